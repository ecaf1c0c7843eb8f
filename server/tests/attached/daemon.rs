//! A daemon in this process that starts without a machine.

use std::path::Path;
use std::time::Duration;

use libtest_mimic::Failed;
use pagewalk_proto::v1;
use pagewalk_proto::v1::machine_service_client::MachineServiceClient;
use pagewalk_proto::v1::mapping_service_client::MappingServiceClient;
use pagewalk_proto::v1::memory_service_client::MemoryServiceClient;
use pagewalk_proto::v1::translation_service_client::TranslationServiceClient;
use pagewalk_proto::v1::vcpu_service_client::VcpuServiceClient;
use pagewalkd::config::Config;
use pagewalkd::machine::Machines;
use pagewalkd::serve::Server;
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

pub(crate) struct Daemon {
    runtime: Runtime,
    channel: Channel,
}

impl Daemon {
    pub(crate) fn start() -> Result<Self, Failed> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let config = Config::on_loopback();
        let channel = runtime.block_on(async {
            let server = Server::bind(&config, Machines::default()).await?;
            let address = server.addresses()[0];
            tokio::spawn(server.run(std::future::pending()));
            Ok::<_, Failed>(Channel::from_shared(format!("http://{address}"))?.connect().await?)
        })?;
        Ok(Self { runtime, channel })
    }

    pub(crate) fn attach(&self, spec: &str) -> Result<v1::Machine, Status> {
        let request = v1::AttachMachineRequest { spec: spec.to_owned() };
        let mut client = MachineServiceClient::new(self.channel.clone());
        let answer = self.runtime.block_on(client.attach_machine(request))?;
        Ok(answer.into_inner().machine.unwrap())
    }

    /// Attaches as machine `id` to the guest behind a QMP socket.
    pub(crate) fn attach_qemu(&self, id: &str, qmp: &Path) -> Result<v1::Machine, Status> {
        self.attach(&format!("{id}=qemu:qmp={}", qmp.display()))
    }

    pub(crate) fn detach(&self, id: &str) -> Result<(), Status> {
        let request = v1::DetachMachineRequest { machine: id.to_owned(), end_guest: false };
        let mut client = MachineServiceClient::new(self.channel.clone());
        self.runtime.block_on(client.detach_machine(request)).map(drop)
    }

    pub(crate) fn machine(&self, id: &str) -> v1::Machine {
        let request = v1::GetMachineRequest { machine: id.to_owned() };
        let mut client = MachineServiceClient::new(self.channel.clone());
        self.runtime.block_on(client.get_machine(request)).unwrap().into_inner().machine.unwrap()
    }

    pub(crate) fn pause(&self, id: &str) -> Result<v1::VcpuInfo, Status> {
        let request = v1::PauseVcpuRequest { vcpu: vcpu(id, 0) };
        let mut client = VcpuServiceClient::new(self.channel.clone());
        Ok(self.runtime.block_on(client.pause_vcpu(request))?.into_inner().vcpu.unwrap())
    }

    pub(crate) fn resume(&self, id: &str) -> Result<v1::VcpuInfo, Status> {
        let request = v1::ResumeVcpuRequest { vcpu: vcpu(id, 0) };
        let mut client = VcpuServiceClient::new(self.channel.clone());
        Ok(self.runtime.block_on(client.resume_vcpu(request))?.into_inner().vcpu.unwrap())
    }

    /// Saves a machine, and throws it away.
    pub(crate) fn save(&self, id: &str, within: Duration) -> Result<(), Status> {
        let mut request =
            Request::new(v1::SaveImageRequest { machine: id.to_owned(), memory_file: String::new() });
        request.set_timeout(within);
        let mut client = MachineServiceClient::new(self.channel.clone());
        self.runtime.block_on(async {
            let mut parts = client.save_image(request).await?.into_inner();
            while parts.message().await?.is_some() {}
            Ok(())
        })
    }

    pub(crate) fn registers(&self, id: &str, index: u32) -> Result<v1::GetRegistersResponse, Status> {
        self.registers_as_of(id, index, v1::Freshness::Sync)
    }

    pub(crate) fn registers_as_of(
        &self,
        id: &str,
        index: u32,
        freshness: v1::Freshness,
    ) -> Result<v1::GetRegistersResponse, Status> {
        let request = v1::GetRegistersRequest { vcpu: vcpu(id, index), freshness: freshness.into() };
        let mut client = VcpuServiceClient::new(self.channel.clone());
        Ok(self.runtime.block_on(client.get_registers(request))?.into_inner())
    }

    pub(crate) fn vcpus(&self, id: &str) -> Vec<v1::VcpuInfo> {
        let request = v1::ListVcpusRequest { machine: id.to_owned() };
        let mut client = VcpuServiceClient::new(self.channel.clone());
        self.runtime.block_on(client.list_vcpus(request)).unwrap().into_inner().vcpus
    }

    /// What addresses mean, by the words of `BatchTranslate`, whatever the rights.
    pub(crate) fn words(&self, id: &str, index: u32, addresses: &[u64]) -> Result<Vec<u64>, Status> {
        self.batch(id, index, addresses).map(|(words, _)| words)
    }

    /// The same from another root.
    pub(crate) fn words_from(&self, id: &str, cr3: u64, addresses: &[u64]) -> Result<Vec<u64>, Status> {
        let state = v1::WalkerOverride { cr3: Some(cr3), ..Default::default() };
        self.batch_with(id, 0, addresses, Some(state)).map(|(words, _)| words)
    }

    /// The same, and all faults among them.
    pub(crate) fn batch(
        &self,
        id: &str,
        index: u32,
        addresses: &[u64],
    ) -> Result<(Vec<u64>, Vec<v1::BatchFault>), Status> {
        self.batch_with(id, index, addresses, None)
    }

    fn batch_with(
        &self,
        id: &str,
        index: u32,
        addresses: &[u64],
        state: Option<v1::WalkerOverride>,
    ) -> Result<(Vec<u64>, Vec<v1::BatchFault>), Status> {
        let request = v1::BatchTranslateRequest {
            head: v1::BatchTranslateRequestHead {
                vcpu: vcpu(id, index),
                access: Some(exempt()),
                max_faults: Some(1 << 16),
                r#override: state,
                ..Default::default()
            },
            column: addresses.iter().copied().collect(),
        };
        let mut client =
            TranslationServiceClient::new(self.channel.clone()).max_decoding_message_size(32 << 20);
        let answer = self.runtime.block_on(client.batch_translate(request))?.into_inner();
        Ok((answer.column.iter().collect(), answer.head.faults))
    }

    /// What is mapped from another root: first addresses, and numbers of bytes.
    pub(crate) fn mapped_from(&self, id: &str, cr3: u64) -> Result<Vec<(u64, u64)>, Status> {
        let request = v1::ListMappingsRequest {
            vcpu: vcpu(id, 0),
            r#override: Some(v1::WalkerOverride { cr3: Some(cr3), ..Default::default() }),
            ..Default::default()
        };
        let mut client = MappingServiceClient::new(self.channel.clone());
        self.runtime.block_on(async {
            let mut parts = client.list_mappings(request).await?.into_inner();
            let mut extents = Vec::new();
            while let Some(part) = parts.message().await? {
                extents.extend(part.extents.iter().map(|extent| (extent.start, extent.bytes)));
            }
            Ok(extents)
        })
    }

    pub(crate) fn translate(&self, id: &str, gva: u64) -> Result<v1::TranslateResponse, Status> {
        let request = v1::TranslateRequest {
            vcpu: vcpu(id, 0),
            address: Some(number(gva)),
            access: Some(exempt()),
            ..Default::default()
        };
        let mut client = TranslationServiceClient::new(self.channel.clone());
        Ok(self.runtime.block_on(client.translate(request))?.into_inner())
    }

    /// The same, from a root that the caller brings.
    pub(crate) fn translate_from(
        &self,
        id: &str,
        cr3: u64,
        gva: u64,
    ) -> Result<v1::TranslateResponse, Status> {
        let request = v1::TranslateRequest {
            vcpu: vcpu(id, 0),
            address: Some(number(gva)),
            access: Some(exempt()),
            r#override: Some(v1::WalkerOverride { cr3: Some(cr3), ..Default::default() }),
            ..Default::default()
        };
        let mut client = TranslationServiceClient::new(self.channel.clone());
        Ok(self.runtime.block_on(client.translate(request))?.into_inner())
    }

    pub(crate) fn read(
        &self,
        id: &str,
        index: u32,
        gva: u64,
        length: u64,
    ) -> Result<v1::ReadMemoryResponse, Status> {
        let request = v1::ReadMemoryRequest {
            vcpu: vcpu(id, index),
            at: Some(v1::read_memory_request::At::Gva(number(gva))),
            length,
            ..Default::default()
        };
        let mut client = MemoryServiceClient::new(self.channel.clone());
        Ok(self.runtime.block_on(client.read_memory(request))?.into_inner())
    }

    /// Asks for an address as text, in an address space of its own if one is named.
    pub(crate) fn translate_text(
        &self,
        id: &str,
        index: usize,
        address: &str,
        cr3: Option<u64>,
    ) -> Result<v1::TranslateResponse, Status> {
        let request = v1::TranslateRequest {
            vcpu: vcpu(id, index as u32),
            address: Some(text(address)),
            access: Some(exempt()),
            r#override: cr3.map(space),
            trace: true,
            ..Default::default()
        };
        let mut client = TranslationServiceClient::new(self.channel.clone());
        Ok(self.runtime.block_on(client.translate(request))?.into_inner())
    }

    /// Asks for an address in many address spaces, whatever its rights.
    pub(crate) fn across(
        &self,
        id: &str,
        address: u64,
        cr3s: Vec<u64>,
    ) -> Result<Vec<v1::SpaceTranslation>, Status> {
        let request = v1::TranslateAcrossRequest {
            vcpu: vcpu(id, 0),
            address: Some(number(address)),
            access: Some(exempt()),
            cr3s,
            ..Default::default()
        };
        let mut client = TranslationServiceClient::new(self.channel.clone());
        Ok(self.runtime.block_on(client.translate_across(request))?.into_inner().spaces)
    }

    pub(crate) fn spaces(&self, id: &str) -> Result<v1::ListAddressSpacesResponse, Status> {
        let request = v1::ListAddressSpacesRequest { machine: id.to_owned() };
        let mut client = MappingServiceClient::new(self.channel.clone());
        Ok(self.runtime.block_on(client.list_address_spaces(request))?.into_inner())
    }

    /// The first bytes at an address that is written as text.
    pub(crate) fn read_text(
        &self,
        id: &str,
        index: usize,
        address: &str,
        cr3: u64,
    ) -> Result<Vec<u8>, Status> {
        let request = v1::ReadMemoryRequest {
            vcpu: vcpu(id, index as u32),
            at: Some(v1::read_memory_request::At::Gva(text(address))),
            length: 16,
            r#override: Some(space(cr3)),
            ..Default::default()
        };
        let mut client = MemoryServiceClient::new(self.channel.clone());
        Ok(self.runtime.block_on(client.read_memory(request))?.into_inner().data)
    }

    pub(crate) fn read_physical(&self, id: &str, gpa: u64, length: u64) -> Result<Vec<u8>, Status> {
        let request = v1::ReadMemoryRequest {
            vcpu: vcpu(id, 0),
            at: Some(v1::read_memory_request::At::Gpa(number(gpa))),
            length,
            ..Default::default()
        };
        let mut client = MemoryServiceClient::new(self.channel.clone());
        Ok(self.runtime.block_on(client.read_memory(request))?.into_inner().data)
    }

    pub(crate) fn write_physical(&self, id: &str, gpa: u64, data: &[u8]) -> Result<(), Status> {
        let request = v1::WriteMemoryRequest {
            vcpu: vcpu(id, 0),
            at: Some(v1::write_memory_request::At::Gpa(number(gpa))),
            data: data.to_vec(),
            ..Default::default()
        };
        let mut client = MemoryServiceClient::new(self.channel.clone());
        self.runtime.block_on(client.write_memory(request)).map(drop)
    }
}

fn vcpu(machine: &str, vcpu: u32) -> Option<v1::VcpuRef> {
    Some(v1::VcpuRef { machine: machine.to_owned(), vcpu })
}

fn number(address: u64) -> v1::Address {
    v1::Address { value: Some(v1::address::Value::Number(address)) }
}

fn text(address: &str) -> v1::Address {
    v1::Address { value: Some(v1::address::Value::Text(address.to_owned())) }
}

fn space(cr3: u64) -> v1::WalkerOverride {
    v1::WalkerOverride { cr3: Some(cr3), ..Default::default() }
}

fn exempt() -> v1::Access {
    v1::Access {
        kind: v1::AccessKind::Read.into(),
        privilege: v1::Privilege::Exempt.into(),
        ..Default::default()
    }
}

/// Code and reason of a refusal, which has to say `said`.
#[track_caller]
pub(crate) fn refusal<T: std::fmt::Debug>(answer: Result<T, Status>, said: &str) -> (Code, String) {
    let status = answer.expect_err("should have been refused");
    assert!(status.message().contains(said), "{said:?} is missing in {status:?}");
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo: {status:?}"));
    (status.code(), info.reason)
}
