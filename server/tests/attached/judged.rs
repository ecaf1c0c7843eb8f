//! Judges `attached-*`: answers of the daemon against QEMU's own MMU and monitor, and the guest's own word. What was said at
//! the last pause judges dumps of that moment as well: see `dumped.rs`.

use std::ffi::OsStr;
use std::path::Path;
use std::time::{Duration, Instant};

use fastrand::Rng;
use libtest_mimic::Failed;
use pagewalk::ControlRegisters;
use pagewalk_proto::v1;

use crate::announced::{self, IDENTITY, Mapping};
use crate::daemon::Daemon;
use crate::dumped;
use crate::guest::Guest;
use crate::judge::{Judge, cases};
use crate::monitor::{self, TlbEntry};

const VCPUS: u32 = 2;
/// How often a guest is paused.
const PAUSES: u64 = 4;
const PAGE: u64 = 4096;
/// Pages whose bytes are compared, at each pause of each vCPU.
const PAGES: usize = 24;
/// For the daemon to attach.
const ATTACH: Duration = Duration::from_secs(1);

pub(crate) fn run(script: &Path, name: &'static str, memory: &str) -> Result<(), Failed> {
    let private = memory == "private";
    let folder = tempfile::tempdir()?;
    let qmp = folder.path().join("qmp");
    let mut translation = Judge::new(match (name, private) {
        ("4-level", _) => "attached-4-level-translation",
        ("5-level", false) => "attached-5-level-translation",
        ("5-level", true) => "attached-5-level-private-translation",
        ("2-level", _) => "attached-2-level-translation",
        _ => "attached-pae-translation",
    })?;
    let mut bytes = Judge::new(match (name, private) {
        ("4-level", _) => "attached-4-level-bytes",
        ("5-level", false) => "attached-5-level-bytes",
        ("5-level", true) => "attached-5-level-private-bytes",
        ("2-level", _) => "attached-2-level-bytes",
        _ => "attached-pae-bytes",
    })?;
    let mut rng = Rng::with_seed(translation.seed());
    let random = cases(20_000)?.div_ceil(u64::from(VCPUS));
    let variables = [
        ("PAGEWALK_BED_QMP", qmp.as_os_str()),
        ("PAGEWALK_BED_MEMORY", OsStr::new(if private { "private" } else { "file" })),
    ];
    let (mut guest, said) = Guest::boot_with(script, name, &variables)?;
    let (cpu, mappings) = announced::read(&said)?;

    let daemon = Daemon::start()?;
    let start = Instant::now();
    let machine = daemon.attach_qemu("vm", &qmp)?;
    let took = start.elapsed();
    println!("attached to {} MiB in {took:?}: {}", machine.memory_bytes >> 20, machine.description);
    assert!(took < ATTACH, "attaching took {took:?}");
    assert_eq!((machine.source.as_str(), machine.vcpus), ("qemu", VCPUS));
    // The program takes 36 bits where CPUID does not tell; without PAE they are 32.
    let width = if name == "2-level" { 32 } else { u32::from(cpu.maxphyaddr) };
    assert_eq!(machine.maxphyaddr, width, "CPUID, as the guest sees it");
    assert!(machine.regions.iter().any(|region| region.read_only), "a ROM");

    for pause in 1..=PAUSES {
        let paused = daemon.pause("vm")?;
        assert_eq!(paused.run_state(), v1::RunState::Paused);
        assert!(daemon.vcpus("vm").iter().all(|vcpu| vcpu.run_state() == v1::RunState::Paused));
        let registers = monitor::registers(&guest.ask(0, "info registers -a")?)?;
        // Most is asked at the pause that dumps are judged by, too.
        let random = if pause == PAUSES { random } else { random.div_ceil(16) };
        let mut said = Vec::new();
        for index in 0..VCPUS {
            let ours = daemon.registers("vm", index)?;
            let (held, provenance) = (ours.registers.unwrap(), ours.provenance.unwrap());
            let control = registers[index as usize].control;
            assert_eq!(
                (held.cr0, held.cr3, held.cr4, held.efer),
                (Some(control.cr0), Some(control.cr3), Some(control.cr4), Some(control.efer))
            );
            assert!(provenance.assumed.iter().any(|a| a.starts_with("PAT=")), "{:?}", provenance.assumed);
            let heard = Said::of(&daemon, &mut guest, &mut rng, index, control, random, folder.path())?;
            judge_leaves(&daemon, index, &heard.leaves, &mut translation)?;
            judge_random(&daemon, index, &heard.random, &mut translation)?;
            judge_bytes(&daemon, index, &heard, &mut bytes)?;
            judge_announced(&daemon, &mut rng, index, &mappings, &mut bytes)?;
            said.push(heard);
        }
        if pause == PAUSES {
            dumped::run(&daemon, &mut guest, name, memory, &said, folder.path())?;
        }
        assert_eq!(daemon.resume("vm")?.run_state(), v1::RunState::Running);
        std::thread::sleep(Duration::from_millis(rng.u64(5..60)));
    }
    let outcomes = [
        translation.finish(&[
            // With page-table isolation, a vCPU in user mode may have but a few of them.
            ("leaf of info tlb", None, 8_000),
            ("random, mapped", None, 10_000),
            ("random, not mapped", None, 10_000),
        ]),
        bytes.finish(&[("page of memsave", None, 1_000), ("word that was announced", None, 1_000)]),
    ];
    outcomes.into_iter().collect()
}

/// What QEMU said of a vCPU while the guest was paused.
pub(crate) struct Said {
    pub(crate) control: ControlRegisters,
    pub(crate) leaves: Vec<TlbEntry>,
    /// Addresses, and what `gva2gpa` said of them.
    pub(crate) random: Vec<(u64, Option<u64>)>,
    /// Pages of memory, and what `memsave` made of them.
    pub(crate) pages: Vec<(TlbEntry, Vec<u8>)>,
    /// Pages that were to be saved and are no memory.
    devices: usize,
}

impl Said {
    fn of(
        daemon: &Daemon,
        guest: &mut Guest,
        rng: &mut Rng,
        index: u32,
        control: ControlRegisters,
        random: u64,
        folder: &Path,
    ) -> Result<Self, Failed> {
        let vcpu = index as usize;
        let leaves = monitor::tlb(&guest.ask(vcpu, "info tlb")?)?;
        let addresses = addresses(rng, &leaves, random);
        let answers = guest.ask_all(vcpu, addresses.iter().map(|gva| format!("gva2gpa {gva:#x}")))?;
        let random = addresses
            .into_iter()
            .zip(answers)
            .map(|(gva, answer)| Ok((gva, monitor::gpa(&answer)?)))
            .collect::<Result<_, String>>()?;
        let regions = daemon.machine("vm").regions;
        let saved = folder.join("saved");
        let (mut pages, mut devices) = (Vec::new(), 0);
        for _ in 0..PAGES {
            let Some(leaf) = rng.choice(&leaves) else { break };
            if !regions.iter().any(|r| (r.start..r.start + r.size).contains(&leaf.gpa)) {
                devices += 1;
                continue;
            }
            let command = format!("memsave {:#x} {PAGE} \"{}\"", leaf.gva, saved.display());
            let said = guest.ask(vcpu, &command)?;
            if !said.trim().is_empty() {
                return Err(format!("memsave says {said:?}").into());
            }
            pages.push((*leaf, std::fs::read(&saved)?));
        }
        Ok(Self { control, leaves, random, pages, devices })
    }
}

/// Mapped addresses, their neighbours, and all others.
fn addresses(rng: &mut Rng, leaves: &[TlbEntry], number: u64) -> Vec<u64> {
    let wide = leaves.iter().any(|leaf| leaf.gva >> 32 != 0);
    let address = |_| {
        let near = rng.choice(leaves).map_or(0, |leaf| leaf.gva);
        let gva = match rng.u32(0..4) {
            0 => near.wrapping_add(rng.u64(0..PAGE)),
            1 => near.wrapping_add(rng.u64(0..1 << 22)),
            2 => near ^ 1 << rng.u32(12..if wide { 57 } else { 32 }),
            _ => rng.u64(..) >> rng.u32(0..40),
        };
        if wide { gva } else { gva & 0xffff_ffff }
    };
    (0..number).map(address).collect()
}

/// The GPA in a word of `BatchTranslate`.
pub(crate) fn gpa(word: u64, gva: u64) -> Option<u64> {
    (word & 1 != 0).then_some(word & 0x000f_ffff_ffff_f000 | gva & 0xfff)
}

fn judge_leaves(daemon: &Daemon, index: u32, leaves: &[TlbEntry], judge: &mut Judge) -> Result<(), Failed> {
    let addresses: Vec<u64> = leaves.iter().map(|leaf| leaf.gva).collect();
    let words = daemon.words("vm", index, &addresses)?;
    assert_eq!(words.len(), leaves.len());
    for (leaf, word) in leaves.iter().zip(words) {
        judge.case();
        judge.count("leaf of info tlb", 0);
        if gpa(word, leaf.gva) != Some(leaf.gpa) {
            judge.disagree(|| format!("vCPU {index}: {leaf:x?}, the daemon says {word:#x}"));
        }
    }
    Ok(())
}

fn judge_random(
    daemon: &Daemon,
    index: u32,
    random: &[(u64, Option<u64>)],
    judge: &mut Judge,
) -> Result<(), Failed> {
    let addresses: Vec<u64> = random.iter().map(|(gva, _)| *gva).collect();
    let words = daemon.words("vm", index, &addresses)?;
    for (&(gva, qemu), word) in random.iter().zip(words) {
        judge.case();
        judge.count(if qemu.is_some() { "random, mapped" } else { "random, not mapped" }, 0);
        if gpa(word, gva) != qemu {
            judge.disagree(|| format!("vCPU {index}: {gva:#x}: QEMU {qemu:x?}, the daemon {word:#x}"));
        }
    }
    Ok(())
}

/// Pages read by GVA and by GPA, against what QEMU saved of them.
fn judge_bytes(daemon: &Daemon, index: u32, said: &Said, judge: &mut Judge) -> Result<(), Failed> {
    for _ in 0..said.devices {
        judge.count("page of a device, not compared", 0);
    }
    for (leaf, theirs) in &said.pages {
        judge.case();
        judge.count("page of memsave", 0);
        let by_gva = daemon.read("vm", index, leaf.gva, PAGE)?;
        let by_gpa = daemon.read_physical("vm", leaf.gpa, PAGE)?;
        if by_gva.data != *theirs || by_gpa != *theirs || by_gva.stop.is_some() {
            judge.disagree(|| format!("bytes of {leaf:x?} differ: {:?}", by_gva.stop));
        }
    }
    Ok(())
}

/// What the worker that a vCPU was running announced.
fn judge_announced(
    daemon: &Daemon,
    rng: &mut Rng,
    index: u32,
    mappings: &[Mapping],
    judge: &mut Judge,
) -> Result<(), Failed> {
    let word = |bytes: &[u8]| bytes.try_into().ok().map(u64::from_le_bytes);
    let identity = daemon.read("vm", index, IDENTITY, 8)?;
    let Some(worker) = word(&identity.data).and_then(announced::worker) else {
        judge.count("a root of no worker", 0);
        return Ok(());
    };
    for mapping in mappings.iter().filter(|mapping| mapping.worker == worker) {
        for _ in 0..8 {
            judge.case();
            let gva = mapping.start + rng.u64(0..mapping.bytes / mapping.step) * mapping.step;
            let read = daemon.read("vm", index, gva, 8)?;
            let agreed = if mapping.rights.is_some() {
                judge.count("word that was announced", 0);
                word(&read.data) == Some(mapping.word(gva))
            } else {
                judge.count("absent, as announced", 0);
                // The tables of a page that was forbidden still hold it: whoever is exempt may see it.
                read.data.is_empty()
                    && read.stop.is_some_and(|stop| stop.address == gva && stop.fault.is_some())
            };
            if !agreed {
                judge.disagree(|| format!("vCPU {index}: {mapping:x?} at {gva:#x}: {:x?}", read.data));
            }
        }
    }
    Ok(())
}
