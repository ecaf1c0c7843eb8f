//! Setting accessed and dirty bits, for callers who ask for policy `Set`.
//!
//! Intel SDM volume 3, "Accessed and Dirty Flags". Bits are set only after every dimension has allowed the access: the
//! accessed bit in each entry that was used, the dirty bit in each leaf whose page is written. A guest paging structure
//! that lies behind NPT counts as written. (A CPU may set accessed bits of upper levels on a walk that faults; we do not.)

use crate::fault::{Fault, FaultKind, Reason};
use crate::memory::{ExchangeError, Memory};
use crate::trace::{Held, Recorder as _, Step, Trace};
use crate::translation::Translation;

/// Walks that are made at most where entries change underneath: by policy `Set` before it answers [`FaultKind::Contended`], and by
/// validation before it calls a walk torn.
pub const MAX_ATTEMPTS: usize = 8;

/// Walks until the entries of a walk that was allowed still are what it decided on, and have their bits set. `trace` holds the
/// steps of the last walk.
pub(crate) fn walk_and_set<M: Memory>(
    memory: &M,
    trace: &mut Trace,
    walk: impl Fn(&mut Trace) -> Result<Translation, Fault>,
) -> Result<Translation, Fault> {
    let mut changed = None;
    for _ in 0..MAX_ATTEMPTS {
        trace.clear();
        let translation = walk(trace)?;
        match commit(memory, trace.steps()) {
            Commit::Done { skipped } => return Ok(translation.with_ad_skipped(skipped)),
            Commit::Changed(step) => changed = Some(step),
        }
    }
    Err(contended(changed))
}

/// The address is the caller's to say.
#[cold]
pub(crate) fn contended(changed: Option<Step>) -> Fault {
    let step = changed.unwrap_or(Trace::EMPTY_STEP);
    Fault {
        kind: FaultKind::Contended,
        address: 0,
        dimension: step.dimension,
        level: step.level,
        entry_gpa: step.entry_gpa,
        entry: step.entry,
        bits: 0,
        nested_gpa: None,
        reason: Reason::Changing,
    }
}

/// Compare-exchanges of one entry before the walk is taken to be contended.
const EXCHANGES: usize = 4;

/// What became of a commit.
enum Commit {
    /// Every bit is set; the flag says that entries in read-only memory were left alone.
    Done { skipped: bool },
    /// This entry is no longer what the walk decided on.
    Changed(Step),
}

/// Sets the bits for the walk that `steps` record.
fn commit<M: Memory>(memory: &M, steps: &[Step]) -> Commit {
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
