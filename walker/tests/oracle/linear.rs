//! From a linear address to the mode that translates it, and on to the page.
//!
//! Intel SDM volume 3, "Paging Modes and Control Bits" and "Paging-Mode Enabling".

use super::structures::{Mapped, View};
use super::{Dimension, Granted, Kind, Page, Physical, Purpose, Refusal, Size, Walk, bit, bits, number};

impl<P: Physical> Walk<'_, P> {
    pub(super) fn linear_address(&mut self) -> Result<Page, Refusal> {
        let registers = self.system.registers;

        let long = registers.cr0_pg() && registers.efer_lma();
        let input = if long {
            // In long mode CR4.LA57 selects 5-level paging.
            self.canonical_address(if registers.cr4_la57() { 57 } else { 48 })?
        } else {
            // "Address Calculations in 64-Bit Mode": outside it linear addresses have 32 bits.
            bits(self.request.linear, 31, 0)
        };
        // Whatever happens from here on, CR2 tells the address without metadata, and without what is no part of it.
        self.request.linear = input;

        // "Paging Modes": with CR0.PG = 0 linear addresses are treated as physical addresses.
        if !registers.cr0_pg() {
            return self.unpaged(input);
        }

        let view = View {
            dimension: Dimension::Guest,
            registers,
            cpu: self.system.cpu,
            input,
            purpose: Purpose::Final,
            // A write to a shadow stack finds the dirty bit set. An exempt one may not, and leaves it clear, by the project's own rule:
            // it would make a shadow stack of a page.
            writes: self.request.kind == Kind::Write,
            first_visit: 0,
        };
        // "4-Level Paging and 5-Level Paging", use of CR3: bits 51:12 are the table's address; the bits below are a PCID, or
        // PWT and PCD, and not part of it.
        let root = view.address(registers.cr3, 51, 12);
        // "Paging-Mode Enabling": outside long mode CR4.PAE selects PAE or 32-bit paging.
        let mapped = match (long, registers.cr4_pae()) {
            (true, _) if registers.cr4_la57() => self.five_level(&view, root)?,
            (true, _) => self.four_level(&view, root)?,
            (false, true) => self.pae(&view, registers.cr3)?,
            (false, false) => self.two_level(&view, registers.cr3)?,
        };

        // "Determination of Access Rights": after the translation, by all the entries that control it.
        self.linear_access_allowed(&view, &mapped)?;
        self.flags_can_be_set(&view)?;
        self.reached(mapped)
    }

    /// No translation in the guest.
    fn unpaged(&mut self, physical: u64) -> Result<Page, Refusal> {
        self.reached(Mapped {
            address: physical,
            entry: 0,
            size: Size::Unpaged,
            granted: Granted::EVERYTHING,
        })
    }

    /// What lies behind the address that the guest's tables gave.
    fn reached(&mut self, mapped: Mapped) -> Result<Page, Refusal> {
        let mut page = (mapped.address, mapped.granted, None, None);
        if self.system.second.is_some() {
            // APM, "Nested Paging": the guest physical address is translated by the nested tables, for the access itself.
            let behind = self.through_second(mapped.address, Purpose::Final, mapped.granted)?;
            let granted = self.by_both_dimensions(mapped.granted, behind.granted);
            page = (behind.address, granted, Some((mapped.address, behind.size)), self.ept_type(&behind));
        }
        let (physical, granted, nested, ept_type) = page;
        let paged = mapped.size != Size::Unpaged;
        Ok(Page {
            physical,
            nested,
            entry: mapped.entry,
            size: mapped.size,
            granted,
            // "Protection Keys": bits 62:59 of the entry that maps the page.
            key: number(mapped.entry, 62, 59) as u8,
            accessed: bit(mapped.entry, 5),
            dirty: bit(mapped.entry, 6),
            global: bit(mapped.entry, 8),
            pat_index: paged.then(|| pat_index(mapped.entry, mapped.size)),
            ept_type,
            nature: self.memory.nature(physical),
        })
    }
}

/// "Determining the Memory Type of a Page": 4*PAT + 2*PCD + PWT; PAT is bit 7 of a PTE and bit 12 of a larger leaf.
fn pat_index(leaf: u64, size: Size) -> usize {
    let pat = if size == Size::FourKib { bit(leaf, 7) } else { bit(leaf, 12) };
    4 * usize::from(pat) + 2 * usize::from(bit(leaf, 4)) + usize::from(bit(leaf, 3))
}
