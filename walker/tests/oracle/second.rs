//! The second dimension: which one there is, what it is asked for, and what it adds to an answer.

use super::structures::Mapped;
use super::{By, Granted, Page, Physical, Refusal, Second, Size, Walk, bit, number};

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

    /// What `Translation::rights` tells, by the project's own rule: what the page allows. EPT has no U/S. It says by whom the page
    /// is executed, and with GMET so does NPT: that is told for those who own the page by the guest's U/S.
    pub(super) fn by_both_dimensions(&self, guest: Granted, nested: Granted) -> Granted {
        let mut both = guest.and(nested);
        match self.system.second {
            Some(Second::Ept { .. }) => {
                both.user = guest.user;
                both.execute = guest.execute && if guest.user { nested.user } else { nested.execute };
            }
            Some(Second::Npt { gmet: true, .. }) => {
                both.user = guest.user;
                both.execute = both.execute && (guest.user || !nested.user);
            }
            _ => {}
        }
        both
    }

    /// "Memory Type Used for Translated Guest-Physical Addresses": bits 5:3 of the last EPT entry are the memory type, and bit 6
    /// ignores the PAT.
    pub(super) fn ept_type(&self, mapped: &Mapped) -> Option<(u64, bool)> {
        match self.system.second {
            Some(Second::Ept { .. }) => Some((number(mapped.entry, 5, 3), bit(mapped.entry, 6))),
            _ => None,
        }
    }

    /// Where only the second dimension is asked. The privilege of the access stands for the linear address's mode, whose page
    /// allows everything; a paging structure is also written if the access writes (`NgpaWalk::translate`).
    pub(super) fn second_alone(&mut self, nested: u64, purpose: Purpose) -> Result<Page, Refusal> {
        let guest = Granted { user: self.request.by == By::User, ..Granted::EVERYTHING };
        let mapped = self.through_second(nested, purpose, guest)?;
        let mut granted = mapped.granted;
        if let Some(Second::Ept { .. }) = self.system.second {
            if purpose == Purpose::Table && self.request.kind.writes() {
                self.guest_structure_written(nested)?;
            }
            granted = Granted { user: true, ..self.by_both_dimensions(guest, mapped.granted) };
        }
        Ok(Page {
            physical: mapped.address,
            nested: Some((nested, mapped.size)),
            entry: 0,
            size: Size::Unpaged,
            granted,
            key: 0,
            accessed: false,
            dirty: false,
            global: false,
            pat_index: None,
            ept_type: self.ept_type(&mapped),
            nature: self.memory.nature(mapped.address),
        })
    }
}
