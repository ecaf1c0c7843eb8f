//! A guest that gcc compiled builds page tables of its own; we translate through them and compare with what it intended.
#![allow(clippy::unwrap_used, clippy::print_stdout)]
#[allow(dead_code)]
mod kvm_bed;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use kvm_bed::{block_on, soon, write_file};
use libtest_mimic::Failed;
use pagewalk::{Access, AccessKind, FaultKind, Gpa, Gva, Memory, PageSize, Privilege};
use pagewalkd::machine::MachineSpec;
use pagewalkd::vcpu::RunState;

fn main() -> ExitCode {
    kvm_bed::main(&[("translates_through_the_tables_of_a_compiled_guest", translates)])
}

/// Builds 4-level tables with 4 KiB and 2 MiB leaves, writes down what each address is to mean, switches to them, touches
/// some, and halts with the notes in RAX and their number in RBX.
const GUEST: &str = r#"
typedef unsigned long u64;
enum { P = 1, W = 2, U = 4, A = 32, D = 64, PS = 128 };
#define NX (1ul << 63)

struct note { u64 gva, gpa, size, flags; };

static u64 tables[16][512] __attribute__((aligned(4096)));
static unsigned next_table;
static struct note notes[128];
static unsigned noted;

static u64 *table_below(u64 *table, unsigned index) {
    if (!(table[index] & P))
        table[index] = (u64)tables[++next_table] | P | W | U;
    return (u64 *)(table[index] & 0x000ffffffffff000ul);
}

static void map(u64 gva, u64 gpa, u64 size, u64 flags) {
    u64 *pdpt = table_below(tables[0], gva >> 39 & 511);
    u64 *pd = table_below(pdpt, gva >> 30 & 511);
    if (size == 1ul << 21)
        pd[gva >> 21 & 511] = gpa | PS | flags;
    else
        table_below(pd, gva >> 21 & 511)[gva >> 12 & 511] = gpa | flags;
    notes[noted++] = (struct note){ gva, gpa, size, flags };
}

void _start(void) {
    /* The code, its stack and its notes stay where they are. */
    map(0, 0, 1ul << 21, P | W);
    map(1ul << 21, 1ul << 21, 1ul << 21, P | W);
    for (u64 i = 0; i < 64; i++) {
        u64 flags = (i & 1 ? P : 0) | (i & 2 ? W : 0) | (i & 4 ? U : 0) | (i & 8 ? NX : 0);
        map(0xffffc90000000000ul + i * 0x1000, 0x800000 + (63 - i) * 0x3000, 0x1000, flags);
    }
    for (u64 i = 0; i < 8; i++) {
        u64 flags = P | (i & 1 ? W : 0) | (i & 2 ? U : 0) | (i & 4 ? NX : 0);
        map(0x00007f0000000000ul + i * (1ul << 21), (i + 8) << 21, 1ul << 21, flags);
    }
    __asm__ volatile("mov %0, %%cr3" ::"r"(tables[0]) : "memory");
    /* Present, writable, supervisor: the accessed and dirty bits become real. */
    *(volatile u64 *)0xffffc90000003000ul = 0x1122334455667788ul;
    __asm__ volatile("1: hlt; jmp 1b" ::"a"(notes), "b"((u64)noted) : "memory");
    __builtin_unreachable();
}
"#;

fn compile() -> PathBuf {
    let source = write_file("guest.c", GUEST.as_bytes());
    let output = source.with_extension("elf");
    let flags = "-m64 -O2 -Wall -Werror -ffreestanding -nostdlib -static -no-pie -mno-red-zone -mgeneral-regs-only \
                 -fno-stack-protector -fcf-protection=none -Wl,-Ttext-segment=0x100000 -Wl,--build-id=none";
    let gcc = Command::new("gcc")
        .args(flags.split_whitespace())
        .arg("-o")
        .arg(&output)
        .arg(&source)
        .output()
        .unwrap();
    assert!(gcc.status.success(), "{}", String::from_utf8_lossy(&gcc.stderr));
    std::fs::remove_file(source).unwrap();
    output
}

fn translates() -> Result<(), Failed> {
    let file = compile();
    let spec = format!("kvm:elf={},mem=64M,cpus=1", file.display());
    let machine = spec.parse::<MachineSpec>().unwrap().open();
    std::fs::remove_file(&file)?;
    let machine = machine?;
    let vcpu = machine.vcpu(0)?;
    let entered = vcpu.latest().registers.cr3;
    let end = soon();
    let halted = loop {
        let snapshot = block_on(vcpu.sync(soon()))?;
        if snapshot.run_state == RunState::Halted {
            break snapshot;
        }
        assert!(Instant::now() < end && !snapshot.run_state.is_final(), "{snapshot:?}");
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_ne!(halted.registers.cr3, entered, "the guest runs on its own tables");
    let memory = &*machine.source().memory();
    let walker = halted.walker.as_ref().unwrap();
    let (notes, count) = (halted.registers.rax, halted.registers.rbx);
    assert_eq!(count, 2 + 64 + 8);

    let (mut pages, mut faults) = (0, 0);
    for index in 0..count {
        let word = |field: u64| memory.load_u64(Gpa(notes + index * 32 + field * 8)).unwrap();
        let (gva, gpa, size, flags) = (word(0), word(1), word(2), word(3));
        let allows = |bit: u64| flags & bit != 0;
        for offset in [0, 8, size / 2, size - 1] {
            for (kind, privilege) in [
                (AccessKind::Read, Privilege::Supervisor),
                (AccessKind::Write, Privilege::Supervisor),
                (AccessKind::Fetch, Privilege::Supervisor),
                (AccessKind::Read, Privilege::User),
                (AccessKind::Write, Privilege::User),
                (AccessKind::Fetch, Privilege::User),
            ] {
                let present = allows(1);
                let user = privilege == Privilege::User;
                let refused = !present
                    || (user && !allows(4))
                    || (kind == AccessKind::Write && !allows(2))
                    || (kind == AccessKind::Fetch && allows(1 << 63));
                let found = walker.translate(memory, Gva(gva + offset), &Access::new(kind, privilege));
                let what = format!("{:#x} {flags:#x} {kind:?} by {privilege:?}: {found:?}", gva + offset);
                if refused {
                    let code = u32::from(present)
                        | u32::from(kind == AccessKind::Write) << 1
                        | u32::from(user) << 2
                        | u32::from(kind == AccessKind::Fetch) << 4;
                    assert_eq!(found.unwrap_err().kind, FaultKind::PageFault { error_code: code }, "{what}");
                    faults += 1;
                } else {
                    let page = found.unwrap_or_else(|_| panic!("{what}"));
                    assert_eq!(page.gpa, Gpa(gpa + offset), "{what}");
                    let wanted = if size == 4096 { PageSize::Size4K } else { PageSize::Size2M };
                    assert_eq!(page.page_size(), wanted, "{what}");
                    pages += 1;
                }
            }
        }
    }
    println!("compiled guest: {pages} translations and {faults} faults as intended");
    assert!(pages > 500 && faults > 500, "{pages} {faults}");

    let read = Access::new(AccessKind::Read, Privilege::Supervisor);
    let written = walker.translate(memory, Gva(0xffff_c900_0000_3000), &read).unwrap();
    assert!(written.accessed() && written.dirty(), "the guest wrote there: {written:?}");
    assert_eq!(
        memory.load_u64(written.gpa),
        Some(0x1122_3344_5566_7788),
        "and what it wrote lies where we say"
    );
    let untouched = walker.translate(memory, Gva(0xffff_c900_0000_7000), &read).unwrap();
    assert!(!untouched.accessed() && !untouched.dirty(), "{untouched:?}");
    let nowhere = walker.translate(memory, Gva(0xffff_c900_0010_0000), &read).unwrap_err();
    assert_eq!((nowhere.kind, nowhere.level), (FaultKind::PageFault { error_code: 0 }, 1));
    Ok(())
}
