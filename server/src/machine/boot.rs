//! The state in which a guest is entered: long mode, flat segments, interrupts off.
//!
//! Intel SDM volume 3, "Initializing IA-32e Mode", with everything that software would do already done.

use kvm_bindings::{kvm_dtable, kvm_segment, kvm_sregs};
use pagewalk::mode::{CR0_PE, CR0_PG, CR0_WP, CR4_PAE, CR4_PGE, EFER_LMA, EFER_LME, EFER_NXE, PAT_RESET};

use crate::vcpu::{CR0_NE, RFLAGS_FIXED, Registers, Selectors};

const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;

/// A GDT with the two descriptors that an entry needs: null, 64-bit code, data.
pub(super) const GDT: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Selector of the code in [`GDT`].
pub(super) const CODE_SELECTOR: u16 = 0x08;

/// Where and with what a vCPU starts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) cr3: u64,
    pub(super) rip: u64,
    pub(super) rsp: u64,
    /// RDI and RSI: the first two arguments of a C function.
    pub(super) arguments: [u64; 2],
    /// Linear address of the GDT.
    pub(super) gdt: u64,
    /// Selector of 64-bit code; the next one is that of data.
    pub(super) code_selector: u16,
}

impl Entry {
    fn data_selector(&self) -> u16 {
        self.code_selector + 8
    }

    pub(super) fn registers(&self) -> Registers {
        let data = self.data_selector();
        Registers {
            cr0: CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG,
            cr3: self.cr3,
            cr4: CR4_PAE | CR4_PGE | CR4_OSFXSR | CR4_OSXMMEXCPT,
            efer: EFER_LME | EFER_LMA | EFER_NXE,
            pat: PAT_RESET,
            rip: self.rip,
            rsp: self.rsp,
            rflags: RFLAGS_FIXED,
            rdi: self.arguments[0],
            rsi: self.arguments[1],
            selectors: Selectors { cs: self.code_selector, ss: data, ds: data, es: data, fs: data, gs: data },
            ..Registers::default()
        }
    }

    /// `reset` with the system registers of the entry state.
    pub(super) fn system_registers(&self, reset: kvm_sregs) -> kvm_sregs {
        let registers = self.registers();
        let code = kvm_segment {
            limit: u32::MAX,
            selector: self.code_selector,
            type_: 0xb,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..kvm_segment::default()
        };
        let data = kvm_segment { selector: self.data_selector(), type_: 0x3, l: 0, db: 1, ..code };
        kvm_sregs {
            cs: code,
            ss: data,
            ds: data,
            es: data,
            fs: data,
            gs: data,
            gdt: kvm_dtable {
                base: self.gdt,
                // To the end of data's descriptor.
                limit: self.data_selector() + 7,
                ..kvm_dtable::default()
            },
            // No IDT: an exception before the guest has set one up is a triple fault.
            idt: kvm_dtable::default(),
            cr0: registers.cr0,
            cr3: registers.cr3,
            cr4: registers.cr4,
            efer: registers.efer,
            ..reset
        }
    }
}
