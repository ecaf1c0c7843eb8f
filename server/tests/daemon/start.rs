//! Starting: what is refused and with which words, what is logged, what an idle daemon costs.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use pagewalk_proto::v1;
use pagewalk_proto::v1::machine_service_client::MachineServiceClient;
use pagewalk_proto::v1::translation_service_client::TranslationServiceClient;

use crate::bed::{connect, page, read};
use crate::beds::{Bed, Test};
use crate::process::{DAEMON, Daemon, block_on, hermetic, run};

pub(crate) const TESTS: &[Test] = &[
    ("start_refusals_say_what_to_do", &[], refusals_say_what_to_do),
    ("start_second_daemon_is_told", &[], second_daemon_is_told),
    ("start_json_log_is_json", &[], json_log_is_json),
    ("start_idle_costs_little", &[], idle_costs_little),
    ("start_without_permission_to_kvm", &[Bed::Setpriv], without_permission_to_kvm),
    ("start_demo_once_tours_and_ends", &[], demo_once_tours_and_ends),
];

fn refusals_say_what_to_do() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let unknown = file("unknown.toml", "listen = []\nmachine = ['demo']\n");
    let broken = file("broken.toml", "listen = [\n");
    let typed = file("typed.toml", "grace-seconds = 'long'\n");
    let long = file("long.pem", &"#".repeat((1 << 20) + 1));
    let latin1 = folder.path().join("latin1.toml").to_str().unwrap().to_owned();
    std::fs::write(&latin1, b"# \xe9\n")?;
    // Nobody writes to it: whoever opens it, and waits, waits without end.
    let pipe = folder.path().join("pipe").to_str().unwrap().to_owned();
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status()?.success());
    let no_elf = file("text.elf", "this is no ELF file");
    let not_elf = format!("kvm:elf={no_elf}");
    let cases: &[(&[&str], &[&str])] = &[
        (&["--listen", "0.0.0.0:0"], &["0.0.0.0:0", "--tls-cert", "--client-ca", "127.0.0.1"]),
        (&["--listen", "[::]:0"], &["--tls-key"]),
        (&["--listen", "localhost:1"], &["localhost:1", "write IP:PORT"]),
        (&["--tls-cert", "/nonexistent"], &["--tls-key"]),
        (&["--tls-cert", "/nonexistent", "--tls-key", &no_elf, "--client-ca", &no_elf], &["/nonexistent"]),
        (&["--tls-cert", &no_elf, "--tls-key", &no_elf, "--client-ca", &no_elf], &["PEM"]),
        (
            &["--tls-cert", &no_elf, "--tls-key", &pipe, "--client-ca", &no_elf],
            &["--tls-key", "not a regular file"],
        ),
        (
            &["--tls-cert", "/dev/zero", "--tls-key", &no_elf, "--client-ca", &no_elf],
            &["--tls-cert", "/dev/zero", "not a regular file"],
        ),
        (&["--tls-cert", &no_elf, "--tls-key", &no_elf, "--client-ca", &long], &["--client-ca", "1 MiB"]),
        (&["--config", &pipe], &["pipe", "not a regular file"]),
        (&["--config", &latin1], &["latin1.toml", "not UTF-8"]),
        (&["--machine", "vax"], &["vax", "demo", "kvm:elf"]),
        (&["--machine", "demo", "--machine", "demo:plain"], &["demo", "other=SPEC"]),
        (&["--machine", "kvm:mem=1G"], &["elf=FILE"]),
        (&["--machine", "kvm:elf=/nonexistent"], &["/nonexistent"]),
        (&["--machine", &not_elf], &["text.elf", "ELF"]),
        (&["--config", "/nonexistent.toml"], &["/nonexistent.toml"]),
        (&["--config", &unknown], &["unknown.toml", "machine", "line 2"]),
        (&["--config", &broken], &["broken.toml"]),
        (&["--config", &typed], &["typed.toml", "grace-seconds"]),
        (&["--grace-seconds", "99999"], &["3600"]),
        (&["--max-calls", "0"], &["--max-calls"]),
        (&["--log", "pagewalkd=loud"], &["--log", "pagewalkd=loud"]),
        (&["--log-format", "xml"], &["human", "json"]),
        (&["--uds", &no_elf], &["no socket", "--uds"]),
        (&["--uds", "/nonexistent/s"], &["/nonexistent/s"]),
        (&["--frobnicate"], &["--frobnicate"]),
    ];
    for (arguments, wanted) in cases {
        let mut command = hermetic(DAEMON);
        command.arg("serve").args(*arguments);
        if !arguments.contains(&"--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        if !arguments.contains(&"--machine") {
            command.args(["--machine", "demo:plain"]);
        }
        let ended = run(&mut command);
        assert!(ended.code.is_some_and(|code| code == 1 || code == 2), "{arguments:?}: {:?}", ended.code);
        for said in *wanted {
            assert!(ended.err.contains(said), "{arguments:?} should say {said}: {}", ended.err);
        }
        assert!(!ended.err.contains("panicked"), "{}", ended.err);
        assert_eq!(ended.out, "", "{arguments:?}");
    }
    assert_eq!(std::fs::read_to_string(&no_elf)?, "this is no ELF file", "nothing in the way was removed");
    Ok(())
}

fn second_daemon_is_told() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("s");
    let socket = socket.to_str().unwrap();
    let first = Daemon::serve(&["--machine", "demo:plain", "--uds", socket]);
    assert_eq!(first.line(), format!("listening on unix:{socket}"));
    for (arguments, said) in [
        (["--listen", &first.address], [first.address.as_str(), "another --listen"]),
        (["--uds", socket], [socket, "another --uds"]),
    ] {
        let mut second = hermetic(DAEMON);
        second.args(["serve", "--machine", "demo:plain"]).args(arguments);
        if arguments[0] == "--uds" {
            second.args(["--listen", "127.0.0.1:0"]);
        }
        let ended = run(&mut second);
        assert_eq!(ended.code, Some(1));
        assert!(said.iter().all(|said| ended.err.contains(said)), "{}", ended.err);
    }
    // The first one has lost nothing to the second.
    assert!(Path::new(socket).exists());
    block_on(async {
        let mut client = TranslationServiceClient::new(connect(first.address.parse().unwrap()).await);
        client.translate(read(0)).await.unwrap();
    });
    Ok(())
}

fn json_log_is_json() -> Result<(), Failed> {
    let mut daemon =
        Daemon::serve(&["--machine", "demo:plain", "--log-format", "json", "--log", "pagewalkd=debug"]);
    block_on(async {
        let mut client = TranslationServiceClient::new(connect(daemon.address.parse().unwrap()).await);
        client.translate(read(0xffff_8000_0001_0000)).await.unwrap();
    });
    daemon.signal("TERM");
    assert!(daemon.wait(Duration::from_secs(10)).success());
    let log = daemon.log();
    let lines: Vec<serde_json::Value> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert!(lines.iter().all(|line| line["level"].is_string() && line["timestamp"].is_string()), "{log}");
    let method = "/pagewalk.v1.TranslationService/Translate";
    assert!(lines.iter().any(|line| line["span"]["method"] == method), "a span per RPC: {log}");
    Ok(())
}

/// The demo machine, running where it can.
fn idle_costs_little() -> Result<(), Failed> {
    const PERIOD: Duration = Duration::from_secs(2);
    let daemon = Daemon::serve(&["--machine", "demo"]);
    block_on(async {
        let mut client = TranslationServiceClient::new(connect(daemon.address.parse().unwrap()).await);
        client.translate(read(0xffff_8000_0001_0000)).await.unwrap();
    });
    let before = cpu_time(daemon.pid());
    let start = Instant::now();
    std::thread::sleep(PERIOD);
    let (used, elapsed) = (cpu_time(daemon.pid()) - before, start.elapsed());
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid()))?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let resident: u64 = resident.trim().trim_end_matches(" kB").parse()?;
    println!("idle: {resident} KiB resident, {used:?} of CPU time in {elapsed:?}");
    assert!(resident < 40 << 10, "{resident} KiB");
    assert!(used < elapsed / 20, "{used:?} in {elapsed:?}");
    Ok(())
}

fn cpu_time(pid: u32) -> Duration {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let nanos = threads.map(|thread| {
        let stat = std::fs::read_to_string(thread.unwrap().path().join("schedstat")).unwrap();
        stat.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    });
    Duration::from_nanos(nanos.sum())
}

/// Nobody may not open `/dev/kvm`; where there is none, that is another reason for the same.
fn without_permission_to_kvm() -> Result<(), Failed> {
    // The build may lie where nobody cannot go.
    let folder = tempfile::tempdir()?;
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755))?;
    let copy = folder.path().join("pagewalkd");
    std::fs::copy(DAEMON, &copy)?;
    let mut command = hermetic("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&copy);
    let daemon = Daemon::spawn(command.args(["serve", "--machine", "demo", "--listen", "127.0.0.1:0"]));
    block_on(async {
        let channel = connect(daemon.address.parse().unwrap()).await;
        let mut machines = MachineServiceClient::new(channel.clone());
        let answer = machines.get_machine(v1::GetMachineRequest::default()).await.unwrap().into_inner();
        let machine = answer.machine.unwrap();
        assert!(machine.description.contains("plain memory"), "{}", machine.description);
        assert!(machine.description.contains("/dev/kvm"), "it says why: {}", machine.description);
        assert!(!machine.capabilities.unwrap().live);
        let gva = machine.landmarks.iter().find(|l| l.name == "kernel-text").unwrap().address;
        let answer = TranslationServiceClient::new(channel).translate(read(gva)).await.unwrap().into_inner();
        assert_eq!(page(&answer).gpa, 0x1_0000);
        assert_eq!(answer.provenance.unwrap().run_state(), v1::RunState::Static);
    });
    assert!(daemon.log().contains("/dev/kvm"), "{}", daemon.log());
    Ok(())
}

fn demo_once_tours_and_ends() -> Result<(), Failed> {
    // Not in the way of a daemon that is there: its default port is not needed.
    let ended = run(hermetic(DAEMON).args(["demo", "--once"]));
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    for said in
        ["listening on 127.0.0.1:", "1. ", "2. ", "3. ", "nested mode on", "nested mode off", "grpcurl"]
    {
        assert!(ended.out.contains(said), "{said}: {}", ended.out);
    }
    Ok(())
}
