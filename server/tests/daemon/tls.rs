//! Mutual TLS, with certificates from `deploy/make-lab-certs.sh`.

use std::path::Path;
use std::process::Command;

use libtest_mimic::Failed;
use pagewalk_proto::v1::translation_service_client::TranslationServiceClient;
use pagewalkd::config::Config;
use pagewalkd::listen::Tls;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};

use crate::bed::{self, page, read};
use crate::beds::{Bed, Test};
use crate::process::{DAEMON, Daemon, block_on, hermetic, output, pagewalk, run};

pub(crate) const TESTS: &[Test] = &[
    ("tls_only_with_the_right_certificate", &[Bed::Openssl], only_with_the_right_certificate),
    ("tls_from_a_second_network_namespace", &[Bed::Openssl, Bed::Netns], from_a_second_network_namespace),
];

const GVA: u64 = 0xffff_8000_0001_0000;

fn make_certificates(folder: &Path, names: &[&str]) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/make-lab-certs.sh");
    output(Command::new(script).arg(folder).args(names));
}

async fn call(address: &str, tls: Option<ClientTlsConfig>) -> Result<u64, String> {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let mut endpoint = Channel::from_shared(format!("{scheme}://{address}")).unwrap();
    if let Some(tls) = tls {
        endpoint = endpoint.tls_config(tls).unwrap();
    }
    let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
    let answer = TranslationServiceClient::new(channel).translate(read(GVA)).await;
    Ok(page(&answer.map_err(|status| status.to_string())?.into_inner()).gpa)
}

fn only_with_the_right_certificate() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let (ours, theirs) = (folder.path().join("ours"), folder.path().join("theirs"));
    make_certificates(&ours, &["localhost", "127.0.0.1"]);
    make_certificates(&theirs, &["localhost", "127.0.0.1"]);
    let trust = |folder: &Path| {
        let authority = Certificate::from_pem(std::fs::read(folder.join("ca.pem")).unwrap());
        ClientTlsConfig::new().ca_certificate(authority).domain_name("localhost")
    };
    let identity = |folder: &Path| {
        let read = |name| std::fs::read(folder.join(name)).unwrap();
        Identity::from_pem(read("client.pem"), read("client.key"))
    };
    let tls =
        Tls { cert: ours.join("server.pem"), key: ours.join("server.key"), client_ca: ours.join("ca.pem") };
    block_on(async {
        // Loopback, too, asks for certificates where it is told to.
        let machines = vec![bed::open("demo:plain")];
        let machines = pagewalkd::machine::Machines::new(machines).unwrap();
        let server = pagewalkd::serve::Server::bind(&Config { tls: Some(tls), ..bed::config() }, machines)
            .await
            .unwrap();
        let address = server.addresses()[0].to_string();
        tokio::spawn(server.run(std::future::pending()));

        let right = || trust(&ours).identity(identity(&ours));
        assert_eq!(call(&address, Some(right())).await, Ok(0x1_0000));
        for (case, tls) in [
            ("no client certificate", Some(trust(&ours))),
            ("a client certificate from another authority", Some(trust(&ours).identity(identity(&theirs)))),
            ("a daemon from another authority", Some(trust(&theirs).identity(identity(&ours)))),
            ("no TLS", None),
        ] {
            assert!(call(&address, tls).await.is_err(), "{case}");
            assert_eq!(call(&address, Some(right())).await, Ok(0x1_0000), "after {case}");
        }

        let plain = bed::Bed::plain().await;
        assert!(call(&plain.address.to_string(), Some(right())).await.is_err(), "TLS on a plain port");
        plain.unharmed().await;
        plain.stop().await;
    });
    Ok(())
}

/// A network namespace and a cable to it; both go with it.
struct Namespace {
    name: String,
    cable: String,
    here: String,
}

impl Namespace {
    fn new() -> Self {
        let id = std::process::id();
        // Interface names have 15 characters.
        let name = format!("pagewalk-{id}");
        let (cable, end) = (format!("pw{id}"), format!("pw{id}n"));
        // TEST-NET-3, of which nobody has a part.
        let (here, there) = ("203.0.113.1", "203.0.113.2");
        let namespace = Self { name, cable, here: here.to_owned() };
        let ip = |arguments: String| drop(output(Command::new("ip").args(arguments.split(' '))));
        let Self { name, cable, .. } = &namespace;
        ip(format!("netns add {name}"));
        ip(format!("link add {cable} type veth peer name {end}"));
        ip(format!("link set {end} netns {name}"));
        ip(format!("addr add {here}/30 dev {cable}"));
        ip(format!("link set {cable} up"));
        ip(format!("-n {name} addr add {there}/30 dev {end}"));
        ip(format!("-n {name} link set {end} up"));
        namespace
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = hermetic("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.cable]).output();
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).output();
    }
}

fn from_a_second_network_namespace() -> Result<(), Failed> {
    let client = pagewalk();
    let namespace = Namespace::new();
    let certificates = tempfile::tempdir()?;
    make_certificates(&certificates.path().join("lab"), &[&namespace.here]);
    let file = |name: &str| certificates.path().join("lab").join(name);
    let listen = format!("{}:0", namespace.here);

    let refused = run(hermetic(DAEMON).args(["serve", "--machine", "demo:plain", "--listen", &listen]));
    assert_eq!(refused.code, Some(1));
    assert!(refused.err.contains("--tls-cert") && refused.err.contains(&listen), "{}", refused.err);

    let mut command = hermetic(DAEMON);
    command.args(["serve", "--machine", "demo:plain", "--listen", &listen]);
    command.arg("--tls-cert").arg(file("server.pem")).arg("--tls-key").arg(file("server.key"));
    let daemon = Daemon::spawn(command.arg("--client-ca").arg(file("ca.pem")));
    let ask = || {
        let mut command = namespace.command(&client);
        command.args([
            "--addr",
            &format!("https://{}", daemon.address),
            "--json",
            "translate",
            "0xffff800000010000",
        ]);
        command.arg("--tls-ca").arg(file("ca.pem"));
        command
    };
    let answer =
        output(ask().arg("--tls-cert").arg(file("client.pem")).arg("--tls-key").arg(file("client.key")));
    let answer: serde_json::Value = serde_json::from_str(&answer)?;
    assert_eq!(answer["translation"]["gpa"], "65536");
    println!("over mutual TLS from network namespace {}: {}", namespace.name, answer["translation"]);
    let without = run(&mut ask());
    assert_ne!(without.code, Some(0), "without a certificate: {}", without.out);
    println!("without a certificate: {}", without.err.trim());
    Ok(())
}
