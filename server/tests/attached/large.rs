//! Guests of 4 GiB that run are attached to at once, whatever holds their memory.

use std::ffi::OsStr;
use std::path::Path;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;

use crate::daemon::Daemon;
use crate::guest::Guest;

pub(crate) fn at_once(script: &Path) -> Result<(), Failed> {
    for memory in ["file", "private"] {
        let folder = tempfile::tempdir()?;
        let qmp = folder.path().join("qmp");
        let variables = [
            ("PAGEWALK_BED_QMP", qmp.as_os_str()),
            ("PAGEWALK_BED_MEMORY", OsStr::new(memory)),
            ("PAGEWALK_BED_SIZE", OsStr::new("4G")),
        ];
        let (guest, _) = Guest::boot_with(script, "5-level", &variables)?;
        let daemon = Daemon::start()?;
        let start = Instant::now();
        let machine = daemon.attach_qemu("vm", &qmp)?;
        let took = start.elapsed();
        let size: u64 = machine.regions.iter().map(|region| region.size).sum();
        println!("a guest of {} MiB, memory {memory}: attached in {took:?}", size >> 20);
        assert!(size >= (4 << 30) - (1 << 20), "{size:#x}");
        assert!(took < Duration::from_secs(1), "{took:?}");
        assert!(daemon.registers("vm", 0).is_ok());
        drop(guest);
    }
    Ok(())
}
