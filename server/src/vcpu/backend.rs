//! What a vCPU's thread drives: something that runs, and whose registers can be read and written.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use super::command::VcpuError;
use super::hold::Holders;
use super::nested::{EnterL2, GuestMode, L2Registers, SecondDimension};
use super::registers::{RegisterChanges, Registers};
use super::snapshot::RunState;

/// Why a backend came back from running.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest executed HLT.
    Halted,
    /// Somebody asked it to come out.
    Kicked,
    /// One instruction was executed.
    Stepped,
    /// The guest shut down: a triple fault. Says where.
    Shutdown(String),
    /// It cannot run on. Says why.
    Failed(String),
}

/// Where a signal handler can ask KVM_RUN to return: the `immediate_exit` byte of a `kvm_run`.
#[derive(Clone, Copy, Debug)]
pub struct ImmediateExit(NonNull<u8>);

impl ImmediateExit {
    /// # Safety
    /// `byte` must stay valid for atomic accesses as long as the [`Backend`] that gives it lives.
    #[allow(unsafe_code)] // The promise about the pointer can only be made by its owner.
    pub unsafe fn new(byte: NonNull<u8>) -> Self {
        Self(byte)
    }

    pub(super) fn as_ptr(self) -> *mut u8 {
        self.0.as_ptr()
    }
}

/// One virtual CPU, owned by its thread. Nobody else touches it.
pub trait Backend: Send + 'static {
    /// Why nothing can run here, for a source of plain memory; `None` where the guest executes.
    fn static_reason(&self) -> Option<String> {
        None
    }

    /// Lets the guest run until something happens that the thread has to know. Not called for one that runs elsewhere.
    fn run(&mut self) -> Exit;

    /// Executes one instruction, whatever kicks arrive meanwhile.
    ///
    /// # Errors
    /// When the backend cannot, and nothing was executed.
    fn step(&mut self) -> Result<Exit, VcpuError>;

    /// Reads the registers.
    ///
    /// # Errors
    /// When the hypervisor refuses, which ends the vCPU, unless it runs elsewhere.
    fn registers(&mut self) -> Result<Registers, String>;

    /// Writes what is present in `changes`, all of it or nothing. Only values that some CPU holds get here.
    ///
    /// # Errors
    /// Says which register was refused.
    fn set_registers(&mut self, changes: &RegisterChanges) -> Result<(), VcpuError>;

    /// Registers that [`Backend::registers`] cannot read, each with the value that it gives instead: `PAT=0x7040600070406`.
    fn assumed(&self) -> Vec<String> {
        Vec::new()
    }

    /// What the guest does, and why, where another process runs it, which may stop it on somebody else's account: asked for
    /// whenever the thread looks up. `None` where [`Backend::run`] runs it.
    fn elsewhere(&mut self) -> Option<(RunState, String)> {
        None
    }

    /// Whether a guest that runs elsewhere is known to have become another since this was last asked, whatever it does: it was
    /// reset, or its memory was laid out anew.
    fn overtaken(&mut self) -> bool {
        false
    }

    /// Stops a guest that runs elsewhere, and says whether it ran until then.
    ///
    /// # Errors
    /// When whoever runs it does not.
    fn pause(&mut self) -> Result<bool, VcpuError> {
        Err(VcpuError::Unsupported("nothing here runs elsewhere".into()))
    }

    /// Lets a guest run on that runs elsewhere.
    ///
    /// # Errors
    /// As [`Backend::pause`].
    fn resume(&mut self) -> Result<(), VcpuError> {
        Err(VcpuError::Unsupported("nothing here runs elsewhere".into()))
    }

    /// Who holds the guest: all vCPUs of one that runs elsewhere stop together, and share this.
    fn holders(&self) -> Arc<Mutex<Holders>> {
        Arc::default()
    }

    /// The L2 that the vCPU, which holds `registers`, runs now: because the guest entered one, or [`Backend::enter_nested`] did.
    ///
    /// # Errors
    /// When the hypervisor refuses, which ends the vCPU.
    fn guest_mode(&mut self, _registers: &Registers) -> Result<Option<GuestMode>, String> {
        Ok(None)
    }

    /// The L2 that is laid over the walkers from the beginning, and its registers.
    fn overlay(&self) -> Option<(SecondDimension, L2Registers)> {
        None
    }

    /// Puts the vCPU into guest mode. Where that fails, everything is as before, with the L2 of an earlier entry.
    ///
    /// # Errors
    /// [`VcpuError::Unsupported`] says why there is no such guest mode here: the walkers alone can be switched then. Other
    /// errors say what is wrong with the request.
    fn enter_nested(&mut self, _request: &EnterL2) -> Result<(), VcpuError> {
        Err(VcpuError::Unsupported("this source cannot put its vCPUs into guest mode".to_owned()))
    }

    /// Takes the vCPU out of the L2 that [`Backend::enter_nested`] entered, to where L1 was then. Does nothing where there is
    /// none.
    ///
    /// # Errors
    /// When the hypervisor refuses.
    fn leave_nested(&mut self) -> Result<(), VcpuError> {
        Ok(())
    }

    /// How the L2 that [`Backend::enter_nested`] entered has left by itself, told once.
    fn take_nested_exit(&mut self) -> Option<String> {
        None
    }

    /// The byte through which a kick reaches [`Backend::run`].
    fn immediate_exit(&mut self) -> Option<ImmediateExit> {
        None
    }
}
