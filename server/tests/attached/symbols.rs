//! Judge `attached-symbols`: the daemon finds the kernels of guests by their symbols, with KASLR and without. What the guest's
//! own /proc/kallsyms says, QEMU's MMU and the kernel's banner are the truth; the file that the daemon has is that of another
//! boot, in which the kernel was not moved.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fastrand::Rng;
use libtest_mimic::Failed;
use pagewalk_proto::v1;
use tempfile::TempDir;
use tonic::Code;

use crate::announced::{self, Mapping};
use crate::daemon::{Daemon, refusal};
use crate::guest::Guest;
use crate::judge::{Judge, cases};
use crate::monitor;
use crate::spaces::Spaces;
use crate::tasks::{self, Tasks};

/// How often a guest is paused.
const PAUSES: u64 = 4;
/// Furthest from a symbol that the daemon names an address.
const NEAR: u64 = 1 << 20;

/// What a guest's kernel says of itself: addresses by name, and names by address.
struct Kallsyms {
    by_name: BTreeMap<String, Vec<u64>>,
    by_address: BTreeMap<u64, Vec<String>>,
}

impl Kallsyms {
    fn read(text: &str) -> Result<Self, Failed> {
        let (mut by_name, mut by_address) = (BTreeMap::<_, Vec<_>>::new(), BTreeMap::<_, Vec<_>>::new());
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [address, _, name, ..] = words[..] else { return Err(format!("a line {line:?}").into()) };
            let address = u64::from_str_radix(address, 16)?;
            by_name.entry(name.to_owned()).or_default().push(address);
            by_address.entry(address).or_default().push(name.to_owned());
        }
        Ok(Self { by_name, by_address })
    }

    fn of(&self, name: &str) -> u64 {
        self.by_name[name][0]
    }
}

/// A guest that runs, and what it says of its symbols.
pub(crate) struct Booted {
    guest: Guest,
    pub(crate) qmp: PathBuf,
    mappings: Vec<Mapping>,
    pub(crate) tasks: Tasks,
    pub(crate) text: String,
    theirs: Kallsyms,
    _folder: TempDir,
}

pub(crate) fn boot(script: &Path, name: &str, append: &str) -> Result<Booted, Failed> {
    let folder = tempfile::tempdir()?;
    let qmp = folder.path().join("qmp");
    let variables = [("PAGEWALK_BED_QMP", qmp.as_os_str()), ("PAGEWALK_BED_APPEND", OsStr::new(append))];
    let (mut guest, said) = Guest::boot_with(script, name, &variables)?;
    let (_, mappings) = announced::read(&said)?;
    let tasks = Tasks::announced(&said)?;
    let announced = said.iter().find_map(|line| line.strip_prefix("kallsyms "));
    let (address, bytes) = announced.and_then(|it| it.split_once(' ')).ok_or("no kallsyms")?;
    let saved = folder.path().join("kallsyms");
    // Every worker has it, and no other program runs: but a vCPU may be idle.
    for attempt in 0.. {
        guest.pause()?;
        guest.ask(0, &format!("memsave 0x{address} 0x{bytes} \"{}\"", saved.display()))?;
        if std::fs::metadata(&saved).is_ok_and(|file| file.len() > 0) {
            break;
        }
        if attempt == 100 {
            return Err("no worker was met".into());
        }
        guest.run_for(Duration::from_millis(3))?;
    }
    let text = String::from_utf8(std::fs::read(&saved)?)?;
    let theirs = Kallsyms::read(&text)?;
    // Runs on; the daemon pauses it.
    guest.run_for(Duration::ZERO)?;
    Ok(Booted { guest, qmp, mappings, tasks, text, theirs, _folder: folder })
}

pub(crate) fn run(script: &Path) -> Result<(), Failed> {
    let mut spaces_judge = Judge::new("attached-spaces")?;
    let mut tasks_judge = Judge::new("attached-tasks-4-level")?;
    let mut judge = Judge::new("attached-symbols")?;
    let mut rng = Rng::with_seed(judge.seed());
    let folder = tempfile::tempdir()?;
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).map(|()| path)
    };
    let linked = boot(script, "4-level", "nokaslr -- kallsyms")?;
    let file = write("System.map", &linked.text)?;
    let (linked_text, in_file) = (linked.text.clone(), Kallsyms::read(&linked.text)?);
    let before =
        judge_guest(linked, &file, &in_file, &mut rng, &mut judge, [&mut spaces_judge, &mut tasks_judge])?;
    assert_eq!(before, 0, "the slide without KASLR");
    // The same kernel, moved.
    let moved = boot(script, "4-level", "-- kallsyms")?;
    refusals(&moved, &linked_text, &write)?;
    let slide =
        judge_guest(moved, &file, &in_file, &mut rng, &mut judge, [&mut spaces_judge, &mut tasks_judge])?;
    judge.count_if("a slide that is not 0", slide != 0);
    let outcomes = [
        judge.finish(&[
            ("banner", None, 250),
            ("symbol, mapped", None, 10_000),
            ("address, named", None, 20_000),
            ("entry, named", None, 1_000),
        ]),
        spaces_judge.finish(&[
            ("mapped in a space that is not active", None, 2_000),
            ("not mapped in a space that is not active", None, 2_000),
            ("two halves", None, 250),
        ]),
        tasks::finish(tasks_judge),
    ];
    outcomes.into_iter().collect()
}

/// Compares, and answers the slide.
fn judge_guest(
    booted: Booted,
    file: &Path,
    in_file: &Kallsyms,
    rng: &mut Rng,
    judge: &mut Judge,
    [spaces_judge, tasks_judge]: [&mut Judge; 2],
) -> Result<u64, Failed> {
    let Booted { mut guest, qmp, mappings, tasks, theirs, .. } = booted;
    let daemon = Daemon::start()?;
    let machine = daemon.attach(&format!("vm=qemu:qmp={},symbols={}", qmp.display(), file.display()))?;
    let symbols = machine.symbols.ok_or("no symbols")?;
    assert_eq!(symbols.placement(), v1::SymbolPlacement::Found, "{symbols:?}");
    let slide = theirs.of("_text").wrapping_sub(in_file.of("_text"));
    println!("{} symbols, slide {slide:#x}: {}", symbols.count, symbols.reason);
    judge.case();
    if symbols.slide != Some(slide) {
        judge.disagree(|| format!("the slide is {slide:#x}, the daemon says {:x?}", symbols.slide));
    }
    let image = theirs.of("_text")..theirs.of("_end");
    let known: Vec<(&String, u64)> = theirs
        .by_name
        .iter()
        .filter(|(name, addresses)| {
            addresses.len() == 1 && in_file.by_name.get(*name).is_some_and(|a| a.len() == 1)
        })
        .map(|(name, addresses)| (name, addresses[0]))
        .filter(|(_, address)| image.contains(address))
        .collect();
    let mut spaces = Spaces::new(rng, &mappings);
    for pause in 0..PAUSES {
        daemon.pause("vm")?;
        spaces.judge(&daemon, &mut guest, spaces_judge)?;
        tasks.judge(&daemon, tasks_judge)?;
        let cr3_of = |vcpu| -> Result<u64, Failed> {
            Ok(daemon.registers("vm", vcpu)?.registers.and_then(|it| it.cr3).ok_or("no CR3")?)
        };
        let cr3s = [cr3_of(0)?, cr3_of(1)?];
        // Rather one that sees the kernel: user mode does not under page-table isolation.
        let turn = (pause % 2) as usize;
        let vcpu = cr3s.iter().position(|cr3| cr3 & 0x1000 == 0).unwrap_or(turn);
        let cr3 = cr3s[vcpu];
        // Of a user's address space under page-table isolation, the kernel's.
        let kernel = cr3 & !0x1000;

        judge.case();
        judge.count("banner", 0);
        let banner = daemon.read_text("vm", vcpu, "linux_banner", kernel)?;
        if !banner.starts_with(b"Linux version 6.") {
            judge.disagree(|| format!("linux_banner holds {:?}", String::from_utf8_lossy(&banner)));
        }

        // Those that could be taken for numbers among them.
        let odd = known.iter().filter(|(name, _)| name.chars().all(|c| c.is_ascii_hexdigit() || c == '_'));
        let any = (0..cases(1000)?.div_ceil(PAUSES)).filter_map(|_| rng.choice(&known));
        let asked: Vec<(&String, u64)> = odd.chain(any).copied().collect();
        let answers =
            guest.ask_all(vcpu, asked.iter().map(|(_, address)| format!("gva2gpa {address:#x}")))?;
        for ((name, address), answer) in asked.into_iter().zip(answers) {
            let qemu = monitor::gpa(&answer)?;
            let ours = daemon.translate_text("vm", vcpu, name, None)?;
            judge.case();
            judge.count(if qemu.is_some() { "symbol, mapped" } else { "symbol, not mapped" }, 0);
            let gpa = page(&ours).map(|page| page.gpa);
            let named = ours
                .symbol
                .as_ref()
                .is_some_and(|near| near.offset == 0 && theirs.by_address[&address].contains(&near.name));
            if (ours.address, gpa, named) != (address, qemu, true) {
                judge.disagree(|| format!("{name} is {address:#x}, {qemu:x?}: {ours:x?}"));
            }
        }

        for _ in 0..cases(1000)?.div_ceil(2 * PAUSES) {
            let address = rng.u64(image.clone());
            let Some((start, names)) = theirs.by_address.range(..=address).next_back() else { continue };
            let ours = daemon.translate_text("vm", vcpu, &format!("{address:#x}"), Some(kernel))?;
            judge.case();
            let offset = address - start;
            judge.count(if offset < NEAR { "address, named" } else { "address, too far from a symbol" }, 0);
            let named = ours.symbol.as_ref().map(|near| (names.contains(&near.name), near.offset));
            if named != (offset < NEAR).then_some((true, offset)) {
                judge.disagree(|| format!("{address:#x} is {names:?}+{offset:#x}: {:?}", ours.symbol));
            }
            // The kernel's own tables have names: entries of the top one of its own address space do.
            for step in &ours.steps {
                let Some(near) = &step.symbol else { continue };
                judge.case();
                judge.count("entry, named", 0);
                let at = theirs.of(&near.name) + near.offset;
                let answer = guest.ask(vcpu, &format!("gva2gpa {at:#x}"))?;
                // A user's address space has no kernel's data.
                if monitor::gpa(&answer)?.is_some_and(|gpa| gpa != step.entry_gpa) {
                    judge.disagree(|| format!("{near:?} is at {answer}, the entry at {:#x}", step.entry_gpa));
                }
            }
        }
        daemon.resume("vm")?;
        std::thread::sleep(Duration::from_millis(rng.u64(5..30)));
    }
    Ok(slide)
}

fn page(answer: &v1::TranslateResponse) -> Option<&v1::Translation> {
    match &answer.outcome {
        Some(v1::translate_response::Outcome::Translation(page)) => Some(page),
        _ => None,
    }
}

/// What is refused, and how.
fn refusals(
    booted: &Booted,
    linked: &str,
    write: &dyn Fn(&str, &str) -> std::io::Result<PathBuf>,
) -> Result<(), Failed> {
    let daemon = Daemon::start()?;
    let attach = |file: &Path| {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            match daemon.attach(&format!("vm=qemu:qmp={},symbols={}", booted.qmp.display(), file.display())) {
                // The socket is free once the last call has let go.
                Err(_) if Instant::now() < end => {}
                answer => return answer,
            }
        }
    };
    let line = linked.lines().count() + 1;
    let broken = write("broken", &format!("{linked}nonsense\n"))?;
    let refused = daemon.attach(&format!("vm=demo:plain,symbols={}", broken.display())).map(drop);
    assert_eq!(refusal(refused, &format!("line {line}: `nonsense`")).0, Code::FailedPrecondition);

    // Another kernel's symbols mean nothing here, and are not guessed at: this one has its banner a byte further on.
    let banner = linked.lines().find(|line| line.ends_with(" linux_banner")).ok_or("no linux_banner")?;
    let (address, rest) = banner.split_once(' ').ok_or("no line of a symbol")?;
    let beside = format!("{:016x} {rest}", u64::from_str_radix(address, 16)? + 1);
    let machine = attach(&write("beside", &linked.replace(banner, &beside))?)?;
    assert_eq!(machine.symbols.ok_or("no symbols")?.placement(), v1::SymbolPlacement::NotFound);
    let refused = daemon.translate_text("vm", 0, "linux_banner", None);
    assert_eq!(refusal(refused, "another one"), (Code::FailedPrecondition, "PRECONDITION".to_owned()));
    assert!(
        daemon.translate_text("vm", 0, address_of(&booted.theirs, "_text").as_str(), None)?.symbol.is_none()
    );
    daemon.detach("vm")?;

    attach(&write("own", &booted.text)?)?;
    let invalid = |text: &str, said: &str| {
        let refused = daemon.translate_text("vm", 0, text, None);
        assert_eq!(refusal(refused, said), (Code::InvalidArgument, "INVALID_FIELD".to_owned()));
    };
    invalid("linux_baner", "close to it are `linux_banner`");
    invalid("linux_banner+nothing", "neither a number");
    invalid("linux_banner+0xffffffffffff", "beyond 64 bits");
    invalid("fixed_percpu_data", "per-CPU");
    let (name, addresses) =
        booted.theirs.by_name.iter().find(|(_, addresses)| addresses.len() > 5).ok_or("no such name")?;
    invalid(name, &format!("{} addresses, {:#x}", addresses.len(), addresses.iter().min().unwrap_or(&0)));
    daemon.detach("vm")?;
    let end = Instant::now() + Duration::from_secs(10);
    while daemon.attach_qemu("free", &booted.qmp).and_then(|_| daemon.detach("free")).is_err() {
        assert!(Instant::now() < end, "the socket stays taken");
    }
    Ok(())
}

fn address_of(theirs: &Kallsyms, name: &str) -> String {
    format!("{:#x}", theirs.of(name))
}
