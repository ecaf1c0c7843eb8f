//! The ioctl `KVM_TRANSLATE` beside us.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::bed::{Machine, Maker, Ram, Vcpu, long_mode};
use super::guest::Guest;

pub(crate) const NAME: &str = "KVM_TRANSLATE";

/// A vCPU that walks a guest's tables.
pub(crate) struct Ioctl {
    pub(crate) guest: Guest,
    vcpu: Vcpu,
}

impl Ioctl {
    /// A guest made in `bytes` of a virtual machine's memory.
    pub(crate) fn new(bytes: u64, guest: impl FnOnce(Ram) -> Guest) -> Result<Self, String> {
        let machine = Machine::new(bytes)?;
        let guest = guest(machine.ram);
        let vcpu = machine.vcpu(0, Maker::Intel, machine.maxphyaddr()?)?;
        let mut sregs = vcpu.reset;
        long_mode(&mut sregs, guest.root);
        vcpu.fd.set_sregs(&sregs).map_err(|error| format!("KVM_SET_SREGS: {error}"))?;
        for gva in guest.gvas.iter().take(512) {
            let kernel = vcpu.fd.translate_gva(*gva).map_err(|error| format!("KVM_TRANSLATE: {error}"))?;
            assert_eq!(Some(kernel.physical_address), guest.answer(*gva), "{gva:#x}");
        }
        Ok(Self { guest, vcpu })
    }

    pub(crate) fn in_a_loop(&self) -> impl FnMut(u64) -> Duration {
        let mut at = self.guest.gvas.len() / 2;
        move |times| {
            let start = Instant::now();
            for _ in 0..times {
                let gva = self.guest.gvas[at & (self.guest.gvas.len() - 1)];
                let _ = black_box(&self.vcpu.fd.translate_gva(gva));
                at += 1;
            }
            start.elapsed()
        }
    }
}
