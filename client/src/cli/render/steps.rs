//! The entries read during a walk, as a table.

use pagewalk_proto::readable;

use super::{
    names,
    table::{Cell, Table},
};
use crate::v1::{PagingMode, Rights, Step};

pub(in crate::cli) fn table(steps: &[Step]) -> String {
    let mut table = Table::new(&["ENTRY", "INPUT", "INDEX", "AT", "VALUE", "RIGHTS", "VERDICT"]);
    for step in steps {
        table.row([
            names::entry_in(step.dimension(), step.level).into(),
            step.input.map_or(Cell::new(""), |input| Cell::new(super::hex(input))),
            step.index.to_string().into(),
            Cell::address(step.entry_gpa),
            super::hex(step.entry).into(),
            step.rights_so_far.as_ref().map(|rights| so_far(step.mode(), rights)).unwrap_or_default().into(),
            format!("{}{}", readable(&step.verdict), super::outcome::symbol(step.symbol.as_ref())).into(),
        ]);
    }
    table.render()
}

/// EPT has no U/S; user-mode fetches may be a right of their own there.
fn so_far(mode: PagingMode, rights: &Rights) -> String {
    match mode {
        PagingMode::EptFourLevel | PagingMode::EptFiveLevel if rights.user == rights.execute => {
            names::rwx(rights)
        }
        PagingMode::EptFourLevel | PagingMode::EptFiveLevel => {
            format!("{}, user-mode {}", names::rwx(rights), if rights.user { "x" } else { "-" })
        }
        _ => names::rights(rights),
    }
}
