//! A vCPU of a guest of QEMU's, as its thread asks for it: it never runs here.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use qapi::qmp;

use super::monitor::ANSWER;
use super::{Attached, QemuError, registers};
use crate::vcpu::{Backend, Exit, Holders, RegisterChanges, Registers, RunState, VcpuError};

/// How long a stop may take. A connection that is given up meanwhile can make nothing run on.
const STOP: Duration = Duration::from_secs(300);

/// One vCPU of the guest.
pub(super) struct QemuVcpu {
    pub(super) attached: Arc<Attached>,
    pub(super) index: i64,
    /// Of what was counted, what is behind it.
    pub(super) overtaken: u64,
    /// What the monitor has no word for, of the CPU and of the last registers.
    pub(super) cpu_assumed: Vec<String>,
    pub(super) assumed: Vec<String>,
}

impl QemuVcpu {
    fn read(&mut self) -> Result<Registers, QemuError> {
        self.attached.refresh_memory()?;
        let answer = self.attached.monitor.ask("info registers", self.index)?;
        let mut read = registers::parse(&answer).map_err(|problem| self.attached.answer(problem))?;
        if let Some(pdptes) = self.attached.pdptes(&read.registers) {
            read.registers.pdptes = Some(pdptes);
            read.assumed
                .push("PDPTE0-3=as in memory at CR3, without the accessed bits that TCG sets".to_owned());
        }
        self.assumed = read.assumed;
        Ok(read.registers)
    }
}

impl Backend for QemuVcpu {
    fn run(&mut self) -> Exit {
        Exit::Failed("QEMU runs this guest".to_owned())
    }

    fn step(&mut self) -> Result<Exit, VcpuError> {
        Err(VcpuError::Unsupported("QEMU's monitor has no single step: use its gdbstub".to_owned()))
    }

    fn registers(&mut self) -> Result<Registers, String> {
        self.read().map_err(|error| self.attached.failed(&error))
    }

    fn set_registers(&mut self, _: &RegisterChanges) -> Result<(), VcpuError> {
        Err(VcpuError::Unsupported("QEMU's monitor writes no registers: use its gdbstub".to_owned()))
    }

    fn assumed(&self) -> Vec<String> {
        self.cpu_assumed.iter().chain(&self.assumed).cloned().collect()
    }

    fn elsewhere(&mut self) -> Option<(RunState, String)> {
        let state = self.attached.state().map_err(|error| self.attached.failed(&error.into()));
        Some(match (self.attached.news.health.lost(), state) {
            (Some(reason), _) => (RunState::InternalError, reason.to_string()),
            (None, Ok(state)) => state,
            // It is asked again at the next look.
            (None, Err(_)) => {
                self.attached.heard.lock().unwrap_or_else(PoisonError::into_inner).state.clone()
            }
        })
    }

    fn overtaken(&mut self) -> bool {
        let now = self.attached.news.overtaken.load(Ordering::Acquire);
        std::mem::replace(&mut self.overtaken, now) != now
    }

    fn pause(&mut self) -> Result<bool, VcpuError> {
        // Somebody else may have stopped it before, and not want it to run on.
        let (state, _) = self.attached.state_now()?;
        // QEMU waits for its disks first.
        self.attached.command(&qmp::stop {}, STOP)?;
        Ok(state == RunState::Running)
    }

    fn resume(&mut self) -> Result<(), VcpuError> {
        self.attached.command(&qmp::cont {}, ANSWER)
    }

    fn holders(&self) -> Arc<Mutex<Holders>> {
        Arc::clone(&self.attached.holders)
    }
}
