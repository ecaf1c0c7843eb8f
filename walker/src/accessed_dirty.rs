//! Setting accessed and dirty bits, for callers who ask for policy `Set`.
//!
//! Intel SDM volume 3, "Accessed and Dirty Flags". Bits are set only after every dimension has allowed the access: the
//! accessed bit in each entry that was used, the dirty bit in each leaf whose page is written. A guest paging structure
//! that lies behind NPT counts as written. (A CPU may set accessed bits of upper levels on a walk that faults; we do not.)

use crate::entry::{EntryLayout, LongMode};
use crate::memory::{ExchangeError, Memory};
use crate::trace::{Step, Verdict};

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
        match commit_entry::<LongMode, M>(memory, step) {
            Ok(()) => {}
            Err(ExchangeError::ReadOnly) => skipped = true,
            Err(ExchangeError::Changed(_) | ExchangeError::Unbacked) => return Commit::Changed(*step),
        }
    }
    Commit::Done { skipped }
}

fn commit_entry<E: EntryLayout, M: Memory>(memory: &M, step: &Step) -> Result<(), ExchangeError> {
    let dirties = step.verdict == Verdict::Leaf && step.writes;
    let wanted = E::ACCESSED | if dirties { E::DIRTY } else { 0 };
    let mut current = step.entry;
    for _ in 0..EXCHANGES {
        if current & wanted == wanted {
            return Ok(());
        }
        match E::compare_exchange(memory, step.entry_gpa, current, current | wanted) {
            // Another walk, or this one through another level of a table that refers to itself, may have set the same
            // two bits: that does not change what the entry means.
            Err(ExchangeError::Changed(found)) if differs_in_ad_only::<E>(found, step.entry) => {
                current = found;
            }
            other => return other,
        }
    }
    Err(ExchangeError::Changed(current))
}

fn differs_in_ad_only<E: EntryLayout>(a: u64, b: u64) -> bool {
    (a ^ b) & !(E::ACCESSED | E::DIRTY) == 0
}
