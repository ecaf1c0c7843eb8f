//! The caller's own walker state, laid over the vCPU's.

use pagewalk::mode::{CR0_PG, EFER_LMA, EFER_LME};
use pagewalk::{CpuProfile, PageWalk, Vendor, Walker};
use pagewalk_proto::v1;
use pagewalk_proto::v1::walker_override::SecondDimension;

use super::nested::{ept_walk, npt_walk, override_field};
use crate::status::Error;
use crate::vcpu::Snapshot;

/// The walkers that a request describes: absent fields are the vCPU's, or those of the L2 that it runs or that is laid over it.
///
/// EFER.LMA follows EFER.LME and CR0.PG where the request changes CR0 and not EFER, as it does in a CPU.
pub(crate) fn walker(request: &v1::WalkerOverride, snapshot: &Snapshot) -> Result<Walker, Error> {
    let mut registers = snapshot.nested.gva_control(snapshot.registers.control());
    registers.cr0 = request.cr0.unwrap_or(registers.cr0);
    registers.cr3 = request.cr3.unwrap_or(registers.cr3);
    registers.cr4 = super::registers::cr4(request.cr4, "override.cr4")?.unwrap_or(registers.cr4);
    registers.pat = request.pat.unwrap_or(registers.pat);
    registers.efer = match (request.efer, request.cr0) {
        (Some(efer), _) => efer,
        (None, None) => registers.efer,
        (None, Some(cr0)) => {
            let active = cr0 & CR0_PG != 0 && registers.efer & EFER_LME != 0;
            registers.efer & !EFER_LMA | if active { EFER_LMA } else { 0 }
        }
    };
    let cpu = cpu(request, &snapshot.cpu)?;
    let gva_walk = match <[u64; 4]>::try_from(request.pdptrs.as_slice()) {
        Ok(pdptes) => PageWalk::with_pdptes(&registers, pdptes, &cpu),
        Err(_) if request.pdptrs.is_empty() => PageWalk::new(&registers, &cpu),
        Err(_) => return Err(Error::invalid("override.pdptrs", "give all four, or none")),
    }
    .map_err(Error::RequestState)?;
    let refused = |ept| move |error| Error::SecondDimension { field: override_field(ept, &error), error };
    let second = match &request.second_dimension {
        Some(SecondDimension::Npt(request)) => Some(npt_walk(request, &cpu).map_err(refused(false))?),
        Some(SecondDimension::Ept(request)) => Some(ept_walk(request, &cpu).map_err(refused(true))?),
        Some(SecondDimension::None(true)) => None,
        Some(SecondDimension::None(false)) => {
            return Err(Error::invalid("override.none", "must be true, or be left out"));
        }
        None => match snapshot.nested.second() {
            Some(second) => Some(second.walk(&cpu).map_err(Error::RequestState)?),
            None => None,
        },
    };
    Ok(match second {
        Some(second) => Walker::nested(gva_walk, second),
        None => Walker::new(gva_walk),
    })
}

fn cpu(request: &v1::WalkerOverride, own: &CpuProfile) -> Result<CpuProfile, Error> {
    let vendor = match request.vendor.map(v1::Vendor::try_from) {
        None | Some(Ok(v1::Vendor::Unspecified)) => own.vendor,
        Some(Ok(v1::Vendor::Intel)) => Vendor::Intel,
        Some(Ok(v1::Vendor::Amd)) => Vendor::Amd,
        Some(Err(_)) => {
            return Err(Error::invalid("override.vendor", "VENDOR_INTEL or VENDOR_AMD, or leave it out"));
        }
    };
    let maxphyaddr = match request.maxphyaddr {
        None => own.maxphyaddr,
        Some(bits) => u8::try_from(bits).ok().filter(|bits| (32..=52).contains(bits)).ok_or_else(|| {
            Error::invalid("override.maxphyaddr", format!("{bits} is not between 32 and 52"))
        })?,
    };
    Ok(CpuProfile { vendor, maxphyaddr, gib_pages: request.gib_pages.unwrap_or(own.gib_pages), ..*own })
}
