//! vCPUs, in a table or one by one.

use pagewalk_proto::readable;

use super::{
    hex, names, paint, provenance,
    table::{Cell, Table},
};
use crate::v1::{ListVcpusResponse, Provenance, RunState, VcpuInfo};

pub(in crate::cli) fn list(answer: &ListVcpusResponse) -> String {
    let mut table = Table::new(&["VCPU", "STATE", "MODE", "NESTED", "CR3", "RIP", "GENERATION", "AGE", ""]);
    for vcpu in &answer.vcpus {
        let nested = vcpu.nested.as_ref().map_or("unknown", |nested| names::nested_kind(nested.kind()));
        table.row([
            vcpu.index.to_string().into(),
            state(vcpu.run_state()),
            names::paging_mode(vcpu.mode()).into(),
            nested.into(),
            Cell::address(vcpu.cr3),
            Cell::address(vcpu.rip),
            vcpu.generation.to_string().into(),
            provenance::age(vcpu.snapshot_age.as_ref()).unwrap_or_default().into(),
            Cell::dim(readable(&vcpu.run_state_reason)),
        ]);
    }
    table.render()
}

fn state(state: RunState) -> Cell {
    let name = names::run_state(state);
    match state {
        RunState::Running | RunState::Halted | RunState::Static => Cell::good(name),
        RunState::Paused | RunState::Unspecified => Cell::warning(name),
        RunState::Shutdown | RunState::InternalError | RunState::Unresponsive => Cell::bad(name),
    }
}

/// `vcpu 0 paused at RIP 0x…`.
pub(in crate::cli) fn now(vcpu: Option<&VcpuInfo>, provenance: Option<&Provenance>) -> String {
    let Some(vcpu) = vcpu else {
        return provenance::short(provenance);
    };
    let reason = match vcpu.run_state_reason.as_str() {
        "" => String::new(),
        reason => format!("  {}", readable(reason)),
    };
    format!(
        "vcpu {} {} at RIP {}  CR3 {}{reason}  {}",
        vcpu.index,
        paint::heading(names::run_state(vcpu.run_state())),
        paint::address(hex(vcpu.rip)),
        hex(vcpu.cr3),
        provenance::short(provenance),
    )
}
