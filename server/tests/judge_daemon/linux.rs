//! Judge `nested-amd-daemon-linux`: Debian's kernel, booted by the daemon on vCPUs that really run.
//!
//! The guest's program is that of the bed `qemu-linux`: it says on the serial line what it mapped where, and what it wrote
//! there. While the guest is paused, its memory is copied into a VM of the judge's own, which is given the vCPU's registers and
//! asked by `KVM_TRANSLATE`; single steps stay under that eye. While it runs, bytes read by GVA are those that were announced,
//! and the kernel's own pages are where they were. What is typed reaches the guest, whose terminal echoes it.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use fastrand::Rng;
use kvm_bindings::kvm_regs;
use libtest_mimic::Failed;
use pagewalk_proto::v1;
use pagewalk_proto::v1::memory_service_client::MemoryServiceClient;
use pagewalk_proto::v1::translate_response::Outcome;
use pagewalk_proto::v1::translation_service_client::TranslationServiceClient;
use pagewalk_proto::v1::vcpu_service_client::VcpuServiceClient;
use tonic::Code;

use crate::announced::{self, IDENTITY, Mapping};
use crate::bed::boot::script;
use crate::bed::judge::{Judge, cases};
use crate::bed::soup::twin;
use crate::bed::{CR4_LA57, Machine, Maker, PAGE, RFLAGS_AC, RFLAGS_FIXED, Vcpu, long_mode, when};
use crate::daemon::Daemon;

const MEMORY: u64 = 192 << 20;
const VCPUS: u32 = 2;
/// ACPI's pointer stays where the daemon put it: no guest uses that page otherwise.
pub(crate) const MARK_AT: u64 = 0xe_0000;
pub(crate) const MARK: &[u8] = b"RSD PTR ";
const CONSOLE: &str = "/tmp/console";
const COMMAND_LINE: &str =
    "console=ttyS0 quiet loglevel=3 nokaslr no_timer_check tsc=reliable hugepages=8 panic=-1";
const BOOT: Duration = Duration::from_secs(120);
/// Two busy vCPUs share one CPU with whoever asks.
const PATIENCE: Duration = Duration::from_secs(30);
const ECHO: Duration = Duration::from_secs(20);
const PAUSES: u64 = 3;
const STEPS: u32 = 12;
/// A running vCPU publishes every tenth of a second, on a CPU that others want too.
const AGE: Duration = Duration::from_secs(3);

/// Has the kernel and the initramfs made that the judge finds in the bed.
pub(crate) fn files(folder: &Path) -> Result<Vec<PathBuf>, Failed> {
    let made = Command::new(script("qemu-linux")).arg("files").arg(folder).output()?;
    if !made.status.success() {
        return Err(String::from_utf8_lossy(&made.stderr).trim().into());
    }
    Ok(vec![folder.join("vmlinuz"), folder.join("initramfs")])
}

pub(crate) fn judge(name: &'static str) -> Result<(), Failed> {
    let started = Instant::now();
    // Two commas are one in a value.
    let machine = format!(
        "kvm:kernel=/vmlinuz,initrd=/initramfs,cmdline={},mem={}M,cpus={VCPUS},console={CONSOLE}",
        COMMAND_LINE.replace(',', ",,"),
        MEMORY >> 20
    );
    let daemon = Daemon::boot(&machine, MEMORY)?;
    let mut console = Console::connect()?;
    let said = console.until(BOOT, |line| line == "ready").map_err(|problem| explain(&daemon, &problem))?;
    println!("Linux is up {:.1} s after its vCPUs", started.elapsed().as_secs_f64());
    let (cpu, mappings) = announced::read(&said)?;
    console.write.write_all(b"typed on the console\r")?;
    console.until(ECHO, |line| line.contains("typed on the console"))?;

    let machine = Machine::new(MEMORY)?;
    let vcpu = machine.vcpu(0, Maker::Amd, machine.maxphyaddr()?)?;
    if cpu.maxphyaddr != vcpu.maxphyaddr {
        return Err(
            format!("the guest sees {} physical bits, this VM {}", cpu.maxphyaddr, vcpu.maxphyaddr).into()
        );
    }
    let mut judge = Judge::new(name)?;
    let mut rng = Rng::with_seed(judge.seed());
    let (mut roots, mut stable) = (Vec::new(), Vec::new());
    let wanted = cases(1_200)?.div_ceil(PAUSES * 2);
    for _ in 0..PAUSES {
        for index in 0..VCPUS {
            pause(&daemon, index)?;
        }
        let mut guest =
            Guest { daemon: &daemon, machine: &machine, vcpu: &vcpu, mappings: &mappings, judge: &mut judge };
        guest.copy_memory()?;
        for index in 0..VCPUS {
            let registers = registers(&daemon, index)?;
            guest.hold(&registers)?;
            guest.ask_paused(&mut rng, index, wanted / u64::from(VCPUS), &mut stable)?;
            if let Some(worker) = guest.worker()? {
                roots.push((worker, registers.cr3.unwrap_or_default()));
            }
        }
        guest.step(0)?;
        for index in 0..VCPUS {
            resume(&daemon, index)?;
        }
        guest.ask_running(&mut rng, wanted, &roots, &stable)?;
    }
    judge.finish(&[
        ("paused: kernel, mapped", None, 10_000),
        ("paused: kernel, not mapped", None, 5_000),
        ("paused: user, mapped", None, 4_000),
        ("paused: user, not mapped", None, 5_000),
        ("running: kernel", None, 20_000),
        ("running: a word that was announced", None, 20_000),
        ("running: absent, as announced", None, 2_000),
        ("stepped", None, 200),
    ])
}

/// The console's socket, line by line.
struct Console {
    read: UnixStream,
    write: UnixStream,
    unread: Vec<u8>,
}

impl Console {
    fn connect() -> Result<Self, Failed> {
        let write = UnixStream::connect(CONSOLE)?;
        let read = write.try_clone()?;
        read.set_read_timeout(Some(Duration::from_secs(1)))?;
        Ok(Self { read, write, unread: Vec::new() })
    }

    /// All lines up to the one that is waited for.
    fn until(&mut self, patience: Duration, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>, String> {
        let started = Instant::now();
        let (mut lines, mut bytes) = (Vec::new(), [0; 4096]);
        loop {
            while let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                lines.push(String::from_utf8_lossy(&line).trim().to_owned());
                if lines.last().is_some_and(|line| wanted(line)) {
                    return Ok(lines);
                }
            }
            let said = || format!("the guest said:\n{}", lines.join("\n"));
            match self.read.read(&mut bytes) {
                Ok(0) => return Err(format!("the console has closed; {}", said())),
                Ok(size) => self.unread.extend(&bytes[..size]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error.to_string()),
            }
            if started.elapsed() > patience {
                return Err(format!("not after {patience:?}; {}", said()));
            }
        }
    }
}

/// Adds to a problem what the vCPUs do.
fn explain(daemon: &Daemon, problem: &str) -> Failed {
    let request = v1::ListVcpusRequest::default();
    let mut client = VcpuServiceClient::new(daemon.channel.clone());
    let vcpus = daemon.block_on(client.list_vcpus(request)).map(|answer| answer.into_inner().vcpus);
    format!("{problem}\n{vcpus:?}").into()
}

/// The guest as it was paused, in the judge's VM.
struct Guest<'a> {
    daemon: &'a Daemon,
    machine: &'a Machine,
    vcpu: &'a Vcpu,
    mappings: &'a [Mapping],
    judge: &'a mut Judge,
}

impl Guest<'_> {
    fn copy_memory(&self) -> Result<(), Failed> {
        const PIECE: usize = 1 << 20;
        let mut bytes = vec![0; PIECE];
        let words = self.machine.ram.words();
        for (number, words) in words.chunks(PIECE / 8).enumerate() {
            self.daemon.read((number * PIECE) as u64, &mut bytes)?;
            for (word, bytes) in words.iter().zip(bytes.chunks_exact(8)) {
                let value = u64::from_le_bytes(bytes.try_into().unwrap());
                // What was never touched costs no memory.
                if word.load(std::sync::atomic::Ordering::Relaxed) != value {
                    word.store(value, std::sync::atomic::Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }

    /// Has the judge's vCPU hold the guest's registers.
    fn hold(&self, registers: &v1::Registers) -> Result<(), Failed> {
        let (Some(cr0), Some(cr3), Some(cr4), Some(efer)) =
            (registers.cr0, registers.cr3, registers.cr4, registers.efer)
        else {
            return Err(format!("control registers are missing: {registers:x?}").into());
        };
        let mut sregs = self.vcpu.reset;
        long_mode(&mut sregs, cr3);
        (sregs.cr0, sregs.cr4, sregs.efer) = (cr0, cr4, efer);
        self.vcpu.fd.set_sregs(&sregs)?;
        let held = self.vcpu.fd.get_sregs()?;
        if (held.cr0, held.cr3, held.cr4, held.efer) != (cr0, cr3, cr4, efer) {
            return Err(format!("KVM did not keep the registers {sregs:x?}: {held:x?}").into());
        }
        Ok(())
    }

    /// What the kernel says of a read by a supervisor.
    fn truth(&self, gva: u64, ac: bool, pkru: u32) -> Result<Option<u64>, Failed> {
        let rflags = RFLAGS_FIXED | when(ac, RFLAGS_AC);
        self.vcpu.fd.set_regs(&kvm_regs { rflags, ..kvm_regs::default() })?;
        if self.machine.has_keys() {
            self.machine.set_pkru(&self.vcpu.fd, pkru)?;
        }
        let translated = self.vcpu.fd.translate_gva(gva)?;
        Ok((translated.valid != 0).then_some(translated.physical_address))
    }

    fn levels(&self) -> Result<u32, Failed> {
        Ok(if self.vcpu.fd.get_sregs()?.cr4 & CR4_LA57 != 0 { 5 } else { 4 })
    }

    /// The worker that the vCPU was running.
    fn worker(&self) -> Result<Option<u64>, Failed> {
        let gpa = self.truth(IDENTITY, true, 0)?.filter(|gpa| self.machine.ram.holds(*gpa));
        Ok(gpa.and_then(|gpa| announced::worker(self.machine.ram.read(gpa))))
    }

    /// Asks about kernel and user addresses. Pages of the kernel that stay where they are go to `stable`.
    fn ask_paused(
        &mut self,
        rng: &mut Rng,
        index: u32,
        number: u64,
        stable: &mut Vec<(u64, u64)>,
    ) -> Result<(), Failed> {
        let levels = self.levels()?;
        for _ in 0..number {
            let (gva, stays) = address(rng, levels, self.mappings);
            let (ac, pkru) = (rng.u32(0..4) != 0, if rng.u32(0..4) == 0 { rng.u32(..) } else { 0 });
            let truth = self.truth(gva, ac, pkru)?;
            let access = v1::Access {
                kind: v1::AccessKind::Read.into(),
                privilege: v1::Privilege::Supervisor.into(),
                ac: Some(ac),
                pkru: Some(pkru),
                ..Default::default()
            };
            let ours = self.translate(index, gva, access, v1::Freshness::Latest)?;
            self.judge.case();
            let kernel = gva >> 63 != 0;
            self.judge.count(
                match (kernel, truth.is_some()) {
                    (true, true) => "paused: kernel, mapped",
                    (true, false) => "paused: kernel, not mapped",
                    (false, true) => "paused: user, mapped",
                    (false, false) => "paused: user, not mapped",
                },
                0,
            );
            if ours != truth {
                self.judge
                    .disagree(|| format!("vCPU {index}, {gva:#x}: daemon {ours:x?}, kernel {truth:x?}"));
            }
            if let (true, Some(gpa)) = (stays, truth) {
                stable.push((gva, gpa));
            }
        }
        Ok(())
    }

    /// Executes single instructions; where the vCPU then is, the kernel translates as we do.
    fn step(&mut self, index: u32) -> Result<(), Failed> {
        for _ in 0..STEPS {
            let request = v1::StepVcpuRequest { vcpu: which(index) };
            let mut client = VcpuServiceClient::new(self.daemon.channel.clone());
            let answer = match self.daemon.block_on(client.step_vcpu(patient(request))) {
                Ok(answer) => answer.into_inner(),
                Err(status)
                    if status.code() == Code::FailedPrecondition && status.message().contains("HLT") =>
                {
                    self.judge.count("asleep", 0);
                    continue;
                }
                Err(status) => return Err(status.into()),
            };
            self.judge.case();
            self.judge.count("stepped", 0);
            if answer.vcpu.unwrap_or_default().run_state() != v1::RunState::Paused {
                self.judge.disagree(|| "a vCPU that was stepped is not paused".to_owned());
            }
            let registers = answer.registers.unwrap_or_default();
            self.hold(&registers)?;
            let rip = registers.rip.unwrap_or_default();
            let truth = self.truth(rip, true, 0)?;
            let access = v1::Access {
                kind: v1::AccessKind::Fetch.into(),
                privilege: v1::Privilege::AsCpl.into(),
                ..Default::default()
            };
            let ours = self.translate(index, rip, access, v1::Freshness::Latest)?;
            if ours.is_none() || ours != truth {
                self.judge.disagree(|| {
                    format!("vCPU {index} at RIP {rip:#x}: daemon {ours:x?}, kernel {truth:x?}")
                });
            }
        }
        Ok(())
    }

    /// Asks while the guest runs, about what does not change.
    fn ask_running(
        &mut self,
        rng: &mut Rng,
        number: u64,
        roots: &[(u64, u64)],
        stable: &[(u64, u64)],
    ) -> Result<(), Failed> {
        for _ in 0..number {
            let index = rng.u32(0..VCPUS);
            let freshness = if rng.bool() { v1::Freshness::Latest } else { v1::Freshness::Sync };
            let known: Vec<_> = self
                .mappings
                .iter()
                .flat_map(|mapping| {
                    roots
                        .iter()
                        .filter(|(worker, _)| *worker == mapping.worker)
                        .map(move |(_, root)| (mapping, *root))
                })
                .collect();
            match (rng.choice(stable), rng.choice(known)) {
                (_, Some((mapping, root))) if stable.is_empty() || rng.bool() => {
                    self.read_announced(rng, index, mapping, root, freshness)?;
                }
                (Some(&page), _) => self.read_stable(index, page, freshness)?,
                (None, _) => return Err("nothing that the guest maps stays where it is".into()),
            }
        }
        Ok(())
    }

    /// A page of the kernel's, which is where it was.
    fn read_stable(
        &mut self,
        index: u32,
        (gva, gpa): (u64, u64),
        freshness: v1::Freshness,
    ) -> Result<(), Failed> {
        self.judge.case();
        self.judge.count("running: kernel", 0);
        let access = v1::Access {
            kind: v1::AccessKind::Read.into(),
            privilege: v1::Privilege::Supervisor.into(),
            ..Default::default()
        };
        let ours = self.translate(index, gva, access, freshness)?;
        if ours != Some(gpa) {
            self.judge
                .disagree(|| format!("vCPU {index}, {gva:#x}, running: daemon {ours:x?}, was {gpa:#x}"));
        }
        Ok(())
    }

    /// A word of a worker's memory, whatever the vCPU runs now.
    fn read_announced(
        &mut self,
        rng: &mut Rng,
        index: u32,
        mapping: &Mapping,
        root: u64,
        freshness: v1::Freshness,
    ) -> Result<(), Failed> {
        let gva = mapping.start + rng.u64(0..mapping.bytes / mapping.step) * mapping.step;
        let request = v1::ReadMemoryRequest {
            vcpu: which(index),
            at: Some(v1::read_memory_request::At::Gva(number_of(gva))),
            length: 8,
            freshness: freshness.into(),
            r#override: Some(v1::WalkerOverride { cr3: Some(root), ..Default::default() }),
            ..Default::default()
        };
        let mut client = MemoryServiceClient::new(self.daemon.channel.clone());
        let read = self.daemon.block_on(client.read_memory(patient(request)))?.into_inner();
        self.judge.case();
        let agreed = if mapping.rights.is_some() {
            self.judge.count("running: a word that was announced", 0);
            read.data == mapping.word(gva).to_le_bytes()
        } else {
            self.judge.count("running: absent, as announced", 0);
            read.data.is_empty()
                && read.stop.as_ref().is_some_and(|stop| stop.address == gva && stop.fault.is_some())
        };
        if !agreed {
            self.judge.disagree(|| format!("{mapping:x?} at {gva:#x}, running: {read:x?}"));
        }
        Ok(())
    }

    fn translate(
        &mut self,
        index: u32,
        gva: u64,
        access: v1::Access,
        freshness: v1::Freshness,
    ) -> Result<Option<u64>, Failed> {
        let request = v1::TranslateRequest {
            vcpu: which(index),
            address: Some(number_of(gva)),
            access: Some(access),
            freshness: freshness.into(),
            ..Default::default()
        };
        let mut client = TranslationServiceClient::new(self.daemon.channel.clone());
        let answer = self.daemon.block_on(client.translate(patient(request)))?.into_inner();
        let provenance = answer.provenance.unwrap_or_default();
        let age = provenance.snapshot_age.unwrap_or_default();
        let running = provenance.run_state() == v1::RunState::Running;
        if running && u64::try_from(age.seconds).unwrap_or(u64::MAX) > AGE.as_secs() {
            self.judge.disagree(|| format!("a running vCPU was last seen {age:?} ago"));
        }
        match answer.outcome {
            Some(Outcome::Translation(page)) => Ok(Some(page.gpa)),
            Some(Outcome::Fault(_)) => Ok(None),
            None => Err("an answer without an outcome".into()),
        }
    }
}

/// An address, and whether what it maps to stays the same: in the kernel's text and its map of all memory. Linux,
/// "Complete virtual memory map with 4-level page tables" and its twin for 5 levels, without randomisation.
fn address(rng: &mut Rng, levels: u32, mappings: &[Mapping]) -> (u64, bool) {
    const TEXT: u64 = 0xffff_ffff_8100_0000;
    let (all_memory, allocated, pages) = if levels == 5 {
        (0xff11_0000_0000_0000, 0xffa0_0000_0000_0000, 0xffd4_0000_0000_0000)
    } else {
        (0xffff_8880_0000_0000, 0xffff_c900_0000_0000, 0xffff_ea00_0000_0000)
    };
    let near = rng.choice(mappings).map_or(0, |mapping| mapping.start + rng.u64(0..mapping.bytes));
    match rng.u32(0..10) {
        0 | 1 => (all_memory + rng.u64(0..MEMORY), true),
        2 => (TEXT + rng.u64(0..8 << 20), true),
        3 => (allocated + rng.u64(0..1 << 24), false),
        4 => (pages + rng.u64(0..MEMORY / PAGE * 64), false),
        5 => (twin((all_memory + rng.u64(0..MEMORY)) ^ (1 << rng.u32(12..48)), levels), false),
        6 => (twin(rng.u64(..), levels), false),
        7 => (near ^ 1 << rng.u32(12..47), false),
        _ => (near, false),
    }
}

fn which(vcpu: u32) -> Option<v1::VcpuRef> {
    Some(v1::VcpuRef { machine: String::new(), vcpu })
}

fn number_of(address: u64) -> v1::Address {
    v1::Address { value: Some(v1::address::Value::Number(address)) }
}

fn patient<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(PATIENCE);
    request
}

fn pause(daemon: &Daemon, index: u32) -> Result<(), Failed> {
    let mut client = VcpuServiceClient::new(daemon.channel.clone());
    let paused = daemon
        .block_on(client.pause_vcpu(patient(v1::PauseVcpuRequest { vcpu: which(index) })))?
        .into_inner();
    match paused.vcpu.unwrap_or_default() {
        vcpu if vcpu.run_state() == v1::RunState::Paused => Ok(()),
        vcpu => Err(format!("vCPU {index} is not paused: {vcpu:?}").into()),
    }
}

fn resume(daemon: &Daemon, index: u32) -> Result<(), Failed> {
    let mut client = VcpuServiceClient::new(daemon.channel.clone());
    Ok(daemon
        .block_on(client.resume_vcpu(patient(v1::ResumeVcpuRequest { vcpu: which(index) })))
        .map(drop)?)
}

fn registers(daemon: &Daemon, index: u32) -> Result<v1::Registers, Failed> {
    let request = v1::GetRegistersRequest { vcpu: which(index), freshness: v1::Freshness::Sync.into() };
    let mut client = VcpuServiceClient::new(daemon.channel.clone());
    Ok(daemon.block_on(client.get_registers(patient(request)))?.into_inner().registers.unwrap_or_default())
}
