//! VMCS12: where KVM keeps the fields of the VMCS that it shows an L1.
//!
//! Intel SDM volume 3, "Virtual Machine Control Structures"; the places are KVM's own, and part of what
//! `KVM_GET_NESTED_STATE` gives. L1 itself reaches the fields by VMREAD and VMWRITE alone.

use std::marker::PhantomData;

use kvm_bindings::kvm_segment;

use super::pages::Page;

/// KVM's name for this layout: the first word, and bits 30:0 of IA32_VMX_BASIC.
pub(super) const REVISION: u32 = 0x11e5_7ed0;
pub(super) const BYTES: usize = 4096;

// A field's place; its type says how wide it is.
macro_rules! fields {
    ($($name:ident: $width:ident = $at:expr;)*) => {
        $(pub(super) const $name: Field<$width> = Field { at: $at, holds: PhantomData };)*
        #[cfg(test)]
        const ALL: &[(&str, usize, usize)] = &[$((stringify!($name), $at, size_of::<$width>())),*];
    };
}

/// A field: where it lies.
#[derive(Clone, Copy)]
pub(super) struct Field<T> {
    at: usize,
    holds: PhantomData<T>,
}

impl<T: Copy> Field<T> {
    /// The one `number` places after it, of the same width.
    fn next(self, number: usize) -> Self {
        Self { at: self.at + number * size_of::<T>(), ..self }
    }
}

fields! {
    REVISION_ID: u32 = 0;
    LAUNCH_STATE: u32 = 8;
    MSR_BITMAP: u64 = 56;
    EPT_POINTER: u64 = 120;
    VMCS_LINK_POINTER: u64 = 176;
    GUEST_PAT: u64 = 192;
    GUEST_EFER: u64 = 200;
    GUEST_PDPTES: u64 = 216;
    HOST_PAT: u64 = 256;
    HOST_EFER: u64 = 264;
    CR4_GUEST_HOST_MASK: u64 = 352;
    CR0_READ_SHADOW: u64 = 360;
    CR4_READ_SHADOW: u64 = 368;
    EXIT_QUALIFICATION: u64 = 408;
    GUEST_CR0: u64 = 424;
    GUEST_CR3: u64 = 432;
    GUEST_CR4: u64 = 440;
    GUEST_BASES: u64 = 448;
    GUEST_GDTR_BASE: u64 = 512;
    GUEST_IDTR_BASE: u64 = 520;
    GUEST_DR7: u64 = 528;
    GUEST_RSP: u64 = 536;
    GUEST_RIP: u64 = 544;
    GUEST_RFLAGS: u64 = 552;
    GUEST_SYSENTER_ESP: u64 = 568;
    GUEST_SYSENTER_EIP: u64 = 576;
    HOST_CR0: u64 = 584;
    HOST_CR3: u64 = 592;
    HOST_CR4: u64 = 600;
    HOST_FS_BASE: u64 = 608;
    HOST_GS_BASE: u64 = 616;
    HOST_TR_BASE: u64 = 624;
    HOST_GDTR_BASE: u64 = 632;
    HOST_IDTR_BASE: u64 = 640;
    HOST_SYSENTER_ESP: u64 = 648;
    HOST_SYSENTER_EIP: u64 = 656;
    HOST_RSP: u64 = 664;
    HOST_RIP: u64 = 672;
    PIN_BASED_CONTROLS: u32 = 744;
    PROCESSOR_BASED_CONTROLS: u32 = 748;
    EXIT_CONTROLS: u32 = 768;
    ENTRY_CONTROLS: u32 = 780;
    SECONDARY_CONTROLS: u32 = 804;
    EXIT_REASON: u32 = 812;
    GUEST_LIMITS: u32 = 840;
    GUEST_GDTR_LIMIT: u32 = 872;
    GUEST_IDTR_LIMIT: u32 = 876;
    GUEST_ACCESS_RIGHTS: u32 = 880;
    GUEST_SYSENTER_CS: u32 = 920;
    HOST_SYSENTER_CS: u32 = 924;
    GUEST_SELECTORS: u16 = 964;
    HOST_SELECTORS: u16 = 982;
}

/// Access rights of a segment register that holds nothing.
const UNUSABLE: u32 = 1 << 16;

/// A VMCS.
#[derive(Clone)]
pub(super) struct Vmcs12(pub(super) Page);

impl Vmcs12 {
    /// With this layout, and nothing in it.
    pub(super) fn new() -> Self {
        let mut vmcs = Self(Box::new([0; BYTES]));
        vmcs.set(REVISION_ID, REVISION);
        vmcs
    }

    pub(super) fn set<T: Word>(&mut self, field: Field<T>, value: T) {
        let bytes = value.bytes();
        if let Some(place) = self.0.get_mut(field.at..field.at + size_of::<T>()) {
            place.copy_from_slice(bytes.as_ref());
        }
    }

    /// Sets `field` and those after it.
    pub(super) fn set_all<T: Word>(&mut self, field: Field<T>, values: impl IntoIterator<Item = T>) {
        for (number, value) in values.into_iter().enumerate() {
            self.set(field.next(number), value);
        }
    }

    pub(super) fn get<T: Word>(&self, field: Field<T>) -> T {
        T::of(|byte| self.0.get(field.at + byte).copied().unwrap_or_default())
    }

    /// Those of L2: ES, CS, SS, DS, FS, GS, LDTR, TR.
    pub(super) fn set_guest_segments(&mut self, segments: [&kvm_segment; 8]) {
        self.set_all(GUEST_SELECTORS, segments.map(|segment| segment.selector));
        self.set_all(GUEST_BASES, segments.map(|segment| segment.base));
        self.set_all(GUEST_LIMITS, segments.map(|segment| segment.limit));
        self.set_all(GUEST_ACCESS_RIGHTS, segments.map(access_rights));
    }
}

/// What a field holds.
pub(super) trait Word: Copy {
    fn bytes(self) -> impl AsRef<[u8]>;
    fn of(byte: impl Fn(usize) -> u8) -> Self;
}

macro_rules! word {
    ($($width:ident)*) => {
        $(impl Word for $width {
            fn bytes(self) -> impl AsRef<[u8]> {
                self.to_le_bytes()
            }

            fn of(byte: impl Fn(usize) -> u8) -> Self {
                Self::from_le_bytes(std::array::from_fn(byte))
            }
        })*
    };
}

word!(u16 u32 u64);

fn access_rights(segment: &kvm_segment) -> u32 {
    let &kvm_segment { type_, s, dpl, present, avl, l, db, g, unusable, .. } = segment;
    let bits = [(type_, 0), (s, 4), (dpl, 5), (present, 7), (avl, 12), (l, 13), (db, 14), (g, 15)];
    let rights = bits.into_iter().fold(0, |rights, (bits, at)| rights | u32::from(bits) << at);
    if unusable == 0 { rights } else { rights | UNUSABLE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_kvm_keeps_them() {
        // The widths of all fields of the structure in their order, with what is kept free between the groups: the 32-bit
        // header, 64-bit, natural-width, 32-bit and 16-bit fields.
        let groups: [(usize, usize, usize); 5] =
            [(4, 10, 0), (8, 35, 24), (8, 42, 64), (4, 47, 28), (2, 19, 0)];
        let mut starts = Vec::new();
        let mut end = 0;
        for (width, count, free) in groups {
            starts.push(end..end + width * count);
            end += width * count + free;
        }
        assert_eq!(end, 998);
        assert!(end <= BYTES);
        for &(name, at, width) in ALL {
            let group = starts.iter().position(|group| group.contains(&at)).expect(name);
            assert_eq!(width, groups[group].0, "{name}");
            assert_eq!((at - starts[group].start) % width, 0, "{name}");
        }
        for (field, at) in [(EPT_POINTER, 120), (GUEST_CR0, 424), (HOST_RIP, 672)] {
            assert_eq!(field.at, at);
        }
        assert_eq!((EXIT_REASON.at, SECONDARY_CONTROLS.at, HOST_SELECTORS.at), (812, 804, 982));
        assert!(ALL.windows(2).all(|two| two[0].1 + two[0].2 <= two[1].1), "in order, and apart");
    }

    #[test]
    fn a_vmcs_is_a_page_that_starts_with_its_revision() {
        let mut vmcs = Vmcs12::new();
        vmcs.set(EPT_POINTER, 0x1122_3344_5566_701e);
        assert_eq!(size_of_val(&*vmcs.0), 4096);
        assert_eq!(vmcs.0[..4], [0xd0, 0x7e, 0xe5, 0x11]);
        assert_eq!(vmcs.0[120..128], [0x1e, 0x70, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
        assert_eq!(vmcs.get(EPT_POINTER), 0x1122_3344_5566_701e);
    }

    #[test]
    fn segments_lie_side_by_side() {
        let segment = |number: u8| kvm_segment {
            base: 0x1000 * u64::from(number),
            limit: 0xffff_0000 | u32::from(number),
            selector: 8 * u16::from(number),
            type_: 0xb,
            s: 1,
            present: 1,
            dpl: 3,
            l: 1,
            g: 1,
            unusable: u8::from(number == 7),
            ..kvm_segment::default()
        };
        let all: [kvm_segment; 8] = std::array::from_fn(|number| segment(number as u8));
        let mut vmcs = Vmcs12::new();
        vmcs.set_guest_segments(all.each_ref());
        fn at<T>(at: usize) -> Field<T> {
            Field { at, holds: PhantomData }
        }
        // GS is the sixth, LDTR the seventh, TR the eighth.
        assert_eq!(vmcs.get(at::<u64>(488)), 0x5000);
        assert_eq!(vmcs.get(at::<u32>(864)), 0xffff_0006);
        assert_eq!(vmcs.get(at::<u32>(904)), 0xa0fb);
        assert_eq!(vmcs.get(at::<u32>(908)), 0x1_a0fb);
        assert_eq!(vmcs.get(at::<u16>(976)), 48);
    }
}
