//! A dump as `dump-guest-memory` lays it out, with every part at the caller's disposal.

use std::io::{Seek, SeekFrom, Write};

pub(crate) const EM_386: u16 = 3;
pub(crate) const EM_X86_64: u16 = 62;

/// A segment of memory: physical address, bytes in the file, and what they are.
pub(crate) struct Load {
    pub(crate) gpa: u64,
    pub(crate) bytes: Vec<u8>,
    /// What the header says instead of the true place and size of the bytes.
    pub(crate) claims: Option<(u64, u64)>,
}

impl Load {
    pub(crate) fn new(gpa: u64, bytes: Vec<u8>) -> Self {
        Self { gpa, bytes, claims: None }
    }
}

pub(crate) struct DumpFile {
    pub(crate) machine: u16,
    pub(crate) kind: u16,
    pub(crate) notes: Vec<u8>,
    pub(crate) loads: Vec<Load>,
    /// Says so in the first section header and not in `e_phnum`.
    pub(crate) many: bool,
}

impl DumpFile {
    pub(crate) fn new(cpus: &[Vec<u8>], loads: Vec<Load>) -> Self {
        let mut notes = Vec::new();
        for _ in cpus {
            note(&mut notes, b"CORE\0", 1, &[0; 336]);
        }
        for cpu in cpus {
            note(&mut notes, b"QEMU\0", 0, cpu);
        }
        Self { machine: EM_X86_64, kind: 4, notes, loads, many: false }
    }

    /// Everything up to the memory, and where each segment's bytes go.
    pub(crate) fn headers(&self) -> (Vec<u8>, Vec<u64>) {
        let segments = self.loads.len() as u64 + 1;
        let table = 64 + 64;
        let notes_at = table + segments * 56;
        let mut at = notes_at + self.notes.len() as u64;
        let mut file = Vec::new();
        file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        for half in [self.kind, self.machine] {
            file.extend(half.to_le_bytes());
        }
        file.extend(0_u32.to_le_bytes());
        for word in [0, table, 64] {
            file.extend(word.to_le_bytes());
        }
        file.extend(0_u32.to_le_bytes());
        // As QEMU writes it: 8 is no size of an ELF header.
        for half in [8, 56, if self.many { 0xffff } else { segments as u16 }, 64, 1, 0] {
            file.extend(half.to_le_bytes());
        }
        let mut section = [0; 64];
        section[44..48].copy_from_slice(&(segments as u32).to_le_bytes());
        file.extend(section);
        program_header(&mut file, 4, notes_at, 0, self.notes.len() as u64);
        let mut offsets = Vec::new();
        for load in &self.loads {
            offsets.push(at);
            let (offset, size) = load.claims.unwrap_or((at, load.bytes.len() as u64));
            program_header(&mut file, 1, offset, load.gpa, size);
            at += load.bytes.len() as u64;
        }
        file.extend(&self.notes);
        (file, offsets)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let (mut file, _) = self.headers();
        self.loads.iter().for_each(|load| file.extend(&load.bytes));
        file
    }

    pub(crate) fn write(&self) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&self.bytes()).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file
    }
}

pub(crate) fn program_header(file: &mut Vec<u8>, kind: u32, offset: u64, gpa: u64, size: u64) {
    file.extend(kind.to_le_bytes());
    file.extend(0_u32.to_le_bytes());
    for word in [offset, 0, gpa, size, size, 0] {
        file.extend(word.to_le_bytes());
    }
}

pub(crate) fn note(notes: &mut Vec<u8>, name: &[u8], kind: u32, contents: &[u8]) {
    for word in [name.len() as u32, contents.len() as u32, kind] {
        notes.extend(word.to_le_bytes());
    }
    for part in [name, contents] {
        notes.extend(part);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
}

/// The contents of a QEMU note: a vCPU in 64-bit code at CPL 0, and these control registers.
pub(crate) fn cpu(cr0: u64, cr3: u64, cr4: u64) -> Vec<u8> {
    let mut note = vec![0; 440];
    let mut word = |at: usize, value: u64| note[at..at + 8].copy_from_slice(&value.to_le_bytes());
    word(0, 1 | 440 << 32);
    for index in 0..16 {
        word(8 + index * 8, 0x100 + index as u64);
    }
    word(136, 0xffff_ffff_8100_0000);
    word(144, 0x2);
    // CS: selector and attributes, with L.
    word(152, 0x10);
    word(160, 0x00a0_9b00);
    word(152 + 4 * 24 + 16, 0xffff_8880_0000_0000);
    for (index, value) in [cr0, 0, 0xdead_b000, cr3, cr4].into_iter().enumerate() {
        word(392 + index * 8, value);
    }
    note
}

/// Four tables from `root` on that map linear address 0 to `frame`, all in one piece of 16 KiB.
pub(crate) fn tables(root: u64, frame: u64) -> Vec<u8> {
    let mut bytes = vec![0; 0x4000];
    for (level, to) in [root + 0x1000, root + 0x2000, root + 0x3000, frame].into_iter().enumerate() {
        bytes[level * 0x1000..][..8].copy_from_slice(&(to | 7).to_le_bytes());
    }
    bytes
}
