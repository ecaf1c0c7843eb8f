//! Setting accessed and dirty bits, for callers who ask for policy `Set`.
//!
//! Intel SDM volume 3, "Accessed and Dirty Flags". Bits are set only after every dimension has allowed the access: the
//! accessed bit in each entry that was used, the dirty bit in each leaf whose page is written. A guest paging structure
//! that lies behind NPT counts as written. (A CPU may set accessed bits of upper levels on a walk that faults; we do not.)

use crate::memory::{ExchangeError, Memory};
use crate::trace::{Held, Step};

/// Compare-exchanges of one entry before the walk is taken to be contended.
const EXCHANGES: usize = 4;

/// What became of a commit.
pub(crate) enum Commit {
    /// Every bit is set; the flag says that entries in read-only memory were left alone.
    Done { skipped: bool },
    /// This entry is no longer what the walk decided on.
    Changed(Step),
}

/// Sets the bits for the walk that `steps` record.
pub(crate) fn commit<M: Memory>(memory: &M, steps: &[Step]) -> Commit {
    let mut skipped = false;
    for step in steps {
        match commit_entry(memory, step) {
            Ok(()) => {}
            Err(ExchangeError::ReadOnly) => skipped = true,
            Err(ExchangeError::Changed(_) | ExchangeError::Unbacked) => return Commit::Changed(*step),
        }
    }
    Commit::Done { skipped }
}

fn commit_entry<M: Memory>(memory: &M, step: &Step) -> Result<(), ExchangeError> {
    let wanted = step.sets;
    let mut current = step.entry;
    for _ in 0..EXCHANGES {
        if current & wanted == wanted {
            return Ok(());
        }
        let exchanged = match step.held {
            Held::Register => return Ok(()),
            Held::Word32 => {
                memory.compare_exchange_u32(step.entry_gpa, current as u32, (current | wanted) as u32)
            }
            Held::Word64 => memory.compare_exchange_u64(step.entry_gpa, current, current | wanted),
        };
        match exchanged {
            // Another walk, or this one through another level of a table that refers to itself, may have set the same
            // two bits: that does not change what the entry means.
            Err(ExchangeError::Changed(found)) if step.differs_in_accessed_dirty_only(found) => {
                current = found;
            }
            other => return other,
        }
    }
    Err(ExchangeError::Changed(current))
}
