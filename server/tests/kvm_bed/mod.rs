//! The bed `kvm`: tests that need `/dev/kvm` run where it can be opened, say so where it cannot, and fail there if
//! `PAGEWALK_REQUIRE` names the bed.
#![allow(clippy::print_stdout)]

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};

/// A test that may need the bed.
pub(crate) type Test = (&'static str, fn() -> Result<(), Failed>);

/// Runs `tests` if the bed is there.
pub(crate) fn main(tests: &[Test]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One at a time: some measure time, and this bed has few CPUs.
    arguments.test_threads.get_or_insert(1);
    let open = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let required =
        std::env::var("PAGEWALK_REQUIRE").is_ok_and(|beds| beds.split(',').any(|b| b.trim() == "kvm"));
    let trials = match open {
        Ok(_) => tests.iter().map(|&(name, test)| Trial::test(name, test)).collect(),
        Err(e) if required => {
            let problem = format!("/dev/kvm: {e}, and PAGEWALK_REQUIRE names kvm");
            vec![Trial::test("bed", move || Err(problem.into()))]
        }
        Err(e) => {
            println!("SKIPPED kvm: /dev/kvm: {e}");
            Vec::new()
        }
    };
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A generous bound for anything that should take microseconds.
pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Runs a future on a runtime of its own.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// Writes a file with a name of its own, below the directory that cargo gives to tests.
pub(crate) fn write_file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}", std::process::id()));
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Where [`elf`] puts its code.
pub(crate) const CODE: u64 = 0x10_0000;

/// An ELF64 executable whose one segment is `code`, entered at its first byte.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0u8; 120];
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\x00");
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &2u16.to_le_bytes()); // e_type: executable
    put(18, &62u16.to_le_bytes()); // e_machine: x86-64
    put(20, &1u32.to_le_bytes()); // e_version
    put(24, &CODE.to_le_bytes()); // e_entry
    put(32, &64u64.to_le_bytes()); // e_phoff
    put(52, &64u16.to_le_bytes()); // e_ehsize
    put(54, &56u16.to_le_bytes()); // e_phentsize
    put(56, &1u16.to_le_bytes()); // e_phnum
    put(64, &1u32.to_le_bytes()); // p_type: load
    put(68, &5u32.to_le_bytes()); // p_flags: read, execute
    put(72, &120u64.to_le_bytes()); // p_offset
    put(80, &CODE.to_le_bytes()); // p_vaddr
    put(88, &CODE.to_le_bytes()); // p_paddr
    put(96, &(code.len() as u64).to_le_bytes()); // p_filesz
    put(104, &(code.len() as u64).to_le_bytes()); // p_memsz
    put(112, &1u64.to_le_bytes()); // p_align
    file.extend_from_slice(code);
    file
}
