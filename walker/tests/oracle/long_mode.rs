//! 4-level and 5-level paging.
//!
//! Intel SDM volume 3, "4-Level Paging and 5-Level Paging", with its tables "Format of a PML5 Entry ..." to "Format of a
//! Page-Table Entry ..."; AMD APM volume 2, "Long-Mode Page Translation". NPT uses the same structures ("Nested Paging":
//! the nested tables are in the format of the host's paging mode).

use super::structures::{Mapped, Read, View};
use super::{Found, Granted, Physical, Refusal, Size, Walk, bit, bits, number};

impl<P: Physical> Walk<'_, P> {
    pub(super) fn five_level(&mut self, view: &View, root: u64) -> Result<Mapped, Refusal> {
        // A PML5E is selected by bits 56:48 of the linear address.
        let pml5e = self.read_entry(
            view,
            Read::numbered(5, root, number(view.input, 56, 48), 8),
            Granted::EVERYTHING,
        )?;
        self.must_be_present(view, pml5e)?;
        let wrong = reserved_always(view, pml5e.value) | reserved_in_pml4e_and_pml5e(view, pml5e.value);
        let granted = grants(pml5e.value);
        self.must_be_clear(view, pml5e, wrong, granted)?;
        self.refers(view, pml5e, granted)?;

        self.pml4_and_below(view, view.address(pml5e.value, 51, 12), granted)
    }

    pub(super) fn four_level(&mut self, view: &View, root: u64) -> Result<Mapped, Refusal> {
        self.pml4_and_below(view, root, Granted::EVERYTHING)
    }

    fn pml4_and_below(&mut self, view: &View, pml4: u64, granted: Granted) -> Result<Mapped, Refusal> {
        // A PML4E is selected by bits 47:39. It always references a page-directory-pointer table.
        let pml4e = self.read_entry(view, Read::numbered(4, pml4, number(view.input, 47, 39), 8), granted)?;
        self.must_be_present(view, pml4e)?;
        let wrong = reserved_always(view, pml4e.value) | reserved_in_pml4e_and_pml5e(view, pml4e.value);
        let granted = granted.and(grants(pml4e.value));
        self.must_be_clear(view, pml4e, wrong, granted)?;
        self.refers(view, pml4e, granted)?;

        // A PDPTE is selected by bits 38:30. With PS = 1 it maps a 1-GByte page.
        let pdpte = self.read_entry(
            view,
            Read::numbered(3, view.address(pml4e.value, 51, 12), number(view.input, 38, 30), 8),
            granted,
        )?;
        self.must_be_present(view, pdpte)?;
        let mut wrong = reserved_always(view, pdpte.value);
        if bit(pdpte.value, 7) {
            if view.cpu.page1gb {
                // "Format of a PDPTE that Maps a 1-GByte Page": bits 29:13.
                wrong |= bits(pdpte.value, 29, 13);
            } else {
                // "Format of a PDPTE that References a Page Directory": PS must be 0 where 1-GByte pages are not supported.
                wrong |= bits(pdpte.value, 7, 7);
            }
        }
        let granted = granted.and(grants(pdpte.value));
        self.must_be_clear(view, pdpte, wrong, granted)?;
        if bit(pdpte.value, 7) {
            self.visited(view, pdpte, granted, Found::Leaf);
            let address = view.address(pdpte.value, 51, 30) | bits(view.input, 29, 0);
            return Ok(Mapped { address, entry: pdpte.value, size: Size::OneGib, granted });
        }
        self.refers(view, pdpte, granted)?;

        // A PDE is selected by bits 29:21. With PS = 1 it maps a 2-MByte page.
        let pde = self.read_entry(
            view,
            Read::numbered(2, view.address(pdpte.value, 51, 12), number(view.input, 29, 21), 8),
            granted,
        )?;
        self.must_be_present(view, pde)?;
        let mut wrong = reserved_always(view, pde.value);
        if bit(pde.value, 7) {
            // "Format of a PDE that Maps a 2-MByte Page": bits 20:13.
            wrong |= bits(pde.value, 20, 13);
        }
        let granted = granted.and(grants(pde.value));
        self.must_be_clear(view, pde, wrong, granted)?;
        if bit(pde.value, 7) {
            self.visited(view, pde, granted, Found::Leaf);
            let address = view.address(pde.value, 51, 21) | bits(view.input, 20, 0);
            return Ok(Mapped { address, entry: pde.value, size: Size::TwoMib, granted });
        }
        self.refers(view, pde, granted)?;

        // A PTE is selected by bits 20:12. It maps a 4-KByte page; its bit 7 is PAT.
        let pte = self.read_entry(
            view,
            Read::numbered(1, view.address(pde.value, 51, 12), number(view.input, 20, 12), 8),
            granted,
        )?;
        self.must_be_present(view, pte)?;
        let granted = granted.and(grants(pte.value));
        self.must_be_clear(view, pte, reserved_always(view, pte.value), granted)?;
        self.visited(view, pte, granted, Found::Leaf);
        let address = view.address(pte.value, 51, 12) | bits(view.input, 11, 0);
        Ok(Mapped { address, entry: pte.value, size: Size::FourKib, granted })
    }
}

/// Every present entry lets data be read. R/W is bit 1, U/S bit 2, XD bit 63, in every entry. XD can only be seen set here with EFER.NXE = 1: it is reserved
/// otherwise.
fn grants(entry: u64) -> Granted {
    Granted { read: true, write: bit(entry, 1), user: bit(entry, 2), execute: !bit(entry, 63) }
}

/// Reserved in the entries of every level: the address bits from MAXPHYADDR to 51, and bit 63 where EFER.NXE = 0. Bits 58:52
/// are ignored; bits 62:59 are the key of a leaf, and ignored elsewhere or without CR4.PKE.
fn reserved_always(view: &View, entry: u64) -> u64 {
    let mut wrong = view.beyond_the_cpu(entry, 51);
    if !view.registers.efer_nxe() {
        wrong |= bits(entry, 63, 63);
    }
    wrong
}

/// "Format of a PML4 Entry that References a Page-Directory-Pointer Table" and the PML5E's: bit 7 must be 0. AMD's figures
/// "PML4E" and "PML5E" make bit 8 MBZ as well, where Intel's ignore it.
fn reserved_in_pml4e_and_pml5e(view: &View, entry: u64) -> u64 {
    let mut wrong = bits(entry, 7, 7);
    if view.cpu.amd {
        wrong |= bits(entry, 8, 8);
    }
    wrong
}
