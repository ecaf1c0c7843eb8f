//! Registers and CPUs, in the words of both sides.

use pagewalk::{
    ControlRegisters, CpuProfile, EptCapabilities, EptControls, NgpaWalk, NptControls, PageWalk, Vendor,
    Walker,
};

use super::host::Host;
use super::path::Shape;
use crate::oracle::{Cpu, Registers, Second, System};

/// A system for the oracle, and the walker for the same system.
pub(crate) struct Setup {
    pub(crate) system: System,
    pub(crate) walker: Walker,
    pub(crate) shape: Shape,
    /// The host's format under a nested guest.
    pub(crate) host: Option<Host>,
}

/// The control bits that decide an access.
#[derive(Clone, Copy)]
pub(crate) struct Controls {
    pub(crate) shape: Shape,
    pub(crate) wp: bool,
    pub(crate) nxe: bool,
    pub(crate) smep: bool,
    pub(crate) smap: bool,
    pub(crate) pke: bool,
    pub(crate) pks: bool,
    /// Only with WP: no CPU has the one without the other.
    pub(crate) cet: bool,
    pub(crate) pse: bool,
}

impl Controls {
    /// The combination with this number, of sixty-four; CR4.PSE is set. CET and PKS, which decide over different accesses, go
    /// together.
    pub(crate) fn numbered(shape: Shape, number: u64) -> Controls {
        let on = |bit: u64| number >> bit & 1 == 1;
        Controls {
            shape,
            wp: on(0),
            nxe: on(1),
            smep: on(2),
            smap: on(3),
            pke: on(4),
            pks: on(5),
            cet: on(5) && on(0),
            pse: true,
        }
    }

    pub(crate) fn registers(self, root: u64) -> Registers {
        let set = |on: bool, bit: u32| u64::from(on) << bit;
        let levels = self.shape.0;
        Registers {
            cr0: 1 | set(self.wp, 16) | set(levels > 0, 31),
            cr3: root,
            cr4: set(self.pse, 4)
                | set(levels >= 3, 5)
                | set(levels == 5, 12)
                | set(self.smep, 20)
                | set(self.smap, 21)
                | set(self.pke, 22)
                | set(self.cet, 23)
                | set(self.pks, 24),
            efer: set(levels >= 4, 8) | set(levels >= 4, 10) | set(self.nxe, 11),
        }
    }
}

impl Setup {
    pub(crate) fn new(registers: Registers, cpu: Cpu, second: Option<Second>) -> Setup {
        Setup::with_pdptes(registers, cpu, None, second)
    }

    /// A setup whose PDPTE registers are known.
    pub(crate) fn with_pdptes(
        registers: Registers,
        cpu: Cpu,
        pdpte_registers: Option<[u64; 4]>,
        second: Option<Second>,
    ) -> Setup {
        let (control, profile) = (control_registers(&registers), profile(&cpu));
        let gva_walk = match pdpte_registers {
            Some(pdptes) => PageWalk::with_pdptes(&control, pdptes, &profile).unwrap(),
            None => PageWalk::new(&control, &profile).unwrap(),
        };
        let walker = match second {
            None => Walker::new(gva_walk),
            Some(Second::Npt { ncr3, host, cpu, gmet }) => {
                let controls = NptControls { guest_mode_execute_trap: gmet };
                let host = control_registers(&host);
                let npt = NgpaWalk::npt_with(ncr3, &host, &controls, &self::profile(&cpu)).unwrap();
                Walker::nested(gva_walk, npt)
            }
            Some(Second::Ept { eptp, controls, offers, cpu }) => {
                let controls = EptControls {
                    mode_based_execute: controls.mode_based_execute,
                    tables_written: controls.tables_written,
                };
                let capabilities = EptCapabilities {
                    execute_only: offers.execute_only,
                    pages_2m: offers.pages_2_mib,
                    pages_1g: offers.pages_1_gib,
                    advanced_information: offers.advanced_information,
                    ..EptCapabilities::all()
                };
                let ept = NgpaWalk::ept(eptp, &controls, &capabilities, &self::profile(&cpu)).unwrap();
                Walker::nested(gva_walk, ept)
            }
        };
        let host = second.map(|second| match second {
            Second::Npt { host, .. } => Host::Npt(shape(&host)),
            Second::Ept { eptp, .. } => Host::Ept((eptp >> 3 & 7) as u32 + 1),
        });
        Setup {
            system: System { registers, cpu, pdpte_registers, second },
            walker,
            shape: shape(&registers),
            host,
        }
    }
}

fn shape(of: &Registers) -> Shape {
    let on = |register: u64, bit: u32| register >> bit & 1 == 1;
    match *of {
        Registers { cr0, .. } if !on(cr0, 31) => Shape(0),
        Registers { cr4, .. } if !on(cr4, 5) => Shape(2),
        Registers { efer, .. } if !on(efer, 10) => Shape(3),
        Registers { cr4, .. } => Shape(if on(cr4, 12) { 5 } else { 4 }),
    }
}

fn control_registers(of: &Registers) -> ControlRegisters {
    ControlRegisters { cr0: of.cr0, cr3: of.cr3, cr4: of.cr4, efer: of.efer, ..Default::default() }
}

fn profile(of: &Cpu) -> CpuProfile {
    CpuProfile {
        vendor: if of.amd { Vendor::Amd } else { Vendor::Intel },
        maxphyaddr: of.maxphyaddr as u8,
        gib_pages: of.page1gb,
        encryption_bit: of.encryption_bit.map(|bit| bit as u8),
    }
}
