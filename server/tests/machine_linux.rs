//! What a Linux kernel meets: its parameters, its serial line, its interrupt controllers. The kernels here are of a few
//! instructions; `judge_daemon` boots a real one where there is a CPU that can.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod bzimage;
#[allow(dead_code)]
mod kvm_bed;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use bzimage::bzimage;
use kvm_bed::{block_on, soon};
use libtest_mimic::Failed;
use pagewalk::{Access, AccessKind, Gpa, Gva, Privilege};
use pagewalkd::machine::{Machine, MachineSpec};
use pagewalkd::vcpu::{RunState, VcpuError};

/// Says its command line and its initramfs; then answers each byte with the next one, until `q` makes it reset the machine.
const ANSWERS: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0x8b, 0x9e, 0x28, 0x02, 0x00, 0x00, // mov ebx, [rsi + 0x228]
    0x8a, 0x03, // mov al, [rbx]
    0x84, 0xc0, // test al, al
    0x74, 0x06, // jz
    0xee, // out dx, al
    0x48, 0xff, 0xc3, // inc rbx
    0xeb, 0xf4, // jmp
    0x8b, 0x9e, 0x18, 0x02, 0x00, 0x00, // mov ebx, [rsi + 0x218]
    0x8b, 0x8e, 0x1c, 0x02, 0x00, 0x00, // mov ecx, [rsi + 0x21c]
    0x8a, 0x03, // mov al, [rbx]
    0xee, // out dx, al
    0x48, 0xff, 0xc3, // inc rbx
    0xff, 0xc9, // dec ecx
    0x75, 0xf6, // jnz
    0xb0, 0x0a, // mov al, 10
    0xee, // out dx, al
    0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
    0xf3, 0x90, // pause
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xf9, // jz
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, // in al, dx
    0x3c, 0x71, // cmp al, 'q'
    0x74, 0x05, // je
    0xfe, 0xc0, // inc al
    0xee, // out dx, al
    0xeb, 0xe7, // jmp
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp
];
const SLEEPS: &[u8] = &[0xf4, 0xeb, 0xfd]; // hlt; jmp -3
/// Goes on where no memory is, which no hypervisor can execute.
const STRAYS: &[u8] = &[0xb8, 0x00, 0x00, 0x00, 0xf0, 0xff, 0xe0]; // mov eax, 0xf0000000; jmp rax

fn main() -> ExitCode {
    kvm_bed::main(&[
        ("is_told_its_parameters_and_answers_on_the_console", answers),
        ("vcpus_that_sleep_in_the_kernel_come_out", sleeps),
        ("a_kernel_that_cannot_be_emulated_stops_with_its_reason", strays),
    ])
}

fn open(folder: &Path, code: &[u8], options: &str) -> Machine {
    let kernel = folder.join("kernel");
    std::fs::write(&kernel, bzimage(code)).unwrap();
    let spec = format!("kvm:kernel={},{options}", kernel.display());
    spec.parse::<MachineSpec>().unwrap().open().unwrap()
}

fn until(stream: &mut UnixStream, said: &mut Vec<u8>, wanted: &str) {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut bytes = [0; 64];
    while !said.ends_with(wanted.as_bytes()) {
        let size = stream.read(&mut bytes).unwrap_or(0);
        assert!(size > 0, "the console says no more after {:?}", said.escape_ascii().to_string());
        said.extend(&bytes[..size]);
    }
}

fn answers() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let (initrd, socket, log) =
        (folder.path().join("initrd"), folder.path().join("console"), folder.path().join("log"));
    std::fs::write(&initrd, "files")?;
    let machine = open(
        folder.path(),
        ANSWERS,
        &format!(
            "initrd={},cmdline=a=1,,2 b;,console={},log={},mem=32M",
            initrd.display(),
            socket.display(),
            log.display()
        ),
    );
    let mut said = Vec::new();
    let mut first = UnixStream::connect(&socket)?;
    until(&mut first, &mut said, "a=1,2 b;files\n");
    // More than the port takes at once, and read while the guest runs.
    first.write_all(&b"HAL".repeat(100))?;
    until(&mut first, &mut said, &"IBM".repeat(100));
    drop(first);
    let mut second = UnixStream::connect(&socket)?;
    said.clear();
    second.write_all(b"1")?;
    until(&mut second, &mut said, "2");
    assert_eq!(said, b"2", "what was read once is not said again");
    second.write_all(b"q")?;
    let vcpu = &machine.source().vcpus()[0];
    let patience = soon();
    while vcpu.latest().run_state != RunState::Shutdown {
        assert!(Instant::now() < patience, "{:?}", vcpu.latest());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(vcpu.latest().run_state_reason.contains("reset"), "{:?}", vcpu.latest().run_state_reason);
    let logged = std::fs::read_to_string(&log)?;
    assert_eq!(logged, format!("a=1,2 b;files\n{}2", "IBM".repeat(100)));
    let started = Instant::now();
    drop(machine);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert!(!socket.exists(), "the socket goes with the machine");
    assert_eq!(second.read(&mut [0])?, 0, "and so does the connection");
    Ok(())
}

fn strays() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let machine = open(folder.path(), STRAYS, "mem=32M,cpus=2");
    let vcpus = machine.source().vcpus();
    let patience = soon();
    while vcpus[0].latest().run_state != RunState::InternalError {
        assert!(Instant::now() < patience, "{:?}", vcpus[0].latest());
        std::thread::sleep(Duration::from_millis(5));
    }
    let reason = vcpus[0].latest().run_state_reason.clone();
    assert!(reason.contains("emulated") && reason.contains("0xf0000000"), "{reason}");
    assert_eq!(block_on(vcpus[1].sync(soon())).unwrap().run_state, RunState::Running);
    let fetched = vcpus[0].latest().walker.as_ref().unwrap().translate(
        &*machine.source().memory(),
        Gva(0x10_0200),
        &Access::new(AccessKind::Fetch, Privilege::Supervisor),
    );
    assert_eq!(fetched.unwrap().gpa, Gpa(0x10_0200), "its memory can be asked about all the same");
    Ok(())
}

fn sleeps() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let machine = open(folder.path(), SLEEPS, "mem=32M,cpus=2");
    let vcpus = machine.source().vcpus();
    block_on(async {
        for vcpu in vcpus {
            for _ in 0..10 {
                let fresh = vcpu.sync(soon()).await.unwrap();
                assert_eq!(fresh.run_state, RunState::Running, "HLT does not come out to us");
            }
            assert_eq!(vcpu.pause(soon()).await.unwrap().run_state, RunState::Paused);
            assert_eq!(vcpu.resume(soon()).await.unwrap().run_state, RunState::Running);
        }
        let started = vcpus[0].latest();
        assert!(started.registers.cr0 >> 31 == 1 && started.registers.rip >= 0x10_0200, "{started:?}");
        let waits = vcpus[1].latest();
        assert!(waits.registers.cr0 >> 31 == 0, "as after a reset: {waits:?}");
        let refused = vcpus[1].step(soon()).await;
        assert!(
            matches!(&refused, Err(VcpuError::Unsupported(why)) if why.contains("start-up IPI")),
            "{refused:?}"
        );
        let refused = vcpus[0].step(soon()).await;
        assert!(matches!(&refused, Err(VcpuError::Unsupported(why)) if why.contains("HLT")), "{refused:?}");
        // Looked at by the timer, though it never comes out by itself.
        std::thread::sleep(Duration::from_millis(500));
        assert!(vcpus[0].latest().taken.elapsed() < Duration::from_millis(400));
    });
    Ok(())
}
