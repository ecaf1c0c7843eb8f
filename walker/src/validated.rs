//! Validated walks: the entries of a walk are read again when it is over.
//!
//! A guest that runs rewrites its tables while they are read, one entry after another: an answer may mix mappings that never
//! stood together. So all entries of a walk are read once more at its end. Where each still holds what the walk used, they held
//! it together at the moment between the walk and the second look, as long as none of them has changed and changed back
//! meanwhile; where one does not, the walk is made again.
//!
//! What values cannot tell is such a change there and back (ABA). It takes at least two writes to the same entry between the two
//! looks at it, with the other entries in between in the guest's other state at both. A guest whose entries do not come back
//! to a value within the time of a walk is never misread; of one that flips between the same few values without pause,
//! a mix can be taken for an answer. Only a guest that is paused leaves no doubt. Nor are registers looked at again.

use core::sync::atomic::{Ordering, fence};

use crate::access::Access;
use crate::accessed_dirty::{MAX_ATTEMPTS, contended};
use crate::addr::{Gva, NestedGpa};
use crate::fault::Fault;
use crate::memory::Memory;
use crate::nested::{NestedPhase, NgpaWalk};
use crate::trace::{Step, Trace};
use crate::translation::Translation;
use crate::walker::{AdPolicy, Walker};

/// What a validated walk came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validated {
    /// What the last walk found.
    pub outcome: Result<Translation, Fault>,
    /// The walks before it, each of which had an entry that changed.
    pub repeated: u32,
    /// The first entry of the last walk that has changed, too: the outcome may mix two mappings.
    pub torn: Option<Step>,
}

impl Validated {
    /// What a walk came to whose entries are not read again.
    #[must_use]
    pub const fn not(outcome: Result<Translation, Fault>) -> Self {
        Self { outcome, repeated: 0, torn: None }
    }

    /// The outcome, or [`FaultKind::Contended`](crate::FaultKind::Contended) where it is torn.
    ///
    /// # Errors
    /// The fault that the access would meet, or that.
    pub fn settled(self, gva: Gva) -> Result<Translation, Fault> {
        match self.torn {
            Some(_) => Err(Fault { address: gva.0, ..contended(self.torn) }),
            None => self.outcome,
        }
    }
}

impl Walker {
    /// [`Self::translate_with`], until the entries that a walk has read are found as they were, [`MAX_ATTEMPTS`] times at most.
    /// `trace` holds the steps of the last walk.
    ///
    /// With [`AdPolicy::Set`] there is one walk only, for what it has set would stay.
    pub fn translate_validated<M: Memory>(
        &self,
        memory: &M,
        gva: Gva,
        access: &Access,
        policy: AdPolicy,
        trace: &mut Trace,
    ) -> Validated {
        validated(memory, policy, trace, |trace| self.translate_with(memory, gva, access, policy, trace))
    }
}

impl NgpaWalk {
    /// [`Self::translate_with`], validated as by [`Walker::translate_validated`].
    pub fn translate_validated<M: Memory>(
        &self,
        memory: &M,
        ngpa: NestedGpa,
        access: &Access,
        phase: NestedPhase,
        policy: AdPolicy,
        trace: &mut Trace,
    ) -> Validated {
        let walk = |trace: &mut Trace| self.translate_with(memory, ngpa, access, phase, policy, trace);
        validated(memory, policy, trace, walk)
    }
}

fn validated<M: Memory>(
    memory: &M,
    policy: AdPolicy,
    trace: &mut Trace,
    walk: impl Fn(&mut Trace) -> Result<Translation, Fault>,
) -> Validated {
    let most = match policy {
        AdPolicy::Observe => MAX_ATTEMPTS as u32,
        AdPolicy::Set => 1,
    };
    let mut repeated = 0;
    loop {
        let outcome = walk(trace);
        // Every load of the walk comes before every load of the second look.
        fence(Ordering::Acquire);
        let torn = trace.steps().iter().find(|step| !step.is_current(memory)).copied();
        if torn.is_none() || repeated + 1 >= most {
            return Validated { outcome, repeated, torn };
        }
        repeated += 1;
    }
}
