//! The registers of a vCPU as plain values, and changes to them.
//!
//! Intel SDM volume 1, "Basic Program Execution Registers", and volume 3, "Control Registers". Floating-point and vector
//! state, debug registers and MSRs other than EFER, PAT and PKRS are left out: no walk depends on them.

use pagewalk::mode::{CR4_LA57, EFER_LMA};
use pagewalk::{ControlRegisters, CpuProfile, PageWalk, PagingMode, StateError, Walker, is_canonical};

macro_rules! registers {
    ($($field:ident $name:literal $doc:literal),* $(,)?) => {
        /// The registers of a vCPU at one moment.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct Registers {
            $(#[doc = $doc] pub $field: u64,)*
            /// PKRU; `None` where the vCPU has none.
            pub pkru: Option<u32>,
            /// IA32_PKRS (MSR 0x6e1); `None` where the vCPU has none, or it cannot be read.
            pub pkrs: Option<u32>,
            /// PDPTE registers of PAE paging; `None` where they cannot be read.
            pub pdptes: Option<[u64; 4]>,
            /// Current privilege level, 0 to 3.
            pub cpl: u8,
            /// Selectors of CS, SS, DS, ES, FS and GS.
            pub selectors: Selectors,
        }

        /// Registers to write: those that are present.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct RegisterChanges {
            $(#[doc = $doc] pub $field: Option<u64>,)*
            /// PKRU.
            pub pkru: Option<u32>,
        }

        impl RegisterChanges {
            /// Whether there is nothing to write.
            #[must_use]
            pub fn is_empty(&self) -> bool {
                *self == Self::default()
            }

            /// `registers` with these changes made.
            #[must_use]
            pub fn applied_to(&self, registers: &Registers) -> Registers {
                let mut changed = registers.clone();
                $(if let Some(value) = self.$field { changed.$field = value; })*
                if self.pkru.is_some() { changed.pkru = self.pkru; }
                changed
            }
        }

        impl Registers {
            /// The first register that differs: its name, the value here and the other.
            #[must_use]
            pub fn first_difference(&self, other: &Self) -> Option<(&'static str, u64, u64)> {
                $(if self.$field != other.$field { return Some(($name, self.$field, other.$field)); })*
                if self.pkru != other.pkru {
                    let value = |pkru: Option<u32>| u64::from(pkru.unwrap_or_default());
                    return Some(("PKRU", value(self.pkru), value(other.pkru)));
                }
                None
            }
        }
    };
}

registers! {
    cr0 "CR0" "CR0.",
    cr2 "CR2" "CR2: linear address of the last page fault.",
    cr3 "CR3" "CR3.",
    cr4 "CR4" "CR4.",
    cr8 "CR8" "CR8: task priority.",
    efer "EFER" "IA32_EFER.",
    pat "PAT" "IA32_PAT.",
    rip "RIP" "RIP.",
    rflags "RFLAGS" "RFLAGS.",
    rax "RAX" "RAX.",
    rbx "RBX" "RBX.",
    rcx "RCX" "RCX.",
    rdx "RDX" "RDX.",
    rsi "RSI" "RSI.",
    rdi "RDI" "RDI.",
    rbp "RBP" "RBP.",
    rsp "RSP" "RSP.",
    r8 "R8" "R8.",
    r9 "R9" "R9.",
    r10 "R10" "R10.",
    r11 "R11" "R11.",
    r12 "R12" "R12.",
    r13 "R13" "R13.",
    r14 "R14" "R14.",
    r15 "R15" "R15.",
    fs_base "FS.base" "Base of FS.",
    gs_base "GS.base" "Base of GS.",
}

/// CR0.NE: the FPU's errors are exceptions.
pub(crate) const CR0_NE: u64 = 1 << 5;
/// The bit of RFLAGS that reads as 1, whatever is written.
pub(crate) const RFLAGS_FIXED: u64 = 1 << 1;
/// RFLAGS.VM: virtual-8086 mode.
pub(crate) const RFLAGS_VM: u64 = 1 << 17;
/// Bits of RFLAGS that no CPU lets be set: 3, 5, 15, and 22 to 63.
const RFLAGS_RESERVED: u64 = !0x3f_7fd7;
const CR8_MAX: u64 = 15;
/// The widest linear addresses that there are.
const LINEAR_BITS: u32 = 57;
/// IA32_PAT.
pub(crate) const MSR_PAT: u32 = 0x277;

/// Bits of CR4 that change what an access may do and that the walker does not model yet.
pub(crate) const UNMODELLED: [(u64, &str); 1] = [(1 << 27, "CR4.LASS")];

/// The visible parts of the segment registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selectors {
    /// CS.
    pub cs: u16,
    /// SS.
    pub ss: u16,
    /// DS.
    pub ds: u16,
    /// ES.
    pub es: u16,
    /// FS.
    pub fs: u16,
    /// GS.
    pub gs: u16,
}

impl RegisterChanges {
    /// Whether some CPU holds these values among all those `wanted`; [`PageWalk::new`] tells of those that a walk depends on.
    pub(super) fn check(&self, wanted: &Registers) -> Result<(), String> {
        if let Some(cr8) = self.cr8.filter(|cr8| *cr8 > CR8_MAX) {
            return Err(format!("CR8: {cr8:#x} is no task priority: 0 to {CR8_MAX} are"));
        }
        if let Some(reserved) = self.rflags.map(|rflags| rflags & RFLAGS_RESERVED).filter(|bits| *bits != 0) {
            return Err(format!("RFLAGS: the bits {reserved:#x} are reserved"));
        }
        let long = wanted.efer & EFER_LMA != 0;
        if long && self.rflags.is_some_and(|rflags| rflags & RFLAGS_VM != 0) {
            return Err("RFLAGS: long mode has no virtual-8086 mode (VM)".to_owned());
        }
        if let Some(cr3) = self.cr3.filter(|cr3| !long && *cr3 > u32::MAX.into()) {
            return Err(format!("CR3: {cr3:#x} has more than 32 bits, outside long mode"));
        }
        if let Some(rip) = self.rip {
            let bits = if wanted.cr4 & CR4_LA57 != 0 { LINEAR_BITS } else { 48 };
            if !long && rip > u32::MAX.into() {
                return Err(format!("RIP: {rip:#x} has more than 32 bits, outside long mode"));
            }
            if long && !is_canonical(rip, bits) {
                return Err(format!("RIP: {rip:#x} is not canonical in {bits} bits"));
            }
        }
        // Their instructions and MSRs are not bound to the way of paging.
        for (name, base) in [("FS.base", self.fs_base), ("GS.base", self.gs_base)] {
            if let Some(base) = base.filter(|base| !is_canonical(*base, LINEAR_BITS)) {
                return Err(format!("{name}: {base:#x} is not canonical in {LINEAR_BITS} bits"));
            }
        }
        Ok(())
    }
}

impl Registers {
    /// The part that a walk depends on.
    #[must_use]
    pub fn control(&self) -> ControlRegisters {
        ControlRegisters { cr0: self.cr0, cr3: self.cr3, cr4: self.cr4, efer: self.efer, pat: self.pat }
    }

    /// The walk that these registers select, from the PDPTE registers where PAE paging has them.
    ///
    /// # Errors
    /// Names the register that holds a value no CPU accepts.
    pub fn gva_walk(&self, cpu: &CpuProfile) -> Result<PageWalk, StateError> {
        let walk = PageWalk::new(&self.control(), cpu)?;
        match self.pdptes {
            Some(pdptes) if walk.format().mode() == PagingMode::Pae => {
                PageWalk::with_pdptes(&self.control(), pdptes, cpu)
            }
            _ => Ok(walk),
        }
    }

    /// `walker` with the PDPTE registers in it, if its first dimension is the vCPU's own, not that of an L2 laid over it.
    pub(super) fn with_pdptes(
        &self,
        walker: Result<Walker, StateError>,
        cpu: &CpuProfile,
    ) -> Result<Walker, StateError> {
        let Ok(from_memory) = &walker else { return walker };
        if self.pdptes.is_none() || PageWalk::new(&self.control(), cpu)? != *from_memory.gva_walk() {
            return walker;
        }
        let gva_walk = self.gva_walk(cpu)?;
        Ok(match from_memory.ngpa_walk() {
            Some(ngpa_walk) => Walker::nested(gva_walk, ngpa_walk.clone()),
            None => Walker::new(gva_walk),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_touch_only_what_is_present() {
        let before = Registers { rax: 1, cr3: 0x1000, pkru: Some(4), ..Registers::default() };
        let after = RegisterChanges { rax: Some(2), ..RegisterChanges::default() }.applied_to(&before);
        assert_eq!(after, Registers { rax: 2, ..before.clone() });
        assert_eq!(before.first_difference(&after), Some(("RAX", 1, 2)));
        assert_eq!(before.first_difference(&before), None);
        assert!(RegisterChanges::default().is_empty());
        assert!(!RegisterChanges { pkru: Some(0), ..RegisterChanges::default() }.is_empty());
    }

    #[test]
    fn what_no_cpu_holds() {
        const HIGH: u64 = 1 << 50;
        let none = RegisterChanges::default;
        let (legacy, long) = (Registers::default(), Registers { efer: EFER_LMA, ..Registers::default() });
        let five = Registers { cr4: CR4_LA57, ..long.clone() };
        let rip = |rip| RegisterChanges { rip: Some(rip), ..none() };
        for (changes, wanted, said) in [
            (RegisterChanges { cr8: Some(15), ..none() }, &long, ""),
            (RegisterChanges { cr8: Some(16), ..none() }, &long, "CR8: 0x10"),
            (RegisterChanges { rflags: Some(0x3f_7fd7), ..none() }, &legacy, ""),
            (
                RegisterChanges { rflags: Some(RFLAGS_VM), ..none() },
                &long,
                "RFLAGS: long mode has no virtual-8086",
            ),
            (RegisterChanges { cr3: Some(1 << 32), ..none() }, &long, ""),
            (RegisterChanges { cr3: Some(1 << 32), ..none() }, &legacy, "CR3: 0x100000000 has more than 32"),
            (RegisterChanges { rflags: Some(0x8000_802a), ..none() }, &long, "RFLAGS: the bits 0x80008028"),
            (rip(u32::MAX.into()), &legacy, ""),
            (rip(1 << 32), &legacy, "RIP: 0x100000000 has more than 32 bits"),
            (rip(1 << 32), &long, ""),
            (rip(HIGH), &long, "RIP: 0x4000000000000 is not canonical in 48"),
            (rip(HIGH), &five, ""),
            (rip(1 << 63), &five, "not canonical in 57"),
            (RegisterChanges { fs_base: Some(HIGH), ..none() }, &long, ""),
            (RegisterChanges { fs_base: Some(1 << 63), ..none() }, &legacy, "FS.base: "),
            (RegisterChanges { gs_base: Some(1 << 60), ..none() }, &long, "GS.base: "),
            (none(), &Registers { cr8: 99, rip: 1 << 63, ..long.clone() }, ""),
        ] {
            let problem = changes.check(wanted).err().unwrap_or_default();
            assert!(
                problem.starts_with(said) || said.starts_with("not") && problem.contains(said),
                "{problem}"
            );
            assert_eq!(problem.is_empty(), said.is_empty(), "{problem}");
        }
    }
}
