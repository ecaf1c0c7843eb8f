//! Judge `attached-spaces`: an address in the address spaces of all processes that were met, against what QEMU's MMU said of it
//! while each was the active one; and the pairs of page-table isolation, against the worker that both halves show.

use std::collections::BTreeMap;

use fastrand::Rng;
use libtest_mimic::Failed;
use pagewalk_proto::v1;
use pagewalk_proto::v1::space_translation::Outcome;

use crate::announced::{IDENTITY, Mapping};
use crate::daemon::Daemon;
use crate::guest::Guest;
use crate::judge::Judge;
use crate::monitor;

const PAGE: u64 = 4096;
/// Of CR3, what is no flag.
const ROOT: u64 = !0xfff;
/// What the two roots of a process differ in.
const HALF: u64 = 0x1000;

/// What was learned of a guest whose page tables of user space do not change any more.
pub(crate) struct Spaces {
    addresses: Vec<u64>,
    /// By root, where each address led to while that root was a vCPU's.
    said: BTreeMap<u64, Vec<Option<u64>>>,
}

impl Spaces {
    pub(crate) fn new(rng: &mut Rng, mappings: &[Mapping]) -> Self {
        let any = |_| {
            let mapping = rng.choice(mappings)?;
            Some(mapping.start + rng.u64(0..mapping.bytes / PAGE) * PAGE)
        };
        let addresses = std::iter::once(IDENTITY).chain((0..40).filter_map(any)).collect();
        Self { addresses, said: BTreeMap::new() }
    }

    /// Compares, while the guest is paused.
    pub(crate) fn judge(
        &mut self,
        daemon: &Daemon,
        guest: &mut Guest,
        judge: &mut Judge,
    ) -> Result<(), Failed> {
        let registers = monitor::registers(&guest.ask(0, "info registers -a")?)?;
        let active: Vec<u64> = registers.iter().map(|vcpu| vcpu.control.cr3 & ROOT).collect();
        for (vcpu, root) in active.iter().enumerate() {
            let asked = self.addresses.iter().map(|gva| format!("gva2gpa {gva:#x}"));
            let answers = guest.ask_all(vcpu, asked)?;
            let said = answers.iter().map(|answer| monitor::gpa(answer)).collect::<Result<_, _>>()?;
            self.said.insert(*root, said);
        }
        let roots: Vec<u64> = self.said.keys().copied().collect();
        for (place, gva) in self.addresses.iter().enumerate() {
            let spaces = daemon.across("vm", *gva, roots.clone())?;
            assert_eq!(spaces.len(), roots.len());
            for (space, root) in spaces.iter().zip(&roots) {
                let expected = self.said[root][place];
                judge.case();
                match (expected.is_some(), active.contains(root)) {
                    (true, false) => judge.count("mapped in a space that is not active", 0),
                    (false, false) => judge.count("not mapped in a space that is not active", 0),
                    (true, true) => judge.count("mapped in a space that is active", 0),
                    (false, true) => judge.count("not mapped in a space that is active", 0),
                }
                if (space.cr3, gpa(space)) != (*root, expected) {
                    judge.disagree(|| format!("{gva:#x} under {root:#x} is {expected:x?}: {space:x?}"));
                }
            }
        }
        self.judge_list(daemon, &active, judge)
    }

    /// What is listed has what is active, and pairs the halves of each worker's.
    fn judge_list(&self, daemon: &Daemon, active: &[u64], judge: &mut Judge) -> Result<(), Failed> {
        let listed = daemon.spaces("vm")?.spaces;
        for root in active {
            judge.case();
            judge.count("active", 0);
            if !listed.iter().any(|space| space.cr3 == *root && space.sightings > 0) {
                judge.disagree(|| format!("CR3 {root:#x} is not listed: {listed:x?}"));
            }
        }
        for space in &listed {
            let Some(worker) = self.said.get(&space.cr3).and_then(|said| said[0]) else { continue };
            judge.case();
            judge.count("two halves", 0);
            let other = space.cr3 ^ HALF;
            let both = daemon.across("vm", IDENTITY, vec![other])?;
            let same = both.first().and_then(gpa) == Some(worker);
            let user = space.cr3 & HALF != 0;
            if (space.isolation_pair, space.user_half, same) != (Some(other), user, true) {
                judge.disagree(|| format!("{space:x?} is a half: {both:x?}"));
            }
        }
        Ok(())
    }
}

pub(crate) fn gpa(space: &v1::SpaceTranslation) -> Option<u64> {
    match &space.outcome {
        Some(Outcome::Translation(page)) => Some(page.gpa),
        _ => None,
    }
}
