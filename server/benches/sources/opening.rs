//! How long it takes until a guest can be asked about, and how much memory.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::Instant;

use pagewalkd::machine::MachineSpec;

use super::bed::report::Report;
use super::dump_file::{DumpFile, Load, cpu, tables};
use super::guests::Qemu;

const GIB: u64 = 1 << 30;

/// 16 GiB of memory, of which the file has a few pages.
pub(crate) fn sparse_dump(report: &mut Report, rounds: usize) {
    const SIZE: u64 = 16 * GIB;
    const LOW: u64 = 3 * GIB;
    const AT: u64 = 0x1_0000;
    let mut dump = DumpFile::new(&[cpu(0x8005_0033, AT, 1 << 5)], vec![]);
    for (gpa, offset, size) in [(0, AT, LOW), (4 * GIB, AT + LOW, SIZE - LOW)] {
        dump.loads.push(Load { gpa, bytes: Vec::new(), claims: Some((offset, size)) });
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(AT + SIZE).unwrap();
    file.as_file().write_all_at(&dump.headers().0, 0).unwrap();
    file.as_file().write_all_at(&tables(AT, 0), AT + AT).unwrap();
    let spec: MachineSpec = format!("dump:{}", file.path().display()).parse().unwrap();
    let (mut times, mut sizes) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let before = resident();
        let start = Instant::now();
        let machine = spec.open().unwrap();
        times.push(start.elapsed().as_secs_f64() * 1e3);
        sizes.push(resident().saturating_sub(before) as f64 / 1e3);
        assert_eq!(machine.source().memory().size(), SIZE);
    }
    report.add("open a sparse dump of 16 GiB", "ms", times, "1 s", vec![1e3]);
    // The first one: what it took is used again.
    sizes.truncate(1);
    report.add("resident memory for it", "MB", sizes, "100 MB", vec![1e2]);
}

pub(crate) fn attach(report: &mut Report, case: &str, qemu: &Qemu, rounds: usize) {
    let mut times = Vec::new();
    for _ in 0..rounds {
        let start = Instant::now();
        let machine = qemu.attach("vm");
        times.push(start.elapsed().as_secs_f64() * 1e3);
        assert!(machine.source().memory().size() >= 4 * GIB - (1 << 20));
    }
    report.add(case, "ms", times, "1 s", vec![1e3]);
}

/// Resident memory of this process, kB.
fn resident() -> u64 {
    let status = std::io::read_to_string(File::open("/proc/self/status").unwrap()).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
