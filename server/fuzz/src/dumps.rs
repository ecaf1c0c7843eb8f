//! Arbitrary bytes as a dump: as the headers of an ELF file, behind which some memory follows. What opens is walked.
//!
//! The first byte says how many pages of memory there are, tables whose entries refer to one another, and whether the rest are
//! the headers as they stand, or say what a whole dump has in it and what of that is damaged.

use std::path::PathBuf;

use pagewalkd::machine::MachineSpec;
use pagewalkd::machine::dump::{Dump, DumpProblem};

use crate::walked;

/// What an input comes to.
pub const CLASSES: [&str; 7] = [
    "opened",
    "no dump, or in another format",
    "of another architecture, order or kind",
    "truncated",
    "corrupt, or too much of something",
    "segments that disagree",
    "no vCPU or no memory",
];
const OPENED: usize = 0;

/// In the first byte: the rest describe the headers.
const BUILT: u8 = 0x80;
/// Of the pieces of an ELF64 file.
const HEADER: usize = 64;
const SEGMENT: usize = 56;
const NOTE: usize = 440;

const PAGE: usize = 4096;
/// Each has a thread, which takes its time.
const VCPUS: usize = 4;

/// A place for the file.
pub struct Bed {
    file: PathBuf,
}

impl Default for Bed {
    fn default() -> Self {
        Self { file: std::env::temp_dir().join(format!("pagewalk-fuzz-{}.elf", std::process::id())) }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

impl Bed {
    /// Reads the dump, and opens and walks it if it can be.
    ///
    /// # Panics
    /// Where what was read lies outside the file, an error says nothing, or the file cannot be written.
    pub fn check(&self, bytes: &[u8], counts: &mut [u64]) {
        let Some((pages, headers)) = bytes.split_first() else { return };
        let mut file = if pages & BUILT == 0 { headers.to_vec() } else { built(headers) };
        for index in 0..usize::from(pages % 16) * PAGE / 8 {
            file.extend(((index as u64 % 16) << 12 | 7).to_le_bytes());
        }
        let class = match Dump::read(&file[..]) {
            Ok(dump) => {
                let mut end = 0;
                for stretch in &dump.stretches {
                    assert!(stretch.gpa.0 >= end && stretch.size > 0, "{dump:?}");
                    assert_eq!((stretch.gpa.0 | stretch.size) % PAGE as u64, 0, "{dump:?}");
                    assert!(stretch.offset + stretch.size <= file.len() as u64, "{dump:?}");
                    end = stretch.gpa.0 + stretch.size;
                }
                assert!(!dump.cpus.is_empty() && end > 0);
                if dump.cpus.len() <= VCPUS {
                    self.open(&file);
                }
                OPENED
            }
            Err(problem) => {
                let said = problem.to_string();
                assert!(!said.is_empty() && !said.contains('\n'), "{said:?}");
                class(&problem)
            }
        };
        counts[class] += 1;
    }

    fn open(&self, file: &[u8]) {
        std::fs::write(&self.file, file).expect("a file");
        let spec: MachineSpec = format!("dump:{}", self.file.display()).parse().expect("a machine");
        match spec.open() {
            Ok(machine) => walked::walk(&machine),
            Err(problem) => assert!(!problem.to_string().is_empty()),
        }
    }
}

/// The headers of a dump of up to three vCPUs and seven segments, with some of their words replaced.
fn built(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.iter().copied();
    let mut byte = || bytes.next().unwrap_or_default();
    let (shape, segments) = (byte(), byte());
    let (many, segments) = (segments >= 0xc0, usize::from(segments % 8));
    let (cpus, long, counted_elsewhere) = (usize::from(shape % 4), shape & 4 == 0, many || shape & 8 != 0);
    let table = HEADER * 2;
    let notes_at = table + SEGMENT * (1 + segments);
    let notes = cpus * (12 + 8 + NOTE);
    let memory = notes_at + notes;

    let mut file = vec![0; memory];
    let mut put = |at: usize, value: &[u8]| file[at..at + value.len()].copy_from_slice(value);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[4, 0, if long { 62 } else { 3 }]);
    put(32, &(table as u64).to_le_bytes());
    put(40, &(HEADER as u64).to_le_bytes());
    put(54, &(SEGMENT as u16).to_le_bytes());
    put(56, &if counted_elsewhere { u16::MAX } else { 1 + segments as u16 }.to_le_bytes());
    let count = if many { 1 << 20 } else { 1 + segments as u32 };
    put(HEADER + 44, &count.to_le_bytes());
    let mut segment = |at: usize, kind: u8, words: [u64; 5]| {
        put(at, &[kind]);
        (1..).zip(words).for_each(|(index, word)| put(at + index * 8, &word.to_le_bytes()));
    };
    segment(table, 4, [notes_at as u64, 0, 0, notes as u64, notes as u64]);
    for index in 1..=segments {
        let [at, gpa, pages] = [byte() % 8, byte(), byte() % 8].map(|page| u64::from(page) * PAGE as u64);
        segment(table + index * SEGMENT, 1, [memory as u64 + at, 0, gpa, pages, pages]);
    }
    for index in 0..cpus {
        let at = notes_at + index * (12 + 8 + NOTE);
        put(at, &[5, 0, 0, 0, (NOTE & 0xff) as u8, (NOTE >> 8) as u8]);
        put(at + 12, b"QEMU");
        put(at + 20, &[1]);
        let (cr3, cr4) = (u64::from(byte() % 16) << 12, byte());
        put(at + 20 + 160, &(u32::from(long) << 21).to_le_bytes());
        let cr4 = u64::from(cr4 & 0x30) | u64::from(cr4 & 1) << 12;
        for (index, register) in [0x8005_0033, 0, 0, cr3, cr4].into_iter().enumerate() {
            put(at + 20 + 392 + index * 8, &register.to_le_bytes());
        }
    }
    for _ in 0..byte() % 4 {
        let at = usize::from(u16::from_le_bytes([byte(), byte()])) % memory;
        let end = memory.min(at + usize::from(1 + byte() % 8));
        file[at..end].fill_with(&mut byte);
    }
    file
}

fn class(problem: &DumpProblem) -> usize {
    match problem {
        DumpProblem::Read(_) | DumpProblem::Magic(_) | DumpProblem::Format { .. } => 1,
        DumpProblem::ByteOrder | DumpProblem::Architecture(_) | DumpProblem::Type(_) => 2,
        DumpProblem::Truncated { .. } => 3,
        DumpProblem::Corrupt { .. } | DumpProblem::TooMany { .. } => 4,
        DumpProblem::Disagreement { .. } => 5,
        DumpProblem::NoCpu | DumpProblem::NoMemory | DumpProblem::Memory(_) => 6,
    }
}
