//! Address spaces, and what one address means in each.

use super::{
    hex, outcome, paint, provenance,
    table::{Cell, Table},
};
use crate::v1::{ListAddressSpacesResponse, TranslateAcrossResponse, space_translation::Outcome};

pub(in crate::cli) fn list(answer: &ListAddressSpacesResponse) -> String {
    if answer.spaces.is_empty() {
        return "no vCPU was seen in an address space yet".into();
    }
    let mut table = Table::new(&["CR3", "SEEN", "LAST BY", "GENERATION", "AGE", "ISOLATION"]);
    for space in &answer.spaces {
        let isolation = space.isolation_pair.map_or_else(String::new, |pair| {
            let (this, other) = if space.user_half { ("user", "kernel") } else { ("kernel", "user") };
            format!("{this} half; {other} half {}", hex(pair))
        });
        table.row([
            Cell::address(space.cr3),
            space.sightings.to_string().into(),
            format!("vcpu {}", space.vcpu).into(),
            space.generation.to_string().into(),
            provenance::age(space.age.as_ref()).unwrap_or_default().into(),
            isolation.into(),
        ]);
    }
    let mut text = table.render();
    if answer.left_out > 0 {
        text += &format!("\n{} more were seen before, and are left out", answer.left_out);
    }
    text
}

/// A line for each address space, and one for all.
pub(in crate::cli) fn across(answer: &TranslateAcrossResponse) -> String {
    let name = outcome::symbol(answer.symbol.as_ref());
    let mut lines: Vec<String> = answer
        .spaces
        .iter()
        .map(|space| {
            let said = match &space.outcome {
                Some(Outcome::Translation(found)) => outcome::translation(found),
                Some(Outcome::Fault(refused)) => outcome::fault(refused),
                None => paint::bad("unknown outcome"),
            };
            format!("CR3 {}  {}{name} -> {said}", hex(space.cr3), hex(answer.address))
        })
        .collect();
    if lines.is_empty() {
        lines.push("no vCPU was seen in an address space yet: name some by their CR3s".into());
    }
    lines.push(provenance::short(answer.provenance.as_ref()));
    lines.join("\n")
}
