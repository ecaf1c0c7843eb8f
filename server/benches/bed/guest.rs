//! Guests to translate: 4-level tables in plain memory, made to be cold or hot.

use std::sync::Arc;

use pagewalk::{Access, AccessKind, CpuProfile, Gpa, Privilege, Vendor};
use pagewalk_proto::v1;
use pagewalkd::machine::{Capabilities, GuestRam, Health, LocalSource, Machine, Region};
use pagewalkd::vcpu::{PlainBackend, Registers, Vcpu};

/// Addresses of a batch.
pub(crate) const BATCH: usize = 65_536;
/// Different batches of a guest, so that a round does not find in the cache what it read just before.
pub(crate) const BATCHES: usize = 16;

const BASE: u64 = 0xffff_8000_0000_0000;
const PLAIN: u64 = 0x63;

/// A shape of page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// 512 pages in one table.
    Hot,
    /// As many pages as 128 MiB of PTEs map: PTEs miss the cache.
    Dense,
    /// Four pages in each of 2^18 tables, one PDE a cache line: PTEs and PDEs miss.
    Sparse,
}

impl Shape {
    pub(crate) const ALL: [Self; 3] = [Self::Hot, Self::Dense, Self::Sparse];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Hot => "hot",
            Self::Dense => "dense",
            Self::Sparse => "sparse",
        }
    }

    pub(crate) fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|shape| shape.name() == name)
    }

    /// Number of L1 tables, PDE slots from one to the next, and pages in each table.
    fn tables(self) -> (u64, u64, u64) {
        match self {
            Self::Hot => (1, 1, 512),
            Self::Dense => (1 << 15, 1, 512),
            Self::Sparse => (1 << 18, 8, 4),
        }
    }

    /// Some address that is mapped.
    fn address(self, seed: u64) -> u64 {
        let (tables, stride, pages) = self.tables();
        let random = scramble(seed);
        let table = random % tables;
        BASE + ((table * stride) << 21) + (slot(table, (random >> 32) % pages, pages) << 12) + (random >> 52)
    }

    /// Batch number `at` of this shape.
    pub(crate) fn batch(self, at: usize) -> Vec<u64> {
        let first = (at % BATCHES * BATCH) as u64;
        (first..first + BATCH as u64).map(|seed| self.address(seed)).collect()
    }

    /// Bytes of all its tables.
    pub(crate) fn size(self) -> u64 {
        let (tables, stride, _) = self.tables();
        let directories = (tables * stride).div_ceil(512);
        (tables + directories + directories.div_ceil(512) + 2) * 4096
    }

    /// Writes the tables, from `origin` on, and gives the root. Into several memories at once, so that the host's pages for
    /// them are taken from the same places.
    pub(crate) fn write(self, memories: &[&GuestRam], origin: u64) -> u64 {
        let (tables, stride, pages) = self.tables();
        let directories = (tables * stride).div_ceil(512);
        let write = |gpa: u64, entry: u64| {
            memories.iter().for_each(|memory| memory.write_u64(Gpa(gpa), entry).unwrap());
        };
        let directory = origin + tables * 4096;
        let pointers = directory + directories * 4096;
        let root = origin + self.size() - 4096;
        for table in 0..tables {
            for page in 0..pages {
                let frame = origin + scramble(table * pages + page) % tables * 4096;
                write(origin + table * 4096 + slot(table, page, pages) * 8, frame | PLAIN);
            }
            write(directory + table * stride * 8, (origin + table * 4096) | PLAIN);
        }
        for at in 0..directories {
            write(pointers + at * 8, (directory + at * 4096) | PLAIN);
        }
        for at in 0..directories.div_ceil(512) {
            write(root + (256 + at) * 8, (pointers + at * 4096) | PLAIN);
        }
        root
    }

    pub(crate) fn machine(self) -> Machine {
        let ram =
            GuestRam::allocate(&[Region { start: Gpa(0), size: self.size(), read_only: false }]).unwrap();
        let root = self.write(&[&ram], 0);
        let registers = Registers {
            cr0: 0x8000_0011 | 1 << 16,
            cr3: root,
            cr4: 0x20,
            efer: 0xd00,
            pat: 0x0007_0406_0007_0406,
            ..Registers::default()
        };
        let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 46, gib_pages: true, encryption_bit: None };
        machine(self.name(), ram, registers, cpu)
    }

    fn vcpu(self) -> Option<v1::VcpuRef> {
        Some(v1::VcpuRef { machine: self.name().to_owned(), vcpu: 0 })
    }

    pub(crate) fn single(self, at: usize) -> v1::TranslateRequest {
        v1::TranslateRequest {
            vcpu: self.vcpu(),
            address: Some(v1::Address { value: Some(v1::address::Value::Number(self.address(at as u64))) }),
            access: read(),
            ..Default::default()
        }
    }

    pub(crate) fn requests(self) -> Vec<v1::BatchTranslateRequest> {
        (0..BATCHES)
            .map(|at| v1::BatchTranslateRequest {
                head: v1::BatchTranslateRequestHead {
                    vcpu: self.vcpu(),
                    access: read(),
                    ..Default::default()
                },
                column: self.batch(at).into_iter().collect(),
            })
            .collect()
    }
}

pub(crate) fn read() -> Option<v1::Access> {
    Some(v1::Access {
        kind: v1::AccessKind::Read.into(),
        privilege: v1::Privilege::Supervisor.into(),
        ..Default::default()
    })
}

/// Which of its 512 entries a table uses for its page number `page`.
fn slot(table: u64, page: u64, pages: u64) -> u64 {
    if pages == 512 { page } else { page * (512 / pages) + scramble(table) % (512 / pages) }
}

/// A fixed pseudo-random function.
fn scramble(seed: u64) -> u64 {
    let mut mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// The same batches without the wire: nanoseconds an address.
pub(crate) fn in_process(machine: &Machine, batches: &[Vec<u64>]) -> f64 {
    let walker = machine.vcpu(0).unwrap().latest().walker.clone().unwrap();
    let memory = machine.source().memory();
    let access = Access::new(AccessKind::Read, Privilege::Supervisor);
    let mut words = vec![0; BATCH];
    let start = std::time::Instant::now();
    for gvas in batches {
        walker.translate_batch(memory.as_ref(), &access, gvas, &mut words, &mut |at, fault| {
            panic!("{at}: {fault:?}");
        });
        std::hint::black_box(&mut words);
    }
    start.elapsed().as_nanos() as f64 / (batches.len() * BATCH) as f64
}

/// A machine over this memory, that executes nothing.
pub(crate) fn machine(id: &str, memory: GuestRam, registers: Registers, cpu: CpuProfile) -> Machine {
    let vcpu = Vcpu::spawn(id, 0, cpu, PlainBackend::new(registers, "a bench")).unwrap();
    let source = LocalSource {
        kind: "bench",
        description: "page tables for a bench".to_owned(),
        vcpus: vec![vcpu],
        memory: Arc::new(memory),
        capabilities: Capabilities {
            live: false,
            can_pause: false,
            can_step: false,
            can_set_registers: true,
            can_write_memory: true,
            ends_when_detached: true,
            real_nested: false,
            nested_reason: "nothing executes here".to_owned(),
        },
        cpu,
        landmarks: Vec::new(),
        health: Health::default(),
    };
    Machine::new(id, Arc::new(source))
}
