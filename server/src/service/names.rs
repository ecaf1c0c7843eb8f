//! The symbols that an answer about an address names.

use pagewalk::{Step, Walker};
use pagewalk_proto::v1;

use super::resolve::Target;
use crate::convert;
use crate::machine::GuestRam;
use crate::symbols::Near;
use crate::vcpu::{NestedMode, Snapshot};

/// Names of an address, and of the entries that its walk read.
#[derive(Default)]
pub(super) struct Names {
    pub(super) gva: Option<Near>,
    /// As many as there are steps, or none.
    pub(super) entries: Vec<Option<Near>>,
}

impl Target {
    /// What the machine's symbols say of a walk: nothing where it has none or its kernel is not found, and nothing of an L2's,
    /// which has a kernel of its own.
    pub(super) fn names(
        &self,
        memory: &GuestRam,
        snapshot: &Snapshot,
        walker: &Walker,
        gva: u64,
        steps: &[Step],
    ) -> Names {
        let of_l2 = walker.ngpa_walk().is_some() || matches!(snapshot.nested, NestedMode::Guest(_));
        let Some(symbols) = self.machine.symbols().filter(|_| !of_l2) else { return Names::default() };
        let Some(placed) = symbols.place_if_quick(&self.machine, memory) else { return Names::default() };
        Names {
            gva: symbols.nearest(&placed, gva),
            entries: steps.iter().map(|step| symbols.nearest_physical(&placed, step.entry_gpa.0)).collect(),
        }
    }
}

impl Names {
    /// The steps, with the names of their entries.
    pub(super) fn steps(&self, steps: &[Step], walker: &Walker) -> Vec<v1::Step> {
        let named =
            |(place, step)| convert::step::step(step, walker, self.entries.get(place).cloned().flatten());
        steps.iter().enumerate().map(named).collect()
    }
}
