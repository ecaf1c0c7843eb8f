//! A race that policy `Set` loses: an entry changes between the walk and the setting of its bits.
//!
//! The first exchange at one of the entries finds that the guest turned one bit of it over, no accessed or dirty bit. The walk starts
//! over, so that the outcome is that of the memory as it is then; bits that were set before the race stay set.

use fastrand::Rng;

use super::answers;
use super::ground::Ground;
use super::setup::Setup;
use crate::oracle::{self, Answer, Request, Written};
use pagewalk::{AdPolicy, Fault, Gva, NoTrace, Translation};

/// What came of one race.
pub(crate) struct Race {
    pub(crate) agrees: bool,
    pub(crate) allowed: bool,
    pub(crate) changed: Written,
    pub(crate) answer: Answer,
    pub(crate) outcome: Result<Translation, Fault>,
}

/// Lets the walker lose a race at one of the entries that `answer` writes, if there is one and the walk meets no word twice.
pub(crate) fn lose(
    setup: &Setup,
    ground: &mut Ground,
    request: Request,
    answer: &Answer,
    rng: &mut Rng,
) -> Option<Race> {
    let word = |n: usize| answer.visits[n].address & !7;
    let twice = (0..answer.visits.len()).any(|one| (0..one).any(|other| word(one) == word(other)));
    if answer.written.is_empty() || twice {
        return None;
    }
    let lost = rng.usize(..answer.written.len());
    let bit = [0, 1, 2, 10, 11, 12, 13, 21][rng.usize(..8)];
    let Written { address, bytes, .. } = answer.written[lost];
    let changed = Written { address, entry: ground.entry(address, bytes) ^ 1 << bit, bytes };

    // Memory as the second walk finds it.
    let mut left: Vec<Written> = answer.written[..lost].to_vec();
    left.push(changed);
    let before: Vec<u64> = left.iter().map(|it| ground.entry(it.address, it.bytes)).collect();
    for it in &left {
        ground.replace(it.address, it.bytes, it.entry);
    }
    let again = oracle::translate(&setup.system, ground, request);
    for (it, entry) in left.iter().zip(before) {
        ground.replace(it.address, it.bytes, entry);
    }
    if again.overlap {
        return None;
    }
    for it in &again.written {
        left.retain(|earlier| earlier.address != it.address);
        left.push(*it);
    }

    ground.interfere(address, bytes, changed.entry);
    let access = answers::access(&request);
    let outcome =
        setup.walker.translate_with(ground, Gva(request.linear), &access, AdPolicy::Set, &mut NoTrace);
    let settled = ground.settle(&left);
    let agrees = answers::outcome(&outcome) == Some(again.outcome) && settled.is_ok();
    Some(Race { agrees, allowed: again.outcome.is_ok(), changed, answer: again, outcome })
}
