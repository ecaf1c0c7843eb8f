//! Source `image`: what a description may say, and what is refused, by key.
#![allow(clippy::unwrap_used)]
#[allow(dead_code, reason = "each test uses its part")]
mod dump_file;

use std::collections::BTreeSet;
use std::path::Path;

use dump_file::tables;
use pagewalk::{
    Access, AccessKind, AdPolicy, Backing, ControlRegisters, EptCapabilities, EptControls, Gva, NgpaWalk,
    NoTrace, NptControls, PagingMode, Privilege, Translation,
};
use pagewalkd::machine::image::{
    Cpu, Description, EptEntry, L2Entry, LandmarkEntry, MemoryRegion, NestedEntry, NptEntry, Number,
    Selectors, VcpuEntry, VendorName,
};
use pagewalkd::machine::{Machine, MachineSpec};
use pagewalkd::vcpu::{NestedMode, RunState};
use tempfile::TempDir;

/// One region and one vCPU under 4-level paging, whose linear address 0 is 0x2000.
const PLAIN: &str = r#"
version = 1
[cpu]
vendor = "intel"
maxphyaddr = 46
[[region]]
gpa = 0
size = 0x4000
file = "memory"
[[vcpu]]
cr0 = 0x80050033
cr3 = 0
cr4 = 0x20
efer = 0xd00
"#;

fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("memory"), tables(0, 0x2000)).unwrap();
    folder
}

fn spec(folder: &Path) -> MachineSpec {
    format!("image:{}", folder.join("image.toml").display()).parse().unwrap()
}

fn open(folder: &TempDir, text: &str) -> Machine {
    std::fs::write(folder.path().join("image.toml"), text).unwrap();
    spec(folder.path()).open().unwrap()
}

fn refused(folder: &TempDir, text: &str) -> String {
    std::fs::write(folder.path().join("image.toml"), text).unwrap();
    let error = spec(folder.path()).open().unwrap_err().to_string();
    let name = folder.path().join("image.toml").display().to_string();
    error.strip_prefix(&format!("{name}: ")).unwrap_or_else(|| panic!("{error}")).to_owned()
}

fn walk(machine: &Machine, gva: u64, kind: AccessKind) -> Option<Translation> {
    let snapshot = machine.vcpu(0).unwrap().latest();
    let access = Access::new(kind, Privilege::Exempt);
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

#[test]
fn an_image_is_walked() {
    let folder = folder();
    let machine = open(&folder, PLAIN);
    assert_eq!(machine.source().kind(), "image");
    assert_eq!(walk(&machine, 0x123, AccessKind::Read).map(|found| found.gpa.0), Some(0x2123));
    assert_eq!(walk(&machine, 0x1000, AccessKind::Read), None);
    let snapshot = machine.vcpu(0).unwrap().latest();
    assert_eq!(snapshot.run_state, RunState::Static);
    assert_eq!(snapshot.assumed, ["PAT=0x7040600070406"]);
    assert!(!machine.source().capabilities().can_set_registers);
}

#[test]
fn regions_may_share_a_file_lie_anywhere_and_be_read_only() {
    let folder = folder();
    std::fs::write(folder.path().join("odd"), [vec![0; 12], tables(0, 0x1_0000_0000)].concat()).unwrap();
    let text = PLAIN.replace("file = \"memory\"", "file = \"odd\"\noffset = 12");
    let text = format!(
        "{text}\n[[region]]\ngpa = 0x100000000\nsize = 0x1000\nfile = \"odd\"\noffset = 0x100c\nread_only = true\n"
    );
    // A table may come after the vCPUs: the order of tables is no matter.
    let machine = open(&folder, &text);
    let found = walk(&machine, 0x10, AccessKind::Read).unwrap();
    assert_eq!((found.gpa.0, found.backing()), (0x1_0000_0010, Backing::ReadOnly));
    assert!(machine.source().memory().blocks(), "offsets that are not at words are fetched");
}

#[test]
fn the_registers_are_those_of_the_description() {
    let folder = folder();
    let text = format!(
        "{PLAIN}rip = \"0xffffffff81000000\"\nr15 = \"18446744073709551615\"\npkru = 4\npat = \"0x0606060606060606\"\nrflags = 0x40246\nselectors = {{ cs = 0x33, gs = 7 }}\n"
    );
    let machine = open(&folder, &text);
    let snapshot = machine.vcpu(0).unwrap().latest();
    let registers = &snapshot.registers;
    assert_eq!((registers.rip, registers.r15, registers.rflags), (0xffff_ffff_8100_0000, u64::MAX, 0x40246));
    assert_eq!((registers.pkru, registers.pkrs, registers.cpl), (Some(4), None, 3));
    assert_eq!((registers.selectors.cs, registers.selectors.gs), (0x33, 7));
    assert_eq!(registers.pat, 0x0606_0606_0606_0606);
    assert!(snapshot.assumed.is_empty(), "{:?}", snapshot.assumed);
}

/// What was assumed when the image was made is assumed of the image, however often it is saved.
#[test]
fn what_was_assumed_stays_so() {
    let folder = folder();
    let machine = open(&folder, &format!("{PLAIN}pat = 0\nassumed = [\"EFER=0xd00\", \"PAT=0x0\"]\n"));
    let snapshot = machine.vcpu(0).unwrap().latest();
    assert_eq!(snapshot.assumed, ["EFER=0xd00", "PAT=0x0"]);
    assert_eq!(VcpuEntry::of(&snapshot).registers().1, snapshot.assumed);
}

#[test]
fn pdpte_registers_stand_in_for_memory() {
    let folder = folder();
    let pae = PLAIN.replace("efer = 0xd00", "efer = 0");
    // In memory the first PDPTE has bits set that only the other modes know.
    let machine = open(&folder, &pae);
    assert_eq!(walk(&machine, 0, AccessKind::Read), None);
    let machine = open(&folder, &format!("{pae}pdptes = [\"0x2001\", 0, 0, 0]\n"));
    let snapshot = machine.vcpu(0).unwrap().latest();
    assert_eq!(snapshot.walker.as_ref().unwrap().gva_walk().format().mode(), PagingMode::Pae);
    assert!(!snapshot.assumed.iter().any(|text| text.contains("PDPTE")), "{:?}", snapshot.assumed);
    // 0x2000 is the page directory now, 0x3000 the page table, whose first entry is the frame.
    assert_eq!(walk(&machine, 0x10, AccessKind::Read).map(|found| found.gpa.0), Some(0x2010));
}

#[test]
fn a_second_dimension_is_that_of_the_description() {
    let folder = folder();
    let walk = |text: &str| {
        let snapshot = open(&folder, text).vcpu(0).unwrap().latest();
        let walker = snapshot.walker.as_ref().unwrap();
        (walker.gva_walk().clone(), walker.ngpa_walk().cloned(), snapshot.nested)
    };
    let (own, none, off) = walk(PLAIN);
    assert_eq!((none, off), (None, NestedMode::Off));
    let cpu = open(&folder, PLAIN).vcpu(0).unwrap().latest().cpu;

    let ept = "[vcpu.nested.ept]\neptp = 0x505e\nmode_based_execute = true\ntables_written = true\n";
    let controls = EptControls { mode_based_execute: true, tables_written: true };
    let (first, second, mode) = walk(&format!("{PLAIN}{ept}"));
    assert_eq!(first, own, "the registers are L2's");
    assert_eq!(second, Some(NgpaWalk::ept(0x505e, &controls, &EptCapabilities::all(), &cpu).unwrap()));
    assert!(matches!(mode, NestedMode::Guest(_)));
    let (_, second, _) = walk(&format!("{PLAIN}{ept}capabilities = 0x204040\n"));
    let few = EptCapabilities::from_msr(0x20_4040);
    assert_eq!(second, Some(NgpaWalk::ept(0x505e, &controls, &few, &cpu).unwrap()));

    let npt = "nested.npt = { ncr3 = 0x5000, host_cr4 = 0x1020, host_efer = 0xd00, guest_mode_execute_trap = true }\n";
    let (first, second, mode) = walk(&format!("{PLAIN}{npt}nested.l2 = {{ cr3 = 0x1000 }}\n"));
    assert_eq!(first.root(), 0x1000);
    let host = ControlRegisters { cr0: 0x8001_0001, cr4: 0x1020, efer: 0xd00, ..Default::default() };
    let controls = NptControls { guest_mode_execute_trap: true };
    assert_eq!(second, Some(NgpaWalk::npt_with(0x5000, &host, &controls, &cpu).unwrap()));
    assert!(matches!(mode, NestedMode::WalkerOnly { l2, .. } if l2.cr3 == Some(0x1000)));
}

fn landmarks(names: &[String], description: &str) -> String {
    let landmark = |name: &String| {
        format!("[[landmark]]\nname = \"{name}\"\naddress = 0x1000\ndescription = \"{description}\"\n")
    };
    PLAIN.to_owned() + &names.iter().map(landmark).collect::<String>()
}

#[test]
fn what_cannot_be_is_refused_by_key() {
    let folder = folder();
    let replaced = |from: &str, to: &str| {
        assert!(PLAIN.contains(from));
        PLAIN.replace(from, to)
    };
    let second = "\n[[region]]\ngpa = 0x3000\nsize = 0x1000\nfile = \"memory\"\n";
    for (text, expected) in [
        (String::new(), "missing field `version`"),
        ("\0".to_owned(), "is no description of an image: line 1"),
        (replaced("version = 1", "version = 2"), "version: 2 is not known: 1 is the only one"),
        (format!("{PLAIN}assumed = [\"\\u001b[2J\"]\n"), "vcpu[0].assumed: at most 64 lines"),
        (format!("{PLAIN}assumed = [\"{}\"]\n", "x".repeat(257)), "vcpu[0].assumed: at most 64 lines"),
        (format!("{PLAIN}assumed = [{}]\n", "\"\",".repeat(65)), "vcpu[0].assumed: at most 64 lines"),
        (format!("{PLAIN}cr9 = 1\n"), "line 15: unknown field `cr9`"),
        (format!("colour = 1\n{PLAIN}"), "line 1: unknown field `colour`"),
        (replaced("gpa = 0", "gpa = 0\nsise = 1"), "unknown field `sise`"),
        (replaced("cr3 = 0\n", ""), "missing field `cr3`"),
        (replaced("cr3 = 0\n", "cr3 = -1\n"), "line 12: invalid value: integer `-1`"),
        (replaced("\"intel\"", "\"arm\""), "unknown variant `arm`"),
        (replaced("maxphyaddr = 46", "maxphyaddr = 60"), "cpu: "),
        (replaced("gpa = 0", "gpa = 0x800"), "region[0].gpa: 0x800 is not 4 KiB-aligned"),
        (
            replaced("size = 0x4000", "size = 0x4001"),
            "region[0].size: 0x4001 is not made of whole 4 KiB pages",
        ),
        (replaced("size = 0x4000", "size = 0"), "region[0].size: 0x0 is not made of whole 4 KiB pages"),
        (
            replaced("size = 0x4000", "size = \"0x8000000000000000\""),
            "region[0].size: 0x0+0x8000000000000000 does not fit into 46 bits",
        ),
        (
            replaced("size = 0x4000", "size = 9223372036854775808"),
            "region[0].size: 0x0+0x8000000000000000 does not fit",
        ),
        (
            replaced("gpa = 0", "gpa = \"0xfffffffffffff000\""),
            "region[0].size: 0xfffffffffffff000+0x4000 does not fit",
        ),
        (replaced("size = 0x4000", "size = 0x5000"), "region[0]: offset 0x0 and size 0x5000 end beyond "),
        (
            replaced("size = 0x4000", "size = 0x4000\noffset = \"0xfffffffffffff000\""),
            "region[0].offset: 0xfffffffffffff000 is beyond any file",
        ),
        (
            replaced("size = 0x4000", "size = 0x4000\noffset = 8"),
            "region[0]: offset 0x8 and size 0x4000 end beyond",
        ),
        (replaced("\"memory\"", "\"nothing\""), "region[0].file: "),
        (replaced("\"memory\"", "\".\""), "is not a regular file"),
        (replaced("\"memory\"", "\"\""), "region[0].file: is empty"),
        (format!("{PLAIN}{second}"), "region[0] and region[1] overlap: both have 0x3000"),
        (replaced("cr0 = 0x80050033", "cr0 = 0x80050032"), "vcpu[0]: "),
        (format!("{PLAIN}cpl = 4\n"), "vcpu[0].cpl: 4 is no privilege level"),
        (format!("{PLAIN}pkru = 0x100000000\n"), "vcpu[0].pkru: 0x100000000 has more than 32 bits"),
        (format!("{PLAIN}pdptes = [1, 2, 3]\n"), "line 15: "),
        (format!("{PLAIN}[vcpu.nested]\nl2 = {{ cr3 = 0 }}\n"), "vcpu[0].nested: has neither npt nor ept"),
        (format!("{PLAIN}[vcpu.nested.npt]\nncr3 = 0x5000\n"), "missing field `host_cr4`"),
        (format!("{PLAIN}[vcpu.nested.ept]\neptp = 0x5\n"), "vcpu[0].nested: EPT: EPTP"),
        (
            format!(
                "{PLAIN}[vcpu.nested.npt]\nncr3 = \"0x8000000000000000\"\nhost_cr4 = 32\nhost_efer = 0xd00\n"
            ),
            "vcpu[0].nested: NPT: nCR3",
        ),
        (
            format!(
                "{PLAIN}nested.ept.eptp = 0x505e\nnested.npt = {{ ncr3 = 0, host_cr4 = 32, host_efer = 0xd00 }}\n"
            ),
            "vcpu[0].nested: has npt and ept",
        ),
        (
            format!("{PLAIN}nested.ept.eptp = 0x505e\nnested.l2.cr0 = 0x80000000\n"),
            "vcpu[0].nested: L2's registers: CR0",
        ),
        (format!("{PLAIN}nested.ept.root = 0x505e\n"), "unknown field `root`"),
        (
            format!("{}\npdptes = [\"0x2007\", 0, 0, 0]\n", replaced("efer = 0xd00", "efer = 0")),
            "vcpu[0]: PDPTE",
        ),
        (PLAIN.split("[[vcpu]]").next().unwrap().to_owned(), "missing field `vcpu`"),
        (
            format!("of = \"{}\"\n{PLAIN}", "x".repeat(513)),
            "of: takes 513 bytes to show, where 512 are the most",
        ),
        (format!("of = \"{}\"\n{PLAIN}", "\\u202e".repeat(65)), "of: takes 520 bytes to show"),
        (landmarks(&["x".repeat(65)], ""), "landmark[0].name: takes 65 bytes to show, where 64 are the most"),
        (landmarks(&["a".into()], &"x".repeat(257)), "landmark[0].description: takes 257 bytes to show"),
        (
            landmarks(&["a".into(), "b".into(), "a".into()], ""),
            "landmark[2].name: landmark[0] is `a`, too: names are unique",
        ),
        (
            format!("vcpu = []\n{}", PLAIN.split("[[vcpu]]").next().unwrap()),
            "vcpu: there has to be at least one",
        ),
    ] {
        let problem = refused(&folder, &text);
        assert!(problem.contains(expected), "{problem}\n  wanted: {expected}\n  of: {text}");
        assert_eq!(problem.lines().count(), 1, "{problem}");
    }
    std::fs::write(folder.path().join("memory"), b"").unwrap();
    assert!(refused(&folder, PLAIN).contains("region[0].file: "), "an empty file");
}

#[test]
fn what_is_no_description_is_not_read_at_length() {
    let folder = folder();
    let path = folder.path().join("image.toml");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    let problem = spec(folder.path()).open().unwrap_err().to_string();
    assert!(problem.contains("1099511627776 bytes, where 4194304 are the most"), "{problem}");
    std::fs::write(&path, [0xff; 16]).unwrap();
    assert!(spec(folder.path()).open().unwrap_err().to_string().contains("is not UTF-8 text"));
}

/// A description with every key that there is.
fn full() -> Description {
    let number = Number(0x1000);
    let npt = NptEntry {
        ncr3: number,
        host_cr0: number,
        host_cr4: number,
        host_efer: number,
        guest_mode_execute_trap: true,
    };
    let ept = EptEntry { eptp: number, mode_based_execute: true, tables_written: true, capabilities: number };
    let l2 = L2Entry {
        cr0: Some(number),
        cr3: Some(number),
        cr4: Some(number),
        efer: Some(number),
        pat: Some(number),
    };
    // Registers that it does not name are written in any case.
    let vcpu = VcpuEntry {
        pat: Some(number),
        pkru: Some(number),
        pkrs: Some(number),
        cpl: Some(0),
        pdptes: Some([number; 4]),
        assumed: vec!["EFER=0xd01".to_owned()],
        selectors: Selectors { cs: 1, ss: 1, ds: 1, es: 1, fs: 1, gs: 1 },
        nested: Some(NestedEntry { npt: Some(npt), ept: Some(ept), l2: Some(l2) }),
        ..VcpuEntry::default()
    };
    Description {
        version: Description::VERSION,
        of: Some("a guest".to_owned()),
        cpu: Cpu { vendor: VendorName::Amd, maxphyaddr: 46, gib_pages: true, encryption_bit: Some(51) },
        regions: vec![MemoryRegion {
            gpa: number,
            size: number,
            file: "memory".to_owned(),
            offset: number,
            read_only: true,
        }],
        vcpus: vec![vcpu],
        landmarks: vec![LandmarkEntry {
            name: "here".to_owned(),
            address: number,
            description: "what is here".to_owned(),
        }],
    }
}

/// The keys of a table and of all in it.
fn keys(table: &toml::Table) -> BTreeSet<&str> {
    fn inner(value: &toml::Value) -> BTreeSet<&str> {
        match value {
            toml::Value::Table(table) => keys(table),
            toml::Value::Array(values) => values.iter().flat_map(inner).collect(),
            _ => BTreeSet::new(),
        }
    }
    table.iter().flat_map(|(key, value)| inner(value).into_iter().chain([key.as_str()])).collect()
}

/// Whether a text has `key` as a key: with a value, with keys behind it, or as the name of a table.
fn has_key(text: &str, key: &str) -> bool {
    text.match_indices(key).any(|(at, _)| {
        let (before, behind) = (&text[..at], &text[at + key.len()..]);
        !before.ends_with(|c: char| c.is_alphanumeric() || c == '_')
            && [" = ", ".", "]"].iter().any(|end| behind.starts_with(end))
    })
}

#[test]
fn the_example_has_every_key() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/image-example.toml");
    let example = std::fs::read_to_string(example).unwrap();
    let full: toml::Table = full().to_toml().unwrap().parse().unwrap();
    let keys = keys(&full);
    assert!(keys.len() >= 70 && keys.contains("host_efer"), "{keys:?}");
    let missing: Vec<_> = keys.into_iter().filter(|key| !has_key(&example, key)).collect();
    assert!(missing.is_empty(), "deploy/image-example.toml says nothing of {missing:?}");
}

/// The example of `deploy/` opens, with files of the sizes that it names.
#[test]
fn the_example_opens() {
    let folder = tempfile::tempdir().unwrap();
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/image-example.toml");
    std::fs::copy(example, folder.path().join("image.toml")).unwrap();
    for (name, size) in [("guest.mem", 0xc00_0000), ("bios.bin", 0x4_0000)] {
        std::fs::File::create(folder.path().join(name)).unwrap().set_len(size).unwrap();
    }
    let machine = spec(folder.path()).open().unwrap();
    let memory = machine.source().memory();
    assert_eq!(memory.regions().len(), 3);
    assert_eq!(memory.size(), 0xc04_0000);
    assert_eq!(machine.source().vcpus().len(), 1);
    assert_eq!(machine.source().landmarks().len(), 1);
    let snapshot = machine.vcpu(0).unwrap().latest();
    assert_eq!(snapshot.registers.rip, 0xffff_ffff_81a3_c0f4);
    assert_eq!(snapshot.walker.as_ref().unwrap().gva_walk().format().mode(), PagingMode::FourLevel);

    // So does what it says about an L2.
    let text = std::fs::read_to_string(folder.path().join("image.toml")).unwrap();
    for (second, overlaid) in [("ept", false), ("npt", false), ("ept", true), ("npt", true)] {
        let text = text.replace(&format!("# nested.{second}"), &format!("nested.{second}"));
        let text = if overlaid { text.replace("# nested.l2", "nested.l2") } else { text };
        let snapshot = open(&folder, &text).vcpu(0).unwrap().latest();
        assert!(snapshot.walker.as_ref().unwrap().ngpa_walk().is_some(), "{second}");
        assert_eq!(matches!(snapshot.nested, NestedMode::WalkerOnly { .. }), overlaid);
    }

    // And each of the other keys that it has in comments.
    let mut opened = 0;
    for (at, _) in text.match_indices("\n# ") {
        let (before, line) = (&text[..=at], &text[at + 3..]);
        let is_key = |key: &str| key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if line.split_once(" = ").is_some_and(|(key, _)| is_key(key)) {
            open(&folder, &format!("{before}{line}"));
            opened += 1;
        }
    }
    assert!(opened > 18, "{opened}");
}
