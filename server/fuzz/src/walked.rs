//! A machine that was opened from a file, walked a little.

use pagewalk::{Access, AccessKind, AdPolicy, Gva, NoTrace, Privilege};
use pagewalkd::machine::Machine;

/// Asks every vCPU for a few addresses. What comes of it does not matter, but that something does.
///
/// # Panics
/// Where a translation is of no memory and says it is, or a vCPU has nothing to say.
pub fn walk(machine: &Machine) {
    let memory = machine.source().memory();
    for vcpu in machine.source().vcpus() {
        let snapshot = vcpu.latest();
        let Ok(walker) = &snapshot.walker else { continue };
        let registers = &snapshot.registers;
        for gva in [0, 0x1000, registers.rip, registers.rsp, registers.gs_base, u64::MAX] {
            let access = Access::new(AccessKind::Read, Privilege::Exempt);
            let found =
                walker.translate_with(memory.as_ref(), Gva(gva), &access, AdPolicy::Observe, &mut NoTrace);
            let mut byte = [0];
            if let Ok(page) = found
                && page.backing() != pagewalk::Backing::None
            {
                let read = memory.read(page.gpa, &mut byte);
                assert!(matches!(read, Ok(1)), "{page:?} is backed, and reading it came to {read:?}");
            }
        }
    }
}
