//! Machines.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use pagewalk_proto::{readable_within, v1};
use prost::Message as _;

use crate::machine::Machine;

/// Most that an abridged machine takes in a list.
pub(crate) const ABRIDGED_MAX: usize = 1 << 10;
/// What is left of a text in it.
const TEXT_MAX: usize = 200;
/// What a machine takes in a list beside itself: its tag and its length.
const BESIDE: usize = 5;

/// A list of machines, of which the largest are abridged as they come, so that all of them take at most `most` bytes.
pub(crate) fn list(machines: impl IntoIterator<Item = v1::Machine>, most: usize) -> Vec<v1::Machine> {
    let size = |machine: &v1::Machine| machine.encoded_len() + BESIDE;
    let (mut listed, mut whole, mut all) = (Vec::new(), BinaryHeap::new(), 0);
    for machine in machines {
        all += size(&machine);
        whole.push((size(&machine), Reverse(listed.len())));
        listed.push(machine);
        while all > most
            && let Some((before, Reverse(place))) = whole.pop()
        {
            abridge(&mut listed[place]);
            all = all - before + size(&listed[place]);
        }
    }
    listed
}

/// Leaves out what can be long.
fn abridge(machine: &mut v1::Machine) {
    machine.abridged = true;
    machine.regions.clear();
    machine.landmarks.clear();
    machine.symbols = None;
    machine.description = readable_within(&machine.description, TEXT_MAX);
    machine.state_reason = readable_within(&machine.state_reason, TEXT_MAX);
}

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
        abridged: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_text(id: usize, length: usize) -> v1::Machine {
        let landmark = v1::Landmark { description: "x".repeat(length), ..Default::default() };
        let landmarks = vec![landmark];
        v1::Machine { id: id.to_string(), landmarks, memory_bytes: 4096, ..Default::default() }
    }

    #[test]
    fn the_largest_are_abridged_and_no_more_than_need_be() {
        let machines: Vec<_> =
            [10, 5000, 20, 3000].into_iter().enumerate().map(|(id, n)| with_text(id, n)).collect();
        assert_eq!(list(machines.clone(), 10_000), machines);
        for (most, expected) in [(5000, [false, true, false, false]), (500, [false, true, false, true])] {
            let listed = list(machines.clone(), most);
            assert_eq!(listed.iter().map(|m| m.abridged).collect::<Vec<_>>(), expected);
            assert_eq!((listed[1].id.as_str(), listed[1].memory_bytes), ("1", 4096));
            assert_eq!((listed[0].clone(), listed[1].landmarks.len()), (machines[0].clone(), 0));
        }
    }

    #[test]
    fn an_abridged_machine_is_small() {
        let can = v1::Capabilities { live: true, can_pause: true, can_step: true, ..Default::default() };
        let longest = v1::Machine {
            id: "x".repeat(64),
            source: "image".to_owned(),
            description: "\u{1b}".repeat(4096),
            memory_bytes: u64::MAX,
            vcpus: u32::MAX,
            capabilities: Some(can),
            maxphyaddr: 52,
            state_reason: "x".repeat(800),
            symbols: Some(v1::Symbols { file: "x".repeat(4096), ..Default::default() }),
            ..with_text(0, 1 << 10)
        };
        let machines = list(vec![longest; 3], 0);
        let answer = v1::ListMachinesResponse { machines, ..Default::default() };
        assert!(answer.encoded_len() <= 3 * ABRIDGED_MAX, "{answer:?}");
    }
}
