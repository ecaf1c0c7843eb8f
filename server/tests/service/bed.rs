//! A daemon in this process, its clients, and what a refusal has to carry.

use std::net::SocketAddr;
use std::time::Duration;

use pagewalk_proto::v1;
use pagewalk_proto::v1::machine_service_client::MachineServiceClient;
use pagewalk_proto::v1::translation_service_client::TranslationServiceClient;
use pagewalk_proto::v1::vcpu_service_client::VcpuServiceClient;
use pagewalk_proto::v1::walker_service_client::WalkerServiceClient;
use pagewalkd::config::Config;
use pagewalkd::machine::{Machine, MachineSpec, Machines};
use pagewalkd::serve::{ServeError, Server};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// A bound for anything that should take microseconds.
pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) fn config() -> Config {
    Config::on_loopback()
}

pub(crate) fn open(spec: &str) -> Machine {
    spec.parse::<MachineSpec>().unwrap().open().unwrap()
}

pub(crate) struct Bed {
    pub(crate) address: SocketAddr,
    /// The first machine.
    pub(crate) machine: Machine,
    /// The last one.
    pub(crate) last: Machine,
    pub(crate) channel: Channel,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), ServeError>>,
}

impl Bed {
    /// The demo machine in plain memory: nothing changes unless it is asked to.
    pub(crate) async fn plain() -> Self {
        Self::with(config(), &["demo:plain"]).await
    }

    pub(crate) async fn with(config: Config, machines: &[&str]) -> Self {
        Self::of(config, machines.iter().map(|spec| open(spec)).collect()).await
    }

    pub(crate) async fn of(config: Config, machines: Vec<Machine>) -> Self {
        let (machine, last) = (machines[0].clone(), machines[machines.len() - 1].clone());
        let server = Server::bind(&config, Machines::new(machines).unwrap()).await.unwrap();
        let address = server.addresses()[0];
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(server.run(async {
            // A bed that is dropped stops its daemon, too.
            let _ = stopped.await;
        }));
        let channel = connect(address).await;
        Self { address, machine, last, channel, stop, task }
    }

    /// Stops the daemon, which must end in time and without an error.
    pub(crate) async fn stop(self) {
        drop(self.channel);
        self.stop.send(()).unwrap();
        tokio::time::timeout(SOON, self.task).await.expect("the daemon ends").unwrap().unwrap();
    }

    /// Has the daemon begin to stop; the future is done when it has.
    pub(crate) fn begin_stop(self) -> JoinHandle<Result<(), ServeError>> {
        self.stop.send(()).unwrap();
        self.task
    }

    pub(crate) fn translation(&self) -> TranslationServiceClient<Channel> {
        TranslationServiceClient::new(self.channel.clone())
    }

    pub(crate) fn walker(&self) -> WalkerServiceClient<Channel> {
        WalkerServiceClient::new(self.channel.clone())
    }

    pub(crate) fn vcpu(&self) -> VcpuServiceClient<Channel> {
        VcpuServiceClient::new(self.channel.clone())
    }

    pub(crate) fn machines(&self) -> MachineServiceClient<Channel> {
        MachineServiceClient::new(self.channel.clone())
    }

    pub(crate) async fn translate(
        &self,
        request: v1::TranslateRequest,
    ) -> Result<v1::TranslateResponse, Status> {
        Ok(self.translation().translate(request).await?.into_inner())
    }

    /// The daemon still answers, over a connection of its own, and answers rightly.
    pub(crate) async fn unharmed(&self) {
        let mut fresh = TranslationServiceClient::new(connect(self.address).await);
        let answer = fresh.translate(read(self.landmark("kernel-text"))).await.unwrap().into_inner();
        assert_eq!(page(&answer).gpa, 0x1_0000);
    }

    pub(crate) fn landmark(&self, name: &str) -> u64 {
        let landmarks = self.machine.source().landmarks();
        landmarks.iter().find(|l| l.name == name).unwrap_or_else(|| panic!("no landmark {name}")).address
    }
}

pub(crate) async fn connect(address: SocketAddr) -> Channel {
    Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap()
}

pub(crate) fn number(address: u64) -> Option<v1::Address> {
    Some(v1::Address { value: Some(v1::address::Value::Number(address)) })
}

pub(crate) fn text(address: &str) -> Option<v1::Address> {
    Some(v1::Address { value: Some(v1::address::Value::Text(address.to_owned())) })
}

pub(crate) fn access(kind: v1::AccessKind, privilege: v1::Privilege) -> Option<v1::Access> {
    Some(v1::Access { kind: kind.into(), privilege: privilege.into(), ..Default::default() })
}

/// A supervisor read.
pub(crate) fn read(gva: u64) -> v1::TranslateRequest {
    v1::TranslateRequest {
        address: number(gva),
        access: access(v1::AccessKind::Read, v1::Privilege::Supervisor),
        ..Default::default()
    }
}

pub(crate) fn page(answer: &v1::TranslateResponse) -> &v1::Translation {
    match &answer.outcome {
        Some(v1::translate_response::Outcome::Translation(page)) => page,
        other => panic!("no translation: {other:?}"),
    }
}

pub(crate) fn fault(answer: &v1::TranslateResponse) -> &v1::Fault {
    match &answer.outcome {
        Some(v1::translate_response::Outcome::Fault(fault)) => fault,
        other => panic!("no fault: {other:?}"),
    }
}

/// A status of this daemon's own, from which a program and a person can tell what to do: its code and reason.
#[track_caller]
pub(crate) fn refusal<T: std::fmt::Debug>(answer: Result<T, Status>) -> (Code, String) {
    let status = answer.expect_err("should have been refused");
    let info =
        status.get_details_error_info().unwrap_or_else(|| panic!("a status without ErrorInfo: {status:?}"));
    assert_eq!(info.domain, "pagewalk", "{status:?}");
    assert!(status.message().len() > 10, "{status:?}");
    (status.code(), info.reason)
}

/// The L2 of the demo machine.
pub(crate) fn nested_on() -> v1::SetNestedModeRequest {
    v1::SetNestedModeRequest {
        mode: Some(v1::set_nested_mode_request::Mode::Npt(v1::Npt {
            ncr3: pagewalkd::machine::demo::NCR3,
            ..Default::default()
        })),
        l2: Some(v1::Registers { cr3: Some(pagewalkd::machine::demo::L2_CR3), ..Default::default() }),
        ..Default::default()
    }
}

pub(crate) fn nested_off() -> v1::SetNestedModeRequest {
    v1::SetNestedModeRequest {
        mode: Some(v1::set_nested_mode_request::Mode::Off(true)),
        ..Default::default()
    }
}

/// Provenance as each answer about vCPU 0 of the plain demo machine carries it.
#[track_caller]
pub(crate) fn from_plain(provenance: Option<&v1::Provenance>) {
    let provenance = provenance.expect("every answer carries its provenance");
    assert_eq!((provenance.machine.as_str(), provenance.vcpu), ("demo", 0));
    assert_eq!(provenance.source, "demo");
    assert_eq!(provenance.run_state(), v1::RunState::Static);
    assert!(provenance.generation >= 1);
    let age = provenance.snapshot_age.expect("an age");
    assert!((0..60).contains(&age.seconds) && age.nanos >= 0, "{age:?}");
    assert_eq!(provenance.assumed, Vec::<String>::new());
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(provenance.host, host.trim());
}
