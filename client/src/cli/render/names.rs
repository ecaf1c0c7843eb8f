//! The manuals' names for what the contract numbers. What a newer daemon knows and we do not is `unknown`.

use crate::v1::{
    Backing, Dimension, FaultKind, MemoryType, NestedModeKind, PageSize, PagingMode, Rights, RunState,
};

/// Name of the entry at a level: the page table's entries are PTEs, the PML4's PML4Es.
pub(super) fn entry(level: u32) -> &'static str {
    match level {
        1 => "PTE",
        2 => "PDE",
        3 => "PDPTE",
        4 => "PML4E",
        5 => "PML5E",
        _ => "entry",
    }
}

/// The same, told apart by dimension.
pub(super) fn entry_in(dimension: Dimension, level: u32) -> String {
    match dimension {
        Dimension::Nested => format!("nested {}", entry(level)),
        _ => entry(level).to_owned(),
    }
}

pub(super) fn page_size(size: PageSize) -> &'static str {
    match size {
        PageSize::PageSize4k => "4 KiB",
        PageSize::PageSize2m => "2 MiB",
        PageSize::PageSize4m => "4 MiB",
        PageSize::PageSize1g => "1 GiB",
        PageSize::Unpaged => "unpaged",
        PageSize::Unspecified => "unknown size",
    }
}

pub(super) fn memory_type(memory_type: MemoryType) -> &'static str {
    match memory_type {
        MemoryType::Uc => "UC",
        MemoryType::Wc => "WC",
        MemoryType::Wt => "WT",
        MemoryType::Wp => "WP",
        MemoryType::Wb => "WB",
        MemoryType::UcMinus => "UC-",
        MemoryType::Unspecified => "?",
    }
}

pub(super) fn backing(backing: Backing) -> &'static str {
    match backing {
        Backing::Ram => "RAM",
        Backing::ReadOnly => "read-only memory",
        Backing::None => "no memory (MMIO or a hole)",
        Backing::Unspecified => "unknown backing",
    }
}

/// Rights as `rwx`, with whose page it is.
pub(super) fn rights(rights: &Rights) -> String {
    format!("{} {}", rwx(rights), if rights.user { "user" } else { "supervisor" })
}

pub(super) fn rwx(rights: &Rights) -> String {
    let letter = |has, letter| if has { letter } else { '-' };
    [letter(rights.read, 'r'), letter(rights.write, 'w'), letter(rights.execute, 'x')].iter().collect()
}

pub(super) fn run_state(state: RunState) -> &'static str {
    match state {
        RunState::Running => "running",
        RunState::Halted => "halted",
        RunState::Paused => "paused",
        RunState::Shutdown => "shut down",
        RunState::InternalError => "internal error",
        RunState::Unresponsive => "unresponsive",
        RunState::Static => "static",
        RunState::Unspecified => "unknown",
    }
}

pub(super) fn paging_mode(mode: PagingMode) -> &'static str {
    match mode {
        PagingMode::None => "paging off",
        PagingMode::TwoLevel => "2-level",
        PagingMode::Pae => "PAE",
        PagingMode::FourLevel => "4-level",
        PagingMode::FiveLevel => "5-level",
        PagingMode::EptFourLevel => "EPT 4-level",
        PagingMode::EptFiveLevel => "EPT 5-level",
        PagingMode::Unspecified => "unknown mode",
    }
}

pub(super) fn nested_kind(kind: NestedModeKind) -> &'static str {
    match kind {
        NestedModeKind::Off => "off",
        NestedModeKind::WalkerOnly => "walker only",
        NestedModeKind::RealVcpu => "real vCPU",
        NestedModeKind::Observed => "observed",
        NestedModeKind::Unspecified => "unknown",
    }
}

pub(super) fn fault(kind: FaultKind) -> &'static str {
    match kind {
        FaultKind::PageFault => "#PF",
        FaultKind::GeneralProtection => "#GP",
        FaultKind::StackFault => "#SS",
        FaultKind::EptViolation => "EPT violation",
        FaultKind::EptMisconfiguration => "EPT misconfiguration",
        FaultKind::NestedPageFault => "NPF",
        FaultKind::Unbacked => "unbacked table",
        FaultKind::Contended => "contended",
        FaultKind::Unspecified => "unknown fault",
    }
}

/// A #PF error code's bits, or those of EXITINFO1, in words (Intel SDM volume 3, "Page-Fault Exceptions"; AMD APM
/// volume 2, "Nested versus Guest Page Faults").
pub(super) fn error_code(code: u64) -> String {
    let mut words = vec![
        if code & 1 == 0 { "not present" } else { "present" },
        match (code & 1 << 4, code & 1 << 1) {
            (0, 0) => "read",
            (0, _) => "write",
            (_, 0) => "fetch",
            (..) => "write fetch",
        },
        if code & 1 << 2 == 0 { "supervisor" } else { "user" },
    ];
    for (bit, word) in [
        (3, "reserved bit"),
        (5, "protection key"),
        (6, "shadow stack"),
        (15, "SGX"),
        (32, "final address"),
        (33, "guest table"),
    ] {
        if code >> bit & 1 != 0 {
            words.push(word);
        }
    }
    words.join(", ")
}

/// Responsible bits of an entry by name, each with its value: `R/W=0`, `NX=1`, `bit 51=1`.
pub(super) fn entry_bits(mask: u64, entry: u64) -> String {
    let mut words = Vec::new();
    let key = 0b1111 << 59;
    if mask & key == key {
        words.push(format!("key={}", (entry & key) >> 59));
    }
    for bit in (0..64).filter(|bit| mask >> bit & 1 != 0 && (mask & key != key || key >> bit & 1 == 0)) {
        let value = entry >> bit & 1;
        words.push(match bit {
            0 => format!("P={value}"),
            1 => format!("R/W={value}"),
            2 => format!("U/S={value}"),
            6 => format!("D={value}"),
            7 => format!("PS={value}"),
            63 => format!("NX={value}"),
            _ => format!("bit {bit}={value}"),
        });
    }
    words.join(" ")
}

/// The same for an EPT entry: `W=0`, `X=0`, `bit 51=1`.
pub(super) fn ept_entry_bits(mask: u64, entry: u64) -> String {
    let names = [(0, "R"), (1, "W"), (2, "X"), (10, "XU"), (60, "SSS")];
    let words: Vec<String> = (0..64)
        .filter(|bit| mask >> bit & 1 != 0)
        .map(|bit| {
            let value = entry >> bit & 1;
            match names.iter().find(|(known, _)| *known == bit) {
                Some((_, name)) => format!("{name}={value}"),
                None => format!("bit {bit}={value}"),
            }
        })
        .collect();
    words.join(" ")
}

/// An EPT violation's exit qualification in words (Intel SDM volume 3, "Exit Qualification for EPT Violations").
pub(super) fn exit_qualification(qualification: u64) -> String {
    let has = |bit: u32| qualification >> bit & 1 != 0;
    let mut words: Vec<String> = [(0, "read"), (1, "write"), (2, "fetch"), (13, "shadow stack")]
        .into_iter()
        .filter(|(bit, _)| has(*bit))
        .map(|(_, word)| word.to_owned())
        .collect();
    let letter = |bit, letter| if has(bit) { letter } else { '-' };
    let granted: String = [letter(3, 'r'), letter(4, 'w'), letter(5, 'x')].iter().collect();
    words.push(format!("entries allow {granted}{}", if has(6) { "u" } else { "" }));
    words.push(
        match (has(7), has(8)) {
            (false, _) => "no linear address",
            (true, false) => "guest table",
            (true, true) => "final address",
        }
        .to_owned(),
    );
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_codes_in_words() {
        for (code, words) in [
            (0, "not present, read, supervisor"),
            (7, "present, write, user"),
            (0x11, "present, fetch, supervisor"),
            (0x29, "present, read, supervisor, reserved bit, protection key"),
            (0x1_0000_0004, "not present, read, user, final address"),
            (0x2_0000_0007, "present, write, user, guest table"),
        ] {
            assert_eq!(error_code(code), words, "{code:#x}");
        }
    }

    #[test]
    fn exit_qualifications_in_words() {
        for (qualification, words) in [
            (0x182, "write, entries allow ---, final address"),
            (0x18a, "write, entries allow r--, final address"),
            (0x9b, "read, write, entries allow rw-, guest table"),
            (0x74, "fetch, entries allow -wxu, no linear address"),
        ] {
            assert_eq!(exit_qualification(qualification), words, "{qualification:#x}");
        }
    }

    #[test]
    fn responsible_bits_of_ept_by_name() {
        assert_eq!(ept_entry_bits(0b10, 0b101), "W=0");
        assert_eq!(ept_entry_bits(1 << 51 | 1 << 10, 1 << 51), "XU=0 bit 51=1");
    }

    #[test]
    fn responsible_bits_by_name() {
        assert_eq!(entry_bits(0, u64::MAX), "");
        assert_eq!(entry_bits(1 << 63, 1 << 63), "NX=1");
        assert_eq!(entry_bits(0b10, 0x5), "R/W=0");
        assert_eq!(entry_bits(0x42, 0x3), "R/W=1 D=0");
        assert_eq!(entry_bits(1 << 51 | 1 << 50, u64::MAX), "bit 50=1 bit 51=1");
        assert_eq!(entry_bits(0b1111 << 59, 3 << 59), "key=3");
    }
}
