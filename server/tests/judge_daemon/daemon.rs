//! The daemon in the bed: its process, its answers, and the memory of its machine, which is rewritten as a debugger would.

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader};
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use pagewalk_proto::v1;
use pagewalk_proto::v1::translation_service_client::TranslationServiceClient;
use pagewalk_proto::v1::vcpu_service_client::VcpuServiceClient;
use pagewalk_proto::v1::walker_service_client::WalkerServiceClient;
use tokio::runtime::Runtime;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::guest::{CODE, MARK, MARK_AT, MEMORY};
use crate::linux;

/// Where the bed puts it.
const PROGRAM: &str = "/pagewalkd";
const SOON: Duration = Duration::from_secs(30);

pub(crate) struct Daemon {
    child: Child,
    runtime: Runtime,
    pub(crate) channel: Channel,
    pub(crate) address: String,
    memory: File,
    /// Where GPA 0 lies in the daemon's address space.
    origin: u64,
}

impl Daemon {
    /// Serves a machine with this ELF file, and waits until its vCPU rests.
    pub(crate) fn serve(elf: &Path) -> Result<Daemon, Failed> {
        let machine = format!("kvm:elf={},mem={}K", elf.display(), MEMORY / 1024);
        Daemon::start(&machine, |process, memory| {
            let mark = find(process, memory, MEMORY..=64 << 20, MARK_AT as u64, MARK)?;
            Ok(mark - (CODE + MARK_AT as u64))
        })
    }

    /// Serves a machine that boots Linux, whose memory is this large.
    pub(crate) fn boot(machine: &str, size: u64) -> Result<Daemon, Failed> {
        Daemon::start(machine, |process, memory| {
            Ok(find(process, memory, size..=u64::MAX, linux::MARK_AT & 0xfff, linux::MARK)? - linux::MARK_AT)
        })
    }

    /// Serves a machine. `origin` finds where its memory lies in the daemon's.
    fn start(
        machine: &str,
        origin: impl FnOnce(u32, &File) -> Result<u64, Failed>,
    ) -> Result<Daemon, Failed> {
        let up = Command::new("/bin/busybox").args(["ip", "link", "set", "lo", "up"]).status()?;
        if !up.success() {
            return Err("there is no loopback".into());
        }
        let mut child = Command::new(PROGRAM)
            .args(["serve", "--listen", "127.0.0.1:0", "--machine", machine])
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{PROGRAM}: {error}"))?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line)?;
        let address = line.trim().strip_prefix("listening on ").ok_or(format!("the daemon says {line:?}"))?;
        let address = address.to_owned();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
        let channel = runtime.block_on(endpoint.connect())?;
        let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{}/mem", child.id()))?;
        let origin = origin(child.id(), &memory)?;
        Ok(Daemon { child, runtime, channel, address, memory, origin })
    }

    pub(crate) fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    pub(crate) fn spawn<F>(&self, future: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.runtime.spawn(future)
    }

    pub(crate) fn read(&self, gpa: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        self.memory.read_exact_at(bytes, self.origin + gpa)
    }

    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.memory.write_all_at(bytes, self.origin + gpa)
    }

    pub(crate) fn read_u64(&self, gpa: u64) -> std::io::Result<u64> {
        let mut word = [0; 8];
        self.read(gpa, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    pub(crate) fn translate(&self, request: v1::TranslateRequest) -> Result<v1::TranslateResponse, Status> {
        let mut client = TranslationServiceClient::new(self.channel.clone());
        self.block_on(client.translate(request)).map(tonic::Response::into_inner)
    }

    pub(crate) fn set_nested(
        &self,
        request: v1::SetNestedModeRequest,
    ) -> Result<v1::SetNestedModeResponse, Status> {
        let mut client = WalkerServiceClient::new(self.channel.clone());
        self.block_on(client.set_nested_mode(request)).map(tonic::Response::into_inner)
    }

    pub(crate) fn state(&self) -> Result<v1::GetWalkerStateResponse, Status> {
        let request =
            v1::GetWalkerStateRequest { freshness: v1::Freshness::Sync.into(), ..Default::default() };
        let mut client = WalkerServiceClient::new(self.channel.clone());
        self.block_on(client.get_walker_state(request)).map(tonic::Response::into_inner)
    }

    pub(crate) fn registers(&self) -> Result<v1::Registers, Status> {
        let request = v1::GetRegistersRequest { freshness: v1::Freshness::Sync.into(), ..Default::default() };
        let mut client = VcpuServiceClient::new(self.channel.clone());
        let answer = self.block_on(client.get_registers(request))?.into_inner();
        Ok(answer.registers.unwrap_or_default())
    }

    pub(crate) fn set_registers(&self, registers: v1::Registers) -> Result<(), Status> {
        let request = v1::SetRegistersRequest { registers: Some(registers), ..Default::default() };
        let mut client = VcpuServiceClient::new(self.channel.clone());
        self.block_on(client.set_registers(request)).map(drop)
    }

    pub(crate) fn pause(&self) -> Result<v1::VcpuInfo, Status> {
        let mut client = VcpuServiceClient::new(self.channel.clone());
        let answer = self.block_on(client.pause_vcpu(v1::PauseVcpuRequest::default()))?.into_inner();
        Ok(answer.vcpu.unwrap_or_default())
    }

    pub(crate) fn resume(&self) -> Result<v1::VcpuInfo, Status> {
        let mut client = VcpuServiceClient::new(self.channel.clone());
        let answer = self.block_on(client.resume_vcpu(v1::ResumeVcpuRequest::default()))?.into_inner();
        Ok(answer.vcpu.unwrap_or_default())
    }

    /// Waits until `seen` is true of the registers.
    pub(crate) fn wait_for(&self, what: &str, seen: impl Fn(&v1::Registers) -> bool) -> Result<(), Failed> {
        let started = Instant::now();
        loop {
            let registers = self.registers()?;
            if seen(&registers) {
                return Ok(());
            }
            if started.elapsed() > SOON {
                return Err(format!("{what}: not after {SOON:?}; {registers:x?}").into());
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The address of `mark` in the process's memory, at `offset` of a page of a writable mapping of such a size.
fn find(
    process: u32,
    memory: &File,
    sizes: RangeInclusive<u64>,
    offset: u64,
    mark: &[u8],
) -> Result<u64, Failed> {
    for line in std::fs::read_to_string(format!("/proc/{process}/maps"))?.lines() {
        let Some((range, rest)) = line.split_once(' ') else { continue };
        let Some((start, end)) = range.split_once('-') else { continue };
        let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
        if !rest.starts_with("rw-") || !sizes.contains(&(end - start)) {
            continue;
        }
        let mut there = vec![0; mark.len()];
        for at in (start + offset..end).step_by(4096) {
            if memory.read_exact_at(&mut there, at).is_ok() && there == mark {
                return Ok(at);
            }
        }
    }
    Err("the machine's memory is not found in the daemon's".into())
}
