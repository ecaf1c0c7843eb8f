//! What an executed access has to end in, and how its outcomes are counted.

pub(crate) mod classes;
pub(crate) mod expected;

/// Who decides what an access may do, and what it leaves in the entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decides {
    /// The local kernel, which emulates every instruction.
    Kernel,
    /// The bed's kernel, which shadows the guest's tables (`npt=0`), under an emulated CPU.
    Shadows,
    /// The bed's emulated CPU itself (`npt=1`).
    Emulator,
}

impl Decides {
    pub(crate) fn here() -> Decides {
        let kvm_amd = std::env::var("PAGEWALK_KVM_AMD").unwrap_or_default();
        match std::env::var_os("PAGEWALK_BED") {
            None => Decides::Kernel,
            Some(_) if kvm_amd.contains("npt=0") => Decides::Shadows,
            Some(_) => Decides::Emulator,
        }
    }
}
