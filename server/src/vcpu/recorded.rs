//! A vCPU that was recorded: registers as they were at one moment, for good.

use super::backend::{Backend, Exit};
use super::command::VcpuError;
use super::registers::{RegisterChanges, Registers};

/// Registers that nothing changes any more.
#[derive(Debug)]
pub struct RecordedBackend {
    registers: Registers,
    assumed: Vec<String>,
    reason: String,
}

impl RecordedBackend {
    /// A vCPU that held `registers`; `reason` says why nothing runs or changes.
    #[must_use]
    pub fn new(registers: Registers, reason: impl Into<String>) -> Self {
        Self { registers, assumed: Vec::new(), reason: reason.into() }
    }

    /// Says which registers were not recorded, each with the value assumed.
    #[must_use]
    pub fn with_assumed(self, assumed: Vec<String>) -> Self {
        Self { assumed, ..self }
    }
}

impl Backend for RecordedBackend {
    fn static_reason(&self) -> Option<String> {
        Some(self.reason.clone())
    }

    fn run(&mut self) -> Exit {
        Exit::Failed(self.reason.clone())
    }

    fn step(&mut self) -> Result<Exit, VcpuError> {
        Err(VcpuError::Unsupported(self.reason.clone()))
    }

    fn registers(&mut self) -> Result<Registers, String> {
        Ok(self.registers.clone())
    }

    fn set_registers(&mut self, _: &RegisterChanges) -> Result<(), VcpuError> {
        Err(VcpuError::Unsupported(self.reason.clone()))
    }

    fn assumed(&self) -> Vec<String> {
        self.assumed.clone()
    }
}
