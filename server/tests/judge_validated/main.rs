//! Judges `validated` and `validated-kvm`: with `validate`, no answer about a page that its guest maps elsewhere all the time mixes
//! two mappings.
//!
//! The guest is a thread that writes plain memory as fast as it can, and a real one on a vCPU of KVM's, slower. A daemon in
//! this process is asked over gRPC: most of the walks come in validated batches, the others by single calls. Each answer has
//! to be the frame of a mapping that was in use during its call, or say that it is torn. To show that this can fail, the
//! same guests are asked without validation, where mixes have to be met.
//!
//! Beyond what is judged, a guest whose entries come back to the same two values with every other mapping: validation rests on that not
//! happening within a walk, so mixes may pass there. They are counted, and told.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports on standard output")]

#[path = "../../../walker/tests/bed/judge.rs"]
#[allow(dead_code, reason = "a part of it is for other judges")]
mod judge;
mod mapping;

use std::path::PathBuf;
use std::process::Command;

use judge::{Judge, skipped};
use libtest_mimic::{Arguments, Failed, Trial};
use mapping::{FRAME, Found, GENERATIONS, GVA, Remapping, found, mapped};
use pagewalk::PageWord;
use pagewalk_proto::v1;
use pagewalk_proto::v1::translate_response::Outcome;
use pagewalk_proto::v1::translation_service_client::TranslationServiceClient;
use pagewalkd::config::Config;
use pagewalkd::machine::{Machine, MachineSpec, Machines};
use pagewalkd::serve::Server;
use tokio::runtime::Runtime;
use tonic::transport::Channel;

/// Addresses of a batch: as many as there can be.
const BATCH: usize = 1 << 18;
/// Batches that are not validated, at most, until a mix is met.
const UNTIL_MIXED: usize = 40;

fn main() {
    let mut arguments = Arguments::from_args();
    // Guests and daemons want a CPU each.
    arguments.test_threads = Some(1);
    let trials = vec![
        Trial::test("a_thread_that_remaps", a_thread),
        Trial::test("a_guest_of_kvm_that_remaps", a_guest_of_kvm),
        Trial::test("entries_that_come_back", entries_that_come_back),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}

/// How often to ask: single calls, and batches.
struct Plan {
    calls: u64,
    batches: u64,
}

fn a_thread() -> Result<(), Failed> {
    let guest = Remapping::start(GENERATIONS)?;
    judge("validated", &guest.machine, &Plan { calls: 10_000, batches: 39 })
}

fn a_guest_of_kvm() -> Result<(), Failed> {
    if let Err(problem) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        return skipped("kvm", &format!("/dev/kvm: {problem}"));
    }
    let spec: MachineSpec = format!("kvm:elf={},mem=4M", compile()?.display()).parse()?;
    judge("validated-kvm", &spec.open()?, &Plan { calls: 5_000, batches: 4 })
}

fn judge(name: &'static str, machine: &Machine, plan: &Plan) -> Result<(), Failed> {
    let daemon = Daemon::serve(machine)?;
    let memory = machine.source().memory();
    let mut judge = Judge::new(name)?;
    let first = mapped(&memory);
    let mut mixed = false;
    for _ in 0..UNTIL_MIXED {
        if mixed {
            break;
        }
        for word in daemon.batch(false)?.words.iter() {
            match PageWord::from_bits(word).gpa(GVA).map(|gpa| found(gpa.0)) {
                Some(Found::Mix(level)) => {
                    mixed = true;
                    judge.count("not validated: a mix, astray at level", level as u64);
                }
                Some(Found::Mapping(_)) => judge.count("not validated: one mapping", 0),
                _ => judge.disagree(|| format!("not validated: {word:#x}")),
            }
        }
    }
    for _ in 0..plan.calls {
        let before = mapped(&memory);
        let answer = daemon.call(true)?;
        let after = mapped(&memory);
        judge.case();
        let provenance = answer.provenance.unwrap_or_default();
        for _ in 0..provenance.repeated_walks {
            judge.count("calls: a walk that was repeated", 0);
        }
        match answer.outcome {
            _ if !provenance.validated => judge.disagree(|| format!("{provenance:?}")),
            _ if provenance.torn => judge.count("calls: torn", 0),
            Some(Outcome::Translation(page)) if in_use(page.gpa, before, after) => {
                judge.count("calls: a mapping in use", 0);
            }
            other => judge.disagree(|| format!("{before} to {after}: {other:x?}")),
        }
    }
    for _ in 0..plan.batches {
        let before = mapped(&memory);
        let asked = daemon.batch(true)?;
        let after = mapped(&memory);
        for _ in 0..asked.provenance.repeated_walks {
            judge.count("batches: a walk that was repeated", 0);
        }
        let mut torn = false;
        for word in asked.words.iter() {
            judge.case();
            match PageWord::from_bits(word).gpa(GVA) {
                Some(gpa) if in_use(gpa.0, before, after) => judge.count("batches: a mapping in use", 0),
                None if word >> 1 & 15 == v1::FaultKind::Contended as u64 => {
                    torn = true;
                    judge.count("batches: torn", 0);
                }
                _ => judge.disagree(|| format!("{before} to {after}: {word:#x}")),
            }
        }
        if !asked.provenance.validated || asked.provenance.torn != torn {
            judge.disagree(|| format!("torn {torn}: {:?}", asked.provenance));
        }
    }
    println!("  {} mappings meanwhile", mapped(&memory) - first);
    judge.finish(&[
        ("not validated: a mix, astray at level", None, 1),
        ("calls: a mapping in use", None, 1),
        ("batches: a mapping in use", None, 1),
        ("batches: a walk that was repeated", None, 1),
    ])
}

/// Whether it is the frame of a mapping that was in use at some time between two looks at the guest.
fn in_use(gpa: u64, before: u64, after: u64) -> bool {
    match found(gpa) {
        // Each look may be at the number before the one in use.
        Found::Mapping(number) => number.wrapping_sub(before) % GENERATIONS <= after + 1 - before,
        _ => false,
    }
}

/// Two numbers: every entry holds again what it held two mappings before.
fn entries_that_come_back() -> Result<(), Failed> {
    let guest = Remapping::start(2)?;
    let daemon = Daemon::serve(&guest.machine)?;
    let mut mixes = [0_u64; 2];
    let (mut walks, mut repeated, mut torn) = (0_u64, 0, 0_u64);
    for round in 0..UNTIL_MIXED {
        if round >= 8 && mixes[0] > 100 {
            break;
        }
        for validate in [false, true] {
            let asked = daemon.batch(validate)?;
            repeated += asked.provenance.repeated_walks;
            for word in asked.words.iter() {
                walks += u64::from(validate);
                match PageWord::from_bits(word).gpa(GVA).map(|gpa| found(gpa.0)) {
                    Some(Found::Mix(_)) => mixes[usize::from(validate)] += 1,
                    Some(Found::Mapping(_)) => {}
                    None if validate => torn += 1,
                    _ => return Err(format!("{word:#x}").into()),
                }
            }
        }
    }
    println!(
        "\nentries that come back: of {walks} walks {} are mixes without validation, and {} with it; {repeated} repeated, {torn} torn",
        mixes[0], mixes[1]
    );
    // Whatever passes, validation has to see most of them.
    assert!(mixes[1] * 10 < mixes[0], "{mixes:?}");
    Ok(())
}

/// A daemon in this process, and a client.
struct Daemon {
    runtime: Runtime,
    channel: Channel,
}

/// What came of a batch.
struct Asked {
    provenance: v1::Provenance,
    words: pagewalk_proto::Column,
}

impl Daemon {
    fn serve(machine: &Machine) -> Result<Self, Failed> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let config = Config { max_calls: 16, ..Config::on_loopback() };
        let machines = Machines::new([machine.clone()])?;
        let channel = runtime.block_on(async {
            let server = Server::bind(&config, machines).await?;
            let address = server.addresses()[0];
            tokio::spawn(server.run(std::future::pending()));
            Ok::<_, Failed>(Channel::from_shared(format!("http://{address}"))?.connect().await?)
        })?;
        Ok(Self { runtime, channel })
    }

    fn call(&self, validate: bool) -> Result<v1::TranslateResponse, Failed> {
        let request = v1::TranslateRequest {
            address: Some(v1::Address { value: Some(v1::address::Value::Number(GVA)) }),
            access: read(),
            validate,
            ..Default::default()
        };
        let mut client = TranslationServiceClient::new(self.channel.clone());
        Ok(self.runtime.block_on(client.translate(request))?.into_inner())
    }

    /// The page, as often as a batch may ask for it.
    fn batch(&self, validate: bool) -> Result<Asked, Failed> {
        let head = v1::BatchTranslateRequestHead {
            access: read(),
            max_faults: Some(0),
            validate,
            ..Default::default()
        };
        let request = v1::BatchTranslateRequest { head, column: vec![GVA; BATCH].as_slice().into() };
        let mut client =
            TranslationServiceClient::new(self.channel.clone()).max_decoding_message_size(8 << 20);
        let answer = self.runtime.block_on(client.batch_translate(request))?.into_inner();
        Ok(Asked { provenance: answer.head.provenance.unwrap_or_default(), words: answer.column })
    }
}

fn read() -> Option<v1::Access> {
    Some(v1::Access {
        kind: v1::AccessKind::Read.into(),
        privilege: v1::Privilege::Supervisor.into(),
        ..Default::default()
    })
}

fn compile() -> Result<PathBuf, Failed> {
    let output = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("remapping.elf");
    let flags = "-m64 -O2 -Wall -Werror -ffreestanding -nostdlib -static -no-pie -mno-red-zone -mgeneral-regs-only \
                 -fno-stack-protector -fcf-protection=none -Wl,-Ttext-segment=0x100000 -Wl,--build-id=none";
    let gcc = Command::new("gcc")
        .args(flags.split_whitespace())
        .arg(format!("-DGENERATIONS={GENERATIONS:#x}ul"))
        .arg(format!("-DFRAME={FRAME:#x}ul"))
        .args((1..).zip(mapping::ASTRAY).map(|(level, frame)| format!("-DASTRAY_{level}={frame:#x}ul")))
        .arg("-o")
        .arg(&output)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/judge_validated/guest.c"))
        .output()
        .map_err(|error| format!("gcc: {error}"))?;
    if !gcc.status.success() {
        return Err(String::from_utf8_lossy(&gcc.stderr).into_owned().into());
    }
    Ok(output)
}
