//! Reading paging-structure entries, and the faults of entries that cannot be used: what all formats have in common.
//!
//! Intel SDM volume 3, "Page-Fault Exceptions".

use super::{
    Cause, Cpu, Dimension, Event, Flags, Found, Granted, Physical, Purpose, Refusal, Registers, Second, Size,
    Visit, Walk, bit, bits, number,
};

/// Whose structures are walked, under which registers, and for what.
pub(super) struct View {
    pub(super) dimension: Dimension,
    /// The guest's; the host's where the second dimension is walked.
    pub(super) registers: Registers,
    pub(super) cpu: Cpu,
    /// The address to translate.
    pub(super) input: u64,
    pub(super) purpose: Purpose,
    pub(super) writes: bool,
    /// Number of the first of the walk's visits that may belong to this view.
    pub(super) first_visit: usize,
}

impl View {
    /// Bits `high` to `low` as an address. Where one of an entry's address bits stands for encryption, it is not part of the address.
    pub(super) fn address(&self, value: u64, high: u32, low: u32) -> u64 {
        match self.cpu.encryption_bit {
            Some(encrypted) => bits(value, high, low) & !(1 << encrypted),
            None => bits(value, high, low),
        }
    }

    /// Bits `high` to MAXPHYADDR: of an address that the CPU does not have.
    pub(super) fn beyond_the_cpu(&self, entry: u64, high: u32) -> u64 {
        self.address(entry, high, self.cpu.maxphyaddr)
    }

    /// A refusal for which no entry is to blame.
    pub(super) fn nobody_to_blame(&self, linear: u64, event: Event, cause: Cause) -> Refusal {
        Refusal {
            event,
            cause,
            linear,
            dimension: self.dimension,
            level: 0,
            at: 0,
            entry: 0,
            bits: 0,
            nested: (self.dimension == Dimension::Nested).then_some(self.input),
        }
    }
}

/// What the structures of one dimension made of an address.
#[derive(Clone, Copy)]
pub(super) struct Mapped {
    pub(super) address: u64,
    /// The entry that maps the page.
    pub(super) entry: u64,
    pub(super) size: Size,
    pub(super) granted: Granted,
}

/// An entry that was read, before it is used.
#[derive(Clone, Copy)]
pub(super) struct Read {
    level: u32,
    table: u64,
    index: u64,
    address: u64,
    pub(super) value: u64,
    bytes: u64,
    flags: Option<Flags>,
    /// Of a guest's entry behind a second dimension: its address there.
    nested: Option<u64>,
}

/// "Accessed and Dirty Flags": bit 5 is the accessed flag, and bit 6 the dirty flag.
const ACCESSED_DIRTY: Flags = Flags { accessed: 5, dirty: 6 };

impl Read {
    /// An entry of `bytes` bytes that no walk has looked at yet.
    pub(super) fn numbered(level: u32, table: u64, index: u64, bytes: u64) -> Read {
        Read {
            level,
            table,
            index,
            address: table + bytes * index,
            value: 0,
            bytes,
            flags: Some(ACCESSED_DIRTY),
            nested: None,
        }
    }

    /// Where the format has other flags, or none.
    pub(super) fn with_flags(self, flags: Option<Flags>) -> Read {
        Read { flags, ..self }
    }

    /// A value that a register holds instead of memory.
    pub(super) fn register(level: u32, index: u64, value: u64) -> Read {
        Read { level, table: 0, index, address: 0, value, bytes: 8, flags: None, nested: None }
    }
}

impl<P: Physical> Walk<'_, P> {
    /// Reads an entry. Where the guest's structures lie behind a second dimension, the entry's address is translated by that
    /// first. `granted` is what the levels above grant.
    pub(super) fn read_entry(
        &mut self,
        view: &View,
        mut read: Read,
        granted: Granted,
    ) -> Result<Read, Refusal> {
        if view.dimension == Dimension::Guest && self.system.second.is_some() {
            let purpose = self.why_translate(read);
            read.nested = Some(read.address);
            read.address = self.through_second(read.address, purpose, Granted::EVERYTHING)?.address;
            read.table = read.address - read.bytes * read.index;
        }
        if let Some(eight_bytes) = self.memory.read(bits(read.address, 63, 3)) {
            read.value = match (read.bytes, bit(read.address, 2)) {
                (8, _) => eight_bytes,
                (_, false) => bits(eight_bytes, 31, 0),
                (_, true) => number(eight_bytes, 63, 32),
            };
            return Ok(read);
        }
        // Not architectural: FaultKind::Unbacked.
        self.visited(view, read, granted, Found::Unbacked);
        Err(self.blame(view, read, 0, Event::Unbacked, Cause::TableUnbacked))
    }

    /// Under EPT the PDPTEs of PAE paging are not walked but loaded into registers beforehand.
    fn why_translate(&self, read: Read) -> Purpose {
        let registers = self.system.registers;
        let pae = registers.cr4_pae() && !registers.efer_lma();
        match self.system.second {
            Some(Second::Ept { .. }) if pae && read.level == 3 => Purpose::PdpteRegister,
            _ => Purpose::Table,
        }
    }

    /// "Page-Fault Exceptions": there is no translation if P is 0 in an entry that the translation would use. The other
    /// bits of such an entry are ignored.
    pub(super) fn must_be_present(&mut self, view: &View, read: Read) -> Result<(), Refusal> {
        if bit(read.value, 0) {
            return Ok(());
        }
        self.visited(view, read, Granted::NOTHING, Found::NotPresent);
        let event = match view.dimension {
            // P is 0; RSVD is 0 wherever P is 0.
            Dimension::Guest => Event::PageFault(self.about_the_access(view)),
            Dimension::Nested => Event::NestedPageFault(self.about_the_nested_access(view)),
        };
        Err(self.blame(view, read, 1, event, Cause::NotPresent))
    }

    /// "Page-Fault Exceptions": nor is there one if an entry sets a reserved bit; then P and RSVD are both 1. `granted` includes
    /// what this entry grants.
    pub(super) fn must_be_clear(
        &mut self,
        view: &View,
        read: Read,
        wrong: u64,
        granted: Granted,
    ) -> Result<(), Refusal> {
        if wrong == 0 {
            return Ok(());
        }
        self.visited(view, read, granted, Found::Reserved);
        let event = match view.dimension {
            Dimension::Guest => Event::PageFault(self.about_the_access(view) | 1 << 0 | 1 << 3),
            Dimension::Nested => Event::NestedPageFault(self.about_the_nested_access(view) | 1 << 0 | 1 << 3),
        };
        Err(self.blame(view, read, wrong, event, Cause::ReservedBits))
    }

    /// An entry that refers to another structure.
    pub(super) fn refers(&mut self, view: &View, read: Read, so_far: Granted) -> Result<(), Refusal> {
        self.visited(view, read, so_far, Found::Table);
        self.flags_can_be_set(view)
    }

    /// Whether the second dimension lets the CPU set flags in the guest's entry that was read last.
    pub(super) fn flags_can_be_set(&mut self, view: &View) -> Result<(), Refusal> {
        let Some(&visit) = self.visits.last() else { return Ok(()) };
        match (view.dimension, visit.nested, self.system.second) {
            (Dimension::Guest, Some(nested), Some(Second::Ept { .. })) => {
                self.guest_entry_updated(&visit, nested)
            }
            _ => Ok(()),
        }
    }

    pub(super) fn visited(&mut self, view: &View, read: Read, so_far: Granted, found: Found) {
        self.visits.push(Visit {
            dimension: view.dimension,
            level: read.level,
            input: view.input,
            table: read.table,
            index: read.index as u32,
            address: read.address,
            entry: read.value,
            so_far,
            found,
            writes: view.writes,
            bytes: read.bytes,
            flags: read.flags,
            nested: read.nested,
        });
    }

    pub(super) fn blame(&self, view: &View, read: Read, bits: u64, event: Event, cause: Cause) -> Refusal {
        Refusal {
            event,
            cause,
            linear: self.request.linear,
            dimension: view.dimension,
            level: read.level,
            at: read.address,
            entry: read.value,
            bits,
            nested: (view.dimension == Dimension::Nested).then_some(view.input),
        }
    }
}
