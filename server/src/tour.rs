//! A short tour of the demo machine, made over gRPC by a client of the daemon's own.

use std::io::Write as _;
use std::net::SocketAddr;

use pagewalk_proto::v1;
use pagewalk_proto::v1::machine_service_client::MachineServiceClient;
use pagewalk_proto::v1::set_nested_mode_request::Mode;
use pagewalk_proto::v1::translation_service_client::TranslationServiceClient;
use pagewalk_proto::v1::walker_service_client::WalkerServiceClient;
use tokio::sync::oneshot;
use tonic::transport::Channel;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Makes the tour against the daemon at `address` and prints it. Then, if `once`, says so through `over`; otherwise the
/// daemon goes on serving.
///
/// # Errors
/// When a call fails, or the output is closed.
pub async fn run(address: SocketAddr, once: bool, over: oneshot::Sender<()>) -> Result<(), Error> {
    let outcome = tour(address, once).await;
    if once {
        // Whoever waits for the end waits for it on failure too.
        let _ = over.send(());
    } else if let Err(error) = &outcome {
        tracing::warn!("the tour ended early, the daemon serves on: {error}");
    }
    outcome
}

async fn tour(address: SocketAddr, once: bool) -> Result<(), Error> {
    let channel = Channel::from_shared(format!("http://{address}"))?.connect().await?;
    let mut guide = Guide {
        translation: TranslationServiceClient::new(channel.clone()),
        walker: WalkerServiceClient::new(channel.clone()),
        landmarks: Vec::new(),
    };
    let machine = MachineServiceClient::new(channel).get_machine(v1::GetMachineRequest::default()).await?;
    let machine = machine.into_inner().machine.ok_or("the daemon describes no machine")?;
    guide.landmarks = machine.landmarks;
    say(&format!("\nmachine {}: {}\n", machine.id, machine.description))?;

    say("\n1. What does an address mean? Here is the guest's own code, read by its kernel.\n\n")?;
    say(&guide.translate("kernel-text", v1::AccessKind::Read).await?)?;

    say("\n2. Somebody saw a page fault. Which bit of which entry was it?\n\n")?;
    say(&guide.explain("read-only", 3).await?)?;

    say("\n3. A guest of the guest: the same question under nested paging, in two dimensions.\n\n")?;
    let on = guide.nested(true).await?;
    let ladder = guide.translate("l2-data", v1::AccessKind::Write).await;
    // Off again before the output can fail.
    let off = guide.nested(false).await?;
    say(&on)?;
    say(&ladder?)?;
    say(&off)?;

    let example = guide.landmark("kernel-text")?;
    let (condition, address) = if once {
        (" while `cargo run --release -- demo` runs", SocketAddr::from(([127, 0, 0, 1], 50051)))
    } else {
        ("", address)
    };
    say(&format!(
        "\nAsk for more{condition}:\n\
         \x20 cargo run --release -p pagewalk-client -- --addr {address} translate {example:#x} --explain\n\
         \x20 cargo run --release -p pagewalk-client -- --addr {address} machines\n\
         \x20 grpcurl -plaintext {address} list\n\
         \x20 grpcurl -plaintext -d '{{\"address\": {{\"text\": \"{example:#x}\"}}, \
         \"access\": {{\"kind\": \"ACCESS_KIND_READ\"}}, \"explain\": true}}' \
         {address} pagewalk.v1.TranslationService/Translate\n"
    ))
}

fn say(text: &str) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

struct Guide {
    translation: TranslationServiceClient<Channel>,
    walker: WalkerServiceClient<Channel>,
    landmarks: Vec<v1::Landmark>,
}

impl Guide {
    fn landmark(&self, name: &str) -> Result<u64, Error> {
        let found = self.landmarks.iter().find(|landmark| landmark.name == name);
        Ok(found.ok_or_else(|| format!("the machine has no landmark `{name}`"))?.address)
    }

    fn address(&self, name: &str) -> Result<Option<v1::Address>, Error> {
        let value = v1::address::Value::Number(self.landmark(name)?);
        Ok(Some(v1::Address { value: Some(value) }))
    }

    async fn translate(&mut self, name: &str, kind: v1::AccessKind) -> Result<String, Error> {
        let request = v1::TranslateRequest {
            address: self.address(name)?,
            access: Some(v1::Access {
                kind: kind.into(),
                privilege: v1::Privilege::Supervisor.into(),
                ..Default::default()
            }),
            explain: true,
            ..Default::default()
        };
        Ok(self.translation.translate(request).await?.into_inner().explanation)
    }

    async fn explain(&mut self, name: &str, error_code: u32) -> Result<String, Error> {
        let seen = v1::PageFault { error_code, cr2: self.address(name)? };
        let request = v1::ExplainFaultRequest {
            seen: Some(v1::explain_fault_request::Seen::PageFault(seen)),
            ..Default::default()
        };
        Ok(self.translation.explain_fault(request).await?.into_inner().explanation)
    }

    /// Switches nested mode, and gives a line that says so.
    async fn nested(&mut self, on: bool) -> Result<String, Error> {
        let request = if on {
            v1::SetNestedModeRequest {
                mode: Some(Mode::Npt(v1::Npt { ncr3: self.landmark("l2-ncr3")?, ..Default::default() })),
                l2: Some(v1::Registers { cr3: Some(self.landmark("l2-cr3")?), ..Default::default() }),
                ..Default::default()
            }
        } else {
            v1::SetNestedModeRequest { mode: Some(Mode::Off(true)), ..Default::default() }
        };
        let effect = self.walker.set_nested_mode(request).await?.into_inner().effect.unwrap_or_default();
        let place = match effect.kind() {
            v1::NestedEffectKind::RealVcpu => "on the vCPU",
            _ => "in the walkers alone",
        };
        Ok(format!("nested mode {} {place}: {}\n", if on { "on" } else { "off" }, effect.reason))
    }
}
