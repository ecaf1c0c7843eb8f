//! The tables by which a guest finds its CPUs and interrupt controllers, and how to reset and switch off the machine.
//!
//! ACPI Specification, "Root System Description Pointer", "Fixed ACPI Description Table", "Multiple APIC Description Table"
//! and "Sleeping States". Of fixed hardware there is the port that switches off; the registers beside it read as all ones.
//! Line N of the ISA bus is input N of the one I/O APIC, as KVM wires them.

use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use pagewalk::Gpa;

use super::pc::{KEYBOARD_COMMAND, PM1_CONTROL, PM1_EVENTS, PULSE_RESET};
use crate::machine::memory::{GuestRam, MemoryError};

/// Where guests look for the pointer to all tables: no memory of theirs.
pub(super) const AT: u64 = 0xe_0000;

const MAKER: [u8; 6] = *b"PGWALK";
const MODEL: [u8; 8] = *b"PAGEWALK";
const REVISION: u32 = 1;
/// The FACS has to lie at a multiple of its size, and the others may.
const ALIGNMENT: usize = 64;
const LOCAL_APIC_AT: u32 = 0xfee0_0000;
const IO_APIC_AT: u32 = 0xfec0_0000;
const SCI_LINE: u16 = 9;
/// There is neither VGA nor a clock that a battery keeps.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 5;
/// There are PICs too.
const PCAT_COMPATIBLE: u32 = 1;

/// Writes the tables of a machine with this many vCPUs, whose APIC ids are their indices.
pub(super) fn write(memory: &GuestRam, cpus: u8) -> Result<(), MemoryError> {
    memory.write(Gpa(AT), &bytes(cpus))
}

fn bytes(cpus: u8) -> Vec<u8> {
    // The pointer comes first, and says where the list of tables is, which is known last.
    let mut all = vec![0; ALIGNMENT];
    let facs = place(&mut all, &FACS::new());
    let dsdt = place(&mut all, &dsdt());
    let fadt = place(&mut all, &fadt(facs, dsdt));
    let madt = place(&mut all, &madt(cpus));
    let mut list = XSDT::new(MAKER, MODEL, REVISION);
    list.add_entry(fadt);
    list.add_entry(madt);
    let list = place(&mut all, &list);
    let mut pointer = Vec::new();
    Rsdp::new(MAKER, list).to_aml_bytes(&mut pointer);
    all.splice(..pointer.len(), pointer);
    all
}

/// Adds a table, and gives its address.
fn place(all: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    let at = all.len().next_multiple_of(ALIGNMENT);
    all.resize(at, 0);
    table.to_aml_bytes(all);
    AT + at as u64
}

/// Nothing but how to switch off.
fn dsdt() -> Sdt {
    let zero = 0_u8;
    let mut code = Vec::new();
    let states = aml::Package::new(vec![&zero, &zero, &zero, &zero]);
    aml::Name::new("_S5_".into(), &states).to_aml_bytes(&mut code);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, MAKER, MODEL, REVISION);
    dsdt.append_slice(&code);
    dsdt
}

fn fadt(facs: u64, dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(MAKER, MODEL, REVISION)
        .firmware_ctrl_32(facs as u32)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = SCI_LINE.into();
    fadt.pm1a_evt_blk = u32::from(PM1_EVENTS).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(PM1_CONTROL).into();
    fadt.pm1_cnt_len = 2;
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, KEYBOARD_COMMAND.into());
    fadt.reset_value = PULSE_RESET;
    fadt.finalize()
}

fn madt(cpus: u8) -> Sdt {
    let mut entries = Vec::new();
    entries.extend(LOCAL_APIC_AT.to_le_bytes());
    entries.extend(PCAT_COMPATIBLE.to_le_bytes());
    for id in 0..cpus {
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut entries);
    }
    IoApic::new(cpus, IO_APIC_AT, 0).to_aml_bytes(&mut entries);
    let mut madt = Sdt::new(*b"APIC", 36, 3, MAKER, MODEL, REVISION);
    madt.append_slice(&entries);
    madt
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::machine::kvm::VCPUS_MAX;

    /// The table at an address, by the length that it gives itself; its bytes add up to zero.
    fn table(all: &[u8], at: u64) -> &[u8] {
        let bytes = &all[(at - AT) as usize..];
        let length = u32::from_le_bytes(*bytes[4..].first_chunk().unwrap()) as usize;
        assert_eq!(bytes[..length].iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        &bytes[..length]
    }

    #[test]
    fn every_table_is_found_from_the_pointer() {
        for cpus in 1..=VCPUS_MAX as u8 {
            let all = bytes(cpus);
            assert!(AT + all.len() as u64 <= 0x10_0000);
            assert_eq!(&all[..8], b"RSD PTR ");
            assert_eq!(all[..20].iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            let list = table(&all, u64::from_le_bytes(*all[24..].first_chunk().unwrap()));
            assert_eq!(&list[..4], b"XSDT");
            let entries: Vec<_> = list[36..]
                .chunks_exact(8)
                .map(|entry| table(&all, u64::from_le_bytes(entry.try_into().unwrap())))
                .collect();
            let [fadt, madt] = entries[..] else { panic!("{} tables", entries.len()) };
            assert_eq!((&fadt[..4], &madt[..4]), (&b"FACP"[..], &b"APIC"[..]));
            let facs = u32::from_le_bytes(*fadt[36..].first_chunk().unwrap());
            assert_eq!((facs % 64, &all[(u64::from(facs) - AT) as usize..][..4]), (0, &b"FACS"[..]));
            let dsdt = table(&all, u64::from_le_bytes(*fadt[140..].first_chunk().unwrap()));
            assert_eq!((&dsdt[..4], &dsdt[36..41]), (&b"DSDT"[..], &b"\x08_S5_"[..]));
            assert_eq!(fadt[116..129], [1, 8, 0, 1, 0x64, 0, 0, 0, 0, 0, 0, 0, 0xfe]);
            // Eight bytes for each CPU, twelve for the I/O APIC.
            assert_eq!(madt.len(), 44 + usize::from(cpus) * 8 + 12);
            let ids: Vec<u8> = madt[44..].chunks_exact(8).take(cpus.into()).map(|entry| entry[3]).collect();
            assert_eq!(ids, (0..cpus).collect::<Vec<_>>());
        }
    }
}
