//! Arbitrary text as the description of an image. Where it names no file but the one that is there, it is opened and walked.
//!
//! After a zero, the bytes are not the text but say what is in it: of text, little is a description.

use std::path::PathBuf;

use pagewalkd::machine::MachineSpec;
use pagewalkd::machine::image::{Description, DescriptionError};

use crate::walked;

/// What an input comes to.
pub const CLASSES: [&str; 6] = [
    "opened",
    "of other files",
    "beyond its file, or empty",
    "no description",
    "a value that cannot be",
    "regions that overlap",
];

/// The only file that an image may name here.
const MEMORY: &str = "memory";
const MEMORY_BYTES: u64 = 0x1_0000;
/// Each has a thread, which takes its time.
const VCPUS: usize = 4;

/// A place for the files.
pub struct Bed {
    folder: PathBuf,
}

impl Default for Bed {
    /// # Panics
    /// Where the files cannot be written.
    fn default() -> Self {
        let folder = std::env::temp_dir().join(format!("pagewalk-fuzz-image-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let memory: Vec<u8> =
            (0..MEMORY_BYTES / 8).flat_map(|index| ((index % 16) << 12 | 7).to_le_bytes()).collect();
        std::fs::write(folder.join(MEMORY), memory).expect("a file");
        Self { folder }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Bed {
    /// Parses the description, writes it, and opens what it describes.
    ///
    /// # Panics
    /// Where it is not what it was once it is written, an error says nothing, or the file cannot be written.
    pub fn check(&self, bytes: &[u8], counts: &mut [u64]) {
        let text = match bytes.split_first() {
            Some((0, choices)) => &built(choices),
            _ => match std::str::from_utf8(bytes) {
                Ok(text) => text,
                Err(_) => return,
            },
        };
        let class = match Description::parse(text) {
            Ok(description) => {
                let written = description.to_toml().expect("what was read can be written");
                assert_eq!(Description::parse(&written).as_ref(), Ok(&description), "{written}");
                let known = description.regions.iter().all(|region| region.file == MEMORY);
                if known && description.vcpus.len() <= VCPUS { self.open(text) } else { 1 }
            }
            Err(problem) => {
                let said = problem.to_string();
                assert!(!said.is_empty() && !said.contains(char::is_control), "{said:?}");
                match problem {
                    DescriptionError::Toml(_) => 3,
                    DescriptionError::Key { .. } => 4,
                    DescriptionError::Overlap { .. } => 5,
                }
            }
        };
        counts[class] += 1;
    }

    fn open(&self, text: &str) -> usize {
        let file = self.folder.join("image.toml");
        std::fs::write(&file, text).expect("a file");
        let spec: MachineSpec = format!("image:{}", file.display()).parse().expect("a machine");
        match spec.open() {
            Ok(machine) => {
                walked::walk(&machine);
                0
            }
            Err(problem) => {
                assert!(!problem.to_string().is_empty());
                2
            }
        }
    }
}

/// A description with all keys, and values of which most can be.
fn built(choices: &[u8]) -> String {
    let mut choices = choices.iter().copied();
    let mut byte = || choices.next().unwrap_or_default();
    let shape = byte();
    let vendor = if shape & 1 == 0 { "intel" } else { "amd" };
    let mut text =
        format!("version = 1\ncpu = {{ vendor = \"{vendor}\", maxphyaddr = {} }}\n", 52 - byte() % 24);
    for _ in 0..shape >> 1 & 3 {
        let [gpa, size, offset] = [byte() % 32, byte() % 8, byte() % 16].map(|page| u64::from(page) << 12);
        let file = if byte() % 16 == 1 { "other" } else { MEMORY };
        text += &format!(
            "[[region]]\ngpa = {gpa}\nsize = {size}\noffset = {}\nfile = \"{file}\"\n",
            offset + u64::from(byte() % 16)
        );
    }
    for _ in 0..1 + (shape >> 3 & 1) {
        let (cr3, modes) = (u64::from(byte() % 16) << 12, byte());
        let cr0 = if modes & 1 == 0 { 0x8005_0033_u64 } else { u64::from(byte()) << 24 | u64::from(byte()) };
        let cr4 = u64::from(modes & 0x30) | u64::from(modes >> 1 & 1) << 12;
        let efer = if modes & 4 == 0 { 0xd00 } else { u64::from(byte()) << 8 };
        text += &format!("[[vcpu]]\ncr0 = {cr0}\ncr3 = {cr3}\ncr4 = {cr4}\nefer = {efer}\n");
        if modes & 8 != 0 {
            let pdptes = [byte(), byte(), byte(), byte()].map(|page| u64::from(page) << 12 | 1);
            text += &format!("pdptes = {pdptes:?}\n");
        }
        let nested = byte();
        let root = u64::from(byte() % 16) << 12;
        match nested & 3 {
            1 => {
                let eptp = root | u64::from(byte());
                let capabilities = if nested & 4 == 0 { 0xe3_41c1 } else { u64::from(byte()) << 14 | 0xc1 };
                text += &format!("nested.ept = {{ eptp = {eptp}, capabilities = {capabilities} }}\n");
            }
            2 => {
                let (host_cr4, host_efer) = (u64::from(byte() & 0x30), u64::from(byte()) << 8);
                text += &format!(
                    "nested.npt = {{ ncr3 = {root}, host_cr4 = {host_cr4}, host_efer = {host_efer} }}\n"
                );
            }
            _ => continue,
        }
        if nested & 8 != 0 {
            text += &format!("nested.l2 = {{ cr3 = {}, pat = {} }}\n", u64::from(byte()) << 12, byte());
        }
    }
    text
}
