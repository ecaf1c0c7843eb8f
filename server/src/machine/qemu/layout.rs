//! Where a guest's memory lies, as `info mtree -f` prints it: QEMU's flattened view of what a vCPU sees.
//!
//! One line a range: `START-END (prio N, KIND): NAME @OFFSET`, with the last address included. `ram` can be written by the
//! guest, `rom` and `romd` cannot; `nv-` before either says that it is an NVDIMM's. All else (`i/o`, and `ramd`, a device's own
//! memory) is no memory here. What System Management Mode sees in its place is not modelled.

use pagewalk::Gpa;

use super::super::{PAGE, Region};

/// Ranges that are looked at. A large machine has some dozens.
const RANGES_MAX: usize = 4096;
/// The view that is walked: what devices and, outside System Management Mode, vCPUs see.
const VIEW: &str = "AS \"memory\"";

/// A range of the view that is memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) region: Region,
    /// The block that it belongs to: `pc.ram`, or the id of a memory backend.
    pub(super) name: String,
}

/// The lines of the view.
pub(super) fn view(mtree: &str) -> Result<&str, String> {
    let views = mtree.split("FlatView #");
    views
        .skip(1)
        .find(|view| view.lines().any(|line| line.trim_start().starts_with(VIEW)))
        .ok_or_else(|| format!("`info mtree -f` shows no view with {VIEW}"))
}

/// The memory in a view, by address.
pub(super) fn ranges(view: &str) -> Result<Vec<Range>, String> {
    let mut ranges: Vec<Range> = Vec::new();
    for line in view.lines().map(str::trim) {
        let Some((addresses, rest)) = line.split_once(" (prio ") else { continue };
        let range = range(addresses, rest).ok_or_else(|| format!("`info mtree -f` says {line:?}"))?;
        let Some(range) = range else { continue };
        if ranges.len() == RANGES_MAX {
            return Err(format!("`info mtree -f` shows more than {RANGES_MAX} ranges of memory"));
        }
        if let Some(last) = ranges.last()
            && last.region.start.0 + last.region.size > range.region.start.0
        {
            return Err(format!("`info mtree -f` shows ranges that overlap, at {:#x}", range.region.start.0));
        }
        ranges.push(range);
    }
    if ranges.is_empty() { Err("`info mtree -f` shows no memory".to_owned()) } else { Ok(ranges) }
}

/// A line of the view; `Some(None)` for what is no memory.
fn range(addresses: &str, rest: &str) -> Option<Option<Range>> {
    let (start, last) = addresses.split_once('-')?;
    let (start, last) = (hex(start)?, hex(last)?);
    let (_, rest) = rest.split_once(", ")?;
    let (kind, name) = rest.split_once("): ")?;
    // Of an NVDIMM, which keeps what is written to it.
    let kind = kind.strip_prefix("nv-").unwrap_or(kind);
    let read_only = match kind {
        "ram" => false,
        "rom" | "romd" => true,
        _ => return Some(None),
    };
    // Only whole pages are memory here: smaller ones belong to devices.
    let start = start.checked_next_multiple_of(PAGE)?;
    let end = last.checked_add(1)? & !(PAGE - 1);
    let name = name.split(" @").next()?.trim_end_matches(" KVM").to_owned();
    let region = Region { start: Gpa(start), size: end.saturating_sub(start), read_only };
    Some((region.size > 0).then_some(Range { region, name }))
}

/// The answer to `gpa2hva`: where QEMU has the byte.
pub(super) fn host_address(answer: &str) -> Result<u64, String> {
    answer
        .trim()
        .strip_prefix("Host virtual address for ")
        .and_then(|rest| rest.rsplit_once(" is 0x"))
        .and_then(|(_, address)| hex(address))
        .ok_or_else(|| format!("`gpa2hva` says {:?}", answer.trim()))
}

/// A number as QEMU prints it.
pub(super) fn hex(digits: &str) -> Option<u64> {
    if digits.bytes().all(|b| b.is_ascii_hexdigit()) { u64::from_str_radix(digits, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const MTREE: &str = "FlatView #0\n AS \"cpu-smm-0\", root: memory\n Root memory region: memory\n  \
        0000000000000000-00000000000bffff (prio 0, ram): m0\n\nFlatView #1\n AS \"memory\", root: system\n \
        AS \"cpu-memory-0\", root: system\n Root memory region: system\n  \
        0000000000000000-000000000009ffff (prio 0, ram): m0 KVM\n  \
        00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem\n  \
        00000000000c0000-00000000000c9fff (prio 0, rom): m0 @00000000000c0000 KVM\n  \
        00000000fd000000-00000000fd0003ff (prio 1, ram): small\n  \
        00000000fe000000-00000000fe0fffff (prio 1, ramd): bar 0\n  \
        00000000fffc0000-00000000ffffffff (prio 0, romd): system.flash0\n  \
        0000000100000000-000000017fffffff (prio 0, ram): m0 @0000000080000000\n  \
        0000000180000000-000000018fffffff (prio 0, nv-ram): nv0 KVM\n  \
        0000000190000000-000000019fffffff (prio 0, nv-rom): nv1\n\n\
        FlatView #2\n AS \"I/O\", root: io\n  0000000000000000-0000000000000007 (prio 0, i/o): dma\n";

    #[test]
    fn memory_of_the_view_that_vcpus_see() {
        let ranges = ranges(view(MTREE).unwrap()).unwrap();
        let found: Vec<_> = ranges
            .iter()
            .map(|r| (r.region.start.0, r.region.size, r.region.read_only, r.name.as_str()))
            .collect();
        assert_eq!(
            found,
            [
                (0, 0xa_0000, false, "m0"),
                (0xc_0000, 0xa000, true, "m0"),
                (0xfffc_0000, 0x4_0000, true, "system.flash0"),
                (0x1_0000_0000, 0x8000_0000, false, "m0"),
                (0x1_8000_0000, 0x1000_0000, false, "nv0"),
                (0x1_9000_0000, 0x1000_0000, true, "nv1"),
            ]
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "FlatView #0\n AS \"I/O\", root: io\n", "unknown command: 'info mtree -f'"] {
            assert!(view(text).is_err(), "{text}");
        }
        for line in [
            "",
            "0-fff (prio 0",
            "0-fff (prio 0, ram) m0",
            "0-xyz (prio 0, ram): m0",
            "0-ffffffffffffffff (prio 0, ram): m0",
            "0-1fff (prio 0, ram): m0\n 1000-2fff (prio 0, ram): m1",
            "2000-1fff (prio 0, ram): m0",
        ] {
            assert!(ranges(line).is_err(), "{line}");
        }
        let many = "0-fff (prio 0, i/o): x\n".repeat(100_000);
        assert!(ranges(&many).is_err());
    }

    #[test]
    fn host_addresses() {
        let answer = "Host virtual address for 0x100000 (a is 0x7) is 0x7f8ca00ff000\r\n";
        assert_eq!(host_address(answer), Ok(0x7f8c_a00f_f000));
        for answer in ["", "Memory at address 0xb0000000 is not RAM", "Host virtual address for 0x0 is 0x+1"]
        {
            assert!(host_address(answer).is_err(), "{answer}");
        }
    }
}
