//! The ladder: a walk as text, one line an entry, in the order in which a CPU reads them.
//!
//! Entries of the second dimension stand indented before the guest's entry whose address they translate.

use std::fmt::{self, Write as _};

use pagewalk::{
    Backing, Dimension, Fault, FaultKind, MemoryType, NestedPage, NgpaWalk, PageFormat, PageSize, Reason,
    Rights, Step, Translation, Verdict, Walker,
};

use crate::convert::fault::{Code, decode};
use crate::convert::step::verdict;
use crate::symbols::Near;

/// A walk and what came of it.
pub(crate) struct Ladder<'a> {
    /// What was asked, of whom.
    pub(crate) title: &'a str,
    pub(crate) walker: &'a Walker,
    pub(crate) steps: &'a [Step],
    pub(crate) outcome: &'a Result<Translation, Fault>,
    /// Only the second dimension was walked: there is no guest page.
    pub(crate) nested_alone: bool,
    /// The nearest symbols of the entries themselves, where they have any.
    pub(crate) names: &'a [Option<Near>],
}

impl fmt::Display for Ladder<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.title)?;
        if self.steps.is_empty() {
            writeln!(f, "  no entry was read")?;
        } else {
            writeln!(
                f,
                "  {:<12} {:>5}  {:<18}  {:<18}  {:<20} {:<9} verdict",
                "level", "index", "entry at GPA", "entry", "bits", "so far"
            )?;
        }
        for (place, step) in self.steps.iter().enumerate() {
            let symbol = self.names.get(place).and_then(Option::as_ref);
            let symbol = symbol.map_or_else(String::new, |near| format!(" <{near}>"));
            let name = match step.dimension {
                Dimension::Guest => level_name(step.level).to_owned(),
                Dimension::Nested => format!("  {} {}", self.second(), level_name(step.level)),
            };
            let entry = match step.verdict {
                Verdict::Unbacked => "-".to_owned(),
                _ => format!("{:#018x}", step.entry),
            };
            writeln!(
                f,
                "  {name:<12} {:>5}  {:#018x}  {entry:<18}  {:<20} {:<9} {}{symbol}",
                step.index,
                step.entry_gpa.0,
                self.bits(step),
                self.so_far(step),
                self.said(step),
            )?;
        }
        match self.outcome {
            Ok(page) => writeln!(f, "=> {}", self.page(page)),
            Err(refused) => writeln!(f, "=> {}", fault(refused, self.second())),
        }
    }
}

impl Ladder<'_> {
    /// The second dimension's name.
    fn second(&self) -> &'static str {
        match self.walker.ngpa_walk() {
            Some(NgpaWalk::Ept(_)) => "EPT",
            _ => "NPT",
        }
    }

    /// The format of an EPT entry.
    fn ept(&self, step: &Step) -> Option<&PageFormat> {
        match (step.dimension, self.walker.ngpa_walk()) {
            (Dimension::Nested, Some(NgpaWalk::Ept(ept))) => Some(ept.page_walk().format()),
            _ => None,
        }
    }

    /// The bits that are set, by their short names.
    fn bits(&self, step: &Step) -> String {
        self.ept(step).map_or_else(|| bits(step), |format| ept_bits(step, format))
    }

    fn so_far(&self, step: &Step) -> String {
        let Some(format) = self.ept(step) else {
            return rights(step.rights_so_far);
        };
        let so_far = step.rights_so_far;
        let user = if format.mode_based_execute() && so_far.user() { "u" } else { "" };
        format!("{}{user}", read_write_execute(so_far))
    }

    fn memory_type(&self, page: &Translation) -> String {
        let format = self.walker.gva_walk().format();
        let pat = memory_type(format.pat_type(page));
        match (page.nested.and_then(|nested| nested.ept_memory_type), format.effective_type(page)) {
            (Some(ept), Some(effective)) => {
                let ignores = if ept.ignore_pat { ", which ignores the PAT" } else { "" };
                let (effective, ept) = (memory_type(effective), memory_type(ept.memory_type));
                format!("{effective} (PAT {pat}, EPT {ept}{ignores})")
            }
            _ => pat.to_owned(),
        }
    }

    /// What the entry is, and whether it is the one that refuses.
    fn said(&self, step: &Step) -> String {
        let what = match step.verdict {
            Verdict::Leaf if step.level > 1 => "maps a large page",
            other => verdict(other),
        };
        let refuses = self.outcome.as_ref().is_err_and(|fault| {
            (fault.dimension, fault.level, fault.entry_gpa) == (step.dimension, step.level, step.entry_gpa)
        });
        if refuses { format!("{what} <- refuses") } else { what.to_owned() }
    }

    fn nested_page(&self, page: &Translation, nested: NestedPage) -> String {
        let ept = nested.ept_memory_type.map_or_else(String::new, |said| {
            let ignores = if said.ignore_pat { ", which ignores the PAT" } else { "" };
            format!(", EPT type {}{ignores}", memory_type(said.memory_type))
        });
        format!(
            "GPA {:#x}: an {} page of {}, {}{ept}, {}",
            page.gpa,
            self.second(),
            size_name(nested.page_size),
            match self.walker.ngpa_walk() {
                Some(NgpaWalk::Ept(_)) => read_write_execute(page.rights()),
                _ => rights(page.rights()),
            },
            backing(page.backing()),
        )
    }

    fn page(&self, page: &Translation) -> String {
        if let (true, Some(nested)) = (self.nested_alone, page.nested) {
            return self.nested_page(page, nested);
        }
        let through =
            page.nested.map(|nested| format!(" through nGPA {:#x}", nested.ngpa)).unwrap_or_default();
        let nested_size = page
            .nested
            .map(|nested| format!(" in an {} page of {}", self.second(), size_name(nested.page_size)))
            .unwrap_or_default();
        let key = match page.key() {
            0 => String::new(),
            key => format!(", key {key}"),
        };
        format!(
            "GPA {:#x}{through}: {}{nested_size}, {}, {}, {}{key}",
            page.gpa,
            size_name(page.page_size()),
            rights(page.rights()),
            self.memory_type(page),
            backing(page.backing()),
        )
    }
}

/// The manuals' name of an entry.
pub(crate) fn level_name(level: u32) -> &'static str {
    match level {
        1 => "PTE",
        2 => "PDE",
        3 => "PDPTE",
        4 => "PML4E",
        5 => "PML5E",
        _ => "-",
    }
}

/// Rights as a person reads them.
pub(crate) fn rights(rights: Rights) -> String {
    format!("{} {}", read_write_execute(rights), if rights.user() { "user" } else { "super" })
}

fn read_write_execute(rights: Rights) -> String {
    let letter = |has, letter| if has { letter } else { '-' };
    format!("{}{}{}", letter(rights.read(), 'r'), letter(rights.write(), 'w'), letter(rights.execute(), 'x'))
}

/// A fault in one or two sentences: what the CPU raises, and which bits of which entry are responsible.
/// `second` is the name of the second dimension.
fn fault(fault: &Fault, second: &str) -> String {
    let mut text = match fault.kind {
        FaultKind::PageFault { error_code } => {
            format!(
                "#PF, error code {error_code:#x} ({})",
                code_names(u64::from(error_code), Code::PageFault)
            )
        }
        FaultKind::GeneralProtection => "#GP(0)".to_owned(),
        FaultKind::StackFault => "#SS(0)".to_owned(),
        FaultKind::NestedPageFault { exit_info_1 } => {
            format!(
                "#VMEXIT(NPF), EXITINFO1 {exit_info_1:#x} ({})",
                code_names(exit_info_1, Code::NestedPageFault)
            )
        }
        FaultKind::EptViolation { exit_qualification } => format!(
            "EPT violation, exit qualification {exit_qualification:#x} ({})",
            code_names(exit_qualification, Code::EptViolation)
        ),
        FaultKind::EptMisconfiguration => "EPT misconfiguration".to_owned(),
        FaultKind::Unbacked => "the walk leaves memory (KVM would report a not-present #PF)".to_owned(),
        FaultKind::Contended => "no answer: the guest kept changing its tables".to_owned(),
    };
    if let Some(gpa) = fault.nested_gpa {
        let _ = write!(text, ", nGPA {gpa:#x}");
    }
    let _ = write!(text, ": {}", fault.reason);
    if fault.level != 0 {
        let dimension = match fault.dimension {
            Dimension::Guest => String::new(),
            Dimension::Nested => format!("{second} "),
        };
        let _ = write!(text, ": {dimension}{} at GPA {:#x}", level_name(fault.level), fault.entry_gpa);
        if fault.reason != Reason::TableUnbacked {
            let _ = write!(text, " is {:#x}", fault.entry);
        }
        // Of a key's bits, any one that is set says where it is.
        let whole = fault.reason == Reason::ProtectionKey && fault.entry & fault.bits != 0;
        let set = if whole { fault.bits } else { fault.entry & fault.bits };
        for (bits, state) in [(set, "set"), (fault.bits & !set, "clear")] {
            if bits != 0 {
                let _ = write!(text, ", {} {state}", bit_list(bits));
            }
        }
    }
    text
}

fn code_names(code: u64, whose: Code) -> String {
    let names: Vec<_> = decode(code, whose)
        .into_iter()
        .filter(|bit| bit.set)
        .map(|bit| if bit.name.is_empty() { format!("bit {}", bit.bit) } else { bit.name })
        .collect();
    if names.is_empty() { "not present, supervisor read".to_owned() } else { names.join(" ") }
}

/// "bit 63" or "bits 51:48" or "bits 13, 20".
fn bit_list(mask: u64) -> String {
    let bits: Vec<u32> = (0..64).filter(|bit| mask >> bit & 1 != 0).collect();
    match bits.as_slice() {
        [only] => format!("bit {only}"),
        [low, .., high] if *high as usize - *low as usize + 1 == bits.len() => format!("bits {high}:{low}"),
        _ => format!("bits {}", bits.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")),
    }
}

/// The bits that are set, by their short names.
fn bits(step: &Step) -> String {
    let entry = step.entry;
    let leaf = step.level == 1 || entry & 0x80 != 0;
    let names = [
        (0, "P"),
        (1, "W"),
        (2, "U"),
        (3, "PWT"),
        (4, "PCD"),
        (5, "A"),
        (6, if leaf { "D" } else { "" }),
        (7, if step.level == 1 { "PAT" } else { "PS" }),
        (8, if leaf { "G" } else { "" }),
        (63, "NX"),
    ];
    let set = names.into_iter().filter(|(bit, name)| entry >> bit & 1 != 0 && !name.is_empty());
    let text = set.map(|(_, name)| name).collect::<Vec<_>>().join(" ");
    if text.is_empty() { "-".to_owned() } else { text }
}

/// Intel SDM volume 3, "EPT Translation Mechanism".
fn ept_bits(step: &Step, format: &PageFormat) -> String {
    let entry = step.entry;
    let leaf = step.level == 1 || entry & 0x80 != 0;
    let has = |bit: u32| entry >> bit & 1 != 0;
    let mut names = Vec::new();
    for (bit, name, known) in [
        (0, "R", true),
        (1, "W", true),
        (2, "X", true),
        (10, "XU", format.mode_based_execute()),
        (6, "IPAT", leaf),
        (7, "PS", step.level > 1),
        (8, "A", format.has_accessed_dirty()),
        (9, "D", leaf && format.has_accessed_dirty()),
        (60, "SSS", leaf),
    ] {
        if known && has(bit) {
            names.push(name.to_owned());
        }
    }
    if leaf {
        names.push(format!("type {}", entry >> 3 & 7));
    }
    if names.is_empty() { "-".to_owned() } else { names.join(" ") }
}

fn size_name(size: PageSize) -> &'static str {
    match size {
        PageSize::Unpaged => "no paging",
        PageSize::Size4K => "4 KiB",
        PageSize::Size2M => "2 MiB",
        PageSize::Size4M => "4 MiB",
        PageSize::Size1G => "1 GiB",
    }
}

fn memory_type(memory_type: MemoryType) -> &'static str {
    match memory_type {
        MemoryType::Uncacheable => "UC",
        MemoryType::WriteCombining => "WC",
        MemoryType::WriteThrough => "WT",
        MemoryType::WriteProtected => "WP",
        MemoryType::WriteBack => "WB",
        MemoryType::UncacheableMinus => "UC-",
    }
}

pub(crate) fn backing(backing: Backing) -> &'static str {
    match backing {
        Backing::Ram => "RAM",
        Backing::ReadOnly => "read-only memory",
        Backing::None => "no memory behind it (MMIO or a hole)",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use std::sync::atomic::AtomicU64;

    use pagewalk::{
        Access, AccessKind, AdPolicy, ControlRegisters, CpuProfile, EptCapabilities, EptControls, Gva,
        NgpaWalk, PageWalk, Privilege, Trace, Vendor, Walker, Window,
    };

    use super::{Ladder, bit_list};

    #[test]
    fn bit_lists() {
        assert_eq!(bit_list(1 << 63), "bit 63");
        assert_eq!(bit_list(0xf << 48), "bits 51:48");
        assert_eq!(bit_list(1 << 13 | 1 << 20), "bits 13, 20");
    }

    /// An unpaged guest over EPT that maps a page which users may execute and nobody write.
    #[test]
    fn ept_has_words_of_its_own() {
        let words: Vec<AtomicU64> = (0..0x5000 / 8).map(|_| AtomicU64::new(0)).collect();
        let put = |gpa: usize, entry| words[gpa / 8].store(entry, std::sync::atomic::Ordering::Relaxed);
        put(0x1000, 0x2407);
        put(0x2000, 0x3407);
        put(0x3000, 0x4407);
        put(0x4000, 0x0571 | 1 << 60);
        let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 40, gib_pages: true, encryption_bit: None };
        let controls = EptControls { mode_based_execute: true, ..EptControls::default() };
        let ept = NgpaWalk::ept(0x105e, &controls, &EptCapabilities::all(), &cpu).unwrap();
        let walker = Walker::nested(PageWalk::new(&ControlRegisters::default(), &cpu).unwrap(), ept);
        let ladder = |kind| {
            let mut trace = Trace::new();
            let access = Access::new(kind, Privilege::User);
            let memory = Window::new(&words);
            let outcome = walker.translate_with(&memory, Gva(8), &access, AdPolicy::Observe, &mut trace);
            Ladder {
                title: "T",
                walker: &walker,
                steps: trace.steps(),
                outcome: &outcome,
                nested_alone: false,
                names: &[],
            }
            .to_string()
        };
        let read = ladder(AccessKind::Read);
        let leaf = read.lines().find(|line| line.contains("EPT PTE")).unwrap();
        assert!(leaf.contains("R XU IPAT A SSS type 6"), "{read}");
        assert!(leaf.contains("r--u"), "{read}");
        assert!(read.contains("in an EPT page of 4 KiB"), "{read}");
        assert!(read.contains("r-x user, WB (PAT WB, EPT WB, which ignores the PAT), RAM"), "{read}");
        let write = ladder(AccessKind::Write);
        let expected = "=> EPT violation, exit qualification 0x7ca (WRITE R XU GVA FINAL USER RW), nGPA 0x8: \
                        write, and R/W is clear in the entry: EPT PTE at GPA 0x4000 is 0x1000000000000571, bit 1 clear";
        assert!(write.contains(expected), "{write}");
        put(0x4000, 0x407 | 7 << 3);
        let broken = ladder(AccessKind::Read);
        let expected = "=> EPT misconfiguration, nGPA 0x8: the memory type in the entry does not exist: \
                        EPT PTE at GPA 0x4000 is 0x43f, bits 5:3 set";
        assert!(broken.contains(expected), "{broken}");
    }
}
