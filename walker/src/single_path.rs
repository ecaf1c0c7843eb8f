//! Memory for tests that enumerate entries: one entry a level.

use crate::addr::Gpa;
use crate::memory::{Backing, ExchangeError, Memory};

/// Below a MAXPHYADDR of 40, but outside memory.
pub(crate) const OUTSIDE: u64 = 1 << 39;

/// The entry of each level, the table of level `n` at `n` GiB, so that every entry may be a leaf of any size.
pub(crate) struct SinglePath(pub(crate) [u64; 6]);

impl Memory for SinglePath {
    fn load_u64(&self, gpa: Gpa) -> Option<u64> {
        if gpa.0 >= OUTSIDE { None } else { self.0.get((gpa.0 >> 30) as usize).copied() }
    }

    fn compare_exchange_u64(&self, _: Gpa, _: u64, _: u64) -> Result<(), ExchangeError> {
        Err(ExchangeError::ReadOnly)
    }

    fn backing(&self, gpa: Gpa) -> Backing {
        if gpa.0 >= OUTSIDE { Backing::None } else { Backing::Ram }
    }
}
