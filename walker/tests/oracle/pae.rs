//! PAE paging.
//!
//! Intel SDM volume 3, "PAE Paging", with "PDPTE Registers"; AMD APM volume 2, "PAE Paging", and "Nested Paging" for PDPTEs that
//! a nested guest's walk reads from memory.

use super::structures::{Mapped, Read, View};
use super::{Dimension, Found, Granted, Physical, Refusal, Size, Walk, bit, bits, number};

impl<P: Physical> Walk<'_, P> {
    /// `cr3` as it is: bits 31:5 are the page-directory-pointer table's address.
    pub(super) fn pae(&mut self, view: &View, cr3: u64) -> Result<Mapped, Refusal> {
        let pdpte = self.pdpte(view, bits(cr3, 31, 5), number(view.input, 31, 30))?;

        // A PDE is selected by bits 29:21. With PS = 1, whatever CR4.PSE, it maps a 2-MByte page. PDPTEs have no U/S, R/W or XD.
        let pde = Read::numbered(2, view.address(pdpte.value, 51, 12), number(view.input, 29, 21), 8);
        let pde = self.read_entry(view, pde, Granted::EVERYTHING)?;
        self.must_be_present(view, pde)?;
        let mut wrong = reserved_always(view, pde.value);
        if bit(pde.value, 7) {
            wrong |= bits(pde.value, 20, 13);
        }
        let granted = grants(pde.value);
        self.must_be_clear(view, pde, wrong, granted)?;
        if bit(pde.value, 7) {
            self.visited(view, pde, granted, Found::Leaf);
            let address = view.address(pde.value, 51, 21) | bits(view.input, 20, 0);
            return Ok(Mapped { address, entry: pde.value, size: Size::TwoMib, granted });
        }
        self.refers(view, pde, granted)?;

        // A PTE is selected by bits 20:12.
        let pte = Read::numbered(1, view.address(pde.value, 51, 12), number(view.input, 20, 12), 8);
        let pte = self.read_entry(view, pte, granted)?;
        self.must_be_present(view, pte)?;
        let granted = granted.and(grants(pte.value));
        self.must_be_clear(view, pte, reserved_always(view, pte.value), granted)?;
        self.visited(view, pte, granted, Found::Leaf);
        let address = view.address(pte.value, 51, 12) | bits(view.input, 11, 0);
        Ok(Mapped { address, entry: pte.value, size: Size::FourKib, granted })
    }

    /// A PDPTE is selected by bits 31:30.
    fn pdpte(&mut self, view: &View, table: u64, index: u64) -> Result<Read, Refusal> {
        // The guest's are in the PDPTE registers, if those are known. A register never holds reserved bits with P set: loading it
        // raises #GP(0) instead. With P clear there is no mapping, and the other bits are ignored.
        let registers = self.system.pdpte_registers.filter(|_| view.dimension == Dimension::Guest);
        if let Some(registers) = registers {
            let pdpte = Read::register(3, index, registers[index as usize]);
            self.must_be_present(view, pdpte)?;
            assert_eq!(reserved_in_pdpte(view, pdpte.value), 0, "no CPU loads such a register");
            self.refers(view, pdpte, Granted::EVERYTHING)?;
            return Ok(pdpte);
        }
        // "Nested Paging": the nested walk of a PAE guest, and a PAE host's own, read them from memory each time. There a reserved
        // bit is a fault like that of any other entry. Bit 5, where others have A, is reserved.
        let pdpte = Read::numbered(3, table, index, 8).with_flags(None);
        let pdpte = self.read_entry(view, pdpte, Granted::EVERYTHING)?;
        self.must_be_present(view, pdpte)?;
        self.must_be_clear(view, pdpte, reserved_in_pdpte(view, pdpte.value), Granted::EVERYTHING)?;
        self.refers(view, pdpte, Granted::EVERYTHING)?;
        Ok(pdpte)
    }
}

/// R/W is bit 1, U/S bit 2, XD bit 63.
fn grants(entry: u64) -> Granted {
    Granted { read: true, write: bit(entry, 1), user: bit(entry, 2), execute: !bit(entry, 63) }
}

/// "Linear-Address Translation with PAE Paging": bits 62:MAXPHYADDR of a PDE and a PTE, and bit 63 where EFER.NXE = 0.
fn reserved_always(view: &View, entry: u64) -> u64 {
    let mut wrong = view.beyond_the_cpu(entry, 62);
    if !view.registers.efer_nxe() {
        wrong |= bits(entry, 63, 63);
    }
    wrong
}

/// "Format of a PAE Page-Directory-Pointer-Table Entry": bits 2:1, 8:5 and 63:MAXPHYADDR.
fn reserved_in_pdpte(view: &View, entry: u64) -> u64 {
    bits(entry, 2, 1) | bits(entry, 8, 5) | view.beyond_the_cpu(entry, 63)
}
