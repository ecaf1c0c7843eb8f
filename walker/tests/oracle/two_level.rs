//! 32-bit paging.
//!
//! Intel SDM volume 3, "32-Bit Paging"; AMD APM volume 2, "Legacy-Mode Page Translation", "Non-PAE Paging".

use super::structures::{Mapped, Read, View};
use super::{Found, Granted, Physical, Refusal, Size, Walk, bit, bits, number};

impl<P: Physical> Walk<'_, P> {
    /// `cr3` as it is: bits 31:12 are the page directory's address.
    pub(super) fn two_level(&mut self, view: &View, cr3: u64) -> Result<Mapped, Refusal> {
        // A PDE is selected by bits 31:22. With CR4.PSE = 1 and PS = 1 it maps a 4-MByte page; with CR4.PSE = 0 its PS is ignored.
        let pde = Read::numbered(2, bits(cr3, 31, 12), number(view.input, 31, 22), 4);
        let pde = self.read_entry(view, pde, Granted::EVERYTHING)?;
        self.must_be_present(view, pde)?;
        let granted = grants(pde.value);
        if bit(view.registers.cr4, 4) && bit(pde.value, 7) {
            // "Format of a 32-Bit PDE that Maps a 4-MByte Page": with M the smaller of 40 and MAXPHYADDR, bits (M-20):13 are bits
            // (M-1):32 of the address, and bits 21:(M-19) are reserved. Without PSE-36 M is 32.
            let m = view.cpu.maxphyaddr.min(40);
            self.must_be_clear(view, pde, bits(pde.value, 21, m - 19), granted)?;
            self.visited(view, pde, granted, Found::Leaf);
            let high = number(pde.value, 20, 13) << 32;
            let address = high | bits(pde.value, 31, 22) | bits(view.input, 21, 0);
            return Ok(Mapped { address, entry: pde.value, size: Size::FourMib, granted });
        }
        self.refers(view, pde, granted)?;

        // A PTE is selected by bits 21:12. Nothing is reserved in it, nor in the PDE above.
        let pte = Read::numbered(1, bits(pde.value, 31, 12), number(view.input, 21, 12), 4);
        let pte = self.read_entry(view, pte, granted)?;
        self.must_be_present(view, pte)?;
        let granted = granted.and(grants(pte.value));
        self.visited(view, pte, granted, Found::Leaf);
        let address = bits(pte.value, 31, 12) | bits(view.input, 11, 0);
        Ok(Mapped { address, entry: pte.value, size: Size::FourKib, granted })
    }
}

/// An entry of 32 bits has no XD.
fn grants(entry: u64) -> Granted {
    Granted { read: true, write: bit(entry, 1), user: bit(entry, 2), execute: true }
}
