//! Machines.

use pagewalk_proto::v1;

use crate::machine::Machine;

pub(crate) fn machine(machine: &Machine) -> v1::Machine {
    let source = machine.source();
    let capabilities = source.capabilities();
    v1::Machine {
        id: machine.id().to_owned(),
        source: source.kind().to_owned(),
        description: source.description().to_owned(),
        memory_bytes: source.memory().size(),
        regions: source
            .memory()
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
    }
}
