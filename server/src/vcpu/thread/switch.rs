//! The switch of nested mode: into an L2 and out of it, for real where the backend can, and over the walkers alone otherwise.

use super::{Activity, Driver};
use crate::vcpu::backend::{Backend, Exit};
use crate::vcpu::command::VcpuError;
use crate::vcpu::nested::{EnterL2, Entered, NestedEffect, NestedEffectKind, NestedMode};
use crate::vcpu::snapshot::RunState;

impl<B: Backend> Driver<'_, B> {
    /// Enters an L2, or lays it over the walkers.
    pub(super) fn enter_nested(&mut self, request: &EnterL2, ticket: u64) -> Result<NestedEffect, VcpuError> {
        let &EnterL2 { second, l2, .. } = request;
        // Against the registers of now: a running vCPU may have left those of the last snapshot behind.
        let now = self.publish(ticket);
        let own = self.l1.unwrap_or_else(|| now.registers.control());
        let overlay = NestedMode::WalkerOnly { second, l2 };
        overlay.walker(own, &self.cpu).map_err(VcpuError::InvalidNested)?;
        let why_not = if request.walker_only {
            "as the request wants it".to_owned()
        } else if self.run_state.is_final() && self.l1.is_none() {
            format!("the vCPU does not run any more: {}", self.reason)
        } else {
            match self.call_nested(|backend| backend.enter_nested(request)) {
                Ok(()) => {
                    self.overlay = None;
                    self.in_guest_mode = true;
                    self.l1 = Some(own);
                    self.nested_reason = "SetNestedMode had the vCPU enter it".to_owned();
                    self.revive("L2 is entered after the one before had failed");
                    let reason = "the vCPU has entered L2".to_owned();
                    return Ok(NestedEffect { kind: NestedEffectKind::RealVcpu, reason });
                }
                Err(VcpuError::Unsupported(reason)) => reason,
                Err(problem) => return Err(problem),
            }
        };
        if let Some(field) = request.for_a_real_vcpu() {
            let problem = format!("for a real vCPU alone, and the walkers alone can be switched: {why_not}");
            return Err(VcpuError::NestedField { field, problem });
        }
        if now.nested == overlay {
            let reason = "nested mode was like this already".to_owned();
            return Ok(NestedEffect { kind: NestedEffectKind::Unchanged, reason });
        }
        if self.l1.is_some() {
            self.call_nested(Backend::leave_nested)?;
            self.left_on_request();
        }
        self.overlay = Some((second, l2));
        Ok(NestedEffect { kind: NestedEffectKind::WalkerOnly, reason: why_not })
    }

    /// Leaves the L2 of a request, or takes away the one that lies over the walkers.
    pub(super) fn leave_nested(&mut self, walker_only: bool, ticket: u64) -> Result<NestedEffect, VcpuError> {
        let effect = |kind, reason: &str| Ok(NestedEffect { kind, reason: reason.to_owned() });
        if self.overlay.take().is_some() {
            self.nested_reason.clear();
            return effect(NestedEffectKind::WalkerOnly, "the walkers are the vCPU's own again");
        }
        // An L2 may have left by itself meanwhile.
        let now = self.publish(ticket);
        match now.nested {
            NestedMode::Guest(guest) if !walker_only && guest.entered == Entered::ByRequest => {
                self.call_nested(Backend::leave_nested)?;
                self.left_on_request();
                effect(NestedEffectKind::RealVcpu, "the vCPU runs L1 again, from where that was")
            }
            NestedMode::Guest(_) if !walker_only => Err(VcpuError::GuestRunsL2),
            _ => effect(NestedEffectKind::Unchanged, "nested mode was like this already"),
        }
    }

    /// Takes note that the vCPU is L1 again, as it was.
    fn left_on_request(&mut self) {
        self.in_guest_mode = false;
        self.l1 = None;
        self.nested_reason.clear();
        self.revive("L1 is back; its L2 had failed");
    }

    /// A vCPU that has stopped for good in an L2 has a state again in which it can run.
    fn revive(&mut self, reason: &str) {
        if self.run_state.is_final() {
            let reason = format!("{reason}: {}", self.reason);
            self.enter(Activity::Pause, RunState::Paused, reason);
        }
    }

    fn call_nested(&mut self, call: impl FnOnce(&mut B) -> Result<(), VcpuError>) -> Result<(), VcpuError> {
        self.guarded(call).unwrap_or_else(|panicked| {
            self.after(Exit::Failed(panicked.clone()));
            Err(VcpuError::Hypervisor(panicked))
        })
    }

    /// Takes note of whether the vCPU runs an L2: an overlay ends where that changes.
    pub(super) fn note_transition(&mut self, in_guest_mode: bool, exit: Option<String>) {
        let left = exit.is_some();
        if let Some(exit) = exit {
            self.nested_reason = format!("the L2 that SetNestedMode had entered has left for its L1: {exit}");
            self.l1 = None;
        }
        if in_guest_mode != self.in_guest_mode {
            self.in_guest_mode = in_guest_mode;
            self.overlay = None;
            if !left {
                self.nested_reason.clear();
            }
        }
    }
}
