//! A machine whose vCPU does not come out of the guest until the test opens its gate: slow on demand, not by the clock.

use std::sync::{Arc, Condvar, Mutex};

use pagewalkd::machine::{Capabilities, Health, LocalSource, Machine};
use pagewalkd::vcpu::{Backend, Exit, RegisterChanges, Registers, Vcpu, VcpuError};

use crate::bed::open;

#[derive(Default)]
struct State {
    open: bool,
    entered: bool,
}

/// What the vCPU waits at.
#[derive(Clone, Default)]
pub(crate) struct Gate(Arc<(Mutex<State>, Condvar)>);

impl Gate {
    pub(crate) fn open(&self) {
        self.0.0.lock().unwrap().open = true;
        self.0.1.notify_all();
    }

    /// Returns once the vCPU waits at the gate.
    pub(crate) fn wait_until_entered(&self) {
        let (state, changed) = &*self.0;
        drop(changed.wait_while(state.lock().unwrap(), |state| !state.entered).unwrap());
    }

    fn pass(&self) {
        let (state, changed) = &*self.0;
        let mut state = state.lock().unwrap();
        state.entered = true;
        changed.notify_all();
        drop(changed.wait_while(state, |state| !state.open).unwrap());
    }
}

impl Drop for OpenAtEnd {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// Opens the gate at the end of a test, also of one that fails.
pub(crate) struct OpenAtEnd(pub(crate) Gate);

struct Stuck {
    registers: Registers,
    gate: Gate,
}

impl Backend for Stuck {
    fn run(&mut self) -> Exit {
        self.gate.pass();
        Exit::Halted
    }

    fn step(&mut self) -> Result<Exit, VcpuError> {
        Err(VcpuError::Unsupported("no steps here".into()))
    }

    fn registers(&mut self) -> Result<Registers, String> {
        Ok(self.registers.clone())
    }

    fn set_registers(&mut self, changes: &RegisterChanges) -> Result<(), VcpuError> {
        self.registers = changes.applied_to(&self.registers);
        Ok(())
    }
}

/// The demo machine's memory, under a vCPU that is stuck in the guest.
pub(crate) fn machine(id: &str, gate: &Gate) -> Machine {
    let demo = open("demo:plain");
    let source = demo.source();
    let registers = demo.vcpu(0).unwrap().latest().registers.clone();
    let vcpu = Vcpu::spawn(id, 0, source.cpu(), Stuck { registers, gate: gate.clone() }).unwrap();
    gate.wait_until_entered();
    let source = LocalSource {
        kind: "stuck",
        description: "a vCPU that does not come out".into(),
        vcpus: vec![vcpu],
        memory: source.memory(),
        capabilities: Capabilities { can_pause: true, live: true, ..source.capabilities().clone() },
        cpu: source.cpu(),
        landmarks: source.landmarks().to_vec(),
        health: Health::default(),
    };
    Machine::new(id, Arc::new(source))
}
