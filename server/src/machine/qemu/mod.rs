//! A guest of QEMU's that somebody else started: asked over its QMP socket, its memory read where QEMU has it.
//!
//! Registers come from `info registers`, the layout of memory from `info mtree -f`. QEMU runs the guest and may stop it for
//! anybody: what it does is known from events. Nothing here writes to the guest. The latest snapshot is answered from without
//! QEMU; a fresh one costs a round trip over the socket, and looks at the layout of memory as well.
//!
//! Memory that QEMU shares through a file (`memory-backend-memfd,share=on`, `memory-backend-file,share=on`) is mapped and
//! walked like our own. All other memory is fetched through `/proc/PID/mem`.
//!
//! What QEMU does not tell is named in each answer's `assumed`. Not seen: System Management Mode's own memory, a vIOMMU, what
//! a device has mapped for itself, and vCPUs that are plugged in after the machine was attached.

mod layout;
mod monitor;
mod process;
mod registers;
mod vcpu;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use pagewalk::mode::{CR0_PG, CR4_PAE, EFER_LMA};
use pagewalk::{CpuProfile, Gpa, Vendor};
use qapi::qmp;

use super::mapping::{Fetch, FileMapping};
use super::memory::{GuestRam, MemoryError, Place};
use super::{Capabilities, Health, Source};
use crate::vcpu::{Holders, Registers, RunState, SpawnError, Vcpu, VcpuError};
use layout::Range;
use monitor::{Event, Events, Monitor};
use process::{Area, Process};
use vcpu::QemuVcpu;

pub use monitor::MonitorError;
pub use process::ProcessError;

/// Most vCPUs that are taken on: each has a thread.
const VCPUS_MAX: usize = 256;
/// How often the layout of memory is asked for while it moves: it is told piece by piece.
const LAYOUT_TRIES: usize = 5;
/// Where QEMU does not tell: what its own CPU models have unless told otherwise.
const MAXPHYADDR: u8 = 40;

/// Why a guest of QEMU's cannot be attached to.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// The monitor.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// QEMU's process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The other end of the socket.
    #[error("the process behind the QMP socket {path} is not known: {problem}")]
    Peer {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        problem: std::io::Error,
    },
    /// Who listens on the socket could not look into the process.
    #[error(
        "process {pid} is user {owner}'s, and the QMP socket {path} is user {peer}'s: name a process of theirs with pid=N, or have root or user {owner} make the socket"
    )]
    NotTheirs {
        /// The socket.
        path: PathBuf,
        /// The user who listens there.
        peer: u32,
        /// The process.
        pid: u32,
        /// The user whose it is.
        owner: u32,
    },
    /// An answer of QEMU's that cannot be.
    #[error("the QMP socket {path}: {problem}")]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What it was.
        problem: String,
    },
    /// The guest's memory.
    #[error("the guest's memory: {0}")]
    Memory(#[from] MemoryError),
    /// A file behind the guest's memory cannot be mapped.
    #[error("the file behind the guest's memory at {at:#x} cannot be mapped: {problem}")]
    Map {
        /// Guest physical address.
        at: u64,
        /// What the system says.
        problem: std::io::Error,
    },
    /// A vCPU.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
}

/// What QEMU has told without being asked, and what the vCPUs share.
struct News {
    path: PathBuf,
    /// Counts what may have changed the guest's run state.
    state: AtomicU64,
    /// Counts what may have changed the layout of memory.
    layout: AtomicU64,
    /// Counts resets and changes of the layout of memory.
    overtaken: AtomicU64,
    health: Arc<Health>,
    process: OnceLock<Arc<Process>>,
    vcpus: OnceLock<Vec<Weak<Vcpu>>>,
}

impl News {
    fn state_has_changed(&self) {
        self.state.fetch_add(1, Ordering::AcqRel);
    }

    fn overtake(&self) {
        self.overtaken.fetch_add(1, Ordering::AcqRel);
    }

    /// Has every vCPU publish what there is now.
    fn tell(&self) {
        for vcpu in self.vcpus.get().into_iter().flatten().filter_map(Weak::upgrade) {
            vcpu.look();
        }
    }
}

impl Events for News {
    fn event(&self, event: Event) {
        tracing::debug!(socket = %self.path.display(), ?event, "QEMU tells");
        match event {
            Event::State => self.state_has_changed(),
            Event::Layout => {
                self.layout.fetch_add(1, Ordering::AcqRel);
                self.overtake();
            }
            // A guest that had shut down is there again.
            Event::Reset => {
                self.state_has_changed();
                self.overtake();
            }
        }
        self.tell();
    }

    fn ended(&self, problem: &str) {
        let path = self.path.display();
        let reason = match self.process.get() {
            Some(process) if !process.lives() => {
                format!("QEMU's process {} has ended (its QMP socket {path}: {problem})", process.pid())
            }
            _ => format!("the QMP socket {path}: {problem}"),
        };
        self.health.declare_lost(reason);
        self.tell();
    }
}

/// QEMU, as the vCPUs' threads use it.
struct Attached {
    news: Arc<News>,
    monitor: Monitor,
    process: Arc<Process>,
    /// No hypervisor's CPU executes the guest, but TCG.
    emulated: bool,
    /// The layout that `memory` was made from. Held while that is looked at and replaced.
    layout: Mutex<Layout>,
    memory: ArcSwap<GuestRam>,
    /// Held while QEMU is asked what it does with the guest.
    heard: Mutex<Heard>,
    /// Who has the guest stopped for a while: all its vCPUs stop together.
    holders: Arc<Mutex<Holders>>,
}

/// What QEMU does with the guest, as it last said, and what [`News::state`] was before it was asked.
struct Heard {
    told: u64,
    state: RunStateNow,
}

/// Device and inode: file systems number their inodes each for itself.
type Identity = (u64, u64);
/// So that a file is mapped once.
type Files = BTreeMap<Identity, Arc<FileMapping>>;

#[derive(Default)]
struct Layout {
    /// As QEMU printed it.
    view: String,
    /// What [`News::layout`] was before that.
    told: u64,
    files: Files,
}

impl Attached {
    fn answer(&self, problem: String) -> QemuError {
        QemuError::Answer { path: self.news.path.clone(), problem }
    }

    /// Whether the guest cannot be asked any more. All else may be otherwise at the next question.
    fn is_final(&self, error: &QemuError) -> bool {
        match error {
            QemuError::Monitor(error) => error.is_final(),
            _ => !self.process.lives(),
        }
    }

    /// What a failure says. The machine is lost if it is final.
    fn failed(&self, error: &QemuError) -> String {
        let reason = error.to_string();
        if self.is_final(error) {
            self.news.health.declare_lost(reason.clone());
        }
        reason
    }

    /// Looks how memory lies now, and has it that way. After an error it lies as it was known before.
    fn refresh_memory(&self) -> Result<(), QemuError> {
        let mut layout = self.layout.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 1..LAYOUT_TRIES {
            match self.lay_out(&mut layout) {
                Err(error) if !self.is_final(&error) => {
                    tracing::debug!(socket = %self.news.path.display(), "the layout of memory moves: {error}");
                }
                done => return done,
            }
        }
        self.lay_out(&mut layout)
    }

    fn lay_out(&self, layout: &mut Layout) -> Result<(), QemuError> {
        let told = self.news.layout.load(Ordering::Acquire);
        let mtree = self.monitor.ask("info mtree -f", 0)?;
        let view = layout::view(&mtree).map_err(|problem| self.answer(problem))?;
        // A DIMM may have gone, and another one of its name come to its place.
        if view == layout.view && told == layout.told {
            return Ok(());
        }
        let ranges = layout::ranges(view).map_err(|problem| self.answer(problem))?;
        let memory = self.memory_of(&ranges, &mut layout.files)?;
        view.clone_into(&mut layout.view);
        layout.told = told;
        self.memory.store(Arc::new(memory));
        Ok(())
    }

    fn memory_of(&self, ranges: &[Range], files: &mut Files) -> Result<GuestRam, QemuError> {
        let areas = self.process.areas()?;
        let mut in_use = Files::new();
        // By where QEMU has them.
        let mut mapped: BTreeMap<u64, Arc<FileMapping>> = BTreeMap::new();
        let mut fetched: Option<Arc<dyn Fetch>> = None;
        let mut places = Vec::new();
        for Range { region, name } in ranges {
            let answer = self.monitor.ask(&format!("gpa2hva {:#x}", region.start.0), 0)?;
            let host = layout::host_address(&answer).map_err(|problem| self.answer(problem))?;
            let end = host.checked_add(region.size);
            // Somebody may have named another process.
            if !areas.iter().any(|area| (area.start..area.end).contains(&host)) {
                let pid = self.process.pid();
                return Err(self.answer(format!(
                    "guest memory at {:#x} is at {host:#x} in QEMU, where process {pid} has none: name QEMU's process with pid=N",
                    region.start.0
                )));
            }
            let area = areas.iter().find(|area| {
                area.start <= host && end.is_some_and(|end| end <= area.end) && area.shared && area.inode != 0
            });
            let file = match area {
                Some(area) => match mapped.get(&area.start) {
                    Some(file) => Some(Arc::clone(file)),
                    None => self.file_of(area, [&in_use, files], region.start)?.map(|(identity, file)| {
                        in_use.insert(identity, Arc::clone(&file));
                        mapped.entry(area.start).or_insert(file).clone()
                    }),
                },
                None => None,
            };
            let is_mapped = file.is_some();
            let place = match (area, file) {
                (Some(area), Some(file)) => Place::Mapped(file, area.offset + (host - area.start)),
                _ => {
                    let from = match &fetched {
                        Some(from) => Arc::clone(from),
                        None => {
                            let memory = self.process.memory(&self.news.health)?;
                            let memory: Arc<dyn Fetch> = Arc::new(memory);
                            fetched.insert(memory).clone()
                        }
                    };
                    Place::Fetched(from, host)
                }
            };
            tracing::debug!(range = ?region, block = %name, mapped = is_mapped, "guest memory");
            places.push((*region, place));
        }
        *files = in_use;
        // The largest first: that is where it is looked first.
        places.sort_by_key(|(region, _)| std::cmp::Reverse(region.size));
        Ok(GuestRam::of_others(places)?)
    }

    /// The file behind an area, mapped, and what tells it from others. The mapping keeps its inode from being given to another
    /// file. A device, such as an NVDIMM may have, is no file that can be mapped whole.
    fn file_of(
        &self,
        area: &Area,
        known: [&Files; 2],
        at: Gpa,
    ) -> Result<Option<(Identity, Arc<FileMapping>)>, QemuError> {
        let failed = |problem| QemuError::Map { at: at.0, problem };
        let file = self.process.file(area)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Ok(None);
        }
        let identity = (metadata.dev(), metadata.ino());
        // One that has grown is mapped anew.
        let covers = |mapping: &&Arc<FileMapping>| mapping.size() as u64 >= metadata.len();
        let mapping = match known.iter().find_map(|files| files.get(&identity)).filter(covers) {
            Some(mapping) => Arc::clone(mapping),
            None => FileMapping::of(&file).map_err(failed)?,
        };
        Ok(Some((identity, mapping)))
    }

    /// The PDPTE registers that a vCPU of TCG would have, if it had any. TCG sets accessed bits in the PDPTEs in memory, which
    /// no CPU does: they are reserved there, and every walk would end at one.
    fn pdptes(&self, registers: &Registers) -> Option<[u64; 4]> {
        const ACCESSED: u64 = 1 << 5;
        let pae =
            registers.cr0 & CR0_PG != 0 && registers.cr4 & CR4_PAE != 0 && registers.efer & EFER_LMA == 0;
        if !pae || !self.emulated {
            return None;
        }
        let mut bytes = [0; 32];
        let memory = self.memory.load();
        let read = memory.read(Gpa(registers.cr3 & 0xffff_ffe0), &mut bytes).ok()?;
        let (words, _) = bytes.as_chunks::<8>();
        let pdptes = <[[u8; 8]; 4]>::try_from(words).ok()?;
        (read == bytes.len()).then(|| pdptes.map(|word| u64::from_le_bytes(word) & !ACCESSED))
    }

    /// What QEMU does with the guest. It is asked, unless nothing was told since it was asked before: an event alone does not say
    /// why, and comes before or after the answers that it belongs with.
    fn state(&self) -> Result<RunStateNow, MonitorError> {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        // What is told from here on may be newer than the answer, and brings another question.
        let told = self.news.state.load(Ordering::Acquire);
        if heard.told != told {
            let qmp::StatusInfo { running, status, .. } = self.monitor.execute(&qmp::query_status {})?;
            let state = match status {
                _ if running => (RunState::Running, String::new()),
                qmp::RunState::shutdown => (RunState::Shutdown, "the guest shut down".to_owned()),
                qmp::RunState::paused => (RunState::Paused, "stopped in QEMU".to_owned()),
                other => {
                    let name = <qmp::RunState as qapi::Enum>::name(&other);
                    (RunState::Paused, format!("stopped in QEMU: {name}"))
                }
            };
            *heard = Heard { told, state };
        }
        Ok(heard.state.clone())
    }

    /// [`Self::state`], by a question of its own.
    fn state_now(&self) -> Result<RunStateNow, VcpuError> {
        self.news.state_has_changed();
        self.state().map_err(|error| VcpuError::Unsupported(self.failed(&error.into())))
    }

    fn command<C: qmp::QmpCommand>(&self, command: &C, patience: Duration) -> Result<(), VcpuError> {
        let done = self.monitor.execute_within(command, patience);
        // An event says so as well, maybe later.
        self.news.state_has_changed();
        done.map(drop).map_err(|error| VcpuError::Unsupported(self.failed(&error.into())))
    }
}

type RunStateNow = (RunState, String);

/// A guest of QEMU's.
pub(super) struct Qemu {
    // Before what their threads use.
    vcpus: Vec<Arc<Vcpu>>,
    attached: Arc<Attached>,
    identity: String,
    description: String,
    capabilities: Capabilities,
    cpu: CpuProfile,
}

/// Attaches to the guest behind a QMP socket. `pid` names QEMU's process where the socket does not tell.
pub(super) fn open(id: &str, path: &Path, pid: Option<u32>) -> Result<Qemu, QemuError> {
    let news = Arc::new(News {
        path: path.to_owned(),
        state: AtomicU64::new(1),
        layout: AtomicU64::new(0),
        overtaken: AtomicU64::new(0),
        health: Arc::default(),
        process: OnceLock::new(),
        vcpus: OnceLock::new(),
    });
    let monitor = Monitor::connect(path, Arc::clone(&news) as Arc<dyn Events>)?;
    let failed = |problem| QemuError::Peer { path: path.to_owned(), problem };
    let peer = Process::peer(monitor.socket()).map_err(failed)?;
    let pid = pid.or(peer.pid).ok_or_else(|| {
        failed(io::Error::other("it is in a PID namespace that cannot be seen from here; name it with pid=N"))
    })?;
    let process = Arc::new(Process::open(pid)?);
    if !peer.may_name(process.owner()) {
        return Err(QemuError::NotTheirs {
            path: path.to_owned(),
            peer: peer.uid,
            pid,
            owner: process.owner(),
        });
    }
    // Nobody else sets it.
    let _ = news.process.set(Arc::clone(&process));
    let emulated = !monitor.execute(&qmp::query_kvm {})?.enabled;
    let attached = Arc::new(Attached {
        emulated,
        news: Arc::clone(&news),
        monitor,
        process,
        layout: Mutex::default(),
        memory: ArcSwap::from_pointee(GuestRam::none()),
        heard: Mutex::new(Heard { told: 0, state: (RunState::Running, String::new()) }),
        holders: Arc::default(),
    });
    attached.refresh_memory()?;
    attached.state()?;
    let (indices, cpu, cpu_assumed) = cpus(&attached)?;
    let vcpus = indices
        .into_iter()
        .zip(0..)
        .map(|(cpu_index, index)| {
            let backend = QemuVcpu {
                attached: Arc::clone(&attached),
                index: cpu_index,
                overtaken: 0,
                cpu_assumed: cpu_assumed.clone(),
                assumed: Vec::new(),
            };
            Vcpu::spawn(id, index, cpu, backend)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let _ = news.vcpus.set(vcpus.iter().map(Arc::downgrade).collect());
    // What was told before there was anybody to tell.
    news.tell();
    let version = attached.monitor.execute(&qmp::query_version {})?.qemu;
    attached.monitor.trust();
    let memory = attached.memory.load_full();
    let way = match (memory.blocks(), memory.is_mapped()) {
        (true, _) => "its memory fetched through /proc",
        (false, true) => "its memory shared",
        (false, false) => "its memory shared, device memory and ROMs fetched through /proc",
    };
    Ok(Qemu {
        identity: attached.process.identity(),
        description: format!(
            "guest of QEMU {}.{}.{}, process {pid}, {way}",
            version.major, version.minor, version.micro
        ),
        vcpus,
        capabilities: Capabilities {
            live: true,
            can_pause: true,
            can_step: false,
            can_set_registers: false,
            can_write_memory: false,
            ends_when_detached: false,
            real_nested: false,
            nested_reason: "QEMU runs the vCPU, and its monitor enters no guest mode".to_owned(),
        },
        attached,
        cpu,
    })
}

/// The indices that the monitor knows the vCPUs by, what their CPUID says, and what is assumed of that.
fn cpus(attached: &Attached) -> Result<(Vec<i64>, CpuProfile, Vec<String>), QemuError> {
    let cpus = attached.monitor.execute(&qmp::query_cpus_fast {})?;
    let mut known: Vec<(i64, String)> = cpus
        .into_iter()
        .map(|cpu| {
            let base = match cpu {
                qmp::CpuInfoFast::x86_64(base) | qmp::CpuInfoFast::i386(base) => base,
                _ => return Err("the guest is no x86 machine".to_owned()),
            };
            Ok((base.cpu_index, base.qom_path))
        })
        .collect::<Result<_, _>>()
        .map_err(|problem| attached.answer(problem))?;
    known.sort_unstable();
    let first = match known.first() {
        Some((_, path)) if known.len() <= VCPUS_MAX => path.clone(),
        _ => {
            return Err(
                attached.answer(format!("QEMU has {} vCPUs, 1 to {VCPUS_MAX} can be had", known.len()))
            );
        }
    };
    let property = |name: &str| {
        let command = qmp::qom_get { path: first.clone(), property: name.to_owned() };
        match attached.monitor.execute(&command) {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.is_final() => Err(error),
            Err(_) => Ok(None),
        }
    };
    let mut assumed = Vec::new();
    let vendor = match property("vendor")?.as_ref().and_then(|vendor| vendor.as_str()) {
        Some("AuthenticAMD" | "HygonGenuine") => Vendor::Amd,
        Some(_) => Vendor::Intel,
        None => {
            assumed.push("CPUID vendor=GenuineIntel".to_owned());
            Vendor::Intel
        }
    };
    let bits = property("phys-bits")?.and_then(|bits| u8::try_from(bits.as_u64()?).ok());
    let maxphyaddr = bits.filter(|bits| (32..=52).contains(bits)).unwrap_or_else(|| {
        assumed.push(format!("MAXPHYADDR={MAXPHYADDR}"));
        MAXPHYADDR
    });
    let gib_pages = property("pdpe1gb")?.and_then(|has| has.as_bool()).unwrap_or_else(|| {
        assumed.push("CPUID pdpe1gb=1".to_owned());
        true
    });
    let cpu = CpuProfile { vendor, maxphyaddr, gib_pages, encryption_bit: None };
    Ok((known.into_iter().map(|(index, _)| index).collect(), cpu, assumed))
}

impl Source for Qemu {
    fn kind(&self) -> &str {
        "qemu"
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn memory(&self) -> Arc<GuestRam> {
        self.attached.memory.load_full()
    }

    fn vcpus(&self) -> &[Arc<Vcpu>] {
        &self.vcpus
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn cpu(&self) -> CpuProfile {
        self.cpu
    }

    fn health(&self) -> &Health {
        &self.attached.news.health
    }

    fn identity(&self) -> Option<&str> {
        Some(&self.identity)
    }
}
