//! What becomes of a linear address before paging sees it.
//!
//! Intel SDM volume 3, "Linear-Address Pre-Processing": "Linear-Address Masking"; volume 1, "Canonical Addressing". AMD APM
//! volume 2, "Upper Address Ignore".

use super::{By, Cause, Event, Kind, Physical, Refusal, Walk, bit, bits};

impl<P: Physical> Walk<'_, P> {
    /// The address that long mode translates, `width` bits wide, in canonical form. #GP(0), or #SS(0) for a reference through SS,
    /// where there is none; no paging structure is looked at.
    pub(super) fn canonical_address(&self, width: u32) -> Result<u64, Refusal> {
        let asked = self.request.linear;
        let mut address = asked;
        if let Some(highest) = self.masked_above(width) {
            // "Linear-Address Masking": the bits between bit 63 and the highest bit that is not metadata are metadata. They are checked
            // and translated as if they were that bit's copies; bit 63 stays what it is.
            for metadata in highest + 1..63 {
                address = with_bit(address, metadata, bit(address, highest));
            }
        }
        if self.upper_bits_ignored() {
            // "Upper Address Ignore": bits 63:57 are not looked at.
            for ignored in 57..64 {
                address = with_bit(address, ignored, bit(address, 56));
            }
        }
        // "Canonical Addressing": bits 63 to the highest one that is translated are equal.
        if canonical(address, width) {
            return Ok(address);
        }
        let event = if self.request.stack { Event::StackFault } else { Event::GeneralProtection };
        Err(Refusal {
            event,
            cause: Cause::NonCanonical,
            linear: asked,
            dimension: super::Dimension::Guest,
            level: 0,
            at: 0,
            entry: 0,
            bits: 0,
            nested: None,
        })
    }

    /// The highest address bit below the metadata, where LAM is in effect for this access.
    fn masked_above(&self, width: u32) -> Option<u32> {
        let registers = self.system.registers;
        // LAM is about data accesses, and no others are exempt but fetches.
        if self.request.kind == Kind::Fetch {
            return None;
        }
        // Bit 63 tells a user pointer from a supervisor pointer, whatever the CPL.
        if bit(self.request.linear, 63) {
            // Supervisor pointers: LAM57 with 5-level paging, LAM48 with 4-level paging.
            registers.cr4_lam_sup().then_some(width - 1)
        } else if registers.cr3_lam_u57() {
            // User pointers: LAM57 by CR3.LAM_U57, whatever LAM_U48; LAM48 by CR3.LAM_U48.
            Some(56)
        } else if registers.cr3_lam_u48() {
            Some(47)
        } else {
            None
        }
    }

    /// UAI is about references through DS and ES: not fetches, not the stack, not what the CPU accesses by itself. Neither is a
    /// shadow stack, which the shadow-stack pointer addresses.
    fn upper_bits_ignored(&self) -> bool {
        let explicit_data = matches!(self.request.kind, Kind::Read | Kind::Write)
            && self.request.by != By::ImplicitSupervisor
            && !self.request.stack;
        self.system.registers.efer_uaie() && explicit_data
    }
}

fn with_bit(value: u64, number: u32, on: bool) -> u64 {
    let others = value - bits(value, number, number);
    if on { others + (1 << number) } else { others }
}

pub(super) fn canonical(linear: u64, width: u32) -> bool {
    let top = bit(linear, width - 1);
    let mut above = width;
    while above < 64 {
        if bit(linear, above) != top {
            return false;
        }
        above += 1;
    }
    true
}
