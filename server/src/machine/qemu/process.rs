//! QEMU's process: where it keeps the guest's memory, and a way to read it.
//!
//! `proc(5)`: `/proc/PID/maps` says what lies behind an address of the process, `/proc/PID/fd` has the files that it holds
//! open, `/proc/PID/mem` is its memory. A shared file behind the guest's memory is opened through `/proc/PID/fd`: it is then
//! the file that QEMU has, even if another one took its name.
#![allow(unsafe_code)] // The standard library does not tell who is at the other end of a socket.

use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::super::health::Health;
use super::super::mapping::Fetch;

/// Largest list of mappings that is read: a process may have 65,530 of them.
const MAPS_MAX: u64 = 64 << 20;

/// A process, which another one of the same id is not taken for.
#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    /// Clock ticks from the host's start to the process's.
    started: u64,
    owner: u32,
}

/// Who listened on a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    /// `None` for a process in a PID namespace that cannot be seen from here.
    pub(super) pid: Option<u32>,
    pub(super) uid: u32,
}

impl Peer {
    /// Whether it may have a process looked into that belongs to `owner`: who listens says where the guest's memory is, and could
    /// name anything.
    pub(super) fn may_name(self, owner: u32) -> bool {
        self.uid == 0 || self.uid == owner
    }
}

/// What cannot be had of a process.
#[derive(Debug, thiserror::Error)]
#[error("QEMU's process {pid}: {what}: {problem}")]
pub struct ProcessError {
    pid: u32,
    what: String,
    problem: io::Error,
}

/// A stretch of the process's address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) start: u64,
    pub(super) end: u64,
    /// What is written to it, others see: only such memory can be looked at through its file.
    pub(super) shared: bool,
    pub(super) offset: u64,
    pub(super) inode: u64,
    device: (u32, u32),
    path: String,
}

impl Process {
    /// Who is at the other end of a socket: who listened.
    pub(super) fn peer(socket: &UnixStream) -> io::Result<Peer> {
        let mut peer = MaybeUninit::<libc::ucred>::uninit();
        let mut size = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: the socket is open, and `peer` and `size` are valid for as many bytes as `size` says.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                peer.as_mut_ptr().cast(),
                &mut size,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded; the kernel fills in all of a `ucred`, every bit pattern of which is valid.
        let libc::ucred { pid, uid, .. } = unsafe { peer.assume_init() };
        Ok(Peer { pid: u32::try_from(pid).ok().filter(|pid| *pid > 0), uid })
    }

    pub(super) fn open(pid: u32) -> Result<Self, ProcessError> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |problem| ProcessError { pid, what, problem }
        };
        let started = started(pid).map_err(failed("it is not there"))?;
        let owner = owner(pid).map_err(failed("its owner cannot be read"))?;
        Ok(Self { pid, started, owner })
    }

    /// Whose it is: not of whoever started it where its memory is kept from them.
    pub(super) fn owner(&self) -> u32 {
        self.owner
    }

    /// What was opened of a process that is still the same one, and has become nobody else's by executing another program.
    fn same(&self, opened: File) -> io::Result<File> {
        if !self.lives() {
            return Err(io::Error::other("it has ended"));
        }
        if owner(self.pid)? != self.owner {
            return Err(io::Error::other("it has another owner than it had"));
        }
        Ok(opened)
    }

    /// What tells it from every other process of this host.
    pub(super) fn identity(&self) -> String {
        format!("process {}, started at tick {}", self.pid, self.started)
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    pub(super) fn lives(&self) -> bool {
        started(self.pid).is_ok_and(|started| started == self.started)
    }

    fn failed(&self, what: impl Into<String>) -> impl FnOnce(io::Error) -> ProcessError {
        let (pid, mut what) = (self.pid, what.into());
        move |problem| {
            if problem.kind() == io::ErrorKind::PermissionDenied {
                what.push_str(": run the daemon as QEMU's user, or with CAP_SYS_PTRACE");
            }
            ProcessError { pid, what, problem }
        }
    }

    /// Its address space.
    pub(super) fn areas(&self) -> Result<Vec<Area>, ProcessError> {
        use io::Read as _;
        let what = "its mappings cannot be read";
        let mut text = Vec::new();
        File::open(format!("/proc/{}/maps", self.pid))
            .and_then(|maps| self.same(maps)?.take(MAPS_MAX).read_to_end(&mut text))
            .map_err(self.failed(what))?;
        let text = String::from_utf8_lossy(&text);
        text.lines()
            .map(|line| area(line).ok_or_else(|| io::Error::other(format!("{line:?}"))))
            .collect::<Result<_, _>>()
            .map_err(self.failed(what))
    }

    /// The file behind an area, as the process has it open.
    pub(super) fn file(&self, area: &Area) -> Result<File, ProcessError> {
        let what = format!("the file {} behind the guest's memory cannot be opened", area.path);
        let open = || {
            for entry in fs::read_dir(format!("/proc/{}/fd", self.pid))? {
                let path = entry?.path();
                // A descriptor may be closed meanwhile, or lead to what has no metadata.
                let Ok(metadata) = fs::metadata(&path) else { continue };
                let device = (libc::major(metadata.dev()), libc::minor(metadata.dev()));
                let same_name =
                    || fs::read_link(&path).is_ok_and(|name| name.as_os_str() == area.path.as_str());
                // Some file systems show another device in the mappings than in a file's metadata.
                if metadata.ino() == area.inode && (device == area.device || same_name()) {
                    return File::open(path).and_then(|file| self.same(file));
                }
            }
            Err(io::Error::other("the process does not hold it open"))
        };
        open().map_err(self.failed(what))
    }

    /// Its memory.
    pub(super) fn memory(self: &Arc<Self>, health: &Arc<Health>) -> Result<ProcessMemory, ProcessError> {
        let memory = File::open(format!("/proc/{}/mem", self.pid)).and_then(|memory| self.same(memory));
        let file = memory.map_err(self.failed(
            "its memory cannot be read, and the guest's is not shared (-object memory-backend-memfd,share=on)",
        ))?;
        Ok(ProcessMemory { process: Arc::clone(self), file, health: Arc::clone(health) })
    }
}

/// The memory of a process, by its own addresses.
pub(super) struct ProcessMemory {
    process: Arc<Process>,
    file: File,
    health: Arc<Health>,
}

impl Fetch for ProcessMemory {
    fn fetch(&self, address: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, address).inspect_err(|_| {
            // QEMU may have unmapped what was there: memory that is plugged out.
            if !self.process.lives() {
                self.health.declare_lost(format!("QEMU's process {} has ended", self.process.pid));
            }
        })
    }
}

/// Whose a process is.
fn owner(pid: u32) -> io::Result<u32> {
    Ok(fs::metadata(format!("/proc/{pid}"))?.uid())
}

/// When a process started. One that has ended and was not waited for is not there any more.
fn started(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold anything: what follows the last one is regular.
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect::<Vec<_>>());
    let fields = fields.ok_or_else(|| io::Error::other("its state cannot be read"))?;
    if matches!(fields.first(), Some(&("Z" | "X"))) {
        return Err(io::Error::other("it has ended"));
    }
    // Field 22 of the whole line; the first after the name is field 3.
    let ticks = fields.get(19).and_then(|ticks| ticks.parse().ok());
    ticks.ok_or_else(|| io::Error::other("its start cannot be read"))
}

/// `START-END PERMS OFFSET MAJOR:MINOR INODE PATH`
fn area(line: &str) -> Option<Area> {
    let mut words = line.splitn(6, ' ');
    let (start, end) = words.next()?.split_once('-')?;
    let permissions = words.next()?;
    let offset = words.next()?;
    let (major, minor) = words.next()?.split_once(':')?;
    let inode = words.next()?.parse().ok()?;
    let hex = |digits| u64::from_str_radix(digits, 16).ok();
    let hex32 = |digits| u32::from_str_radix(digits, 16).ok();
    Some(Area {
        start: hex(start)?,
        end: hex(end)?,
        shared: permissions.ends_with('s'),
        offset: hex(offset)?,
        inode,
        device: (hex32(major)?, hex32(minor)?),
        path: words.next().unwrap_or_default().trim_start().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write as _;

    use super::*;

    /// As where it executes a program of somebody else's, set-user-ID.
    #[test]
    fn a_process_that_has_become_anothers_is_not_looked_into() {
        let own = Process::open(std::process::id()).unwrap();
        assert!(own.areas().is_ok());
        let others = Arc::new(Process { owner: own.owner + 1, ..own });
        assert!(others.areas().unwrap_err().to_string().contains("another owner"));
        assert!(others.memory(&Arc::default()).is_err());
    }

    #[test]
    fn areas_of_all_kinds() {
        let memfd = area(
            "7f8c9ffff000-7f8caffff000 rw-s 00001000 00:01 1028                       /memfd:a b (deleted)",
        );
        let memfd = memfd.unwrap();
        assert_eq!((memfd.start, memfd.end, memfd.offset), (0x7f8c_9fff_f000, 0x7f8c_afff_f000, 0x1000));
        assert_eq!((memfd.shared, memfd.inode, memfd.device), (true, 1028, (0, 1)));
        assert_eq!(memfd.path, "/memfd:a b (deleted)");
        let anonymous = area("558314b84000-558315bcd000 rw-p 00000000 00:00 0 ").unwrap();
        assert_eq!((anonymous.shared, anonymous.inode, anonymous.path.as_str()), (false, 0, ""));
        for line in ["", "x", "0-1", "0-1 rw-s 0 0:0", "0-1 rw-s 0 0:0 x", "g-1 rw-s 0 0:0 1"] {
            assert_eq!(area(line), None, "{line}");
        }
    }

    #[test]
    fn this_process_is_found_behind_its_own_socket() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Process::peer(&ours).unwrap();
        assert_eq!(peer.pid, Some(std::process::id()));
        let process = Arc::new(Process::open(std::process::id()).unwrap());
        assert!(peer.may_name(process.owner()));
        assert!(process.lives());

        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 0x2000]).unwrap();
        let mapping = super::super::super::FileMapping::of(&file).unwrap();
        let at = mapping.place(0x1000, 8).unwrap().addr() as u64;
        let areas = process.areas().unwrap();
        let area = areas.iter().find(|area| area.start <= at && at < area.end).unwrap();
        assert!(area.shared && area.offset == 0);
        assert_eq!(process.file(area).unwrap().metadata().unwrap().len(), 0x2000);

        let health = Arc::new(Health::default());
        let memory = process.memory(&health).unwrap();
        let mut bytes = [0; 8];
        memory.fetch(at, &mut bytes).unwrap();
        assert_eq!((bytes, health.lost()), ([7; 8], None));
        assert!(memory.fetch(8, &mut bytes).is_err());
        assert_eq!(health.lost(), None, "the process lives");
    }

    #[test]
    fn who_listens_names_its_own_processes_alone_unless_it_is_root() {
        let peer = |uid| Peer { pid: None, uid };
        assert!(peer(1000).may_name(1000) && peer(0).may_name(1000) && peer(0).may_name(0));
        assert!(!peer(1000).may_name(1001) && !peer(1000).may_name(0));
    }

    #[test]
    fn a_process_that_has_ended_does_not_live() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let process = Process::open(child.id());
        child.wait().unwrap();
        assert!(!process.is_ok_and(|process| process.lives()));
        assert!(Process::open(child.id()).is_err());
    }
}
