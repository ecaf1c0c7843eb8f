//! A vCPU that was recorded: registers as they were at one moment, for good.

use super::backend::{Backend, Exit};
use super::command::VcpuError;
use super::nested::{GuestMode, L2Registers, NestedMode, SecondDimension};
use super::registers::{RegisterChanges, Registers};

/// Registers that nothing changes any more.
#[derive(Debug)]
pub struct RecordedBackend {
    registers: Registers,
    assumed: Vec<String>,
    nested: NestedMode,
    reason: String,
}

impl RecordedBackend {
    /// A vCPU that held `registers`; `reason` says why nothing runs or changes.
    #[must_use]
    pub fn new(registers: Registers, reason: impl Into<String>) -> Self {
        Self { registers, assumed: Vec::new(), nested: NestedMode::Off, reason: reason.into() }
    }

    /// Says which registers were not recorded, each with the value assumed.
    #[must_use]
    pub fn with_assumed(self, assumed: Vec<String>) -> Self {
        Self { assumed, ..self }
    }

    /// Says what L2 it ran, or what was laid over its walkers.
    #[must_use]
    pub fn with_nested(self, nested: NestedMode) -> Self {
        Self { nested, ..self }
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

    fn guest_mode(&mut self, _: &Registers) -> Result<Option<GuestMode>, String> {
        Ok(match self.nested {
            NestedMode::Guest(guest) => Some(guest),
            NestedMode::Off | NestedMode::WalkerOnly { .. } => None,
        })
    }

    fn overlay(&self) -> Option<(SecondDimension, L2Registers)> {
        match self.nested {
            NestedMode::WalkerOnly { second, l2 } => Some((second, l2)),
            NestedMode::Off | NestedMode::Guest(_) => None,
        }
    }

    fn assumed(&self) -> Vec<String> {
        self.assumed.clone()
    }
}
