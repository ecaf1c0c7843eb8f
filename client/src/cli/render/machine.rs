//! Machines: what they are, their memory, and addresses worth asking about.

use pagewalk_proto::readable;

use super::{
    paint,
    table::{Cell, Table},
};
use crate::v1::{
    AttachMachineResponse, GetMachineResponse, ListMachinesResponse, Machine, MachineState, SymbolPlacement,
};

pub(in crate::cli) fn list(answer: &ListMachinesResponse) -> String {
    if answer.machines.is_empty() {
        return "the daemon serves no machine".into();
    }
    answer.machines.iter().map(machine).collect::<Vec<_>>().join("\n\n")
}

pub(in crate::cli) fn one(answer: &GetMachineResponse) -> String {
    answer.machine.as_ref().map_or_else(|| "the daemon described no machine".into(), machine)
}

pub(in crate::cli) fn attached(answer: &AttachMachineResponse) -> String {
    answer.machine.as_ref().map_or_else(|| "the daemon described no machine".into(), machine)
}

fn machine(machine: &Machine) -> String {
    let mut parts = vec![format!(
        "{}  source {}, {}, {} of memory, MAXPHYADDR {}",
        paint::heading(readable(&machine.id)),
        readable(&machine.source),
        vcpus(machine.vcpus),
        size(machine.memory_bytes),
        machine.maxphyaddr,
    )];
    if !machine.description.is_empty() {
        parts.push(format!("  {}", readable(&machine.description)));
    }
    if machine.state() == MachineState::Lost {
        parts.push(format!("  LOST: {}", readable(&machine.state_reason)));
    }
    if let Some(symbols) = &machine.symbols {
        let place = match (symbols.placement(), symbols.slide) {
            (SymbolPlacement::Found, Some(slide)) => format!("slide {}", displacement(slide)),
            (SymbolPlacement::NotFound, _) => paint::bad("kernel not found"),
            _ => "as written".into(),
        };
        parts.push(format!(
            "  symbols: {} of {}, {place}: {}",
            symbols.count,
            readable(&symbols.file),
            readable(&symbols.reason)
        ));
    }
    if let Some(can) = &machine.capabilities {
        let words: Vec<&str> = [
            (can.live, "runs"),
            (can.can_pause, "pause and resume"),
            (can.can_step, "step"),
            (can.can_set_registers, "regs set"),
            (can.can_write_memory, "write memory"),
            (can.real_nested, "nested mode on the real vCPU"),
        ]
        .into_iter()
        .filter_map(|(can, word)| can.then_some(word))
        .collect();
        let words = if words.is_empty() { "nothing but look".into() } else { words.join(", ") };
        parts.push(format!("  can: {words}"));
    }
    let mut regions = Table::default().indented(2);
    for region in &machine.regions {
        regions.row([
            Cell::new("memory"),
            Cell::address(region.start),
            size(region.size).into(),
            Cell::new(if region.read_only { "read-only" } else { "" }),
        ]);
    }
    parts.push(regions.render());
    let mut landmarks = Table::default().indented(2);
    for landmark in &machine.landmarks {
        landmarks.row([
            Cell::new(readable(&landmark.name)),
            Cell::address(landmark.address),
            Cell::dim(readable(&landmark.description)),
        ]);
    }
    parts.push(landmarks.render());
    if machine.abridged {
        let id = readable(&machine.id);
        parts.push(format!("  abridged: `pagewalk machines --machine {id}` shows all of it"));
    }
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n")
}

/// `1 vCPU`, `2 vCPUs`.
pub(in crate::cli) fn vcpus(count: u32) -> String {
    format!("{count} vCPU{}", if count == 1 { "" } else { "s" })
}

/// Bytes in the largest unit that divides them.
fn size(bytes: u64) -> String {
    match bytes {
        0 => "0 bytes".into(),
        _ if bytes.is_multiple_of(1 << 30) => format!("{} GiB", bytes >> 30),
        _ if bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        _ if bytes.is_multiple_of(1 << 10) => format!("{} KiB", bytes >> 10),
        _ => format!("{bytes} bytes"),
    }
}

/// What is added to addresses modulo 2^64, with its sign.
fn displacement(slide: u64) -> String {
    let sign = if slide.cast_signed() < 0 { "-" } else { "" };
    format!("{sign}{:#x}", slide.cast_signed().unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_said() {
        let abridged = Machine { id: "vm".into(), abridged: true, ..Machine::default() };
        let said = "abridged: `pagewalk machines --machine vm` shows all of it";
        assert!(machine(&abridged).contains(said), "{}", machine(&abridged));
        assert!(!machine(&Machine::default()).contains("abridged"));
    }

    #[test]
    fn a_slide_goes_up_or_down() {
        for (slide, text) in [(0, "0x0"), (0x20_0000, "0x200000"), (0xffff_ffff_e1a0_0000, "-0x1e600000")] {
            assert_eq!(displacement(slide), text);
        }
    }

    #[test]
    fn sizes_in_their_largest_whole_unit() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1000, "1000 bytes"),
            (4096, "4 KiB"),
            (64 << 20, "64 MiB"),
            (3 << 30, "3 GiB"),
            ((3 << 30) + 4096, "3145732 KiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
