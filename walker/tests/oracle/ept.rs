//! The second dimension under Intel's EPT.
//!
//! Intel SDM volume 3, "The Extended Page Table Mechanism (EPT)": "EPT Translation Mechanism" with the formats of the entries,
//! "EPT-Induced VM Exits", "Accessed and Dirty Flags for EPT"; "Exit Qualification for EPT Violations".

use super::structures::{Mapped, Read, View};
use super::{
    By, Cause, Cpu, Dimension, EptOffers, Event, Flags, Found, Granted, Kind, Physical, Purpose, Refusal,
    Second, Size, Visit, Walk, bit, bits, number,
};

/// The fields of EPTP and of the VM-execution controls.
#[derive(Clone, Copy)]
struct Controls {
    /// Bits 5:3 of EPTP hold one less.
    levels: u32,
    /// Bits 51:12.
    root: u64,
    accessed_dirty: bool,
    /// Whether every access to a guest's paging structure is a write: by EPTP bit 6, or to be like KVM.
    tables_written: bool,
    supervisor_shadow_stack: bool,
    mode_based_execute: bool,
    offers: EptOffers,
    cpu: Cpu,
}

/// What the access does to the guest-physical address, in the words of "EPT Violations".
#[derive(Clone, Copy)]
struct Access {
    data_read: bool,
    data_write: bool,
    fetch: bool,
}

/// An entry's bits 2:0 and, with mode-based execute control, bit 10. Without, the walker calls `user` what bit 2 says.
fn grants(controls: Controls, entry: u64) -> Granted {
    let execute_for_user = if controls.mode_based_execute { bit(entry, 10) } else { bit(entry, 2) };
    Granted { read: bit(entry, 0), write: bit(entry, 1), user: execute_for_user, execute: bit(entry, 2) }
}

impl<P: Physical> Walk<'_, P> {
    pub(super) fn ept(&mut self, address: u64, purpose: Purpose, guest: Granted) -> Result<Mapped, Refusal> {
        let controls = self.ept_controls();
        let access = self.ept_access(controls, purpose);
        self.ept_walk(controls, access, address, purpose, guest)
    }

    fn ept_controls(&self) -> Controls {
        let Some(Second::Ept { eptp, controls, offers, cpu }) = self.system.second else {
            unreachable!("asked only under EPT")
        };
        Controls {
            levels: number(eptp, 5, 3) as u32 + 1,
            root: bits(eptp, 51, 12),
            accessed_dirty: bit(eptp, 6),
            tables_written: bit(eptp, 6) || controls.tables_written,
            supervisor_shadow_stack: bit(eptp, 7),
            mode_based_execute: controls.mode_based_execute,
            offers,
            cpu,
        }
    }

    fn ept_walk(
        &mut self,
        controls: Controls,
        access: Access,
        address: u64,
        purpose: Purpose,
        guest: Granted,
    ) -> Result<Mapped, Refusal> {
        let view = View {
            dimension: Dimension::Nested,
            registers: self.system.registers,
            cpu: controls.cpu,
            input: address,
            purpose,
            writes: access.data_write,
            first_visit: self.visits.len(),
        };
        // "EPT Translation Mechanism": 4-level EPT translates bits 47:0. What lies above cannot be translated, which is a violation.
        if bits(address, 63, 12 + 9 * controls.levels) != 0 {
            let event = self.ept_violation(&view, controls, access, guest, Granted::NOTHING, None);
            return Err(view.nobody_to_blame(self.request.linear, event, Cause::TooWide));
        }

        // Bit 8 is the accessed flag and bit 9 the dirty flag, where EPTP enables them.
        let flags = controls.accessed_dirty.then_some(Flags { accessed: 8, dirty: 9 });
        let mut granted = Granted::EVERYTHING;
        let mut table = controls.root;
        let mut level = controls.levels;
        loop {
            // Nine bits of the address select an entry; the lowest nine above the page offset select the EPT PTE.
            let low = 12 + 9 * (level - 1);
            let entry = Read::numbered(level, table, number(address, low + 8, low), 8).with_flags(flags);
            let entry = self.read_entry(&view, entry, granted)?;
            self.ept_present(&view, controls, access, guest, entry)?;
            granted = granted.and(grants(controls, entry.value));
            // An EPT PTE maps a page, and an EPT PDE and an EPT PDPTE with bit 7 set do.
            let maps = level == 1 || (level <= 3 && bit(entry.value, 7));
            self.ept_configured(&view, controls, entry, level, maps, granted)?;
            if !maps {
                self.visited(&view, entry, granted, Found::Table);
                table = bits(entry.value, 51, 12);
                level -= 1;
                continue;
            }
            self.visited(&view, entry, granted, Found::Leaf);
            self.ept_allows(&view, controls, access, guest, granted, entry.value)?;
            let size = match level {
                1 => Size::FourKib,
                2 => Size::TwoMib,
                _ => Size::OneGib,
            };
            let page = bits(entry.value, 51, low) | bits(address, low - 1, 0);
            return Ok(Mapped { address: page, entry: entry.value, size, granted });
        }
    }

    /// "Writes by the logical processor to guest paging structures to update accessed and dirty flags are considered to be data
    /// writes." Without EPTP bit 6 that is the first the entry is written, and what its page lacks shows only here.
    ///
    /// When a CPU makes the update is its own business. The project's own rule (`EptWalk`): as soon as the entry is known to be used; and
    /// what updates has read, too.
    pub(super) fn guest_entry_updated(&mut self, visit: &Visit, nested: u64) -> Result<(), Refusal> {
        let controls = self.ept_controls();
        let Some(flags) = visit.flags else { return Ok(()) };
        let dirties = visit.found == Found::Leaf && visit.writes;
        if controls.tables_written
            || (bit(visit.entry, flags.accessed) && (!dirties || bit(visit.entry, flags.dirty)))
        {
            return Ok(());
        }
        self.guest_structure_written(nested)
    }

    /// What the entry at this address was read from is written as well.
    pub(super) fn guest_structure_written(&mut self, nested: u64) -> Result<(), Refusal> {
        // The walk was made for the read already, and is no part of the trace again.
        let visits = self.visits.len();
        let access = Access { data_read: true, data_write: true, fetch: false };
        let controls = self.ept_controls();
        let outcome = self.ept_walk(controls, access, nested, Purpose::Table, Granted::EVERYTHING);
        self.visits.truncate(visits);
        outcome.map(|_| ())
    }

    fn ept_access(&self, controls: Controls, purpose: Purpose) -> Access {
        match (purpose, self.request.kind) {
            // "Reads by the logical processor of guest paging structures ... are considered to be data reads." With EPTP bit 6 they
            // "are treated as writes", too.
            (Purpose::Table, _) => {
                Access { data_read: true, data_write: controls.tables_written, fetch: false }
            }
            // "Loads of guest PDPTEs are treated as reads", with bit 6 as without.
            (Purpose::PdpteRegister, _) => Access { data_read: true, data_write: false, fetch: false },
            (Purpose::Final, Kind::Fetch) => Access { data_read: false, data_write: false, fetch: true },
            (Purpose::Final, kind) => {
                Access { data_read: !kind.writes(), data_write: kind.writes(), fetch: false }
            }
        }
    }

    /// An entry is present if any of bits 2:0 is 1; with mode-based execute control, bit 10 counts as well. If it is not, the other
    /// bits are ignored.
    fn ept_present(
        &mut self,
        view: &View,
        controls: Controls,
        access: Access,
        guest: Granted,
        entry: Read,
    ) -> Result<(), Refusal> {
        let value = entry.value;
        if bits(value, 2, 0) != 0 || (controls.mode_based_execute && bit(value, 10)) {
            return Ok(());
        }
        self.visited(view, entry, Granted::NOTHING, Found::NotPresent);
        let event = self.ept_violation(view, controls, access, guest, Granted::NOTHING, None);
        // For an absent entry, the present bits (`Fault::bits`).
        let present_bits = if controls.mode_based_execute { 1 << 10 | 0b111 } else { 0b111 };
        Err(self.blame(view, entry, present_bits, event, Cause::NotPresent))
    }

    /// "EPT Misconfigurations".
    fn ept_configured(
        &mut self,
        view: &View,
        controls: Controls,
        entry: Read,
        level: u32,
        maps: bool,
        granted: Granted,
    ) -> Result<(), Refusal> {
        let value = entry.value;
        // Of several causes the project names the first in the order of `Reason`.
        let mut wrong: Option<(Cause, u64)> = None;

        // "Bit 0 of the entry is clear and bit 1 is set."
        if !bit(value, 0) && bit(value, 1) {
            wrong = wrong.or(Some((Cause::WriteWithoutRead, 1 << 1)));
        }
        // "Bit 0 is clear, the processor does not support execute-only translations, and bit 2 is set", or bit 10 with mode-based
        // execute control.
        if !bit(value, 0) && !controls.offers.execute_only {
            let mut executable = bits(value, 2, 2);
            if controls.mode_based_execute {
                executable |= bits(value, 10, 10);
            }
            if executable != 0 {
                wrong = wrong.or(Some((Cause::ExecuteOnly, executable)));
            }
        }
        // "A reserved bit is set": by the formats.
        let mut reserved = bits(value, 51, controls.cpu.maxphyaddr);
        match level {
            // EPT PML5E and EPT PML4E: 7:3.
            4 | 5 => reserved |= bits(value, 7, 3),
            // EPT PDPTE and EPT PDE that refer to a table: 6:3. Those that map a page: the address bits below its size. Where the CPU
            // offers no such pages, all refer to tables, and bit 7 must be 0 as well.
            3 if maps && controls.offers.pages_1_gib => reserved |= bits(value, 29, 12),
            2 if maps && controls.offers.pages_2_mib => reserved |= bits(value, 20, 12),
            2 | 3 if maps => reserved |= bits(value, 7, 3),
            2 | 3 => reserved |= bits(value, 6, 3),
            // EPT PTE: nothing but address bits.
            _ => {}
        }
        if reserved != 0 {
            wrong = wrong.or(Some((Cause::ReservedBits, reserved)));
        }
        // "The entry is the last one used, and the value of bits 5:3 is 2, 3, or 7."
        if maps && matches!(number(value, 5, 3), 2 | 3 | 7) {
            wrong = wrong.or(Some((Cause::MemoryType, bits(value, 5, 3))));
        }

        let Some((cause, bits)) = wrong else { return Ok(()) };
        let found = if cause == Cause::ReservedBits { Found::Reserved } else { Found::Misconfigured };
        self.visited(view, entry, granted, found);
        Err(self.blame(view, entry, bits, Event::EptMisconfiguration, cause))
    }

    /// "EPT Violations", of a translation whose entries are present and configured.
    fn ept_allows(
        &self,
        view: &View,
        controls: Controls,
        access: Access,
        guest: Granted,
        granted: Granted,
        leaf: u64,
    ) -> Result<(), Refusal> {
        // Privilege::Exempt: no rights are checked.
        if self.request.by == By::Exempt {
            return Ok(());
        }
        let supervisor_shadow_stack_access = view.purpose == Purpose::Final
            && self.request.kind.of_a_shadow_stack()
            && self.request.by != By::User;
        let marked_pages_only = controls.supervisor_shadow_stack && supervisor_shadow_stack_access;
        let cause = if marked_pages_only {
            // Such an access needs bit 0 in every entry, bit 1 in every entry but the last, and bit 60 in the last. Bit 1 of the last
            // does not count: the page need not be writable otherwise.
            let above = &self.visits[view.first_visit..self.visits.len() - 1];
            if above.iter().any(|visit| !bit(visit.entry, 1)) {
                Cause::ReadOnly
            } else if !bit(leaf, 60) {
                Cause::NotShadowStack
            } else if !granted.read {
                Cause::NotReadable
            } else {
                return Ok(());
            }
        } else if access.fetch && !self.ept_executable(controls, guest, granted) {
            Cause::NoExecute
        } else if access.data_write && !granted.write {
            Cause::ReadOnly
        } else if access.data_read && !granted.read {
            Cause::NotReadable
        } else {
            return Ok(());
        };
        let event = self.ept_violation(view, controls, access, guest, granted, Some(leaf));
        // The project's own rule (`Fault`): the entry nearest to the leaf that withholds the right.
        let needed = match cause {
            Cause::NotReadable => 1 << 0,
            Cause::ReadOnly => 1 << 1,
            Cause::NotShadowStack => 1 << 60,
            _ if controls.mode_based_execute && guest.user => 1 << 10,
            _ => 1 << 2,
        };
        Err(self.blame_the_lowest(view, cause, event, |visit| match (cause, visit.found) {
            (Cause::ReadOnly, Found::Leaf) if marked_pages_only => 0,
            _ => !visit.entry & needed,
        }))
    }

    /// With mode-based execute control, bit 2 is for addresses that paging maps as supervisor-mode ones, and bit 10 for user-mode
    /// ones. "If paging is disabled, every linear address is a user-mode address."
    fn ept_executable(&self, controls: Controls, guest: Granted, granted: Granted) -> bool {
        if controls.mode_based_execute && guest.user { granted.user } else { granted.execute }
    }

    /// The exit qualification, bit by bit. `granted` is nothing where an entry was not present, and `leaf` what maps the page, if the
    /// translation got there. What the manual leaves undefined is 0.
    fn ept_violation(
        &self,
        view: &View,
        controls: Controls,
        access: Access,
        guest: Granted,
        granted: Granted,
        leaf: Option<u64>,
    ) -> Event {
        let last = view.purpose == Purpose::Final;
        let mut qualification = 0;
        let mut set = |number: u32, on: bool| qualification |= u64::from(on) << number;
        set(0, access.data_read);
        set(1, access.data_write);
        set(2, access.fetch);
        set(3, granted.read);
        set(4, granted.write);
        set(5, granted.execute);
        set(6, controls.mode_based_execute && granted.user);
        // Valid "for all EPT violations except those resulting from an attempt to load the guest PDPTEs".
        set(7, view.purpose != Purpose::PdpteRegister);
        set(8, last);
        if last && controls.offers.advanced_information {
            set(9, guest.user);
            set(10, guest.write);
            set(11, !guest.execute);
        }
        set(13, last && self.request.kind.of_a_shadow_stack());
        set(14, controls.supervisor_shadow_stack && leaf.is_some_and(|leaf| bit(leaf, 60)));
        Event::EptViolation(qualification)
    }
}
