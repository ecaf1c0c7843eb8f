//! One connection to a daemon, and one method per RPC.

use std::time::Duration;

use pagewalk_proto::v1::{
    self, machine_service_client::MachineServiceClient, mapping_service_client::MappingServiceClient,
    memory_service_client::MemoryServiceClient, translation_service_client::TranslationServiceClient,
    vcpu_service_client::VcpuServiceClient, walker_service_client::WalkerServiceClient,
};
use tonic::{IntoStreamingRequest, Request, Response, Status, Streaming, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{answers::Answers, connection::ConnectionError, endpoint::Endpoint, error::Error, unix};

/// How long a call may take unless told otherwise.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(10);

/// The transport panics where the wire has no way to write a deadline.
const LONGEST_DEADLINE: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// An answer to the largest batch, with as many faults as can be asked for, is smaller.
const LARGEST_ANSWER: usize = 12 << 20;

/// A connection to a daemon. Clones share it; calls do not wait for each other.
///
/// Every call carries its deadline to the daemon, which stops working when it passes, and is given up here as well, should
/// the daemon not keep to it.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
    endpoint: Endpoint,
    deadline: Duration,
}

macro_rules! unary {
    ($($(#[$doc:meta])* $method:ident: $service:ident, $request:ident -> $response:ident;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// If the daemon cannot be reached, refuses, or does not answer in time.
        pub async fn $method(&self, request: v1::$request) -> Result<v1::$response, Error> {
            let mut service = $service::new(self.channel.clone());
            self.bounded(service.$method(self.request(request))).await
        }
    )*};
}

macro_rules! streams {
    ($($(#[$doc:meta])* $method:ident: $service:ident, $request:ident -> $response:ident;)*) => {$(
        $(#[$doc])*
        ///
        /// Only the stream's start has a deadline.
        ///
        /// # Errors
        /// If the daemon cannot be reached, refuses, or does not begin to answer in time.
        pub async fn $method(&self, request: v1::$request) -> Result<Answers<v1::$response>, Error> {
            let mut service = $service::new(self.channel.clone());
            let stream = self.bounded(service.$method(request)).await?;
            Ok(Answers::new(stream, self.endpoint.clone()))
        }
    )*};
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// If the endpoint contradicts itself, or no connection comes about within its timeout.
    pub async fn connect(endpoint: Endpoint) -> Result<Self, Error> {
        let transport = endpoint.transport()?;
        // The transport's own bound covers neither the TLS handshake nor the name's resolution.
        let connected = async {
            match endpoint.socket() {
                Some(path) => unix::connect(&transport, path.clone()).await,
                None => transport.connect().await,
            }
        };
        let channel = match tokio::time::timeout(endpoint.connect_timeout(), connected).await {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => return Err(ConnectionError::from_transport(&endpoint, &error).into()),
            Err(_) => return Err(ConnectionError::timeout(&endpoint).into()),
        };
        Ok(Self { channel, endpoint, deadline: DEFAULT_DEADLINE })
    }

    /// Gives every call so long, a year at most. Default: [`DEFAULT_DEADLINE`].
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline: deadline.min(LONGEST_DEADLINE), ..self }
    }

    /// Where it is connected to.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    unary! {
        /// Translates one guest virtual address. A fault is an answer.
        translate: TranslationServiceClient, TranslateRequest -> TranslateResponse;
        /// Translates one guest virtual address in many address spaces. Faults are answers.
        translate_across: TranslationServiceClient, TranslateAcrossRequest -> TranslateAcrossResponse;
        /// Translates one guest physical address of an L2. A fault is an answer.
        translate_nested_gpa: TranslationServiceClient, TranslateNestedGpaRequest -> TranslateNestedGpaResponse;
        /// Explains a fault that somebody saw.
        explain_fault: TranslationServiceClient, ExplainFaultRequest -> ExplainFaultResponse;
        /// Gives the whole of both walkers.
        get_walker_state: WalkerServiceClient, GetWalkerStateRequest -> GetWalkerStateResponse;
        /// Switches nested mode on or off.
        set_nested_mode: WalkerServiceClient, SetNestedModeRequest -> SetNestedModeResponse;
        /// Lists the address spaces that a machine's vCPUs were seen in.
        list_address_spaces: MappingServiceClient, ListAddressSpacesRequest -> ListAddressSpacesResponse;
        /// Lists the vCPUs of a machine.
        list_vcpus: VcpuServiceClient, ListVcpusRequest -> ListVcpusResponse;
        /// Gives the registers of a vCPU.
        get_registers: VcpuServiceClient, GetRegistersRequest -> GetRegistersResponse;
        /// Writes registers of a vCPU.
        set_registers: VcpuServiceClient, SetRegistersRequest -> SetRegistersResponse;
        /// Stops a vCPU.
        pause_vcpu: VcpuServiceClient, PauseVcpuRequest -> PauseVcpuResponse;
        /// Lets a stopped vCPU run on.
        resume_vcpu: VcpuServiceClient, ResumeVcpuRequest -> ResumeVcpuResponse;
        /// Executes one instruction and leaves the vCPU stopped.
        step_vcpu: VcpuServiceClient, StepVcpuRequest -> StepVcpuResponse;
        /// Lists the machines.
        list_machines: MachineServiceClient, ListMachinesRequest -> ListMachinesResponse;
        /// Gives one machine.
        get_machine: MachineServiceClient, GetMachineRequest -> GetMachineResponse;
        /// Takes in a machine.
        attach_machine: MachineServiceClient, AttachMachineRequest -> AttachMachineResponse;
        /// Reads memory, at most 1 MiB.
        read_memory: MemoryServiceClient, ReadMemoryRequest -> ReadMemoryResponse;
        /// Writes memory, at most 32 KiB.
        write_memory: MemoryServiceClient, WriteMemoryRequest -> WriteMemoryResponse;
        /// Lets go of a machine.
        detach_machine: MachineServiceClient, DetachMachineRequest -> DetachMachineResponse;
    }

    /// Translates up to 262144 guest virtual addresses. Faults are answers.
    ///
    /// # Errors
    /// If the daemon cannot be reached, refuses, or does not answer in time.
    pub async fn batch_translate(
        &self,
        request: v1::BatchTranslateRequest,
    ) -> Result<v1::BatchTranslateResponse, Error> {
        self.bounded(self.translation().batch_translate(self.request(request))).await
    }

    /// Translates batches as they come, each answered in its turn. Only the stream's start has a deadline. Who does not take
    /// the answers is not read from any more.
    ///
    /// # Errors
    /// If the daemon cannot be reached, refuses, or does not begin to answer in time.
    pub async fn stream_translate(
        &self,
        requests: impl IntoStreamingRequest<Message = v1::StreamTranslateRequest>,
    ) -> Result<Answers<v1::StreamTranslateResponse>, Error> {
        let stream = self.bounded(self.translation().stream_translate(requests)).await?;
        Ok(Answers::new(stream, self.endpoint.clone()))
    }

    fn translation(&self) -> TranslationServiceClient<Channel> {
        TranslationServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_ANSWER)
    }

    streams! {
        /// Streams the walker state: what it is now, then each change, the newest always among them.
        watch_walker_state: WalkerServiceClient, WatchWalkerStateRequest -> GetWalkerStateResponse;
        /// Lists the mappings of an address space. The answer with `last` set ends the list.
        list_mappings: MappingServiceClient, ListMappingsRequest -> ListMappingsResponse;
        /// Finds the guest virtual addresses that lead to a guest physical one. The answer with `last` set ends the search.
        find_mappings: MappingServiceClient, FindMappingsRequest -> FindMappingsResponse;
        /// Translates a range for one access. The answer with `last` set ends it.
        translate_range: TranslationServiceClient, TranslateRangeRequest -> TranslateRangeResponse;
    }

    /// Streams the parts of an image. Each has as long to come as a call.
    pub(crate) async fn image_parts(&self, request: v1::SaveImageRequest) -> Result<ImageParts, Error> {
        let mut service = MachineServiceClient::new(self.channel.clone());
        let stream = self.bounded(service.save_image(request)).await?;
        Ok(ImageParts { stream, client: self.clone() })
    }

    /// Whether the daemon says that it serves, by the standard health protocol.
    ///
    /// # Errors
    /// If the daemon cannot be reached, refuses, or does not answer in time.
    pub async fn is_serving(&self) -> Result<bool, Error> {
        let mut service = HealthClient::new(self.channel.clone());
        let answer =
            self.bounded(service.check(self.request(HealthCheckRequest { service: String::new() }))).await?;
        Ok(answer.status() == ServingStatus::Serving)
    }

    async fn next_of<T>(&self, stream: &mut Streaming<T>) -> Result<Option<T>, Error> {
        match tokio::time::timeout(self.deadline, stream.message()).await {
            Ok(Ok(part)) => Ok(part),
            Ok(Err(status)) => Err(Error::from_status(&self.endpoint, Some(self.deadline), &status)),
            Err(_) => Err(Error::Deadline { endpoint: self.endpoint.to_string(), after: self.deadline }),
        }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.deadline);
        request
    }

    async fn bounded<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Error> {
        match tokio::time::timeout(self.deadline, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(Error::from_status(&self.endpoint, Some(self.deadline), &status)),
            Err(_) => Err(Error::Deadline { endpoint: self.endpoint.to_string(), after: self.deadline }),
        }
    }
}

/// The parts of an image, as they come.
pub(crate) struct ImageParts {
    stream: Streaming<v1::SaveImageResponse>,
    client: Client,
}

impl ImageParts {
    /// Waits for the next part; `None` when the daemon ended the stream.
    pub(crate) async fn next(&mut self) -> Result<Option<v1::SaveImageResponse>, Error> {
        self.client.next_of(&mut self.stream).await
    }
}
