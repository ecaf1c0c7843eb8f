//! Guests whose memory, vCPUs and run state change at the moment when it matters, and a QEMU that takes its time: what no real one
//! does on demand.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::process::{Command, Stdio};

use libtest_mimic::{Failed, Trial};
use vm_memory::{FileOffset, MmapRegion};

use crate::daemon::Daemon;
use crate::fake::{Fake, Place};
use crate::judge;

const SIZE: u64 = 16 << 12;

pub(crate) fn trials() -> Vec<Trial> {
    let moving: [(&str, fn() -> Result<(), Failed>); 1] = [("files_of_one_inode", files_of_one_inode)];
    moving.into_iter().map(|(name, test)| Trial::test(name, test)).collect()
}

/// A file of `SIZE` bytes, mapped into this process.
struct Shared {
    _region: MmapRegion,
    place: Place,
}

impl Shared {
    fn new(file: File, start: u64, first: u8) -> Result<Self, Failed> {
        file.set_len(SIZE)?;
        file.write_all_at(&[first], 0)?;
        let region: MmapRegion = MmapRegion::from_file(FileOffset::new(file, 0), SIZE as usize)?;
        let place = Place { start, size: SIZE, host: region.as_ptr().addr() as u64 };
        Ok(Self { _region: region, place })
    }
}

fn first_byte(daemon: &Daemon, at: u64) -> Result<u8, Failed> {
    let bytes = daemon.read_physical("vm", at, 1)?;
    Ok(*bytes.first().ok_or("no byte")?)
}

/// Each file is the first of its own file system, and has its inode from that.
fn files_of_one_inode() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let script = "mkdir a b && mount -t tmpfs none a && mount -t tmpfs none b && exec 3<>a/file 4<>b/file && echo ready && read -r _";
    let mut child = Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .current_dir(folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().ok_or("no standard output")?).read_line(&mut line)?;
    if line.trim() != "ready" {
        let said = child.wait_with_output()?.stderr;
        return judge::skipped("mounts", String::from_utf8_lossy(&said).trim());
    }
    let open = |descriptor: u32| {
        File::options().read(true).write(true).open(format!("/proc/{}/fd/{descriptor}", child.id()))
    };
    let (low, high) = (open(3)?, open(4)?);
    let inodes = (low.metadata()?.ino(), high.metadata()?.ino());
    println!("inodes {inodes:?} of devices {:#x} and {:#x}", low.metadata()?.dev(), high.metadata()?.dev());
    assert_eq!(inodes.0, inodes.1, "the files do not show what they are for");
    // The mappings are all that is left of the mounts.
    let (low, high) = (Shared::new(low, 0, 1)?, Shared::new(high, 1 << 20, 2)?);
    let fake = Fake::start(&[low.place, high.place])?;
    let daemon = Daemon::start()?;
    let machine = daemon.attach_qemu("vm", &fake.qmp)?;
    assert!(machine.description.contains("its memory shared"), "{}", machine.description);
    assert_eq!((first_byte(&daemon, 0)?, first_byte(&daemon, 1 << 20)?), (1, 2));
    drop(child.stdin.take());
    child.wait()?;
    Ok(())
}
