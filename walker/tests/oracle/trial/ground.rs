//! Memory for both sides: a few stretches of RAM, one of ROM, and nothing between them. It keeps a log of what the walker
//! writes, so that a case is compared and undone at the price of its writes.

use std::cell::{Cell, RefCell};

use pagewalk::{Backing, ExchangeError, Gpa, Memory};

use crate::oracle::{Nature, Physical, Written};

const PAGE: u64 = 4096;

/// A stretch of memory: where it starts, how many pages it has, whether it can be written.
#[derive(Clone, Copy)]
pub(crate) struct Stretch {
    pub(crate) start: u64,
    pub(crate) pages: u64,
    rom: bool,
}

/// Below 4 GiB; read-only, 2 MiB further up; above 4 GiB, on a 1 GiB boundary; and as high as an address goes.
pub(crate) const LOW: Stretch = Stretch { start: 0, pages: 64, rom: false };
pub(crate) const ROM: Stretch = Stretch { start: 0x20_0000, pages: 16, rom: true };
pub(crate) const HIGH: Stretch = Stretch { start: 5 << 30, pages: 16, rom: false };
pub(crate) const TOP: Stretch = Stretch { start: 1 << 51, pages: 16, rom: false };
pub(crate) const STRETCHES: [Stretch; 4] = [LOW, ROM, HIGH, TOP];

/// One successful exchange: the address, what it held, what it was given.
pub(crate) type Exchange = (u64, u64, u64);

pub(crate) struct Ground {
    stretches: [Vec<Cell<u64>>; 4],
    log: RefCell<Vec<Exchange>>,
    /// Addresses that a case put something at.
    placed: Vec<u64>,
    /// The word that the next exchange at its address finds instead of the one that is there.
    interference: Cell<Option<(u64, u64)>>,
}

impl Ground {
    pub(crate) fn new() -> Ground {
        let stretches = STRETCHES.map(|it| vec![Cell::new(0); (it.pages * PAGE / 8) as usize]);
        Ground { stretches, log: RefCell::default(), placed: Vec::new(), interference: Cell::new(None) }
    }

    fn word(&self, address: u64) -> Option<(&Cell<u64>, bool)> {
        STRETCHES.iter().zip(&self.stretches).find_map(|(stretch, words)| {
            let offset = address.checked_sub(stretch.start)?;
            Some((words.get((offset / 8) as usize)?, stretch.rom))
        })
    }

    /// Puts an entry of `bytes` bytes somewhere until the next [`Self::clear`].
    pub(crate) fn place(&mut self, address: u64, bytes: u64, entry: u64) {
        let aligned = address & !7;
        if let Some((word, _)) = self.word(aligned) {
            word.set(replaced(word.get(), address, bytes, entry));
            self.placed.push(aligned);
        }
    }

    /// Replaces an entry for good.
    pub(crate) fn replace(&self, address: u64, bytes: u64, entry: u64) {
        let aligned = address & !7;
        if let Some((word, _)) = self.word(aligned) {
            word.set(replaced(word.get(), address, bytes, entry));
        }
    }

    /// Has the next exchange at this entry's word find the entry changed.
    pub(crate) fn interfere(&self, address: u64, bytes: u64, entry: u64) {
        let aligned = address & !7;
        let now = self.word(aligned).map_or(0, |(word, _)| word.get());
        self.interference.set(Some((aligned, replaced(now, address, bytes, entry))));
    }

    /// Puts a word somewhere for good.
    pub(crate) fn keep(&self, address: u64, value: u64) {
        if let Some((word, _)) = self.word(address) {
            word.set(value);
        }
    }

    pub(crate) fn clear(&mut self) {
        for address in std::mem::take(&mut self.placed) {
            self.keep(address, 0);
        }
    }

    /// What lies at a place, as an entry of `bytes` bytes; 0 where nothing does.
    pub(crate) fn entry(&self, address: u64, bytes: u64) -> u64 {
        let word = self.word(address & !7).map_or(0, |(word, _)| word.get());
        match (bytes, address & 4) {
            (8, _) => word,
            (_, 0) => word & 0xffff_ffff,
            _ => word >> 32,
        }
    }

    /// Whether the walker's writes left exactly `expected` behind: those words with those values, and no other word changed.
    /// Undoes them.
    pub(crate) fn settle(&self, expected: &[Written]) -> Result<(), Vec<Exchange>> {
        let mut log = self.log.borrow_mut();
        let as_expected = expected.iter().all(|it| self.entry(it.address, it.bytes) == it.entry)
            && log.iter().all(|(address, ..)| expected.iter().any(|it| it.address & !7 == *address))
            && log.iter().all(|&(address, before, after)| {
                // Of a word with one entry of four bytes in it, the other half stays.
                let halves = expected.iter().filter(|it| it.address & !7 == address);
                let may_change = halves.fold(0, |mask, it| replaced(mask, it.address, it.bytes, u64::MAX));
                (before ^ after) & !may_change == 0
            });
        let verdict = if as_expected { Ok(()) } else { Err(log.clone()) };
        for (address, before, _) in log.drain(..).rev() {
            self.keep(address, before);
        }
        verdict
    }
}

/// `word` with the entry at `address` replaced.
fn replaced(word: u64, address: u64, bytes: u64, entry: u64) -> u64 {
    match (bytes, address & 4) {
        (8, _) => entry,
        (_, 0) => word & !0xffff_ffff | entry & 0xffff_ffff,
        _ => word & 0xffff_ffff | entry << 32,
    }
}

impl Memory for Ground {
    fn load_u64(&self, gpa: Gpa) -> Option<u64> {
        assert!(gpa.0.is_multiple_of(8), "the walker loads from {gpa}");
        self.word(gpa.0).map(|(word, _)| word.get())
    }

    fn compare_exchange_u64(&self, gpa: Gpa, current: u64, new: u64) -> Result<(), ExchangeError> {
        assert!(gpa.0.is_multiple_of(8), "the walker writes to {gpa}");
        let (word, rom) = self.word(gpa.0).ok_or(ExchangeError::Unbacked)?;
        if rom {
            return Err(ExchangeError::ReadOnly);
        }
        if let Some((address, changed)) = self.interference.get().filter(|it| it.0 == gpa.0) {
            self.interference.set(None);
            self.log.borrow_mut().push((address, word.get(), changed));
            word.set(changed);
        }
        if word.get() != current {
            return Err(ExchangeError::Changed(word.get()));
        }
        word.set(new);
        self.log.borrow_mut().push((gpa.0, current, new));
        Ok(())
    }

    fn backing(&self, gpa: Gpa) -> Backing {
        match self.word(gpa.0) {
            Some((_, false)) => Backing::Ram,
            Some((_, true)) => Backing::ReadOnly,
            None => Backing::None,
        }
    }
}

impl Physical for Ground {
    fn read(&self, address: u64) -> Option<u64> {
        self.word(address).map(|(word, _)| word.get())
    }

    fn nature(&self, address: u64) -> Nature {
        match self.word(address) {
            Some((_, false)) => Nature::Ram,
            Some((_, true)) => Nature::Rom,
            None => Nature::Nothing,
        }
    }
}
