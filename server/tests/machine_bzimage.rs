//! Kernels, initramfs and command lines that are wrong in one way each: each gets an error of its own, before any vCPU exists.
#![allow(clippy::unwrap_used)]

mod bzimage;

use std::path::Path;

use bzimage::{SETUP, bzimage};
use pagewalkd::machine::{InitrdProblem, KernelProblem, LinuxError, MachineSpec, OpenError};
use tempfile::TempDir;

fn open(options: &str) -> LinuxError {
    let spec: MachineSpec = format!("kvm:{options}").parse().unwrap();
    match spec.open() {
        Err(OpenError::Linux(error)) => error,
        other => panic!("{options}: {other:?}"),
    }
}

fn written(folder: &TempDir, name: &str, bytes: &[u8]) -> String {
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

fn kernel_problem(kernel: &Path, memory: &str) -> KernelProblem {
    match open(&format!("kernel={},mem={memory}", kernel.display())) {
        LinuxError::Kernel { file, problem } => {
            assert_eq!(file, kernel);
            problem
        }
        other => panic!("{other:?}"),
    }
}

/// A valid file, changed at one place.
fn patched(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = bzimage(&[0xf4; 64]);
    file[at..at + bytes.len()].copy_from_slice(bytes);
    file
}

macro_rules! refuses {
    ($name:ident, $file:expr, $problem:pat) => {
        #[test]
        fn $name() {
            let folder = tempfile::tempdir().unwrap();
            let kernel = folder.path().join("k");
            std::fs::write(&kernel, &$file[..]).unwrap();
            let found = kernel_problem(&kernel, "64M");
            assert!(matches!(found, $problem), "{found:?}");
        }
    };
}

refuses!(empty, [0_u8; 0], KernelProblem::NotAKernel);
refuses!(an_elf_file, b"\x7fELF".repeat(1000), KernelProblem::NotAKernel);
refuses!(cut_in_its_header, bzimage(&[0xf4])[..0x26b], KernelProblem::NotAKernel);
refuses!(cut_in_its_code, bzimage(&[0xf4; 64])[..SETUP + 0x200], KernelProblem::Truncated { .. });
refuses!(without_code, patched(0x1f4, &[0; 4]), KernelProblem::NoCode);
refuses!(of_any_length, patched(0x1f4, &[0xff; 4]), KernelProblem::Truncated { .. });
refuses!(an_old_protocol, patched(0x206, &[0x0b, 2]), KernelProblem::No64Bit { version: 0x20b });
refuses!(a_zimage, patched(0x211, &[0]), KernelProblem::No64Bit { .. });
refuses!(a_32_bit_kernel, patched(0x236, &[0, 0]), KernelProblem::No64Bit { .. });
refuses!(at_the_end_of_all, patched(0x258, &[0xff; 8]), KernelProblem::Memory { .. });
refuses!(larger_than_memory, patched(0x260, &[0xff; 4]), KernelProblem::Memory { .. });

#[test]
fn no_file() {
    let folder = tempfile::tempdir().unwrap();
    let found = kernel_problem(&folder.path().join("none"), "64M");
    assert!(matches!(found, KernelProblem::Read(_)), "{found:?}");
    let found = kernel_problem(folder.path(), "64M");
    assert!(matches!(found, KernelProblem::Read(_)), "{found:?}");
}

#[test]
fn too_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("k");
    std::fs::write(&kernel, bzimage(&[0xf4])).unwrap();
    for memory in ["1M", "17404K"] {
        let found = kernel_problem(&kernel, memory);
        assert!(matches!(found, KernelProblem::Memory { needed: 0x110_0000, .. }), "{memory}: {found:?}");
        assert!(found.to_string().contains("mem="), "{found}");
    }
}

#[test]
fn initrds() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = written(&folder, "k", &bzimage(&[0xf4]));
    let empty = written(&folder, "empty", &[]);
    let sparse = folder.path().join("large");
    std::fs::File::create(&sparse).unwrap().set_len(2 << 20).unwrap();
    let problem = |initrd: &str| match open(&format!("kernel={kernel},initrd={initrd},mem=18M")) {
        LinuxError::Initrd { problem, .. } => problem,
        other => panic!("{initrd}: {other:?}"),
    };
    assert!(matches!(problem("/nowhere/initrd"), InitrdProblem::Read(_)));
    assert!(matches!(problem(&empty), InitrdProblem::Empty));
    let found = problem(&sparse.display().to_string());
    assert!(matches!(found, InitrdProblem::Memory { size: 0x20_0000, room: 0x10_0000 }), "{found:?}");
}

#[test]
fn command_lines() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = written(&folder, "k", &bzimage(&[0xf4]));
    let line = "x".repeat(2048);
    let found = open(&format!("kernel={kernel},cmdline={line}"));
    assert!(matches!(found, LinuxError::CommandLine { length: 2048, most: 2047 }), "{found:?}");
    let found = open(&format!("kernel={kernel},cmdline=quiet\u{7}"));
    assert!(matches!(found, LinuxError::CommandLineCharacters), "{found:?}");
}

#[test]
fn consoles() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = written(&folder, "k", &bzimage(&[0xf4]));
    let file = written(&folder, "file", b"precious");
    for console in [format!("console={file}"), "console=/nowhere/s".to_owned(), "log=/dev/null".to_owned()] {
        let found = open(&format!("kernel={kernel},{console}"));
        assert!(matches!(found, LinuxError::Console(_)), "{console}: {found:?}");
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}
