//! Lists of tasks in the memory of a kernel that the tests lay out, sound and hostile.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pagewalk::{CpuProfile, Gpa, Vendor};
use proptest::prelude::*;
use tempfile::NamedTempFile;

use super::btf::tests::Blob;
use super::{MOST, Task, TaskList, list};
use crate::machine::{GuestRam, Health, LocalSource, Machine, MachineSpec, Region};
use crate::symbols::Symbols;
use crate::vcpu::{PlainBackend, Registers, Vcpu};

const TEXT: u64 = 0xffff_ffff_8100_0000;
/// The image's end, behind which the kernel's other memory is mapped.
const HEAP: u64 = TEXT + LEAF;
const HEAP_BYTES: u64 = 4 * LEAF;
const LEAF: u64 = 2 << 20;
/// Where the image begins in the guest's physical memory; the rest follows.
const IMAGE: u64 = LEAF;
const ROOT: u64 = 0x2000;
const INIT_TASK: u64 = TEXT + 0x4000;
const BTF: u64 = TEXT + 0x8000;

/// Offsets in the tests' `task_struct`.
const TASKS: u64 = 0;
const PID: u64 = 16;
const COMM: u64 = 24;
const MM: u64 = 40;
const TASK_BYTES: u64 = 48;
/// And in their `mm_struct`.
const PGD: u64 = 8;

struct Guest {
    memory: Arc<GuestRam>,
    machine: Machine,
}

fn types() -> Vec<u8> {
    types_with_names(16)
}

/// Where names may have so many bytes.
fn types_with_names(bytes: u32) -> Vec<u8> {
    let mut blob = Blob::default();
    let int = blob.add("int", 1, 0, 4, &[32]);
    let char = blob.add("char", 1, 0, 1, &[8]);
    let pointer = blob.add("", 2, 0, 0, &[]);
    let name = blob.add("", 3, 0, 0, &[char, int, bytes]);
    let links = blob.add("list_head", 4, 0, 16, &[]);
    blob.structure(
        "task_struct",
        &[
            ("tasks", links, TASKS as u32),
            ("pid", int, PID as u32),
            ("comm", name, COMM as u32),
            ("mm", pointer, MM as u32),
        ],
    );
    blob.structure("mm_struct", &[("pgd", pointer, PGD as u32)]);
    blob.bytes()
}

/// A machine that does nothing, with this much memory.
fn machine(size: u64, registers: Registers, symbols: &str) -> (Arc<GuestRam>, Machine) {
    let memory = Arc::new(GuestRam::allocate(&[Region { start: Gpa(0), size, read_only: false }]).unwrap());
    let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 40, gib_pages: true, encryption_bit: None };
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(symbols.as_bytes()).unwrap();
    let demo = "demo:plain".parse::<MachineSpec>().unwrap().open().unwrap();
    let source = LocalSource {
        kind: "test",
        description: String::new(),
        vcpus: vec![Vcpu::spawn("guest", 0, cpu, PlainBackend::new(registers, "a test")).unwrap()],
        memory: Arc::clone(&memory),
        capabilities: demo.source().capabilities().clone(),
        cpu,
        landmarks: Vec::new(),
        health: Health::default(),
    };
    let symbols = Symbols::read(file.path()).unwrap();
    (memory, Machine::new("guest", Arc::new(source)).with_symbols(symbols))
}

fn written(symbols: &[(u64, &str)]) -> String {
    symbols.iter().map(|(address, name)| format!("{address:016x} D {name}\n")).collect()
}

impl Guest {
    fn new() -> Self {
        Self::with(&types(), None)
    }

    /// With this BTF, which is said to end elsewhere if it is said.
    fn with(types: &[u8], stop: Option<u64>) -> Self {
        let stop = stop.unwrap_or(BTF + types.len() as u64);
        let symbols = [
            (TEXT, "_text"),
            (TEXT + 0x1000, "linux_banner"),
            (TEXT + 0x3000, "init_top_pgt"),
            (INIT_TASK, "init_task"),
            (BTF, "__start_BTF"),
            (stop, "__stop_BTF"),
            (TEXT + LEAF - 1, "_end"),
        ];
        Self::of(types, &written(&symbols))
    }

    fn of(types: &[u8], symbols: &str) -> Self {
        let registers =
            Registers { cr0: 0x8005_0033, cr3: ROOT, cr4: 0x20, efer: 0xd01, ..Registers::default() };
        let (memory, machine) = machine(IMAGE + LEAF + HEAP_BYTES, registers, symbols);
        let guest = Self { memory, machine };
        let root = IMAGE + 0x3000;
        for table in [ROOT, root] {
            guest.put_physical(table + 8 * 511, 0x4003);
        }
        guest.put_physical(0x4000 + 8 * 510, 0x5003);
        for leaf in 0..1 + HEAP_BYTES / LEAF {
            guest.put_physical(0x5000 + 8 * (8 + leaf), (IMAGE + leaf * LEAF) | 0x83);
        }
        guest.write(TEXT + 0x1000, b"Linux version 9.9 (me)\n");
        guest.write(BTF, types);
        guest.link(&[]);
        guest
    }

    fn put_physical(&self, gpa: u64, value: u64) {
        self.memory.write_u64(Gpa(gpa), value).unwrap();
    }

    fn write(&self, gva: u64, bytes: &[u8]) {
        self.memory.write(Gpa(gva - TEXT + IMAGE), bytes).unwrap();
    }

    fn put(&self, gva: u64, value: u64) {
        self.write(gva, &value.to_le_bytes());
    }

    /// A task of this number at a place of its own; its top table is a page of that number, if it has one.
    fn task(&self, number: u64, name: &[u8], has_space: bool) -> u64 {
        let (at, mm) = (HEAP + number * TASK_BYTES, HEAP + HEAP_BYTES / 2 + number * 16);
        self.put(at + PID, number);
        self.write(at + COMM, name);
        if has_space {
            self.put(at + MM, mm);
            self.put(mm + PGD, TEXT + number % 64 * 0x1000);
        }
        at
    }

    /// Links tasks into the list.
    fn link(&self, tasks: &[u64]) {
        let all: Vec<u64> = std::iter::once(INIT_TASK).chain(tasks.iter().copied()).collect();
        for (place, task) in all.iter().enumerate() {
            let next = all[(place + 1) % all.len()];
            self.put(task + TASKS, next + TASKS);
            self.put(next + TASKS + 8, task + TASKS);
        }
    }

    fn list(&self) -> Result<TaskList, String> {
        list(&self.machine, &self.memory, Instant::now() + Duration::from_secs(30))
    }

    #[track_caller]
    fn incomplete(&self, said: &str) -> TaskList {
        let list = self.list().unwrap();
        let why = list.incomplete.clone().unwrap_or_default();
        assert!(why.contains(said), "{said:?} is missing in {why:?}");
        list
    }
}

fn three() -> (Guest, [u64; 3]) {
    let guest = Guest::new();
    let tasks = [
        guest.task(1, b"init\0left over", true),
        guest.task(2, b"kthreadd", false),
        guest.task(3, b"\xff\xc3\xb6\x1bsixteen-bytes", true),
    ];
    guest.link(&tasks);
    (guest, tasks)
}

#[test]
fn processes_with_an_address_space() {
    let (guest, _) = three();
    let task =
        |pid: u32, name: &str| Task { pid, name: name.to_owned(), root: IMAGE + u64::from(pid) * 0x1000 };
    let tasks = vec![task(1, "init"), task(3, "\\xff\u{f6}\\u{1b}sixteen-byte")];
    assert_eq!(guest.list(), Ok(TaskList { tasks, count: 3, incomplete: None }));
    guest.link(&[]);
    assert_eq!(guest.list(), Ok(TaskList::default()));
}

/// Names are the guest's, and are shown on terminals.
#[test]
fn names_are_short_and_steer_no_terminal() {
    let name = b"\x1b[2J\xc2\x9b1m\r\n\\ \xf0\x9f\x90\xa7 and more";
    for bytes in [16, 64] {
        let guest = Guest::with(&types_with_names(bytes), None);
        guest.link(&[guest.task(1, &name[..16], true)]);
        let [Task { name, .. }] = guest.list().unwrap().tasks.try_into().unwrap();
        assert_eq!(name, "\\u{1b}[2J\\u{9b}1m\\u{d}\\u{a}\\ \u{1f427}");
    }
    let found = Guest::with(&types_with_names(65), None).list();
    assert!(found.unwrap_err().contains("`task_struct.comm` of 65 bytes"));
}

#[test]
fn lists_that_lead_in_circles_have_an_end() {
    let (guest, tasks) = three();
    for (from, to) in [(tasks[2], tasks[0]), (tasks[1], tasks[1]), (tasks[2], tasks[1])] {
        guest.link(&tasks);
        guest.put(from + TASKS, to + TASKS);
        guest.incomplete("not linked back");
    }
    // Links both ways, and never back to where the list began.
    guest.link(&tasks);
    guest.put(tasks[2] + TASKS, tasks[1] + TASKS);
    guest.put(tasks[1] + TASKS + 8, tasks[2] + TASKS);
    guest.incomplete("not linked back");
    // All the same, what is known of it is said.
    guest.link(&tasks);
    guest.put(tasks[2] + TASKS, tasks[0] + TASKS);
    assert_eq!(guest.incomplete("not linked back").count, 3);
}

#[test]
fn lists_that_lead_to_nowhere() {
    let (guest, tasks) = three();
    for nowhere in [0, 8, 0x1000, u64::MAX, u64::MAX - 7, 1 << 47, HEAP + HEAP_BYTES, TEXT - 8, tasks[2] + 1]
    {
        guest.link(&tasks);
        guest.put(tasks[1] + TASKS, nowhere);
        guest.incomplete("no memory of the kernel's");
    }
    // From the end of mapped memory on there is only a part of a task.
    guest.link(&tasks);
    let edge = HEAP + HEAP_BYTES - 16;
    guest.put(tasks[1] + TASKS, edge);
    guest.put(edge + 8, tasks[1] + TASKS);
    guest.incomplete("not all is memory");
    for nowhere in [8, u64::MAX, u64::MAX - PGD, HEAP + HEAP_BYTES, 1 << 60] {
        let (guest, tasks) = three();
        guest.put(tasks[2] + MM, nowhere);
        assert_eq!(guest.incomplete("no top table").tasks.len(), 1);
    }
    let (guest, _) = three();
    guest.put(HEAP + HEAP_BYTES / 2 + 3 * 16 + PGD, TEXT + 0x1008);
    assert_eq!(guest.incomplete("no top table").tasks.len(), 1);
}

/// A page of user space is no kernel's: a program cannot show a list of its own.
#[test]
fn lists_in_user_pages_are_none() {
    let (guest, tasks) = three();
    guest.put_physical(0x4000, 0x6007);
    for table in [ROOT, IMAGE + 0x3000] {
        guest.put_physical(table, 0x4007);
    }
    guest.put_physical(0x6000, (IMAGE + LEAF) | 0x87);
    guest.put(tasks[1] + TASKS, tasks[2] - HEAP);
    guest.incomplete("no memory of the kernel's");
}

#[test]
fn lists_that_are_too_long() {
    let guest = Guest::new();
    let tasks: Vec<u64> = (0..=u64::from(MOST)).map(|number| guest.task(number, b"x", false)).collect();
    guest.link(&tasks);
    assert_eq!(guest.incomplete("longer than 65536").count, MOST);
    guest.link(&tasks[1..]);
    assert_eq!(guest.list(), Ok(TaskList { tasks: Vec::new(), count: MOST, incomplete: None }));
    let over = list(&guest.machine, &guest.memory, Instant::now()).unwrap();
    assert!(over.incomplete.unwrap().contains("time was over"));
}

#[test]
fn kernels_that_do_not_say_where_fields_are() {
    let sound = types();
    let mut claims = sound.clone();
    claims[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut pid = Blob::default();
    let long = pid.add("long", 1, 0, 8, &[64]);
    pid.structure("task_struct", &[("comm", long, 0), ("tasks", long, 0), ("pid", long, 0)]);
    for (types, stop, said) in [
        (&b"garbage that is no BTF, whatever it is"[..], None, "begins with 0x6167"),
        (&claims, None, "types lie outside"),
        (&sound, Some(BTF + 10), "is cut off"),
        (&sound, Some(BTF + 30), "types lie outside"),
        (&sound, Some(BTF - 1), "at most"),
        (&sound, Some(BTF), "is cut off"),
        (&sound, Some(TEXT + LEAF - 1), ""),
        (&pid.bytes(), None, "`task_struct.tasks` of 8 bytes"),
        (&Blob::default().bytes(), None, "no `struct task_struct`"),
    ] {
        let found = Guest::with(types, stop).list();
        match said {
            "" => assert_eq!(found, Ok(TaskList::default())),
            said => assert!(found.as_ref().unwrap_err().contains(said), "{said:?}: {found:?}"),
        }
    }
    let banner = (TEXT + 0x1000, "linux_banner");
    for (symbols, said) in [
        (written(&[(TEXT, "_text")]), "no Linux kernel"),
        (written(&[banner]), "without BTF"),
        (written(&[banner, (BTF, "__start_BTF"), (BTF + (1 << 26), "__stop_BTF")]), "at most"),
        (
            written(&[
                banner,
                (BTF + HEAP_BYTES, "__start_BTF"),
                (BTF + HEAP_BYTES + (1 << 24), "__stop_BTF"),
            ]),
            "not all in memory",
        ),
        (written(&[banner, (BTF, "__start_BTF"), (BTF + sound.len() as u64, "__stop_BTF")]), "`init_task`"),
        (written(&[(TEXT + 0x2000, "linux_banner")]), "another one"),
    ] {
        let found = Guest::of(&sound, &symbols).list();
        assert!(found.as_ref().unwrap_err().contains(said), "{said:?}: {found:?}");
    }
}

#[test]
fn a_32_bit_kernel() {
    const TEXT: u64 = 0xc100_0000;
    const IMAGE: u64 = 0x40_0000;
    let mut blob = Blob::default();
    let int = blob.add("int", 1, 0, 4, &[32]);
    let pointer = blob.add("", 2, 0, 0, &[]);
    let name = blob.add("", 3, 0, 0, &[int, int, 4]);
    let links = blob.add("list_head", 4, 0, 8, &[]);
    let members = [("tasks", links, 4), ("pid", int, 12), ("comm", name, 16), ("mm", pointer, 32)];
    blob.structure("task_struct", &members);
    blob.structure("mm_struct", &[("pgd", pointer, 0)]);
    let types = blob.bytes();
    let symbols = written(&[
        (TEXT, "_text"),
        (TEXT + 0x1000, "linux_banner"),
        (TEXT + 0x3000, "swapper_pg_dir"),
        (TEXT + 0x4000, "init_task"),
        (TEXT + 0x8000, "__start_BTF"),
        (TEXT + 0x8000 + types.len() as u64, "__stop_BTF"),
        (TEXT + 0x3f_ffff, "_end"),
    ]);
    let registers = Registers { cr0: 0x8005_0033, cr3: ROOT, cr4: 0x10, ..Registers::default() };
    let (memory, machine) = machine(3 * IMAGE, registers, &symbols);
    let write = |gva: u64, bytes: &[u8]| memory.write(Gpa(gva - TEXT + IMAGE), bytes).unwrap();
    let put = |gva: u64, value: u64| write(gva, &(value as u32).to_le_bytes());
    for root in [ROOT, IMAGE + 0x3000] {
        // 4 MiB of the image, and 4 MiB behind it.
        for (place, leaf) in [(0x304, IMAGE), (0x305, 2 * IMAGE)] {
            memory.write(Gpa(root + 4 * place), &(leaf as u32 | 0x83).to_le_bytes()).unwrap();
        }
    }
    write(TEXT + 0x1000, b"Linux version 9.9 (me)\n");
    write(TEXT + 0x8000, &types);
    let (init, task, mm) = (TEXT + 0x4000, TEXT + IMAGE, TEXT + IMAGE + 0x100);
    for (from, to) in [(init, task), (task, init)] {
        put(from + 4, to + 4);
        put(to + 8, from + 4);
    }
    put(task + 12, 77);
    write(task + 16, b"narrow");
    put(task + 32, mm);
    put(mm, TEXT + 0x5000);
    let found = list(&machine, &memory, Instant::now() + Duration::from_secs(30));
    let tasks = vec![Task { pid: 77, name: "narrow".to_owned(), root: IMAGE + 0x5000 }];
    assert_eq!(found, Ok(TaskList { tasks, count: 1, incomplete: None }));
    // Where a page of 4 MiB can be, and CR3 cannot lead.
    memory.write(Gpa(IMAGE + 0x3000 + 4 * 0x306), &0x2083_u32.to_le_bytes()).unwrap();
    put(mm, TEXT + 2 * IMAGE);
    let found = list(&machine, &memory, Instant::now() + Duration::from_secs(30)).unwrap();
    assert!(found.incomplete.is_some_and(|why| why.contains("no top table")));
}

/// Without symbols nothing is guessed.
#[test]
fn machines_without_symbols() {
    let machine = "demo:plain".parse::<MachineSpec>().unwrap().open().unwrap();
    let found = list(&machine, &machine.source().memory(), Instant::now());
    assert!(found.unwrap_err().contains("symbols=FILE"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the guest writes into its tasks, the list has an end.
    #[test]
    fn any_memory_is_read_to_the_end(
        words in proptest::collection::vec((0..40u64, prop_oneof![0..40u64, any::<u64>()]), 1..60),
    ) {
        let (guest, _) = three();
        for (at, word) in words {
            // Mostly a place in the list.
            let word = if word < 40 { HEAP + word * 8 } else { word };
            guest.put(HEAP + at * 8, word);
        }
        let list = guest.list().unwrap();
        prop_assert!(list.incomplete.is_some() || list.count <= 8);
    }
}
