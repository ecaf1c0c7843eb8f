//! The one OS thread of a vCPU: owns the backend, carries out commands, publishes snapshots.
//!
//! Each turn of its loop takes note of kicks, draws the highest ticket, carries out what was asked, publishes if there is
//! something to tell, and then runs the guest, rests, or waits. A ticket is drawn before the registers are read, so that a
//! snapshot answers every ticket up to its own. Port accesses are served inside the backend and publish nothing, so that a
//! guest that loops on them keeps nobody busy; such a guest, and one that never leaves at all, publishes by a timer.

mod switch;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pagewalk::{ControlRegisters, CpuProfile, PageWalk};
use tokio::sync::mpsc;

use super::assumed::{as_before, with_limits};
use super::backend::{Backend, Exit};
use super::command::{Action, Command, Done, Reply, VcpuError};
use super::hold::{Holders, Released};
use super::kick::{Kicker, OnThread};
use super::nested::{L2Registers, NestedMode, NestedRequest, SecondDimension};
use super::publication::{Published, Publisher};
use super::registers::{RFLAGS_FIXED, RegisterChanges};
use super::signal::REFRESH;
use super::snapshot::{RunState, Snapshot};
use super::spaces::Spaces;

/// How long a vCPU rests after HLT: nothing here sends it interrupts.
pub(super) const HALT_REST: Duration = Duration::from_millis(50);

/// What the thread shares with its handle.
pub(super) struct Shared {
    pub(super) kicker: Kicker,
    pub(super) published: Published<Snapshot>,
    pub(super) spaces: Spaces,
    pub(super) released: Released,
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
    let guest = backend.guest_mode(&registers)?;
    let nested = match backend.overlay() {
        Some((second, l2)) => NestedMode::WalkerOnly { second, l2 },
        None => guest.map_or(NestedMode::Off, NestedMode::Guest),
    };
    let walker = nested.walker(registers.control(), &cpu).map_err(|error| *error.state());
    let walker = registers.with_pdptes(walker, &cpu);
    Ok(Snapshot {
        generation: 1,
        ticket: 0,
        taken: Instant::now(),
        unread: None,
        run_state,
        run_state_reason,
        assumed: with_limits(backend.assumed(), &registers, &walker),
        walker,
        registers,
        cpu,
        nested,
        nested_reason: String::new(),
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
        let overlay = backend.overlay();
        let holders = backend.holders();
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
            holders,
            run_state: first.run_state,
            reason: first.run_state_reason.clone(),
            overlay,
            in_guest_mode: matches!(first.nested, NestedMode::Guest(_)),
            l1: None,
            nested_reason: String::new(),
        };
        while let Some(ticket) = shared.published.attend(&on_thread) {
            driver.turn(ticket, &on_thread);
        }
        // A guest that runs elsewhere outlives this thread.
        driver.let_go(driver.shared.published.latest().ticket);
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
    holders: Arc<Mutex<Holders>>,
    run_state: RunState,
    reason: String,
    /// The L2 that is laid over the walkers alone.
    overlay: Option<(SecondDimension, L2Registers)>,
    in_guest_mode: bool,
    /// L1's control registers, while the vCPU runs the L2 of a request.
    l1: Option<ControlRegisters>,
    nested_reason: String,
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
        // After the commands: one of them may have been the pause that was given up.
        self.let_go(ticket);
        let published = self.shared.published.latest();
        // A command that failed may have ended the vCPU, after its ticket was served.
        if ticket > published.ticket || self.run_state != published.run_state {
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

    /// Lets the vCPU run on for those who had it stopped and do not need that any more.
    fn let_go(&mut self, ticket: u64) {
        for holds in self.shared.released.take() {
            if !holds.load(Ordering::Relaxed) {
                continue;
            }
            let runs_on = self.with_holders(|driver, holders| match holders.leave() {
                true => driver.run_on().map(|()| true).inspect_err(|_| holders.owe()),
                false => Ok(false),
            });
            match runs_on {
                Ok(true) => drop(self.publish(ticket)),
                Ok(false) => {}
                Err(problem) => {
                    tracing::warn!(vcpu = %self.name, "does not run on after it was held: {problem}");
                }
            }
        }
    }

    /// Nobody else stops the guest, or lets it go, until `work` is done.
    fn with_holders<T>(&mut self, work: impl FnOnce(&mut Self, &mut Holders) -> T) -> T {
        let holders = Arc::clone(&self.holders);
        let mut holders = holders.lock().unwrap_or_else(PoisonError::into_inner);
        work(self, &mut holders)
    }

    /// Stops the guest, and says whether it ran until then.
    fn stop(&mut self) -> Result<bool, VcpuError> {
        self.must_execute()?;
        if self.elsewhere {
            return self.command_elsewhere(Backend::pause);
        }
        let ran = !matches!(self.activity, Activity::Pause);
        if ran {
            self.enter(Activity::Pause, RunState::Paused, "paused on request".into());
        }
        Ok(ran)
    }

    /// Lets the guest run on.
    fn run_on(&mut self) -> Result<(), VcpuError> {
        self.must_execute()?;
        if self.elsewhere {
            self.command_elsewhere(Backend::resume)?;
        } else if matches!(self.activity, Activity::Pause) {
            self.enter(Activity::Run, RunState::Running, String::new());
        }
        Ok(())
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

    /// Takes note of what a guest does that runs elsewhere, and says whether that, or the guest, has changed.
    fn look_elsewhere(&mut self) -> bool {
        let Ok(Some((run_state, reason))) = self.guarded(Backend::elsewhere) else { return false };
        let changed = (run_state, &reason) != (self.run_state, &self.reason);
        if changed {
            self.enter(Activity::Stay, run_state, reason);
        }
        changed | self.guarded(Backend::overtaken).unwrap_or(false)
    }

    /// Has whoever runs the guest stop it or let it go.
    fn command_elsewhere<T>(
        &mut self,
        command: impl FnOnce(&mut B) -> Result<T, VcpuError>,
    ) -> Result<T, VcpuError> {
        let done = self.guarded(command).map_err(VcpuError::Hypervisor)??;
        self.look_elsewhere();
        Ok(done)
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
            Action::Pause => self.with_holders(|driver, holders| {
                driver.stop()?;
                holders.overrule();
                Ok(())
            })?,
            Action::Hold(holds) => self.with_holders(|driver, holders| {
                let ran = driver.stop()?;
                holders.join(ran, holds.swap(true, Ordering::Relaxed));
                Ok(())
            })?,
            Action::Resume => self.with_holders(|driver, holders| {
                driver.run_on()?;
                holders.overrule();
                Ok(())
            })?,
            Action::Step => {
                self.must_execute()?;
                match self.guarded(Backend::step) {
                    Ok(Err(refused)) => return Err(refused),
                    Err(panicked) => self.after(Exit::Failed(panicked)),
                    Ok(Ok(exit)) => {
                        self.with_holders(|_, holders| holders.overrule());
                        match exit {
                            _ if self.elsewhere => {
                                self.look_elsewhere();
                            }
                            Exit::Shutdown(_) | Exit::Failed(_) => self.after(exit),
                            _ => self.after(Exit::Stepped),
                        }
                    }
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
            Action::SetNested(request) => {
                let effect = match **request {
                    NestedRequest::Off { walker_only } => self.leave_nested(walker_only, ticket)?,
                    NestedRequest::Enter(request) => self.enter_nested(&request, ticket)?,
                };
                return Ok(Done { snapshot: self.publish(ticket), nested: Some(effect) });
            }
        }
        Ok(Done { snapshot: self.publish(ticket), nested: None })
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
        let read = self.guarded(|backend| {
            let registers = backend.registers()?;
            let guest = backend.guest_mode(&registers)?;
            Ok((registers, guest, backend.take_nested_exit()))
        });
        let mut unread = None;
        let (assumed, registers, nested) = match read {
            Ok(Ok((registers, guest, exit))) => {
                self.note_transition(guest.is_some(), exit);
                let assumed = self.backend.as_deref().map(Backend::assumed).unwrap_or_default();
                (assumed, registers, guest.map_or(NestedMode::Off, NestedMode::Guest))
            }
            Ok(Err(problem)) if self.elsewhere => {
                unread = Some(problem);
                (as_before(&previous), previous.registers.clone(), previous.nested)
            }
            Ok(Err(problem)) | Err(problem) => {
                if !self.run_state.is_final() {
                    self.after(Exit::Failed(format!("its registers cannot be read: {problem}")));
                }
                (as_before(&previous), previous.registers.clone(), previous.nested)
            }
        };
        let overlay = self.overlay.map(|(second, l2)| NestedMode::WalkerOnly { second, l2 });
        let nested = overlay.unwrap_or(nested);
        let walker = nested.walker(registers.control(), &self.cpu).map_err(|error| *error.state());
        let walker = registers.with_pdptes(walker, &self.cpu);
        let assumed = with_limits(assumed, &registers, &walker);
        let changed = walker != previous.walker || nested != previous.nested;
        let generation = previous.generation + u64::from(changed);
        let snapshot = Arc::new(Snapshot {
            generation,
            ticket,
            taken: if unread.is_some() { previous.taken } else { Instant::now() },
            unread,
            run_state: self.run_state,
            run_state_reason: self.reason.clone(),
            registers,
            cpu: self.cpu,
            walker,
            nested,
            nested_reason: self.nested_reason.clone(),
            assumed,
        });
        self.shared.spaces.note(&snapshot);
        let announced = changed.then_some(generation);
        self.publisher.publish(&self.shared.published, Arc::clone(&snapshot), ticket, announced);
        snapshot
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
    let wanted = changes.applied_to(&current);
    if wanted.control() != current.control() {
        PageWalk::new(&wanted.control(), cpu)
            .map_err(|problem| VcpuError::InvalidRegisters(problem.to_string()))?;
    }
    changes.check(&wanted).map_err(VcpuError::InvalidRegisters)?;
    let rflags = changes.rflags.map(|rflags| rflags | RFLAGS_FIXED);
    backend.set_registers(&RegisterChanges { rflags, ..changes.clone() })
}

fn panic_message(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
