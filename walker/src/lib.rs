//! An x86 page walker as a library: what does a guest virtual address mean, and if nothing, why not?
//!
//! A [`Walker`] is a plain value, built from control registers and what CPUID says ([`ControlRegisters`],
//! [`CpuProfile`]). It walks any [`Memory`], checks what a CPU checks, and answers with a [`Translation`] or with the
//! exact [`Fault`]. It is `no_std`, takes no lock, allocates nothing, does not panic, and changes nothing in the guest
//! unless asked to ([`AdPolicy::Set`]).
//!
//! The answer is a fresh walk of memory, not what a TLB may still hold. Guest memory is hostile and may change under the
//! walk: each entry is loaded once, atomically, and every decision uses that one value.
//!
//! Modelled are no paging, 32-bit, PAE, 4-level and 5-level paging, and as a second dimension EPT of four and of five levels, or
//! NPT in every host format.
//!
//! The module [`rules`] lists every rule with the manual's section, what shows that it is kept, and every known difference
//! between CPUs, the Linux kernel, emulators and this walker. It ends with what no machine here judges, and what is not modelled.
#![no_std]

#[cfg(test)]
extern crate std;

mod access;
mod accessed_dirty;
mod addr;
mod batch;
mod descent;
mod entry;
mod ept;
mod fault;
mod format;
mod lane;
pub mod map;
mod masking;
mod memory;
mod memory_type;
pub mod mode;
mod nested;
mod npt;
mod permission;
mod reserved;
#[doc = include_str!("../RULES.md")]
pub mod rules {}
mod shadow_stack;
#[cfg(test)]
mod single_path;
mod trace;
mod translation;
mod validated;
mod walk;
mod walker;
mod window;

pub use access::{Access, AccessKind, Privilege};
pub use accessed_dirty::MAX_ATTEMPTS;
pub use addr::{Gpa, Gva, NestedGpa, is_canonical};
#[doc(hidden)]
pub use batch::Instructions;
pub use batch::PageWord;
pub use ept::{
    EPT_VIOLATION_EXECUTABLE, EPT_VIOLATION_FETCH, EPT_VIOLATION_GVA_TRANSLATED, EPT_VIOLATION_GVA_VALID,
    EPT_VIOLATION_NO_EXECUTE_PAGE, EPT_VIOLATION_READ, EPT_VIOLATION_READABLE, EPT_VIOLATION_SHADOW_STACK,
    EPT_VIOLATION_SUPERVISOR_SHADOW_STACK, EPT_VIOLATION_USER_EXECUTABLE, EPT_VIOLATION_USER_PAGE,
    EPT_VIOLATION_WRITABLE, EPT_VIOLATION_WRITABLE_PAGE, EPT_VIOLATION_WRITE, EptCapabilities, EptControls,
    EptWalk,
};
pub use fault::{
    Dimension, EXIT_INFO_1_FINAL, EXIT_INFO_1_TABLE, Fault, FaultKind, PFEC_FETCH, PFEC_KEY, PFEC_PRESENT,
    PFEC_RESERVED, PFEC_SHADOW_STACK, PFEC_USER, PFEC_WRITE, Reason,
};
pub use format::PageFormat;
pub use masking::Masking;
pub use memory::{Backing, ExchangeError, Memory};
pub use memory_type::{EptMemoryType, MemoryType};
pub use mode::{ControlRegisters, CpuProfile, PagingMode, StateError, Vendor};
pub use nested::{NestedPhase, NgpaWalk};
pub use npt::{NptControls, NptWalk};
pub use permission::Rights;
pub use trace::{MAX_STEPS, NoTrace, Recorder, Step, Trace, Verdict};
pub use translation::{NestedPage, PageSize, Translation};
pub use validated::Validated;
pub use walk::PageWalk;
pub use walker::{AdPolicy, Walker};
pub use window::Window;
