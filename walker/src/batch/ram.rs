//! Guest memory as lanes see it.

use core::sync::atomic::AtomicU64;

use crate::addr::Gpa;
use crate::batch::admission::{ADDRESS, State};
use crate::batch::column::Column;
use crate::batch::gather::{Gather, WIDTH};
use crate::memory::Memory;

/// The longest run of RAM, which is looked at first, and all other memory behind it.
pub(super) struct Ram<'a, M> {
    pub(super) memory: &'a M,
    /// What the run holds; nothing where it cannot be shown.
    words: &'a [AtomicU64],
    first: u64,
    last: u64,
}

impl<'a, M: Memory> Ram<'a, M> {
    pub(super) fn new(memory: &'a M) -> Self {
        let (first, size) = memory.ram();
        Self {
            memory,
            words: memory.words(),
            first: first.0,
            last: first.0.wrapping_add(size).wrapping_sub(1),
        }
    }

    /// Not 0 in bit 63 where a frame is not of the run.
    #[inline(always)]
    pub(super) const fn outside(&self, frame: u64) -> u64 {
        // Addresses have 52 bits: the sign tells.
        frame.wrapping_sub(self.first) | self.last.wrapping_sub(frame)
    }

    /// The next entry. One outside memory is absent.
    #[inline(always)]
    pub(super) fn load(&self, state: State) -> u64 {
        self.memory.load_u64(Gpa(state & ADDRESS)).unwrap_or(0)
    }

    /// The next entries of so many lanes, in any of the others as well.
    #[inline(always)]
    pub(super) fn load_all(&self, gather: impl Gather, states: &Column, count: usize, entries: &mut Column) {
        if self.words.is_empty() {
            for (entry, state) in entries.iter_mut().zip(states).take(count) {
                *entry = self.load(*state);
            }
            return;
        }
        let (groups, _) = entries.as_chunks_mut::<WIDTH>();
        let (states, _) = states.as_chunks::<WIDTH>();
        for (entries, states) in groups.iter_mut().zip(states).take(count.div_ceil(WIDTH)) {
            let numbers = states.map(|state| (state & ADDRESS).wrapping_sub(self.first) >> 3);
            *entries = gather.gather(self.words, &numbers);
            if entries.contains(&0) {
                self.load_elsewhere(states, entries);
            }
        }
    }

    /// Those entries that lie elsewhere than in the run.
    #[cold]
    #[inline(never)]
    fn load_elsewhere(&self, states: &[State; WIDTH], entries: &mut [u64; WIDTH]) {
        for (entry, state) in entries.iter_mut().zip(states) {
            if self.outside(state & ADDRESS) >> 63 != 0 {
                *entry = self.load(*state);
            }
        }
    }

    #[inline(always)]
    pub(super) fn prefetch(&self, state: State) {
        self.memory.prefetch(Gpa(state & ADDRESS));
    }
}
