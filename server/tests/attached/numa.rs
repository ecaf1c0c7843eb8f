//! Memory of several NUMA nodes, each with a backend of its own, and DIMMs that are plugged in while the guest is attached.
//!
//! What has to be there is QEMU's word: `pmemsave` for bytes, `info tlb` for addresses, the backends' files for the DIMMs.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use fastrand::Rng;
use libtest_mimic::Failed;
use pagewalk_proto::v1;
use tonic::Code;

use crate::daemon::{Daemon, refusal};
use crate::guest::Guest;
use crate::judged::gpa;
use crate::monitor;
use crate::trouble::boot;

const SOON: Duration = Duration::from_secs(30);
const PAGE: u64 = 4096;
const NODE: u64 = 512 << 20;
const DIMM: u64 = 128 << 20;
/// Pages whose bytes are compared, in each place.
const PAGES: usize = 64;

pub(crate) fn nodes_and_dimms(script: &Path) -> Result<(), Failed> {
    let (mut guest, qmp, folder) = boot(script, "numa")?;
    let mut rng = Rng::new();
    let daemon = Daemon::start()?;
    let machine = daemon.attach_qemu("vm", &qmp)?;
    println!("{}", machine.description);
    assert!(machine.description.contains("its memory shared"), "{}", machine.description);
    let before = memory(&machine);
    // Less the hole and the ROMs below 1 MiB.
    assert!(before > 2 * NODE - (1 << 20), "{before:#x} bytes");

    daemon.pause("vm")?;
    same_bytes(&daemon, &mut guest, &mut rng, 0x10_0000..NODE, folder.path())?;
    same_bytes(&daemon, &mut guest, &mut rng, NODE..2 * NODE, folder.path())?;
    let in_node = |leaf: &monitor::TlbEntry, node: u64| leaf.gpa / NODE == node;
    for vcpu in 0..2 {
        let leaves = monitor::tlb(&guest.ask(vcpu, "info tlb")?)?;
        assert!(leaves.iter().any(|leaf| in_node(leaf, 0)) && leaves.iter().any(|leaf| in_node(leaf, 1)));
        let addresses: Vec<u64> = leaves.iter().map(|leaf| leaf.gva).collect();
        let words = daemon.words("vm", vcpu as u32, &addresses)?;
        for (leaf, word) in leaves.iter().zip(words) {
            assert_eq!(gpa(word, leaf.gva), Some(leaf.gpa), "{leaf:x?}");
        }
    }

    // Nobody tells of a DIMM while the guest stands still: asking for what is fresh finds it.
    let (file, start) = plug(&mut guest, &mut rng, 0, folder.path())?;
    daemon.registers("vm", 0)?;
    assert_eq!(memory(&daemon.machine("vm")), before + DIMM);
    same_words(&daemon, &file, start)?;
    same_bytes(&daemon, &mut guest, &mut rng, start..start + DIMM, folder.path())?;
    walked(&daemon, &file, start)?;

    // A guest that runs answers to it, and QEMU says so: nobody has to ask.
    daemon.resume("vm")?;
    let (file, start) = plug(&mut guest, &mut rng, 1, folder.path())?;
    let end = Instant::now() + SOON;
    while memory(&daemon.machine("vm")) != before + 2 * DIMM {
        assert!(Instant::now() < end, "the layout does not follow the event");
        std::thread::sleep(Duration::from_millis(5));
    }
    // The guest takes it into use, but its last page not at once.
    let mut theirs = vec![0; PAGE as usize];
    file.read_exact_at(&mut theirs, DIMM - PAGE)?;
    assert_eq!(daemon.read_physical("vm", start + DIMM - PAGE, PAGE)?, theirs);

    by_pid(&daemon, &machine.description, &qmp)
}

/// Attached by the number of QEMU's process, and of another one.
fn by_pid(daemon: &Daemon, description: &str, qmp: &Path) -> Result<(), Failed> {
    let pid = description.split_once("process ").and_then(|(_, rest)| rest.split_once(','));
    let (pid, _) = pid.ok_or("no process is named")?;
    daemon.detach("vm")?;
    let attach = |pid: &str| daemon.attach(&format!("vm=qemu:qmp={},pid={pid}", qmp.display()));
    let own = std::process::id().to_string();
    let end = Instant::now() + SOON;
    // The socket is free once the last call has let go.
    let refused = loop {
        match attach(&own) {
            Err(status) if status.message().contains("greet") && Instant::now() < end => {}
            answer => break answer,
        }
    };
    let (code, _) = refusal(refused, &format!("process {own} has none: name QEMU's process with pid=N"));
    assert_eq!(code, Code::FailedPrecondition);
    let end = Instant::now() + SOON;
    loop {
        match attach(pid) {
            Ok(machine) => break assert!(machine.description.contains(&format!("process {pid},"))),
            Err(status) => assert!(Instant::now() < end, "{status:?}"),
        }
    }
    Ok(())
}

/// Bytes of memory that the guest may write.
fn memory(machine: &v1::Machine) -> u64 {
    machine.regions.iter().filter(|region| !region.read_only).map(|region| region.size).sum()
}

fn same_bytes(
    daemon: &Daemon,
    guest: &mut Guest,
    rng: &mut Rng,
    range: std::ops::Range<u64>,
    folder: &Path,
) -> Result<(), Failed> {
    let saved = folder.join("saved");
    let mut written = 0;
    for _ in 0..PAGES {
        let at = rng.u64(range.start / PAGE..range.end / PAGE) * PAGE;
        let answer = guest.ask(0, &format!("pmemsave {at:#x} {PAGE} \"{}\"", saved.display()))?;
        assert!(answer.trim().is_empty(), "{answer}");
        let theirs = std::fs::read(&saved)?;
        assert!(daemon.read_physical("vm", at, PAGE)? == theirs, "bytes at {at:#x} differ");
        written += usize::from(theirs.iter().any(|byte| *byte != 0));
    }
    println!("{PAGES} pages of {range:#x?} are as pmemsave has them, {written} of them not zero");
    Ok(())
}

/// Plugs in a DIMM with known contents: at every page, where it is; at its end, tables. Gives its file, and where it is.
fn plug(guest: &mut Guest, rng: &mut Rng, slot: u32, folder: &Path) -> Result<(File, u64), Failed> {
    let path = folder.join(format!("dimm{slot}"));
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    file.set_len(DIMM)?;
    for page in 0..DIMM / PAGE {
        file.write_all_at(&(page ^ rng.u64(..) << 32).to_le_bytes(), page * PAGE)?;
    }
    let options = format!("id=m{slot},size=128M,mem-path={},share=on", path.display());
    let backend = guest.ask(0, &format!("object_add memory-backend-file,{options}"))?;
    let device = guest.ask(0, &format!("device_add pc-dimm,id=d{slot},memdev=m{slot}"))?;
    assert!(backend.trim().is_empty() && device.trim().is_empty(), "{backend} {device}");
    let devices = guest.ask(0, "info memory-devices")?;
    let at = devices.split_once(&format!("\"d{slot}\"")).and_then(|(_, rest)| rest.split_once("addr: 0x"));
    let (_, address) = at.ok_or_else(|| format!("info memory-devices says {devices:?}"))?;
    let digits = address.split_whitespace().next().unwrap_or_default();
    Ok((file, u64::from_str_radix(digits, 16)?))
}

fn same_words(daemon: &Daemon, file: &File, start: u64) -> Result<(), Failed> {
    for page in (0..DIMM / PAGE).step_by(61) {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, page * PAGE)?;
        assert_eq!(daemon.read_physical("vm", start + page * PAGE, 8)?, word, "page {page:#x}");
    }
    Ok(())
}

/// Tables in the DIMM, written through its file, are walked.
fn walked(daemon: &Daemon, file: &File, start: u64) -> Result<(), Failed> {
    for (level, to) in (1..).zip([start + 0x2000, start + 0x3000, start + 0x4000, start + 0x5000, NODE]) {
        let at = (level * PAGE, to | 7);
        file.write_all_at(&at.1.to_le_bytes(), at.0)?;
    }
    let found = daemon.translate_from("vm", start + PAGE, 0x123)?;
    match found.outcome {
        Some(v1::translate_response::Outcome::Translation(page)) => assert_eq!(page.gpa, NODE + 0x123),
        other => return Err(format!("{other:?}").into()),
    }
    Ok(())
}
