//! Many walks at once, in columns: addresses in, one word an address out, faults on the side.
//!
//! One translation is a chain of dependent loads; many need not wait for one another. A batch means exactly what as many
//! single walks mean, element by element and in the order of the column, on memory that does not change meanwhile; on a
//! running guest each element is a walk made during the batch, which 64 neighbours may share in part. Nothing is allocated:
//! the caller brings the columns. Nothing is kept from one batch to the next, either.

mod admission;
mod column;
pub(crate) mod dispatch;
pub(crate) mod gather;
mod nested;
mod pipeline;
mod ram;
mod word;

pub use dispatch::Instructions;
pub use word::PageWord;

use crate::access::Access;
use crate::addr::Gva;
use crate::batch::dispatch::Batch;
use crate::batch::nested::NestedLanes;
use crate::batch::pipeline::Lanes;
use crate::fault::Fault;
use crate::memory::Memory;
use crate::nested::NgpaWalk;
use crate::trace::NoTrace;
use crate::walker::Walker;

impl Walker {
    /// What each of `gvas` means for `access`, with nothing changed in the guest: a [`PageWord`] an address, in order.
    ///
    /// An element without translation gets the word 0, and `fault` is called with its place in the column and its fault,
    /// which is that of [`Self::translate`]; places come in ascending order. Where the columns differ in length, no more is
    /// done than the shorter one has room for.
    ///
    /// ```
    /// # use core::sync::atomic::AtomicU64;
    /// # use pagewalk::*;
    /// # let mut words: Vec<AtomicU64> = (0..0x4000 / 8).map(|_| AtomicU64::new(0)).collect();
    /// # words[0x1000 / 8] = AtomicU64::new(0x2003);
    /// # words[0x2000 / 8] = AtomicU64::new(0x3003);
    /// # words[0x3000 / 8] = AtomicU64::new(0x20_0083);
    /// # let memory = Window::new(&words);
    /// # let registers = ControlRegisters { cr0: 0x8000_0001, cr3: 0x1000, cr4: 0x20, efer: 0x500, ..Default::default() };
    /// # let cpu = CpuProfile { vendor: Vendor::Intel, maxphyaddr: 48, gib_pages: true, encryption_bit: None };
    /// # let walker = Walker::new(PageWalk::new(&registers, &cpu)?);
    /// // One 2 MiB page at GVA 0.
    /// let gvas = [0x1234, 0x20_0000];
    /// let (mut pages, mut faults) = ([0; 2], Vec::new());
    /// let read = Access::new(AccessKind::Read, Privilege::Supervisor);
    /// walker.translate_batch(&memory, &read, &gvas, &mut pages, &mut |at, fault| faults.push((at, fault)));
    ///
    /// let page = PageWord::from_bits(pages[0]);
    /// assert_eq!((page.gpa(gvas[0]), page.page_size()), (Some(Gpa(0x20_1234)), PageSize::Size2M));
    /// assert!(PageWord::from_bits(pages[1]).is_fault());
    /// assert_eq!((faults[0].0, faults[0].1.kind), (1, FaultKind::PageFault { error_code: 0 }));
    /// # Ok::<(), StateError>(())
    /// ```
    pub fn translate_batch<M: Memory>(
        &self,
        memory: &M,
        access: &Access,
        gvas: &[u64],
        words: &mut [u64],
        fault: &mut dyn FnMut(usize, Fault),
    ) {
        self.translate_batch_by(Instructions::best(), memory, access, gvas, words, fault);
    }

    /// [`Self::translate_batch`], by these instructions where the CPU has them: for tests, and to count.
    #[doc(hidden)]
    pub fn translate_batch_by<M: Memory>(
        &self,
        instructions: Instructions,
        memory: &M,
        access: &Access,
        gvas: &[u64],
        words: &mut [u64],
        fault: &mut dyn FnMut(usize, Fault),
    ) {
        let mut alone = |at: usize, gva: u64| match self.observe(memory, Gva(gva), access, &mut NoTrace) {
            Ok(page) => PageWord::of(&page).bits(),
            Err(refused) => {
                fault(at, refused);
                PageWord::FAULT.bits()
            }
        };
        let walk = self.gva_walk();
        match self.ngpa_walk() {
            None => {
                if let Some(lanes) = Lanes::<M, false>::new(walk, memory, access) {
                    let batch = Batch { lanes: &lanes, gvas, words, alone: &mut alone };
                    return dispatch::run(instructions, batch);
                }
                if let Some(lanes) = Lanes::<M, true>::new(walk, memory, access) {
                    let batch = Batch { lanes: &lanes, gvas, words, alone: &mut alone };
                    return dispatch::run(instructions, batch);
                }
            }
            Some(second @ NgpaWalk::Npt(_)) => {
                if let Some(lanes) = NestedLanes::<M, false>::new(walk, second, memory, access) {
                    let batch = Batch { lanes: &lanes, gvas, words, alone: &mut alone };
                    return dispatch::run(instructions, batch);
                }
            }
            Some(second @ NgpaWalk::Ept(_)) => {
                if let Some(lanes) = NestedLanes::<M, true>::new(walk, second, memory, access) {
                    let batch = Batch { lanes: &lanes, gvas, words, alone: &mut alone };
                    return dispatch::run(instructions, batch);
                }
            }
        }
        for (at, (gva, word)) in gvas.iter().zip(words).enumerate() {
            *word = alone(at, *gva);
        }
    }
}
