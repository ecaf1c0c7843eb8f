//! A vCPU that is registers and nothing else: the guest's memory can be walked, and nothing executes.

use super::backend::{Backend, Exit};
use super::command::VcpuError;
use super::nested::EnterL2;
use super::registers::{RegisterChanges, Registers};

/// Registers over plain memory.
#[derive(Debug)]
pub struct PlainBackend {
    registers: Registers,
    reason: String,
}

impl PlainBackend {
    /// A vCPU that holds `registers`; `reason` says why nothing runs.
    #[must_use]
    pub fn new(registers: Registers, reason: impl Into<String>) -> Self {
        Self { registers, reason: reason.into() }
    }
}

impl Backend for PlainBackend {
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

    fn enter_nested(&mut self, _request: &EnterL2) -> Result<(), VcpuError> {
        Err(VcpuError::Unsupported("nothing executes in plain memory".to_owned()))
    }

    fn set_registers(&mut self, changes: &RegisterChanges) -> Result<(), VcpuError> {
        if changes.pkru.is_some() && self.registers.pkru.is_none() {
            return Err(VcpuError::InvalidRegisters("this vCPU has no PKRU".into()));
        }
        self.registers = changes.applied_to(&self.registers);
        Ok(())
    }
}
