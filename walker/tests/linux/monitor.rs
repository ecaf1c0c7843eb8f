//! What QEMU's monitor for people prints, as values. Whatever does not look as expected is an error: nothing is skipped.

use pagewalk::ControlRegisters;

/// One line of `info tlb`: a leaf, as the emulated MMU finds it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TlbEntry {
    pub(crate) gva: u64,
    pub(crate) gpa: u64,
    /// In the order of [`FLAGS`].
    pub(crate) flags: [bool; 9],
}

/// The letters of `info tlb`, and the bit of the leaf that each stands for.
pub(crate) const FLAGS: [(char, u64); 9] = [
    ('X', 1 << 63),
    ('G', 1 << 8),
    ('P', 1 << 7),
    ('D', 1 << 6),
    ('A', 1 << 5),
    ('C', 1 << 4),
    ('T', 1 << 3),
    ('U', 1 << 2),
    ('W', 1 << 1),
];

impl TlbEntry {
    pub(crate) fn has(&self, letter: char) -> bool {
        FLAGS.iter().zip(self.flags).any(|((known, _), set)| *known == letter && set)
    }
}

/// One line of `info mem`: addresses with the same effective rights. `end` lies behind the last address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) user: bool,
    pub(crate) write: bool,
}

/// A vCPU's registers, and its privilege level.
pub(crate) struct Registers {
    pub(crate) control: ControlRegisters,
    pub(crate) cpl: u64,
}

/// The answer to `info tlb`. Under PAE, QEMU 7.2 leaves bit 63 of an entry, NX, in the address: it is taken out.
pub(crate) fn tlb(answer: &str) -> Result<Vec<TlbEntry>, String> {
    lines(answer, |line| {
        let (gva, rest) = line.split_once(": ")?;
        let (gpa, letters) = rest.split_once(' ')?;
        let mut letters = letters.chars();
        let mut flags = [false; 9];
        for (flag, (letter, _)) in flags.iter_mut().zip(FLAGS) {
            *flag = match letters.next()? {
                '-' => false,
                found if found == letter => true,
                _ => return None,
            };
        }
        let entry = TlbEntry { gva: hex(gva)?, gpa: hex(gpa)? & !(1 << 63), flags };
        letters.next().is_none().then_some(entry)
    })
}

/// The answer to `info mem`.
pub(crate) fn extents(answer: &str) -> Result<Vec<Extent>, String> {
    lines(answer, |line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, _) = range.split_once('-')?;
        let (size, rights) = rest.split_once(' ')?;
        let start = hex(start)?;
        let (user, write) = match rights {
            "urw" => (true, true),
            "ur-" => (true, false),
            "-rw" => (false, true),
            "-r-" => (false, false),
            _ => return None,
        };
        Some(Extent { start, end: start.checked_add(hex(size)?)?, user, write })
    })
}

/// The answer to `gva2gpa`, which is `None` for "Unmapped".
pub(crate) fn gpa(answer: &str) -> Result<Option<u64>, String> {
    if answer.trim() == "gpa: 0" {
        return Ok(Some(0));
    }
    match answer.trim().strip_prefix("gpa: 0x") {
        Some(digits) => Ok(Some(hex(digits).ok_or_else(|| format!("gva2gpa says {answer:?}"))?)),
        None if answer.trim() == "Unmapped" => Ok(None),
        None => Err(format!("gva2gpa says {answer:?}")),
    }
}

/// The answer to `info registers -a`, by vCPU.
pub(crate) fn registers(answer: &str) -> Result<Vec<Registers>, String> {
    let vcpu = |text: &str| {
        let value = |name: &str| {
            let at = text.find(name)? + name.len();
            hex(text[at..].split_whitespace().next()?)
        };
        let (cr0, cr3, cr4, efer) = (value("CR0=")?, value("CR3=")?, value("CR4=")?, value("EFER=")?);
        let control = ControlRegisters { cr0, cr3, cr4, efer, ..ControlRegisters::default() };
        Some(Registers { control, cpl: value("CPL=")? })
    };
    let vcpus = answer.split("CPU#").skip(1);
    vcpus.map(|text| vcpu(text).ok_or_else(|| format!("info registers says {text:?}"))).collect()
}

fn lines<T>(answer: &str, parse: impl Fn(&str) -> Option<T>) -> Result<Vec<T>, String> {
    let line = |line: &str| parse(line).ok_or_else(|| format!("the monitor says {line:?}"));
    answer.lines().map(str::trim).filter(|text| !text.is_empty()).map(line).collect()
}

fn hex(digits: &str) -> Option<u64> {
    u64::from_str_radix(digits, 16).ok()
}
