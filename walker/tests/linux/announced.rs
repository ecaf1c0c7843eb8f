//! What the guest's own program said of its CPU and of the memory that its workers mapped: `deploy/beds/qemu-linux.c`.

use pagewalk::{CpuProfile, Vendor};

/// Where every worker has the page that says who it is.
pub(crate) const IDENTITY: u64 = 0x4000_0000;
const MAGIC: u64 = 0x7061_6765_776c_6b00;
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// One mapping of one worker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapping {
    pub(crate) worker: u64,
    pub(crate) start: u64,
    pub(crate) bytes: u64,
    pub(crate) page_bytes: u64,
    /// `None` where the worker made sure that nothing is mapped.
    pub(crate) rights: Option<Rights>,
    salt: u64,
    pub(crate) key: u64,
    /// From one known word to the next.
    pub(crate) step: u64,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Rights {
    pub(crate) write: bool,
    pub(crate) execute: bool,
}

impl Mapping {
    /// The eight bytes that the worker wrote to `gva`.
    pub(crate) fn word(&self, gva: u64) -> u64 {
        match self.salt {
            0 => 0,
            salt => gva.wrapping_mul(GOLDEN) ^ salt,
        }
    }
}

/// The worker whose page of identity begins with this word.
pub(crate) fn worker(word: u64) -> Option<u64> {
    word.checked_sub(MAGIC).filter(|number| *number < 16)
}

/// What the guest announced: its CPU, and all mappings.
pub(crate) fn read(said: &[String]) -> Result<(CpuProfile, Vec<Mapping>), String> {
    let mut cpu = None;
    let mut mappings = Vec::new();
    for line in said {
        let words: Vec<&str> = line.split_whitespace().collect();
        let parsed = match words[..] {
            ["cpu", ..] => profile(&words[1..]).map(|profile| cpu = Some(profile)),
            ["map", ..] => mapping(&words[1..]).map(|mapping| mappings.push(mapping)),
            // The firmware's and the kernel's lines.
            _ => Some(()),
        };
        parsed.ok_or_else(|| format!("the guest says {line:?}"))?;
    }
    Ok((cpu.ok_or("the guest did not say what its CPU is")?, mappings))
}

/// A task that has a worker's address space: that worker, the task's number, and its name.
pub(crate) fn tasks(said: &[String]) -> Result<Vec<(u64, u32, Vec<u8>)>, String> {
    let task = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let worker = u64::from_str_radix(words.next()?, 16).ok()?;
        let pid = u32::from_str_radix(words.next()?, 16).ok()?;
        let digits = words.next()?.as_bytes().as_chunks::<2>().0;
        let byte = |digits: &[u8; 2]| u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok();
        Some((worker, pid, digits.iter().map(byte).collect::<Option<_>>()?))
    };
    let lines = said.iter().filter(|line| line.starts_with("task "));
    lines.map(|line| task(line).ok_or_else(|| format!("the guest says {line:?}"))).collect()
}

fn profile(words: &[&str]) -> Option<CpuProfile> {
    let [vendor, maxphyaddr, gib_pages] = words else { return None };
    let vendor = match *vendor {
        "GenuineIntel" => Vendor::Intel,
        "AuthenticAMD" => Vendor::Amd,
        _ => return None,
    };
    Some(CpuProfile {
        vendor,
        maxphyaddr: u8::from_str_radix(maxphyaddr, 16).ok()?,
        gib_pages: *gib_pages == "1",
        encryption_bit: None,
    })
}

fn mapping(words: &[&str]) -> Option<Mapping> {
    let [worker, start, bytes, page_bytes, rights, salt, key, step] = words else { return None };
    let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
    let rights = match rights.as_bytes() {
        b"---" => None,
        [b'r', w, x] => Some(Rights { write: *w == b'w', execute: *x == b'x' }),
        _ => return None,
    };
    Some(Mapping {
        worker: hex(worker)?,
        start: hex(start)?,
        bytes: hex(bytes)?,
        page_bytes: hex(page_bytes)?,
        rights,
        salt: hex(salt)?,
        key: hex(key)?,
        step: hex(step)?,
    })
}
