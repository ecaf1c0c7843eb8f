//! A guest of the bed `qemu-linux`: its process, its monitor, its memory.
//!
//! Nothing of it has a name in the file system: the guest's memory is an unnamed file, and QMP runs over a socket pair.
//! Every wait has an end, and the process ends with the value, with this process, or when the bed's time is up.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use pagewalk::{Backing, ExchangeError, Gpa, Memory};
use qapi::{ExecuteError, Qmp, Stream, qmp};

/// For the guest to say that it is ready.
const BOOT: Duration = Duration::from_secs(120);
/// For one answer of the monitor.
const ANSWER: Duration = Duration::from_secs(60);
/// For QEMU to end when it is told to.
const END: Duration = Duration::from_secs(5);
/// QEMU gives up after this long.
const LIFE_SECONDS: &str = "300";
/// Commands under way at once: what is asked and answered has to fit into the socket's buffers.
const UNDER_WAY: usize = 64;

type Monitor = Qmp<Stream<BufReader<UnixStream>, BufWriter<UnixStream>>>;

/// Killed when it is no longer held.
struct Process(Child);

pub(crate) struct Guest {
    process: Process,
    monitor: Monitor,
    ram: File,
}

impl Guest {
    /// Boots the guest of this name, and answers once it is ready, with what it said until then.
    pub(crate) fn boot(script: &Path, name: &str) -> Result<(Guest, Vec<String>), Failed> {
        Self::boot_with(script, name, &[])
    }

    /// Boots it with more variables of the bed's.
    pub(crate) fn boot_with(
        script: &Path,
        name: &str,
        variables: &[(&str, &OsStr)],
    ) -> Result<(Guest, Vec<String>), Failed> {
        let shared = Path::new("/dev/shm");
        let ram = if shared.is_dir() { tempfile::tempfile_in(shared)? } else { tempfile::tempfile()? };
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(ANSWER))?;
        ours.set_write_timeout(Some(ANSWER))?;
        let mut child = Command::new(script)
            .args(["boot", name])
            .arg(format!("/proc/{}/fd/{}", std::process::id(), ram.as_raw_fd()))
            .env("PAGEWALK_BED_SECONDS", LIFE_SECONDS)
            .envs(variables.iter().copied())
            .stdin(OwnedFd::from(theirs.try_clone()?))
            .stdout(OwnedFd::from(theirs))
            .stderr(Stdio::piped())
            .spawn()?;
        let serial = child.stderr.take();
        let process = Process(child);
        let serial = serial.ok_or("the guest has no serial line")?;
        let (say, heard) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(serial).split(b'\n') {
                let Ok(line) = line else { break };
                if say.send(String::from_utf8_lossy(&line).trim().to_owned()).is_err() {
                    break;
                }
            }
        });
        let stream = Stream::new(BufReader::new(ours.try_clone()?), BufWriter::new(ours));
        let mut guest = Guest { process, monitor: Qmp::new(stream), ram };
        if let Err(error) = guest.handshake() {
            guest.process.end();
            let said: Vec<String> = heard.iter().collect();
            return Err(format!("QEMU did not start ({error}): {}", said.join("\n")).into());
        }
        let said = until_ready(&heard)?;
        Ok((guest, said))
    }

    fn handshake(&mut self) -> Result<(), ExecuteError> {
        // The library takes it for granted that somebody greets.
        if self.monitor.inner_mut().fill_buf()?.is_empty() {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        self.monitor.handshake()?;
        Ok(())
    }

    /// The file behind its memory.
    pub(crate) fn file(&self) -> &File {
        &self.ram
    }

    /// Kills QEMU, as the host's administrator would, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        self.process.end();
    }

    pub(crate) fn pause(&mut self) -> Result<(), Failed> {
        self.monitor.execute(&qmp::stop {})?;
        Ok(())
    }

    /// Begins anew, as at the push of a button. It is paused or runs, as before.
    pub(crate) fn reset(&mut self) -> Result<(), Failed> {
        // The bed has QEMU end instead.
        let reboot = Some(qmp::RebootAction::reset);
        self.monitor.execute(&qmp::set_action { reboot, shutdown: None, panic: None, watchdog: None })?;
        self.monitor.execute(&qmp::system_reset {})?;
        Ok(())
    }

    pub(crate) fn run_for(&mut self, time: Duration) -> Result<(), Failed> {
        self.monitor.execute(&qmp::cont {})?;
        std::thread::sleep(time);
        self.pause()
    }

    /// What the monitor for people says, from where `vcpu` sees it.
    pub(crate) fn ask(&mut self, vcpu: usize, command: &str) -> Result<String, Failed> {
        let mut answers = self.ask_all(vcpu, std::iter::once(command.to_owned()))?;
        Ok(answers.pop().ok_or("no answer")?)
    }

    /// The answers to many commands, in order.
    pub(crate) fn ask_all(
        &mut self,
        vcpu: usize,
        commands: impl IntoIterator<Item = String>,
    ) -> Result<Vec<String>, Failed> {
        let mut commands: VecDeque<String> = commands.into_iter().collect();
        let mut answers = Vec::with_capacity(commands.len());
        while !commands.is_empty() {
            let some: Vec<String> = commands.drain(..UNDER_WAY.min(commands.len())).collect();
            let under_way = some.len();
            for command_line in some {
                self.monitor.write_command(&qmp::human_monitor_command {
                    command_line,
                    cpu_index: Some(vcpu as i64),
                })?;
            }
            for _ in 0..under_way {
                answers.push(self.monitor.read_response::<qmp::human_monitor_command>()?);
            }
        }
        // QEMU reports events whether or not anybody wants them.
        self.monitor.events().for_each(drop);
        Ok(answers)
    }

    /// The memory as it is now: good until the guest runs again.
    pub(crate) fn ram(&self) -> Result<FileRam<'_>, Failed> {
        let bytes = self.ram.metadata()?.len();
        Ok(FileRam { file: &self.ram, bytes, pages: RefCell::default() })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // What does not listen is killed.
        let _ = self.monitor.write_command(&qmp::quit {});
        let deadline = Instant::now() + END;
        while matches!(self.process.0.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Process {
    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

fn until_ready(heard: &Receiver<String>) -> Result<Vec<String>, Failed> {
    let deadline = Instant::now() + BOOT;
    let mut said = Vec::new();
    loop {
        match heard.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) if line == "ready" => return Ok(said),
            Ok(line) if line.starts_with("failed: ") => return Err(format!("in the guest: {line}").into()),
            Ok(line) => said.push(line),
            Err(error) => {
                return Err(format!("the guest is not ready ({error}); it said:\n{}", said.join("\n")).into());
            }
        }
    }
}

/// The memory of a paused guest, all of it below the hole for devices: an offset in the file is a GPA.
pub(crate) struct FileRam<'a> {
    file: &'a File,
    bytes: u64,
    /// Pages that were read, by number: nothing changes while the guest is paused.
    pages: RefCell<Vec<Option<Box<[u8; PAGE]>>>>,
}

const PAGE: usize = 4096;

impl FileRam<'_> {
    /// The 64-bit word at `gpa`, or `None` where no memory is.
    pub(crate) fn word(&self, gpa: u64) -> Option<u64> {
        let (number, offset) = (usize::try_from(gpa).ok()? / PAGE, gpa as usize % PAGE);
        if gpa >= self.bytes {
            return None;
        }
        let mut pages = self.pages.borrow_mut();
        if number >= pages.len() {
            pages.resize_with(number + 1, || None);
        }
        let page = pages[number].get_or_insert_with(|| {
            let mut page = Box::new([0; PAGE]);
            self.file
                .read_exact_at(&mut *page, (number * PAGE) as u64)
                .expect("the guest's memory can be read");
            page
        });
        let bytes = page.get(offset..offset + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }
}

impl Memory for FileRam<'_> {
    fn load_u64(&self, gpa: Gpa) -> Option<u64> {
        self.word(gpa.0)
    }

    fn compare_exchange_u64(&self, _: Gpa, _: u64, _: u64) -> Result<(), ExchangeError> {
        Err(ExchangeError::ReadOnly)
    }

    fn backing(&self, gpa: Gpa) -> Backing {
        if gpa.0 < self.bytes { Backing::Ram } else { Backing::None }
    }
}
