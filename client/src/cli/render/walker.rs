//! Both walkers of a vCPU.

use pagewalk_proto::readable;

use super::{hex, names, page_format, paint, provenance};
use crate::v1::{
    GetWalkerStateResponse, NestedEffectKind, NestedMode, PageWalk, SetNestedModeResponse,
    nested_mode::SecondDimension,
};

/// The whole state.
pub(in crate::cli) fn state(state: &GetWalkerStateResponse) -> String {
    let mut parts = Vec::new();
    if let Some(provenance) = &state.provenance {
        parts.push(provenance::long(provenance));
    }
    if let Some(mode) = &state.nested {
        parts.push(nested(mode));
    }
    let mut walks = Vec::new();
    if let Some(walk) = &state.gva_walk {
        walks.push(page_format::walk("gva_walk", walk));
    }
    match &state.ngpa_walk {
        Some(walk) => walks.push(page_format::walk("ngpa_walk", walk)),
        None => walks.push(format!("{}: none, there is no second dimension", paint::heading("ngpa_walk"))),
    }
    parts.extend(walks.into_iter().map(|walk| format!("\n{walk}")));
    parts.join("\n")
}

/// One line for one update.
pub(in crate::cli) fn line(state: &GetWalkerStateResponse) -> String {
    let mut words = Vec::new();
    if let Some(walk) = &state.gva_walk {
        words.push(format!("gva_walk {}", root(walk)));
    }
    if let Some(walk) = &state.ngpa_walk {
        words.push(format!("ngpa_walk {}", root(walk)));
    }
    if let Some(mode) = &state.nested {
        words.push(format!("nested {}", names::nested_kind(mode.kind())));
    }
    words.push(provenance::short(state.provenance.as_ref()));
    words.join("  ")
}

fn root(walk: &PageWalk) -> String {
    let mode = walk.format.as_ref().map_or("unknown mode", |format| names::paging_mode(format.mode()));
    format!("{mode} root {}", paint::address(hex(walk.root)))
}

/// What a switch of nested mode did, and the state after it in one line.
pub(in crate::cli) fn switched(answer: &SetNestedModeResponse) -> String {
    let mut parts = Vec::new();
    if let Some(effect) = &answer.effect {
        let did = match effect.kind() {
            NestedEffectKind::RealVcpu => "switched the real vCPU",
            NestedEffectKind::WalkerOnly => "switched the walkers alone",
            NestedEffectKind::Unchanged => "nothing changed",
            NestedEffectKind::Unspecified => "switched, in a way that this client does not know",
        };
        parts.push(format!("{}: {}", paint::heading(did), readable(&effect.reason)));
    }
    if let Some(state) = &answer.state {
        if let Some(mode) = &state.nested {
            parts.push(nested(mode));
        }
        parts.push(line(state));
    }
    parts.join("\n")
}

fn nested(mode: &NestedMode) -> String {
    let mut text = format!("{} {}", paint::heading("nested mode:"), names::nested_kind(mode.kind()));
    match &mode.second_dimension {
        None => {}
        Some(SecondDimension::Ept(ept)) => {
            text += &format!(", EPT, EPTP {}", hex(ept.eptp));
            for (name, on) in
                [("MBEC", ept.mode_based_execute), ("tables accessed as writes", ept.tables_written)]
            {
                if on {
                    text += &format!(", {name}");
                }
            }
            if let Some(value) = ept.capabilities {
                text += &format!(", capabilities {value:#x}");
            }
        }
        Some(SecondDimension::Npt(npt)) => {
            text += &format!(", NPT, nCR3 {}", paint::address(hex(npt.ncr3)));
            if npt.guest_mode_execute_trap {
                text += ", GMET";
            }
            for (name, value) in [("CR0", npt.host_cr0), ("CR4", npt.host_cr4), ("EFER", npt.host_efer)] {
                if let Some(value) = value {
                    text += &format!(", L1's {name} {value:#x}");
                }
            }
        }
    }
    if !mode.reason.is_empty() {
        text += &format!(" ({})", readable(&mode.reason));
    }
    text
}
