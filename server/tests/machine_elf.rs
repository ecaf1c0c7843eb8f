//! ELF files that are wrong in one way each: each gets an error of its own, before any vCPU exists.
#![allow(clippy::unwrap_used)]
#[allow(dead_code)]
mod kvm_bed;

use std::path::Path;

use kvm_bed::{CODE, elf, write_file};
use pagewalkd::machine::{ElfProblem, MachineSpec, OpenError};

fn open(path: &Path) -> Result<(), OpenError> {
    let spec = format!("kvm:elf={},mem=2M", path.display());
    spec.parse::<MachineSpec>().unwrap().open().map(drop)
}

fn problem(name: &str, bytes: &[u8]) -> ElfProblem {
    let path = write_file(name, bytes);
    let result = open(&path);
    std::fs::remove_file(&path).unwrap();
    match result {
        Err(OpenError::Elf(e)) => {
            assert!(e.to_string().contains(name), "the message names the file: {e}");
            e.problem
        }
        other => panic!("{name}: {other:?}"),
    }
}

/// A valid file, changed at one place.
fn patched(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = elf(&[0xf4; 32]);
    file[at..at + bytes.len()].copy_from_slice(bytes);
    file
}

macro_rules! refuses {
    ($name:ident, $file:expr, $problem:pat) => {
        #[test]
        fn $name() {
            let found = problem(stringify!($name), &$file[..]);
            assert!(matches!(found, $problem), "{found:?}");
        }
    };
}

refuses!(empty, [0u8; 0], ElfProblem::Magic);
refuses!(
    text,
    b"#!/bin/sh\necho no ELF file at all, but a script that is longer than a header\n",
    ElfProblem::Magic
);
refuses!(header_cut, elf(&[0xf4])[..63], ElfProblem::Truncated { what: "the ELF header", .. });
refuses!(table_cut, elf(&[0xf4])[..100], ElfProblem::Truncated { what: "the program header table", .. });
refuses!(segment_cut, elf(&[0xf4; 32])[..130], ElfProblem::Truncated { what: "a segment", .. });
refuses!(class_32, patched(4, &[1]), ElfProblem::Class { class: 1, data: 1 });
refuses!(big_endian, patched(5, &[2]), ElfProblem::Class { class: 2, data: 2 });
refuses!(aarch64, patched(18, &183u16.to_le_bytes()), ElfProblem::Machine(183));
refuses!(shared, patched(16, &3u16.to_le_bytes()), ElfProblem::Shared);
refuses!(object, patched(16, &1u16.to_le_bytes()), ElfProblem::Type(1));
refuses!(core_file, patched(16, &4u16.to_le_bytes()), ElfProblem::Type(4));
refuses!(no_headers, patched(56, &[0, 0]), ElfProblem::ProgramHeaders { .. });
refuses!(odd_header_size, patched(54, &[57, 0]), ElfProblem::ProgramHeaders { .. });
refuses!(headers_in_header, patched(32, &8u64.to_le_bytes()), ElfProblem::ProgramHeaders { .. });
refuses!(headers_at_the_end_of_all, patched(32, &u64::MAX.to_le_bytes()), ElfProblem::Truncated { .. });
refuses!(too_many_headers, patched(56, &[0xff, 0xff]), ElfProblem::Truncated { .. });
refuses!(nothing_to_load, patched(64, &[4]), ElfProblem::Empty);
refuses!(interpreter, patched(64, &[3]), ElfProblem::Dynamic);
refuses!(offset_wraps, patched(72, &u64::MAX.to_le_bytes()), ElfProblem::Truncated { .. });
refuses!(address_wraps, patched(88, &(u64::MAX - 8).to_le_bytes()), ElfProblem::Outside { .. });
refuses!(address_outside, patched(88, &0x20_0000u64.to_le_bytes()), ElfProblem::Outside { .. });
refuses!(address_crosses_the_end, patched(88, &0x1f_fff0u64.to_le_bytes()), ElfProblem::Outside { .. });
refuses!(size_2_to_63, patched(104, &(1u64 << 63).to_le_bytes()), ElfProblem::Outside { .. });
refuses!(file_size_2_to_63, patched(96, &(1u64 << 63).to_le_bytes()), ElfProblem::Sizes { .. });
refuses!(
    both_sizes_2_to_63,
    patched(96, &[(1u64 << 63).to_le_bytes(), (1u64 << 63).to_le_bytes()].concat()),
    ElfProblem::Truncated { .. }
);
refuses!(more_in_file_than_in_memory, patched(104, &8u64.to_le_bytes()), ElfProblem::Sizes { .. });
refuses!(
    over_the_boot_tables,
    patched(88, &0x2000u64.to_le_bytes()),
    ElfProblem::BootArea { at: 0x2000, .. }
);
refuses!(entry_outside, patched(24, &(CODE + 32).to_le_bytes()), ElfProblem::EntryPoint(_));
refuses!(entry_before, patched(24, &(CODE - 1).to_le_bytes()), ElfProblem::EntryPoint(_));
refuses!(entry_not_executable, patched(68, &[6]), ElfProblem::EntryPoint(CODE));

#[test]
fn overlapping_segments() {
    // A second program header, the same but eight bytes further, before the code.
    let one = elf(&[0xf4; 32]);
    let mut file = one[..120].to_vec();
    file.extend_from_slice(&one[64..120]);
    file.extend_from_slice(&[0xf4; 64]);
    file[56] = 2;
    for at in [72, 128] {
        file[at..at + 8].copy_from_slice(&176u64.to_le_bytes());
    }
    file[144..152].copy_from_slice(&(CODE + 8).to_le_bytes());
    let found = problem("overlap", &file);
    assert!(matches!(found, ElfProblem::Overlap { first: CODE, second } if second == CODE + 8), "{found:?}");
}

#[test]
fn what_is_not_a_file() {
    let missing = open(Path::new("/nonexistent/guest.elf")).unwrap_err();
    assert!(missing.to_string().contains("/nonexistent/guest.elf"), "{missing}");
    for path in ["/", "/dev/zero"] {
        match open(Path::new(path)) {
            Err(OpenError::Elf(e)) => assert!(e.to_string().contains("is not a regular file"), "{e}"),
            other => panic!("{other:?}"),
        }
    }
}

/// Every single-byte corruption of the headers of a valid file is loaded or refused, and never worse.
#[test]
fn corrupted_headers() {
    let valid = elf(&[0xf4; 32]);
    let path = write_file("corrupted", &valid);
    for at in 4..120 {
        for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let mut file = valid.clone();
            file[at] = value;
            std::fs::write(&path, &file).unwrap();
            match open(&path) {
                Ok(()) | Err(OpenError::Elf(_) | OpenError::Kvm(_)) => {}
                other => panic!("byte {at} = {value:#x}: {other:?}"),
            }
        }
    }
    std::fs::remove_file(&path).unwrap();
}
