//! Machines.

use pagewalk_proto::v1;

use crate::machine::Machine;

pub(crate) fn machine(machine: &Machine) -> v1::Machine {
    let source = machine.source();
    let capabilities = source.capabilities();
    let memory = source.memory();
    let lost = machine.lost();
    v1::Machine {
        id: machine.id().to_owned(),
        source: source.kind().to_owned(),
        description: source.description().to_owned(),
        memory_bytes: memory.size(),
        regions: memory
            .regions()
            .iter()
            .map(|region| v1::MemoryRegion {
                start: region.start.0,
                size: region.size,
                read_only: region.read_only,
            })
            .collect(),
        vcpus: u32::try_from(source.vcpus().len()).unwrap_or(u32::MAX),
        capabilities: Some(v1::Capabilities {
            real_nested: capabilities.real_nested,
            can_step: capabilities.can_step,
            can_pause: capabilities.can_pause,
            can_set_registers: capabilities.can_set_registers,
            live: capabilities.live,
            can_write_memory: capabilities.can_write_memory,
            ends_when_detached: capabilities.ends_when_detached,
        }),
        landmarks: source
            .landmarks()
            .iter()
            .map(|landmark| v1::Landmark {
                name: landmark.name.clone(),
                address: landmark.address,
                description: landmark.description.clone(),
            })
            .collect(),
        maxphyaddr: u32::from(source.cpu().maxphyaddr),
        state: if lost.is_none() { v1::MachineState::Alive } else { v1::MachineState::Lost }.into(),
        state_reason: lost.as_deref().unwrap_or_default().to_owned(),
        symbols: machine.symbols().map(super::symbol::symbols),
    }
}
