//! The one OS thread of a vCPU: owns the backend, carries out commands, publishes snapshots.
//!
//! Each turn of its loop takes note of kicks, draws the highest ticket, carries out what was asked, publishes if there is
//! something to tell, and then runs the guest, rests, or waits. A ticket is drawn before the registers are read, so that a
//! snapshot answers every ticket up to its own. Port accesses are served inside the backend and publish nothing, so that a
//! guest that loops on them keeps nobody busy; such a guest, and one that never leaves at all, publishes by a timer.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pagewalk::{CpuProfile, PageWalk, PagingMode, StateError, Walker};
use tokio::sync::mpsc;

use super::backend::{Backend, Exit};
use super::command::{Action, Command, Reply, VcpuError};
use super::kick::{Kicker, OnThread};
use super::publication::{Published, Publisher};
use super::registers::{RegisterChanges, Registers, UNMODELLED};
use super::signal::REFRESH;
use super::snapshot::{NestedMode, RunState, Snapshot};

/// How long a vCPU rests after HLT: nothing here sends it interrupts.
pub(super) const HALT_REST: Duration = Duration::from_millis(50);

/// What the thread shares with its handle.
pub(super) struct Shared {
    pub(super) kicker: Kicker,
    pub(super) published: Published<Snapshot>,
}

/// What the vCPU does when nobody asks anything of it.
enum Activity {
    Run,
    Rest { until: Instant },
    Pause,
    Stay,
}

pub(super) struct VcpuThread<B> {
    pub(super) name: String,
    pub(super) cpu: CpuProfile,
    pub(super) backend: B,
    pub(super) shared: Arc<Shared>,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) publisher: Publisher,
}

/// The first snapshot of a vCPU, before its thread runs.
pub(super) fn first_snapshot<B: Backend>(backend: &mut B, cpu: CpuProfile) -> Result<Snapshot, String> {
    let registers = backend.registers()?;
    let (run_state, run_state_reason) = match (backend.static_reason(), backend.elsewhere()) {
        (Some(reason), _) => (RunState::Static, reason),
        (None, Some(elsewhere)) => elsewhere,
        (None, None) => (RunState::Running, String::new()),
    };
    let walker = registers.with_pdptes(NestedMode::Off.walker(registers.control(), &cpu), &cpu);
    Ok(Snapshot {
        generation: 1,
        ticket: 0,
        taken: Instant::now(),
        run_state,
        run_state_reason,
        assumed: with_limits(backend.assumed(), &registers, &walker),
        walker,
        registers,
        cpu,
        nested: NestedMode::Off,
    })
}

impl<B: Backend> VcpuThread<B> {
    /// Runs until the handle says stop.
    pub(super) fn main(self) {
        let (name, shared) = (self.name.clone(), Arc::clone(&self.shared));
        match catch_unwind(AssertUnwindSafe(|| self.turn_until_stopped())) {
            Ok(Ok(())) => {}
            Ok(Err(problem)) => give_up(&name, &shared, problem),
            Err(payload) => {
                give_up(
                    &name,
                    &shared,
                    format!("the vCPU's thread has panicked: {}", panic_message(&*payload)),
                );
            }
        }
    }

    fn turn_until_stopped(self) -> Result<(), String> {
        let Self { name, cpu, mut backend, shared, commands, publisher } = self;
        // Without kicks the vCPU could never be made to come out: better not to run it.
        let on_thread = shared.kicker.enter(backend.immediate_exit())?;
        let first = shared.published.latest();
        let elsewhere = backend.elsewhere().is_some();
        let stays = elsewhere || first.run_state == RunState::Static;
        let mut driver = Driver {
            name,
            cpu,
            backend: Some(&mut backend),
            shared: &shared,
            commands,
            publisher,
            activity: if stays { Activity::Stay } else { Activity::Run },
            elsewhere,
            run_state: first.run_state,
            reason: first.run_state_reason.clone(),
            nested: NestedMode::Off,
        };
        while let Some(ticket) = shared.published.attend(&on_thread) {
            driver.turn(ticket, &on_thread);
        }
        Ok(())
    }
}

/// Leaves word that the thread ends without having been asked to.
fn give_up(name: &str, shared: &Shared, problem: String) {
    tracing::error!(vcpu = %name, problem, "the vCPU's thread ends");
    let last = Snapshot::clone(&shared.published.latest());
    let run_state = RunState::InternalError;
    shared.published.replace(Snapshot { run_state, run_state_reason: problem, ..last });
}

struct Driver<'a, B> {
    name: String,
    cpu: CpuProfile,
    /// `None` once it has panicked: nothing is known about it then.
    backend: Option<&'a mut B>,
    shared: &'a Shared,
    commands: mpsc::Receiver<Command>,
    publisher: Publisher,
    activity: Activity,
    /// Another process runs the guest.
    elsewhere: bool,
    run_state: RunState,
    reason: String,
    nested: NestedMode,
}

impl<B: Backend> Driver<'_, B> {
    fn turn(&mut self, ticket: u64, on_thread: &OnThread<'_>) {
        if self.elsewhere && self.look_elsewhere() {
            self.publish(ticket);
        }
        while let Ok(command) = self.commands.try_recv() {
            if !command.reply.is_closed() {
                let reply = self.perform(&command.action, ticket);
                // The asker may have gone meanwhile; what was done is published all the same.
                let _ = command.reply.send(reply);
            }
        }
        if ticket > self.shared.published.latest().ticket {
            self.publish(ticket);
        }
        match self.activity {
            Activity::Run if on_thread.pending() => {}
            Activity::Run => self.run(ticket, on_thread),
            Activity::Rest { until } => {
                on_thread.wait(Some(until));
                if Instant::now() >= until {
                    self.enter(Activity::Run, RunState::Running, String::new());
                    self.publish(ticket);
                }
            }
            Activity::Pause | Activity::Stay => on_thread.wait(None),
        }
    }

    fn run(&mut self, ticket: u64, on_thread: &OnThread<'_>) {
        let exit = self.guarded(Backend::run).unwrap_or_else(Exit::Failed);
        if exit == Exit::Kicked {
            // Whoever kicked is served by the next turn. Where nobody did, the timer wants a look at a guest that runs on.
            let stale = || self.shared.published.latest().taken.elapsed() >= REFRESH;
            if !on_thread.pending() && stale() {
                self.publish(ticket);
            }
        } else {
            self.after(exit);
            self.publish(ticket);
        }
    }

    /// Takes note of what a guest does that runs elsewhere, and says whether that has changed.
    fn look_elsewhere(&mut self) -> bool {
        let Ok(Some((run_state, reason))) = self.guarded(Backend::elsewhere) else { return false };
        let changed = (run_state, &reason) != (self.run_state, &self.reason);
        if changed {
            self.enter(Activity::Stay, run_state, reason);
        }
        changed
    }

    /// Has whoever runs the guest stop it or let it go.
    fn command_elsewhere(
        &mut self,
        command: impl FnOnce(&mut B) -> Result<(), VcpuError>,
    ) -> Result<(), VcpuError> {
        self.guarded(command).map_err(VcpuError::Hypervisor)??;
        self.look_elsewhere();
        Ok(())
    }

    /// Takes note of why the guest came out.
    fn after(&mut self, exit: Exit) {
        match exit {
            Exit::Kicked => {}
            Exit::Halted => {
                let until = Instant::now() + HALT_REST;
                self.enter(Activity::Rest { until }, RunState::Halted, String::new());
            }
            Exit::Stepped => self.enter(Activity::Pause, RunState::Paused, "stepped".into()),
            Exit::Shutdown(reason) => {
                tracing::warn!(vcpu = %self.name, reason, "the vCPU shut down");
                self.enter(Activity::Stay, RunState::Shutdown, reason);
            }
            Exit::Failed(reason) => {
                tracing::warn!(vcpu = %self.name, reason, "the vCPU cannot run on");
                self.enter(Activity::Stay, RunState::InternalError, reason);
            }
        }
    }

    fn enter(&mut self, activity: Activity, run_state: RunState, reason: String) {
        self.activity = activity;
        self.run_state = run_state;
        self.reason = reason;
    }

    fn perform(&mut self, action: &Action, ticket: u64) -> Reply {
        match action {
            Action::Pause => {
                self.must_execute()?;
                if self.elsewhere {
                    self.command_elsewhere(Backend::pause)?;
                } else if !matches!(self.activity, Activity::Pause) {
                    self.enter(Activity::Pause, RunState::Paused, "paused on request".into());
                }
            }
            Action::Resume => {
                self.must_execute()?;
                if self.elsewhere {
                    self.command_elsewhere(Backend::resume)?;
                } else if matches!(self.activity, Activity::Pause) {
                    self.enter(Activity::Run, RunState::Running, String::new());
                }
            }
            Action::Step => {
                self.must_execute()?;
                match self.guarded(Backend::step) {
                    Ok(Ok(_)) if self.elsewhere => {
                        self.look_elsewhere();
                    }
                    Ok(Ok(exit @ (Exit::Shutdown(_) | Exit::Failed(_)))) => self.after(exit),
                    Ok(Ok(_)) => self.after(Exit::Stepped),
                    Ok(Err(e)) => return Err(e),
                    Err(panicked) => self.after(Exit::Failed(panicked)),
                }
            }
            Action::SetRegisters(changes) => {
                if changes.is_empty() {
                    return Err(VcpuError::NothingToWrite);
                }
                let cpu = self.cpu;
                match self.guarded(|backend| accept(backend, changes, &cpu)) {
                    Ok(written) => written?,
                    Err(panicked) => {
                        self.after(Exit::Failed(panicked.clone()));
                        return Err(VcpuError::Hypervisor(panicked));
                    }
                }
            }
            Action::SetNested(mode) => {
                // One dimension is always to be had again, also where the vCPU's own registers select no walk.
                if **mode != NestedMode::Off {
                    // Against the registers of now: a running vCPU may have left those of the last snapshot behind.
                    let own = self.publish(ticket).registers.control();
                    mode.walker(own, &self.cpu).map_err(VcpuError::InvalidNested)?;
                }
                self.nested = **mode;
            }
        }
        Ok(self.publish(ticket))
    }

    fn must_execute(&self) -> Result<(), VcpuError> {
        match self.run_state {
            RunState::Static => Err(VcpuError::Unsupported(self.reason.clone())),
            state if state.is_final() => Err(VcpuError::Stopped { state, reason: self.reason.clone() }),
            _ => Ok(()),
        }
    }

    /// Reads the registers and publishes them, with the walkers they select.
    fn publish(&mut self, ticket: u64) -> Arc<Snapshot> {
        let previous = self.shared.published.latest();
        let read = self.guarded(Backend::registers);
        let (assumed, registers) = match read {
            Ok(Ok(registers)) => {
                (self.backend.as_deref().map(Backend::assumed).unwrap_or_default(), registers)
            }
            Ok(Err(problem)) | Err(problem) => self.without_registers(&problem, &previous),
        };
        let walker = self.nested.walker(registers.control(), &self.cpu);
        let walker = registers.with_pdptes(walker, &self.cpu);
        let assumed = with_limits(assumed, &registers, &walker);
        let changed = walker != previous.walker || self.nested != previous.nested;
        let generation = previous.generation + u64::from(changed);
        let snapshot = Arc::new(Snapshot {
            generation,
            ticket,
            taken: Instant::now(),
            run_state: self.run_state,
            run_state_reason: self.reason.clone(),
            registers,
            cpu: self.cpu,
            walker,
            nested: self.nested,
            assumed,
        });
        let announced = changed.then_some(generation);
        self.publisher.publish(&self.shared.published, Arc::clone(&snapshot), ticket, announced);
        snapshot
    }

    /// What to publish when the registers cannot be read: the last ones, and the vCPU is done for.
    fn without_registers(&mut self, problem: &str, previous: &Snapshot) -> (Vec<String>, Registers) {
        if !self.run_state.is_final() {
            self.after(Exit::Failed(format!("its registers cannot be read: {problem}")));
        }
        let mut assumed = previous.assumed.clone();
        if !assumed.iter().any(|a| a == STALE) {
            assumed.push(STALE.to_owned());
        }
        (assumed, previous.registers.clone())
    }

    /// Calls the backend; a panic in there ends the vCPU, not the daemon.
    fn guarded<T>(&mut self, call: impl FnOnce(&mut B) -> T) -> Result<T, String> {
        let Some(backend) = self.backend.as_deref_mut() else {
            return Err("the vCPU's backend has panicked".to_owned());
        };
        catch_unwind(AssertUnwindSafe(|| call(backend))).map_err(|payload| {
            self.backend = None;
            format!("the vCPU's backend has panicked: {}", panic_message(&*payload))
        })
    }
}

/// Has `backend` write `changes`, unless they make a state that no CPU accepts: hypervisors let some of those pass.
fn accept<B: Backend>(backend: &mut B, changes: &RegisterChanges, cpu: &CpuProfile) -> Result<(), VcpuError> {
    let current = backend.registers().map_err(VcpuError::Hypervisor)?;
    let wanted = changes.applied_to(&current).control();
    if wanted != current.control() {
        PageWalk::new(&wanted, cpu).map_err(|problem| VcpuError::InvalidRegisters(problem.to_string()))?;
    }
    backend.set_registers(changes)
}

/// Adds what the walkers take for granted: where a backend does not read the PDPTE registers, PDPTEs come from memory, as if
/// CR3 were loaded now; what the walker does not model is as if it were off; and keys that cannot be read are open.
fn with_limits(
    mut assumed: Vec<String>,
    registers: &Registers,
    walker: &Result<Walker, StateError>,
) -> Vec<String> {
    let pae = walker.as_ref().is_ok_and(|walker| {
        let gva_walk = walker.gva_walk();
        gva_walk.format().mode() == PagingMode::Pae && gva_walk.pdptes().is_none()
    });
    let unmodelled = UNMODELLED.iter().filter(|(bit, _)| registers.cr4 & bit != 0);
    // Which keys the walk asks for: of user pages in the upper half of the mask's first eight fields, of supervisor pages in
    // the lower one.
    let keys = walker.as_ref().map_or(0, |walker| walker.gva_walk().format().protection_key_mask());
    let unknown = [
        ("PKRU=0x0", keys & 0xff00 != 0 && registers.pkru.is_none()),
        ("PKRS=0x0", keys & 0xff != 0 && registers.pkrs.is_none()),
    ];
    let limits = unmodelled
        .map(|(_, name)| format!("{name}=0"))
        .chain(unknown.iter().filter(|(_, unknown)| *unknown).map(|(name, _)| (*name).to_owned()))
        .chain(pae.then(|| "PDPTE0-3=as in memory at CR3".to_owned()));
    for limit in limits {
        if !assumed.contains(&limit) {
            assumed.push(limit);
        }
    }
    assumed
}

/// Says in `assumed` that all registers are those of an earlier moment.
const STALE: &str = "all registers as last read before the failure";

fn panic_message(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
