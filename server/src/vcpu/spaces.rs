//! Address spaces that a vCPU was seen in: the roots of its walks, as it published them.
//!
//! What runs between two publications is not seen. The set is bounded; where it is full, the space that was not met for the
//! longest time is forgotten.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use pagewalk::PagingMode;

use super::nested::NestedMode;
use super::snapshot::Snapshot;

/// Spaces that are kept.
const MOST: usize = 256;

/// An address space that a vCPU was seen in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenSpace {
    /// CR3 without PCID and flags: where the tables begin.
    pub root: u64,
    /// How often it was published.
    pub sightings: u64,
    /// Generation of the walkers when it was published last.
    pub generation: u64,
    /// When that was.
    pub last: Instant,
}

/// All of them. The vCPU's thread adds, whoever wants to know copies: nobody holds the lock for longer than that takes.
#[derive(Debug, Default)]
pub(super) struct Spaces(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    spaces: Vec<SeenSpace>,
    forgotten: u64,
}

impl Spaces {
    /// Takes note of the space in a snapshot. Without paging there is none, and an L2's is not its machine's.
    pub(super) fn note(&self, snapshot: &Snapshot) {
        let Ok(walker) = &snapshot.walker else { return };
        let walk = walker.gva_walk();
        if snapshot.nested != NestedMode::Off || walk.format().mode() == PagingMode::None {
            return;
        }
        self.lock().note(walk.root(), snapshot.generation, snapshot.taken);
    }

    /// What was seen, in no order, and how many spaces were forgotten.
    pub(super) fn all(&self) -> (Vec<SeenSpace>, u64) {
        let seen = self.lock();
        (seen.spaces.clone(), seen.forgotten)
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    fn note(&mut self, root: u64, generation: u64, now: Instant) {
        if let Some(space) = self.spaces.iter_mut().find(|space| space.root == root) {
            space.sightings += 1;
            (space.generation, space.last) = (generation, now);
            return;
        }
        let space = SeenSpace { root, sightings: 1, generation, last: now };
        if self.spaces.len() < MOST {
            self.spaces.push(space);
        } else if let Some(oldest) = self.spaces.iter_mut().min_by_key(|space| space.last) {
            *oldest = space;
            self.forgotten += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_space_that_was_not_met_for_the_longest_time_is_forgotten() {
        let (mut seen, begin) = (Seen::default(), Instant::now());
        let at = |second| begin + Duration::from_secs(second);
        for number in 0..MOST as u64 {
            seen.note(number << 12, 1, at(number));
        }
        seen.note(0, 2, at(1000));
        assert_eq!(seen.spaces[0], SeenSpace { root: 0, sightings: 2, generation: 2, last: at(1000) });
        seen.note(0xabc000, 3, at(1001));
        assert_eq!((seen.spaces.len(), seen.forgotten), (MOST, 1));
        assert!(seen.spaces.iter().any(|space| space.root == 0xabc000));
        assert!(seen.spaces.iter().all(|space| space.root != 1 << 12));
    }
}
