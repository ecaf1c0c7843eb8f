//! Policy `Set`, where an entry changes under the walk.

use crate::{Mutant, unseen};

pub(crate) const MUTANTS: &[Mutant] = &[
    unseen(
        "a lost exchange is not walked again",
        &[(
            "accessed_dirty.rs",
            "Commit::Changed(step) => changed = Some(step),",
            "Commit::Changed(_) => return Ok(translation),",
        )],
    ),
    unseen(
        "any change of an entry is taken for one of its accessed and dirty bits",
        &[(
            "trace.rs",
            "(found ^ self.entry) & !self.accessed_dirty == 0",
            "(found ^ self.entry) & !self.accessed_dirty == 0 || true",
        )],
    ),
];
