//! The second dimension: which one there is, and what it is asked for.

use super::structures::Mapped;
use super::{Granted, Physical, Refusal, Second, Walk};

/// What a nested physical address is translated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The entry of a guest paging structure.
    Table,
    /// A PDPTE that is loaded into its register, which EPT tells from other tables.
    PdpteRegister,
    /// What the access is about.
    Final,
}

impl<P: Physical> Walk<'_, P> {
    /// Translates `address` of the guest's physical space. `guest` is what the guest's own structures grant at a final address:
    /// everything where there are none.
    pub(super) fn through_second(
        &mut self,
        address: u64,
        purpose: Purpose,
        guest: Granted,
    ) -> Result<Mapped, Refusal> {
        match self.system.second {
            Some(Second::Npt { .. }) => self.npt(address, purpose),
            Some(Second::Ept { .. }) => self.ept(address, purpose, guest),
            None => unreachable!("asked only where there is a second dimension"),
        }
    }
}
