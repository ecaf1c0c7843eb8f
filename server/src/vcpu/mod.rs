//! vCPUs: each runs on an OS thread of its own, which alone touches its hypervisor handle.
//!
//! The rest of the daemon holds a [`Vcpu`], an asynchronous handle. Reading the latest [`Snapshot`] takes no lock and
//! disturbs nobody. Everything else is a request to the thread with a deadline: a command that waits in a bounded queue,
//! or, for a fresh snapshot, a ticket that any number of askers share. Either kicks the thread out of the guest.

mod assumed;
mod backend;
mod command;
pub(crate) mod console;
pub(crate) mod devices;
mod hold;
mod kick;
pub(crate) mod kvm;
pub(crate) mod nested;
mod plain;
mod publication;
mod recorded;
mod registers;
mod signal;
mod snapshot;
mod spaces;
mod sync;
mod thread;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc as blocking;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use pagewalk::CpuProfile;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout_at;

pub use backend::{Backend, Exit, ImmediateExit};
pub use command::VcpuError;
pub use hold::{Hold, Holders};
pub use nested::{
    EnterL2, Entered, GuestMode, L2Error, L2Registers, NestedEffect, NestedEffectKind, NestedMode,
    NestedRequest, SecondDimension,
};
pub use plain::PlainBackend;
pub use recorded::RecordedBackend;
pub(crate) use registers::{CR0_NE, RFLAGS_FIXED, RFLAGS_VM, UNMODELLED};
pub use registers::{RegisterChanges, Registers, Selectors};
pub use snapshot::{RunState, Snapshot};
pub use spaces::SeenSpace;

use command::{Action, Command, Done};
use hold::Released;
use kick::Kicker;
use publication::{Published, Publisher};
use spaces::Spaces;
use thread::{Shared, VcpuThread, first_snapshot};

/// Commands that may wait for one vCPU; more askers wait for a place, up to their deadlines.
const QUEUE: usize = 64;
/// How long a vanishing handle waits for its thread before it leaves it behind.
const SHUTDOWN_BOUND: Duration = Duration::from_secs(1);

/// Why a vCPU could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// Its registers cannot be read.
    #[error("cannot read the registers of the new vCPU: {0}")]
    Registers(String),
    /// The host gives no thread.
    #[error("cannot start the vCPU's thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// The handle of a vCPU.
///
/// Dropping it stops the vCPU and waits for its thread, for one second at most.
pub struct Vcpu {
    name: String,
    index: u32,
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    served: watch::Receiver<u64>,
    generation: watch::Receiver<u64>,
    /// The highest ticket that was given up waiting for.
    unanswered: AtomicU64,
    thread: Mutex<Option<Running>>,
}

struct Running {
    handle: JoinHandle<()>,
    /// Disconnects when the thread has dropped its backend and ends.
    ended: blocking::Receiver<()>,
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu").field("name", &self.name).field("index", &self.index).finish_non_exhaustive()
    }
}

impl Vcpu {
    /// Starts the thread of vCPU `index` of `machine`; it runs the guest at once, where the backend can.
    ///
    /// # Errors
    /// When its registers cannot be read or the host gives no thread.
    pub fn spawn<B: Backend>(
        machine: &str,
        index: u32,
        cpu: CpuProfile,
        mut backend: B,
    ) -> Result<Arc<Self>, SpawnError> {
        let first = first_snapshot(&mut backend, cpu).map_err(SpawnError::Registers)?;
        let name = format!("{machine}/vcpu{index}");
        let spaces = Spaces::default();
        spaces.note(&first);
        let shared = Arc::new(Shared {
            kicker: Kicker::default(),
            published: Published::new(first),
            spaces,
            released: Released::default(),
        });
        let (commands, queue) = mpsc::channel(QUEUE);
        let (served_by_thread, served) = watch::channel(0);
        let (generation_by_thread, generation) = watch::channel(1);
        let (alive, ended) = blocking::channel();
        let thread = VcpuThread {
            name: name.clone(),
            cpu,
            backend,
            shared: Arc::clone(&shared),
            commands: queue,
            publisher: Publisher { served: served_by_thread, generation: generation_by_thread },
        };
        // The system takes no NUL in a thread's name, and an embedder's machine may be called anything.
        let handle = Builder::new().name(name.replace('\0', "")).spawn(move || {
            let _alive: blocking::Sender<()> = alive;
            thread.main();
        })?;
        Ok(Arc::new(Self {
            name,
            index,
            shared,
            commands,
            served,
            generation,
            unanswered: AtomicU64::new(0),
            thread: Mutex::new(Some(Running { handle, ended })),
        }))
    }

    /// Name of the vCPU and of its thread: `machine/vcpuN`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its index in its machine.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// What it last published. Takes no lock and disturbs nobody.
    #[must_use]
    pub fn latest(&self) -> Arc<Snapshot> {
        self.shared.published.latest()
    }

    /// The address spaces that it was seen in when it published, in no order, and how many more were forgotten.
    #[must_use]
    pub fn spaces(&self) -> (Vec<SeenSpace>, u64) {
        self.shared.spaces.all()
    }

    /// What it is doing: the run state of `snapshot`, or [`RunState::Unresponsive`] if, since then, somebody waited for
    /// the vCPU in vain.
    #[must_use]
    pub fn run_state(&self, snapshot: &Snapshot) -> RunState {
        if self.unanswered.load(Ordering::Acquire) > snapshot.ticket {
            RunState::Unresponsive
        } else {
            snapshot.run_state
        }
    }

    /// Has the thread look what a guest does that runs elsewhere. Does not wait for it.
    pub fn look(&self) {
        self.shared.kicker.kick();
    }

    /// The generation of the walkers, and its changes. Holds the newest only: a slow reader skips generations.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.generation.clone()
    }

    /// A snapshot that was taken after this call began. Concurrent calls share one exit from the guest.
    ///
    /// # Errors
    /// [`VcpuError::Timeout`] when the vCPU does not come out in time, [`VcpuError::Unread`] when whoever runs it does not tell
    /// its registers.
    pub async fn sync(&self, deadline: Instant) -> Result<Arc<Snapshot>, VcpuError> {
        let start = Instant::now();
        let mut served = self.served.clone();
        let ticket = self.shared.published.ask(&self.shared.kicker);
        match timeout_at(deadline.into(), served.wait_for(|served| *served >= ticket)).await {
            Ok(Ok(_)) => {
                let snapshot = self.latest();
                match &snapshot.unread {
                    None => Ok(snapshot),
                    Some(problem) => {
                        Err(VcpuError::Unread { vcpu: self.name.clone(), problem: problem.clone() })
                    }
                }
            }
            Ok(Err(_)) => Err(self.gone()),
            Err(_) => Err(self.timed_out(ticket, start)),
        }
    }

    /// Stops the vCPU until [`Vcpu::resume`]. Stopping a stopped one changes nothing.
    ///
    /// # Errors
    /// When it does not come out in time, has stopped for good, or nothing runs here.
    pub async fn pause(&self, deadline: Instant) -> Result<Arc<Snapshot>, VcpuError> {
        self.command(Action::Pause, deadline).await
    }

    /// Lets a paused vCPU run on. Resuming a running one changes nothing.
    ///
    /// # Errors
    /// As [`Vcpu::pause`].
    pub async fn resume(&self, deadline: Instant) -> Result<Arc<Snapshot>, VcpuError> {
        self.command(Action::Resume, deadline).await
    }

    /// Executes one instruction and leaves the vCPU paused.
    ///
    /// # Errors
    /// As [`Vcpu::pause`], and when the hypervisor does not single-step.
    pub async fn step(&self, deadline: Instant) -> Result<Arc<Snapshot>, VcpuError> {
        self.command(Action::Step, deadline).await
    }

    /// Writes the registers that are present in `changes`, all of them or none. A running vCPU runs on.
    ///
    /// # Errors
    /// Names the register that was not accepted; also when the vCPU does not come out in time.
    pub async fn set_registers(
        &self,
        changes: RegisterChanges,
        deadline: Instant,
    ) -> Result<Arc<Snapshot>, VcpuError> {
        self.command(Action::SetRegisters(Box::new(changes)), deadline).await
    }

    /// Puts the vCPU into guest mode, or takes it out again; where it cannot be, lays the L2 over the walkers alone. One
    /// publication. A running vCPU runs on.
    ///
    /// # Errors
    /// Names what is wrong with the described L2; the previous mode stays.
    pub async fn set_nested(
        &self,
        request: NestedRequest,
        deadline: Instant,
    ) -> Result<(Arc<Snapshot>, NestedEffect), VcpuError> {
        let done = self.perform(Action::SetNested(Box::new(request)), deadline).await?;
        let unchanged = || NestedEffect { kind: NestedEffectKind::Unchanged, reason: String::new() };
        Ok((done.snapshot, done.nested.unwrap_or_else(unchanged)))
    }

    async fn command(&self, action: Action, deadline: Instant) -> Result<Arc<Snapshot>, VcpuError> {
        Ok(self.perform(action, deadline).await?.snapshot)
    }

    async fn perform(&self, action: Action, deadline: Instant) -> Result<Done, VcpuError> {
        let start = Instant::now();
        let ticket = self.shared.published.draw_ticket();
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            self.commands.send(Command { action, reply }).await.map_err(|_| self.gone())?;
            self.shared.kicker.kick();
            answer.await.map_err(|_| self.gone())?
        };
        match timeout_at(deadline.into(), exchange).await {
            Ok(reply) => reply,
            Err(_) => Err(self.timed_out(ticket, start)),
        }
    }

    fn timed_out(&self, ticket: u64, start: Instant) -> VcpuError {
        self.unanswered.fetch_max(ticket, Ordering::AcqRel);
        tracing::debug!(vcpu = %self.name, "the vCPU did not come out in time");
        VcpuError::Timeout { vcpu: self.name.clone(), waited: start.elapsed() }
    }

    fn gone(&self) -> VcpuError {
        VcpuError::Gone { vcpu: self.name.clone() }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.shared.published.stop(&self.shared.kicker);
        let running = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Running { handle, ended }) = running else { return };
        match ended.recv_timeout(SHUTDOWN_BOUND) {
            Err(blocking::RecvTimeoutError::Disconnected) => {
                // The thread catches the backend's panics; one of its own has been reported by the panic hook.
                let _ = handle.join();
            }
            _ => tracing::warn!(vcpu = %self.name, "the vCPU's thread does not end; it is left behind"),
        }
    }
}
