//! Guest memory of sixteen pages that counts how it is used, and can change under a walk.

use std::cell::{Cell, RefCell};

use pagewalk::{Backing, ExchangeError, Gpa, Memory};

/// Pages from GPA 0 upwards; the last one is read-only.
pub const PAGES: u64 = 16;
const WORDS: usize = PAGES as usize * 512;
/// More loads than this by one call are a walk without a bound.
pub const RUNAWAY: usize = 10_000;
/// Memory stands still after so many changes.
const CHANGES: usize = 500;

/// The words, and what was done to them.
pub struct Ram {
    words: Vec<Cell<u64>>,
    filled: Vec<usize>,
    /// Loads since the last [`Ram::restart`].
    pub loads: Cell<usize>,
    /// Compare-exchanges that changed a word: where, what was there, what is there now.
    pub written: RefCell<Vec<(usize, u64, u64)>>,
    /// What is XORed into memory, one word before each load and each compare-exchange, over and over.
    changes: RefCell<Vec<(usize, u64)>>,
    changed: Cell<usize>,
}

impl Ram {
    /// All zeros.
    pub fn new() -> Self {
        Self {
            words: vec![Cell::new(0); WORDS],
            filled: Vec::new(),
            loads: Cell::new(0),
            written: RefCell::default(),
            changes: RefCell::default(),
            changed: Cell::new(0),
        }
    }

    /// Forgets what was done, keeps the words.
    pub fn restart(&self) {
        self.loads.set(0);
        self.written.borrow_mut().clear();
        self.changes.borrow_mut().clear();
        self.changed.set(0);
    }

    /// All zeros again.
    pub fn clear(&mut self) {
        self.restart();
        for word in self.filled.drain(..) {
            self.words[word].set(0);
        }
    }

    /// Puts an entry into `word`.
    pub fn fill(&mut self, word: usize, entry: u64) {
        self.words[word % WORDS].set(entry);
        self.filled.push(word % WORDS);
    }

    /// Undoes the writes since the last restart.
    pub fn undo(&self) {
        for (word, was, _) in self.written.borrow_mut().drain(..).rev() {
            self.words[word].set(was);
        }
    }

    /// Undoes the writes and forgets what was done.
    pub fn restart_with_undo(&self) {
        self.undo();
        self.restart();
    }

    /// The word at `gpa`.
    pub fn word(&self, gpa: Gpa) -> Option<u64> {
        Some(self.words.get(index(gpa)?)?.get())
    }

    /// Where memory changes by itself while it is walked.
    pub fn disturb(&self, changes: &[(usize, u64)]) {
        self.changes.borrow_mut().extend(changes);
    }

    fn shift(&self) {
        let changes = self.changes.borrow();
        let number = self.changed.get();
        if changes.is_empty() || number >= CHANGES {
            return;
        }
        self.changed.set(number + 1);
        let (word, bits) = changes[number % changes.len()];
        let word = word % WORDS;
        let was = self.words[word].get();
        self.words[word].set(was ^ bits);
        self.written.borrow_mut().push((word, was, was ^ bits));
    }
}

impl Default for Ram {
    fn default() -> Self {
        Self::new()
    }
}

fn index(gpa: Gpa) -> Option<usize> {
    usize::try_from(gpa.0 / 8).ok().filter(|word| *word < WORDS)
}

impl Memory for Ram {
    fn load_u64(&self, gpa: Gpa) -> Option<u64> {
        assert_eq!(gpa.0 % 8, 0, "an entry is loaded at its own address");
        self.loads.set(self.loads.get() + 1);
        assert!(self.loads.get() < RUNAWAY, "the walk does not end");
        self.shift();
        self.word(gpa)
    }

    fn load_u32(&self, gpa: Gpa) -> Option<u32> {
        assert_eq!(gpa.0 % 4, 0, "an entry is loaded at its own address");
        let word = self.load_u64(Gpa(gpa.0 & !7))?;
        Some((word >> ((gpa.0 & 4) * 8)) as u32)
    }

    fn compare_exchange_u64(&self, gpa: Gpa, current: u64, new: u64) -> Result<(), ExchangeError> {
        self.shift();
        let word = index(gpa).ok_or(ExchangeError::Unbacked)?;
        if self.backing(gpa) != Backing::Ram {
            return Err(ExchangeError::ReadOnly);
        }
        let found = self.words[word].get();
        if found != current {
            return Err(ExchangeError::Changed(found));
        }
        self.written.borrow_mut().push((word, found, new));
        self.words[word].set(new);
        Ok(())
    }

    fn backing(&self, gpa: Gpa) -> Backing {
        match gpa.0 >> 12 {
            page if page < PAGES - 1 => Backing::Ram,
            page if page < PAGES => Backing::ReadOnly,
            _ => Backing::None,
        }
    }
}
