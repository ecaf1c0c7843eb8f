//! What the note of a vCPU does not tell, and what its other registers say of it.
//!
//! EFER.LMA decides between PAE and 4-level paging. It is certain where CS.L, CR4.LA57 or CR4.PCIDE is set, which only long
//! mode allows, or where RIP is wider than 32 bits; QEMU also writes the file for x86-64 if its first vCPU was in long mode.

use pagewalk::mode::{CR0_PG, CR4_LA57, CR4_PAE, EFER_LMA, EFER_LME, EFER_NXE, PAT_RESET};
use pagewalk::{Gpa, Memory};

use super::CpuState;
use crate::vcpu::Registers;

const CR4_PCIDE: u64 = 1 << 17;
/// Set by QEMU's emulator in PDPTEs of PAE paging, in memory; a CPU reserves the bit there.
const PDPTE_ACCESSED: u64 = 1 << 5;

/// The registers of a vCPU, and what of them was assumed. `long_mode` says what the file says of its first vCPU.
pub(super) fn registers(state: &CpuState, long_mode: bool, memory: &impl Memory) -> (Registers, Vec<String>) {
    let mut registers = state.registers.clone();
    let (efer, why) = efer(state, long_mode);
    registers.efer = efer;
    registers.pat = PAT_RESET;
    let mut assumed = vec![format!("EFER={efer:#x} ({why})"), format!("PAT={PAT_RESET:#x}")];
    let paged = registers.cr0 & CR0_PG != 0;
    if paged
        && registers.cr4 & CR4_PAE != 0
        && efer & EFER_LMA == 0
        && let Some(pdptes) = pdptes(registers.cr3, memory)
    {
        registers.pdptes = Some(pdptes);
        assumed.push("PDPTE0-3=as in memory at CR3, without bit 5, which an emulator sets there".to_owned());
    }
    (registers, assumed)
}

fn efer(state: &CpuState, long_mode: bool) -> (u64, &'static str) {
    let Registers { cr0, cr4, rip, .. } = state.registers;
    if cr0 & CR0_PG == 0 {
        return (0, "CR0.PG is clear, so that LMA is");
    }
    if cr4 & CR4_PAE == 0 {
        return (0, "CR4.PAE is clear, so that LMA is, and NXE has no say");
    }
    let evidence = if state.long_code {
        Some("LMA because CS.L is set; NXE is assumed")
    } else if cr4 & (CR4_LA57 | CR4_PCIDE) != 0 {
        Some("LMA because CR4 has LA57 or PCIDE; NXE is assumed")
    } else if rip >> 32 != 0 {
        Some("LMA because RIP is above 4 GiB; NXE is assumed")
    } else if state.registers.cr3 >> 32 != 0 {
        Some("LMA because CR3 is above 4 GiB; NXE is assumed")
    } else if long_mode {
        Some("LMA because the dump says x86-64; NXE is assumed")
    } else {
        None
    };
    match evidence {
        Some(why) => (EFER_LME | EFER_LMA | EFER_NXE, why),
        None => (EFER_NXE, "no LMA because the dump says i386, CS.L is clear; NXE is assumed"),
    }
}

/// PDPTE registers as a CPU would load them from CR3, where an emulator left a bit in memory that a CPU never would.
fn pdptes(cr3: u64, memory: &impl Memory) -> Option<[u64; 4]> {
    let mut pdptes = [0; 4];
    for (index, pdpte) in (0..).zip(&mut pdptes) {
        *pdpte = memory.load_u64(Gpa((cr3 & 0xffff_ffe0) + index * 8))?;
    }
    let marked = pdptes.iter().any(|pdpte| pdpte & PDPTE_ACCESSED != 0);
    marked.then(|| pdptes.map(|pdpte| pdpte & !PDPTE_ACCESSED))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(cr0: u64, cr4: u64, rip: u64, long_code: bool) -> CpuState {
        CpuState { registers: Registers { cr0, cr4, rip, ..Registers::default() }, long_code }
    }

    #[test]
    fn efer_follows_from_what_only_long_mode_allows() {
        let long = EFER_LME | EFER_LMA | EFER_NXE;
        let paged = CR0_PG | 1;
        for (cr0, cr4, rip, long_code, long_mode, expected) in [
            (1, CR4_PAE, u64::MAX, true, true, 0),
            (paged, 0, 0, false, true, 0),
            (paged, CR4_PAE, 0, false, false, EFER_NXE),
            (paged, CR4_PAE, 0, true, false, long),
            (paged, CR4_PAE, 0, false, true, long),
            (paged, CR4_PAE | CR4_LA57, 0, false, false, long),
            (paged, CR4_PAE | CR4_PCIDE, 0, false, false, long),
            (paged, CR4_PAE, 1 << 32, false, false, long),
        ] {
            let (found, why) = efer(&state(cr0, cr4, rip, long_code), long_mode);
            assert_eq!(found, expected, "{cr0:#x} {cr4:#x} {rip:#x} {long_code} {long_mode}: {why}");
        }
        let mut high = state(paged, CR4_PAE, 0, false);
        high.registers.cr3 = 1 << 32;
        assert_eq!(efer(&high, false).0, long);
    }
}
