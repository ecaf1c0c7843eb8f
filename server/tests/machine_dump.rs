//! Source `dump`: what opens, what is refused and how, and what a dump of many GiB costs.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]
mod dump_file;

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use dump_file::{DumpFile, EM_386, Load, cpu, note, tables};
use pagewalk::{Access, AccessKind, AdPolicy, Backing, Gva, NoTrace, PagingMode, Privilege, Translation};
use pagewalkd::machine::{AttachError, Machine, MachineSpec, Machines};
use pagewalkd::vcpu::{RegisterChanges, RunState, VcpuError};

const CR0: u64 = 0x8005_0033;
const PAE: u64 = 1 << 5;
const LA57: u64 = 1 << 12;

fn spec(path: &Path) -> MachineSpec {
    format!("dump:{}", path.display()).parse().unwrap()
}

fn open(file: &DumpFile) -> Machine {
    let file = file.write();
    spec(file.path()).open().unwrap()
}

fn refused(bytes: &[u8]) -> String {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let error = spec(file.path()).open().unwrap_err().to_string();
    let (name, problem) = error.split_once(": ").unwrap();
    assert_eq!(name, file.path().display().to_string());
    problem.to_owned()
}

fn walk(machine: &Machine, vcpu: u32, gva: u64) -> Option<Translation> {
    let snapshot = machine.vcpu(vcpu).unwrap().latest();
    let access = Access::new(AccessKind::Read, Privilege::Exempt);
    let walker = snapshot.walker.as_ref().unwrap();
    walker
        .translate_with(
            machine.source().memory().as_ref(),
            Gva(gva),
            &access,
            AdPolicy::Observe,
            &mut NoTrace,
        )
        .ok()
}

/// One vCPU under 4-level paging, whose linear address 0 is `frame`.
fn plain(frame: u64) -> DumpFile {
    DumpFile::new(&[cpu(CR0, 0x1_0000, PAE)], vec![Load::new(0x1_0000, tables(0x1_0000, frame))])
}

#[test]
fn a_dump_is_walked_and_its_registers_are_read() {
    let machine = open(&plain(0x1_2000));
    let found = walk(&machine, 0, 0x123).unwrap();
    assert_eq!((found.gpa.0, found.backing()), (0x1_2123, Backing::Ram));
    assert_eq!(walk(&machine, 0, 0x1000), None);
    let snapshot = machine.vcpu(0).unwrap().latest();
    let registers = &snapshot.registers;
    assert_eq!((registers.cr0, registers.cr2, registers.cr3), (CR0, 0xdead_b000, 0x1_0000));
    assert_eq!((registers.cr4, registers.efer, registers.cpl), (PAE, 0xd00, 0));
    assert_eq!((registers.rip, registers.gs_base), (0xffff_ffff_8100_0000, 0xffff_8880_0000_0000));
    // RAX to RBP, R8 to R15, in the order of the note.
    let general = [registers.rax, registers.rbx, registers.rcx, registers.rdx, registers.rsi, registers.rdi];
    assert_eq!(general, [0x100, 0x101, 0x102, 0x103, 0x104, 0x105]);
    assert_eq!((registers.rsp, registers.rbp, registers.r8, registers.r15), (0x106, 0x107, 0x108, 0x10f));
    for assumed in ["EFER=0xd00 (LMA because CS.L is set", "PAT=0x7040600070406", "MAXPHYADDR=52"] {
        assert!(snapshot.assumed.iter().any(|text| text.starts_with(assumed)), "{:?}", snapshot.assumed);
    }
    assert_eq!(machine.source().kind(), "dump");
}

#[test]
fn paging_modes_follow_from_the_note() {
    let mode = |cr0, cr4, machine, long: bool| {
        let mut note = cpu(cr0, 0x1_0000, cr4);
        if !long {
            // CS.L and the upper half of RIP.
            note[160..168].fill(0);
            note[140..144].fill(0);
        }
        let mut file = DumpFile::new(&[note], vec![Load::new(0x1_0000, tables(0x1_0000, 0))]);
        file.machine = machine;
        let machine = open(&file);
        let snapshot = machine.vcpu(0).unwrap().latest();
        snapshot.walker.as_ref().unwrap().gva_walk().format().mode()
    };
    assert_eq!(mode(CR0, PAE, dump_file::EM_X86_64, true), PagingMode::FourLevel);
    assert_eq!(mode(CR0, PAE | LA57, dump_file::EM_X86_64, true), PagingMode::FiveLevel);
    // Compatibility mode: the file says what CS does not.
    assert_eq!(mode(CR0, PAE, dump_file::EM_X86_64, false), PagingMode::FourLevel);
    assert_eq!(mode(CR0, PAE, EM_386, false), PagingMode::Pae);
    assert_eq!(mode(CR0, 0, EM_386, false), PagingMode::TwoLevel);
    assert_eq!(mode(0x33, PAE, EM_386, false), PagingMode::None);
}

#[test]
fn pdptes_that_an_emulator_has_marked_are_those_of_a_cpu() {
    let mut note = cpu(CR0, 0x1_0020, PAE);
    note[160..168].fill(0);
    note[140..144].fill(0);
    let mut memory = vec![0; 0x4000];
    for (at, entry) in [(0x20, 0x1_1021_u64), (0x1000, 0x1_2003), (0x2000, 0x1_3003)] {
        memory[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }
    let mut file = DumpFile::new(&[note], vec![Load::new(0x1_0000, memory)]);
    file.machine = EM_386;
    let machine = open(&file);
    assert_eq!(walk(&machine, 0, 0x10).unwrap().gpa.0, 0x1_3010);
    let snapshot = machine.vcpu(0).unwrap().latest();
    assert!(snapshot.assumed.iter().any(|text| text.contains("without bit 5")), "{:?}", snapshot.assumed);
}

#[test]
fn segments_that_show_the_same_bytes_are_one() {
    // As with paging=true: three mappings of one piece, one of them of what the file does not have.
    let mut file = plain(0x1_2000);
    let (_, offsets) = file.headers();
    let shift = 3 * 56;
    let at = offsets[0] + shift;
    for (gpa, offset, size) in [(0x1_1000, at + 0x1000, 0x2000), (0x1_0000, at, 0x1000), (0x8_0000, 0, 0)] {
        file.loads.push(Load { gpa, bytes: Vec::new(), claims: Some((offset, size)) });
    }
    let machine = open(&file);
    assert_eq!(machine.source().memory().regions().len(), 1);
    assert_eq!(machine.source().memory().size(), 0x4000);
    assert_eq!(walk(&machine, 0, 0).unwrap().gpa.0, 0x1_2000);
    // The same with other bytes.
    file.loads[1].claims = Some((at, 0x2000));
    let problem = refused(&file.bytes());
    assert!(problem.contains("two segments disagree about physical address 0x11000"), "{problem}");
}

#[test]
fn the_number_of_segments_may_be_in_the_section_header() {
    let mut file = plain(0x1_2000);
    file.many = true;
    assert!(walk(&open(&file), 0, 0).is_some());
}

#[test]
fn bytes_that_are_not_at_words_of_the_file_are_fetched() {
    let mut file = plain(0x1_2000);
    note(&mut file.notes, b"VMCOREINFO\0", 0, b"odd");
    assert_ne!(file.headers().1[0] % 8, 0);
    let machine = open(&file);
    assert_eq!(walk(&machine, 0, 0).unwrap().gpa.0, 0x1_2000);
    assert!(machine.source().memory().blocks());
}

#[test]
fn each_vcpu_has_its_own_registers() {
    let cpus = [cpu(CR0, 0x1_0000, PAE), cpu(CR0, 0x2_0000, PAE)];
    let loads = [(0x1_0000, 0x1_2000), (0x2_0000, 0x2_1000)]
        .map(|(root, frame)| Load::new(root, tables(root, frame)));
    let machine = open(&DumpFile::new(&cpus, loads.into()));
    assert_eq!(walk(&machine, 0, 0).unwrap().gpa.0, 0x1_2000);
    assert_eq!(walk(&machine, 1, 0).unwrap().gpa.0, 0x2_1000);
}

#[tokio::test]
async fn nothing_of_a_dump_changes() {
    let machine = open(&plain(0x1_2000));
    let vcpu = machine.vcpu(0).unwrap();
    let soon = || Instant::now() + Duration::from_secs(20);
    assert_eq!(vcpu.latest().run_state, RunState::Static);
    assert_eq!(vcpu.sync(soon()).await.unwrap().registers, vcpu.latest().registers);
    let changes = RegisterChanges { cr3: Some(0x2000), ..RegisterChanges::default() };
    for refused in [
        vcpu.pause(soon()).await,
        vcpu.resume(soon()).await,
        vcpu.step(soon()).await,
        vcpu.set_registers(changes, soon()).await,
    ] {
        let error = refused.unwrap_err();
        assert!(matches!(&error, VcpuError::Unsupported(why) if why.contains("dump")), "{error}");
    }
    assert_eq!(vcpu.latest().registers.cr3, 0x1_0000);
    assert!(!machine.source().capabilities().can_write_memory);
}

#[test]
fn the_same_dump_is_attached_once() {
    let file = plain(0x1_2000).write();
    let machines = Machines::default();
    machines.open(&spec(file.path())).unwrap();
    let again: MachineSpec = format!("other=dump:{}", file.path().display()).parse().unwrap();
    assert!(matches!(machines.open(&again), Err(AttachError::SameGuest { .. })));
}

#[test]
fn what_is_no_dump_is_refused_by_name() {
    for (bytes, expected) in [
        (&b""[..], "not an ELF file: it begins with nothing"),
        (b"\x7fEL", "it begins with 7f 45 4c"),
        (b"KDUMP   \x06\0\0\0", "kdump-compressed dump, which is not read here"),
        (b"makedumpfile\0\0\0\0", "dump-guest-memory FILE"),
        (b"PAGEDU64", "win-dmp"),
        (b"\x7fELF\x03\x01", "class at offset 0x4"),
        (
            b"\x7fELF\x02\x01",
            "truncated: the ELF header at offset 0x0 has 0x40 bytes, and the file ends at 0x6",
        ),
    ] {
        let problem = refused(bytes);
        assert!(problem.contains(expected), "{problem}");
    }
    let missing = spec(Path::new("/nonexistent")).open().unwrap_err().to_string();
    assert!(missing.starts_with("/nonexistent: cannot be read: No such file"), "{missing}");
    let folder = spec(Path::new("/")).open().unwrap_err().to_string();
    assert!(folder.contains("not a regular file"), "{folder}");
}

#[test]
fn a_broken_header_is_refused_with_its_offset() {
    type Break = fn(&mut Vec<u8>);
    let cases: [(Break, &str); 20] = [
        (|file| file[5] = 2, "big-endian (at offset 0x5)"),
        (
            |file| file[0x12..0x14].copy_from_slice(&183_u16.to_le_bytes()),
            "another architecture: its ELF machine is 183",
        ),
        (|file| file[0x10] = 2, "no core file: its ELF type is 2 (at offset 0x10)"),
        (|file| file[0x36] = 55, "the program header table at offset 0x80: an entry has 55 bytes, not 56"),
        (
            |file| file[0x20..0x28].fill(0xff),
            "truncated: the program header table at offset 0xffffffffffffffff",
        ),
        (|file| file[0x38..0x3a].fill(0xfe), "truncated: the program header table"),
        (|file| file[0x80] = 0, "no QEMU note"),
        (|file| file[0x80 + 32..][..8].fill(0xff), "truncated: a segment of notes at offset 0xf0"),
        (|file| file[0xb8 + 32 + 6] = 0x80, "truncated: a segment of memory at offset 0x420"),
        (|file| file[0xb8 + 24 + 6] = 0x10, "a segment's header at offset 0xb8: physical address"),
        (|file| file[0xb8] = 0, "no memory in it"),
        // Sizes of 2^63 bytes.
        (
            |file| file[0x80 + 32 + 7] = 0x80,
            "truncated: a segment of notes at offset 0xf0 has 0x8000000000000330 bytes",
        ),
        (
            |file| file[0xb8 + 32 + 7] = 0x80,
            "truncated: a segment of memory at offset 0x420 has 0x8000000000004000 bytes",
        ),
        (|file| file[0xb8 + 8 + 7] = 0x80, "truncated: a segment of memory at offset 0x8000000000000420"),
        (
            |file| file[0xb8 + 24 + 7] = 0x80,
            "physical address 0x8000000000010000+0x4000 has more than 52 bits",
        ),
        // Notes with names and contents of 4 GiB.
        (|file| file[0xf0..0xf4].fill(0xff), "corrupt: the notes at offset 0xf0"),
        (|file| file[0xf4..0xf8].fill(0xff), "corrupt: the notes at offset 0xf0"),
        // The number of segments is said to be where nothing is, and then where there is none.
        (
            |file| {
                file[0x38..0x3a].fill(0xff);
                file[0x28..0x30].copy_from_slice(&(1_u64 << 63).to_le_bytes());
            },
            "truncated: the section header with the number of segments at offset 0x8000000000000000",
        ),
        (
            |file| {
                file[0x38..0x3a].fill(0xff);
                file[0x28..0x30].fill(0);
            },
            "corrupt: the number of segments",
        ),
        (
            |file| file.truncate(0x2000),
            "truncated: a segment of memory at offset 0x420 has 0x4000 bytes, and the file ends at 0x2000",
        ),
    ];
    for (damage, expected) in cases {
        let mut bytes = plain(0x1_2000).bytes();
        damage(&mut bytes);
        let problem = refused(&bytes);
        assert!(problem.contains(expected), "{problem}\n  wanted: {expected}");
    }
    for (mut cpu, expected) in [
        (cpu(CR0, 0, PAE), "version 2, where 1 is known"),
        (cpu(CR0, 0, PAE)[..400].to_vec(), "of 400 bytes, where 432 are the least"),
        (Vec::new(), "of 0 bytes"),
    ] {
        if cpu.len() == 440 {
            cpu[0] = 2;
        }
        let problem = refused(&DumpFile::new(&[cpu], vec![]).bytes());
        assert!(problem.contains(expected) && problem.contains("the notes at offset 0xb8"), "{problem}");
    }
}

#[test]
fn counts_are_bounded() {
    // 2^20 segments that the file really has: a hole.
    let mut file = plain(0x1_2000);
    file.many = true;
    let mut bytes = file.bytes();
    bytes[64 + 44..][..4].copy_from_slice(&(1_u32 << 20).to_le_bytes());
    let dump = tempfile::NamedTempFile::new().unwrap();
    dump.as_file().write_all_at(&bytes, 0).unwrap();
    dump.as_file().set_len(1 << 30).unwrap();
    let problem = spec(dump.path()).open().unwrap_err().to_string();
    assert!(problem.contains("has 1048576 segments, where 262144 are the most"), "{problem}");

    let cpus = vec![cpu(CR0, 0x1_0000, PAE); 1025];
    let problem = refused(&DumpFile::new(&cpus, vec![]).bytes());
    assert!(problem.contains("vCPUs, where 1024 are the most"), "{problem}");

    // A segment of notes that the file really has, most of it a hole.
    let mut bytes = plain(0x1_2000).bytes();
    bytes[0x80 + 32..][..8].copy_from_slice(&(5_u64 << 20).to_le_bytes());
    dump.as_file().write_all_at(&bytes, 0).unwrap();
    let problem = spec(dump.path()).open().unwrap_err().to_string();
    assert!(problem.contains("has 5242880 bytes of notes, where 4194304 are the most"), "{problem}");

    // Two of them, neither too large by itself.
    let mut bytes = plain(0x1_2000).bytes();
    bytes[0x80 + 56..][..4].copy_from_slice(&object::elf::PT_NOTE.to_le_bytes());
    bytes[0x80 + 56 + 32..][..8].copy_from_slice(&(4_u64 << 20).to_le_bytes());
    dump.as_file().write_all_at(&bytes, 0).unwrap();
    let problem = spec(dump.path()).open().unwrap_err().to_string();
    assert!(problem.contains("bytes of notes, where 4194304 are the most"), "{problem}");

    let pieces = (0..5000).map(|index| Load::new(index * 0x2000, vec![0; 0x1000])).collect();
    let problem = refused(&DumpFile::new(&[cpu(CR0, 0, PAE)], pieces).bytes());
    assert!(problem.contains("has 5000 separate pieces of memory, where 4096 are the most"), "{problem}");
}

#[test]
fn a_damaged_byte_never_does_more_than_refuse() {
    let whole = plain(0x1_2000).bytes();
    let headers = 0x420;
    let mut rng = fastrand::Rng::with_seed(7);
    let (mut opened, mut not) = (0, 0);
    for _ in 0..3000 {
        let mut bytes = whole.clone();
        for _ in 0..rng.usize(1..4) {
            bytes[rng.usize(..headers)] = rng.u8(..);
        }
        match pagewalkd::machine::dump::Dump::read(&bytes[..]) {
            Ok(dump) => {
                assert!(dump.stretches.iter().all(|s| s.offset + s.size <= bytes.len() as u64));
                opened += 1;
            }
            Err(problem) => {
                assert!(!problem.to_string().is_empty());
                not += 1;
            }
        }
    }
    assert!(opened > 100 && not > 100, "{opened} opened, {not} refused");
}

/// 16 GiB of memory, of which the file has a few pages: opened in less than a second and 100 MB.
#[test]
fn sixteen_sparse_gib_open_at_once() {
    const SIZE: u64 = 16 << 30;
    let low = 3 << 30;
    let mut dump = DumpFile::new(&[cpu(CR0, 0x1_0000, PAE)], vec![]);
    for (gpa, offset, size) in [(0, 0x1_0000, low), (4 << 30, 0x1_0000 + low, SIZE - low)] {
        dump.loads.push(Load { gpa, bytes: Vec::new(), claims: Some((offset, size)) });
    }
    let (headers, _) = dump.headers();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(0x1_0000 + SIZE).unwrap();
    file.as_file().write_all_at(&headers, 0).unwrap();
    // The frame is in the last page of the upper part.
    let last = (4 << 30) + (SIZE - low) - 0x1000;
    file.as_file().write_all_at(&tables(0x1_0000, last), 0x2_0000).unwrap();

    let before = resident();
    let start = Instant::now();
    let machine = spec(file.path()).open().unwrap();
    let took = start.elapsed();
    assert_eq!(walk(&machine, 0, 0x10).map(|found| found.gpa.0), Some(last + 0x10));
    let grown = resident().saturating_sub(before);
    assert_eq!(machine.source().memory().size(), SIZE);
    println!("a sparse dump of 16 GiB: opened in {took:?}, resident memory grew by {grown} KiB");
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!(grown < 100_000, "{grown} KiB");
}

/// Resident memory of this process, KiB.
fn resident() -> u64 {
    let status = std::io::read_to_string(File::open("/proc/self/status").unwrap()).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
