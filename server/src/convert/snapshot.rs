//! What a vCPU published: its state as a client sees it, and the provenance of an answer.

use std::time::Duration;

use pagewalk_proto::v1;

use super::format::mode;
use super::nested::nested_mode;
use crate::vcpu::{RunState, Snapshot, Vcpu};

pub(crate) fn run_state(state: RunState) -> v1::RunState {
    match state {
        RunState::Running => v1::RunState::Running,
        RunState::Halted => v1::RunState::Halted,
        RunState::Paused => v1::RunState::Paused,
        RunState::Shutdown => v1::RunState::Shutdown,
        RunState::InternalError => v1::RunState::InternalError,
        RunState::Unresponsive => v1::RunState::Unresponsive,
        RunState::Static => v1::RunState::Static,
    }
}

pub(crate) fn vcpu_info(vcpu: &Vcpu, snapshot: &Snapshot) -> v1::VcpuInfo {
    let paging = match &snapshot.walker {
        Ok(walker) => mode(walker.gva_walk().format().mode()),
        Err(_) => v1::PagingMode::Unspecified,
    };
    v1::VcpuInfo {
        index: vcpu.index(),
        run_state: run_state(vcpu.run_state(snapshot)).into(),
        run_state_reason: snapshot.run_state_reason.clone(),
        generation: snapshot.generation,
        mode: paging.into(),
        nested: Some(nested_mode(snapshot)),
        cr3: snapshot.registers.cr3,
        rip: snapshot.registers.rip,
        snapshot_age: Some(age(snapshot)),
    }
}

pub(crate) fn age(snapshot: &Snapshot) -> prost_types::Duration {
    duration(snapshot.taken.elapsed())
}

fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: duration.subsec_nanos().cast_signed(),
    }
}
