//! A daemon of scripted answers: it implements the contract's traits and understands nothing.
//!
//! `translate` chooses its answer by the address asked for, the others by the machine: `nobody` is not found.

use std::{net::SocketAddr, path::PathBuf, pin::Pin, thread, time::Duration};

use pagewalk_client::v1::{
    self, machine_service_server as machine, mapping_service_server as mapping,
    memory_service_server as memory, translation_service_server as translation, vcpu_service_server as vcpu,
    walker_service_server as walker,
};
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::{
    Stream, StreamExt as _,
    wrappers::{TcpListenerStream, UnixListenerStream},
};
use tonic::{
    Code, Request, Response, Status,
    transport::{Server, ServerTlsConfig},
};
use tonic_types::{ErrorDetails, StatusExt as _};

pub(crate) const MAPPED: u64 = 0x1000;
pub(crate) const FAULTS: u64 = 0x2000;
pub(crate) const REFUSED: u64 = 0x3000;
pub(crate) const SILENT: u64 = 0x4000;
pub(crate) const MUTE_REFUSAL: u64 = 0x5000;
pub(crate) const STEERING: u64 = 0x6000;
pub(crate) const EMPTY: u64 = 0x7000;
/// How long machine `slow` takes for each part of an answer.
pub(crate) const SLOW: Duration = Duration::from_millis(300);

/// Starts one on a free port of the loopback, for as long as the test process lives.
pub(crate) fn start(tls: Option<ServerTlsConfig>) -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    serve(tls, async move |server| {
        let listener = TcpListener::from_std(listener).unwrap();
        server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
    });
    address
}

/// Starts one on a Unix socket.
pub(crate) fn start_unix(path: PathBuf) {
    let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    listener.set_nonblocking(true).unwrap();
    serve(None, async move |server| {
        let listener = UnixListener::from_std(listener).unwrap();
        server.serve_with_incoming(UnixListenerStream::new(listener)).await.unwrap();
    });
}

fn serve(
    tls: Option<ServerTlsConfig>,
    listen: impl AsyncFnOnce(tonic::transport::server::Router) + Send + 'static,
) {
    thread::spawn(move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async move {
            let (_, health) = tonic_health::server::health_reporter();
            let mut server = Server::builder();
            if let Some(tls) = tls {
                server = server.tls_config(tls).unwrap();
            }
            let router = server
                .add_service(health)
                .add_service(translation::TranslationServiceServer::new(Scripted))
                .add_service(walker::WalkerServiceServer::new(Scripted))
                .add_service(vcpu::VcpuServiceServer::new(Scripted))
                .add_service(mapping::MappingServiceServer::new(Scripted))
                .add_service(memory::MemoryServiceServer::new(Scripted))
                .add_service(machine::MachineServiceServer::new(Scripted));
            listen(router).await;
        });
    });
}

struct Scripted;

pub(crate) fn provenance() -> v1::Provenance {
    v1::Provenance {
        machine: "script".into(),
        source: "demo".into(),
        generation: 7,
        run_state: v1::RunState::Halted.into(),
        snapshot_age: Some(prost_types::Duration { seconds: 0, nanos: 3_000_000 }),
        ..v1::Provenance::default()
    }
}

/// The tasks of some address spaces.
fn tasks(place: usize) -> Vec<v1::Task> {
    let task = |pid, name: &str| v1::Task { pid, name: name.to_owned() };
    match place {
        0 => vec![task(1, "init")],
        1 => vec![task(57, "cat"), task(58, "a\nb\u{1b}[2J")],
        _ => Vec::new(),
    }
}

fn task_list() -> v1::TaskList {
    v1::TaskList {
        state: v1::TaskListState::Incomplete.into(),
        count: 7,
        reason: "the guest's list of tasks: it is longer than 65536 tasks".into(),
    }
}

fn not_found(what: &str) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info("NO_SUCH_THING", "pagewalk", [("known".to_owned(), "script".to_owned())]);
    Status::with_error_details(Code::NotFound, format!("there is no {what}; there is `script`"), details)
}

fn known(reference: Option<&v1::VcpuRef>) -> Result<(), Status> {
    if reference.is_some_and(|reference| reference.machine == "nobody") {
        return Err(not_found("machine `nobody`"));
    }
    Ok(())
}

/// Of machine `echo`, the access that came over the wire, for tests to see.
fn assumed(reference: Option<&v1::VcpuRef>, access: Option<&v1::Access>) -> Vec<String> {
    let echo = reference.is_some_and(|reference| reference.machine == "echo");
    access.into_iter().filter(|_| echo).map(|access| format!("{access:?}")).collect()
}

fn is_slow(reference: Option<&v1::VcpuRef>) -> bool {
    reference.is_some_and(|reference| reference.machine == "slow")
}

fn info(index: u32, state: v1::RunState) -> v1::VcpuInfo {
    v1::VcpuInfo {
        index,
        run_state: state.into(),
        rip: 0x1234,
        cr3: 0x2_0000,
        generation: 7,
        ..v1::VcpuInfo::default()
    }
}

/// Odd pages are not present; the faults told are those that the request wants.
fn batch(request: &v1::BatchTranslateRequest) -> v1::BatchTranslateResponse {
    const MAPPED: u64 = 0x8000_0000_0000_0223;
    const ABSENT: u64 = 1 << 1 | 1 << 5;
    let word = |address: u64| if address & 0x1000 == 0 { MAPPED | address & 0xff_f000 } else { ABSENT };
    let refused: Vec<u32> = (0..)
        .zip(request.column.iter())
        .filter(|(_, address)| word(*address) == ABSENT)
        .map(|(at, _)| at)
        .collect();
    let told = request.head.max_faults.unwrap_or(4096) as usize;
    let assumed = assumed(request.head.vcpu.as_ref(), request.head.access.as_ref());
    let fault = |index: &u32| v1::BatchFault {
        index: *index,
        fault: Some(v1::Fault {
            kind: v1::FaultKind::PageFault.into(),
            dimension: v1::Dimension::Guest.into(),
            error_code: Some(0),
            level: 1,
            entry_gpa: 0x4008,
            bits: 1,
            ..v1::Fault::default()
        }),
    };
    v1::BatchTranslateResponse {
        head: v1::BatchTranslateResponseHead {
            provenance: Some(v1::Provenance { validated: request.head.validate, assumed, ..provenance() }),
            faults: refused.iter().take(told).map(fault).collect(),
            fault_count: refused.len() as u32,
        },
        column: request.column.iter().map(word).collect(),
    }
}

fn script_machine() -> v1::Machine {
    v1::Machine { id: "script".into(), source: "demo".into(), vcpus: 1, ..v1::Machine::default() }
}

#[tonic::async_trait]
impl translation::TranslationService for Scripted {
    async fn translate(
        &self,
        request: Request<v1::TranslateRequest>,
    ) -> Result<Response<v1::TranslateResponse>, Status> {
        let timeout = request.metadata().get("grpc-timeout").map(|value| value.to_str().unwrap().to_owned());
        let request = request.into_inner();
        known(request.vcpu.as_ref())?;
        let Some(v1::address::Value::Number(address)) =
            request.address.clone().and_then(|address| address.value)
        else {
            return Err(Status::invalid_argument("the script takes numbers"));
        };
        let translation = v1::Translation {
            gpa: 0x0010_5000 | address & 0xfff,
            page_size: v1::PageSize::PageSize4k.into(),
            effective: Some(v1::Rights { read: true, write: true, ..v1::Rights::default() }),
            backing: v1::Backing::Ram.into(),
            pat_type: v1::MemoryType::Wb.into(),
            ..v1::Translation::default()
        };
        let mut answer = v1::TranslateResponse {
            outcome: Some(v1::translate_response::Outcome::Translation(translation)),
            provenance: Some(v1::Provenance {
                validated: request.validate,
                torn: request.validate && address == 0xb000,
                repeated_walks: if request.validate && address >= 0xb000 { 7 } else { 0 },
                ..provenance()
            }),
            ..v1::TranslateResponse::default()
        };
        if request.explain {
            // What came over the wire, for tests to see.
            answer.explanation = format!("timeout {} request {request:?}", timeout.unwrap_or_default());
        }
        match address {
            FAULTS => {
                answer.outcome = Some(v1::translate_response::Outcome::Fault(v1::Fault {
                    kind: v1::FaultKind::PageFault.into(),
                    address,
                    error_code: Some(0),
                    level: 1,
                    dimension: v1::Dimension::Guest.into(),
                    entry_gpa: 0x0010_4010,
                    bits: 1,
                    reason: "the PTE is not present".into(),
                    ..v1::Fault::default()
                }));
            }
            REFUSED => return Err(not_found("vCPU 9")),
            SILENT => tokio::time::sleep(Duration::from_secs(60)).await,
            MUTE_REFUSAL => return Err(Status::new(Code::Unavailable, "")),
            STEERING => answer.explanation = "\u{1b}]0;owned\u{7}\u{1b}[2J".into(),
            EMPTY => answer.outcome = None,
            _ => {}
        }
        Ok(Response::new(answer))
    }

    async fn batch_translate(
        &self,
        request: Request<v1::BatchTranslateRequest>,
    ) -> Result<Response<v1::BatchTranslateResponse>, Status> {
        let request = request.into_inner();
        known(request.head.vcpu.as_ref())?;
        if is_slow(request.head.vcpu.as_ref()) {
            tokio::time::sleep(SLOW).await;
        }
        Ok(Response::new(batch(&request)))
    }

    type StreamTranslateStream =
        Pin<Box<dyn Stream<Item = Result<v1::StreamTranslateResponse, Status>> + Send>>;

    async fn stream_translate(
        &self,
        request: Request<tonic::Streaming<v1::StreamTranslateRequest>>,
    ) -> Result<Response<Self::StreamTranslateStream>, Status> {
        use tokio_stream::StreamExt as _;
        Ok(Response::new(Box::pin(request.into_inner().map(|request| {
            let request = request?;
            let asked = request.batch.unwrap_or_default();
            known(asked.head.vcpu.as_ref())?;
            Ok(v1::StreamTranslateResponse { sequence: request.sequence, answer: Some(batch(&asked)) })
        }))))
    }

    type TranslateRangeStream = Parts<v1::TranslateRangeResponse>;

    /// A page and a fault; with a budget of one extent, truncated.
    async fn translate_range(
        &self,
        request: Request<v1::TranslateRangeRequest>,
    ) -> Result<Response<Self::TranslateRangeStream>, Status> {
        let request = request.into_inner();
        known(request.vcpu.as_ref())?;
        let assumed = assumed(request.vcpu.as_ref(), request.access.as_ref());
        let truncated = request.budget.is_some_and(|budget| budget.extents == Some(1));
        let fault = v1::Fault {
            kind: v1::FaultKind::PageFault.into(),
            error_code: Some(0),
            reason: "not present".into(),
            ..v1::Fault::default()
        };
        let refused =
            v1::Extent { start: 0x2000, bytes: 0x1000, outcome: Some(v1::extent::Outcome::Fault(fault)) };
        let part = v1::TranslateRangeResponse {
            extents: if truncated { vec![extent(0x1000)] } else { vec![extent(0x1000), refused] },
            tally: Some(v1::MappingTally { tables: 4, extents: 2, ..v1::MappingTally::default() }),
            last: true,
            truncation: truncated
                .then_some(v1::Truncation { limit: v1::MappingLimit::Extents.into(), continue_at: 0x2000 }),
            provenance: Some(v1::Provenance { assumed, ..provenance() }),
            ..v1::TranslateRangeResponse::default()
        };
        Ok(Response::new(Box::pin(tokio_stream::iter([Ok(part)]))))
    }

    /// Mapped in the first address space, and in no other.
    async fn translate_across(
        &self,
        request: Request<v1::TranslateAcrossRequest>,
    ) -> Result<Response<v1::TranslateAcrossResponse>, Status> {
        use v1::space_translation::Outcome;
        let request = request.into_inner();
        known(request.vcpu.as_ref())?;
        let space = |(place, cr3)| v1::SpaceTranslation {
            cr3,
            outcome: Some(match (place, extent(0x1000).outcome) {
                (0, Some(v1::extent::Outcome::Translation(page))) => Outcome::Translation(page),
                _ => Outcome::Fault(v1::Fault {
                    kind: v1::FaultKind::PageFault.into(),
                    error_code: Some(0),
                    reason: "not present".into(),
                    ..v1::Fault::default()
                }),
            }),
            tasks: tasks(place),
            tasks_left_out: 0,
        };
        Ok(Response::new(v1::TranslateAcrossResponse {
            address: MAPPED,
            symbol: Some(v1::Symbol { name: "init_task".into(), offset: 0x10 }),
            spaces: request.cr3s.into_iter().enumerate().map(space).collect(),
            provenance: Some(provenance()),
            task_list: Some(task_list()),
        }))
    }

    async fn translate_nested_gpa(
        &self,
        request: Request<v1::TranslateNestedGpaRequest>,
    ) -> Result<Response<v1::TranslateNestedGpaResponse>, Status> {
        let request = request.into_inner();
        known(request.vcpu.as_ref())?;
        Ok(Response::new(v1::TranslateNestedGpaResponse {
            outcome: Some(v1::translate_nested_gpa_response::Outcome::Translation(v1::Translation {
                gpa: 0x0010_5000,
                nested_gpa: Some(0x5000),
                nested_page_size: Some(v1::PageSize::PageSize4k.into()),
                effective: Some(v1::Rights { read: true, ..v1::Rights::default() }),
                backing: v1::Backing::Ram.into(),
                ..v1::Translation::default()
            })),
            explanation: if request.explain { format!("{request:?}") } else { String::new() },
            provenance: Some(provenance()),
            ..v1::TranslateNestedGpaResponse::default()
        }))
    }

    async fn explain_fault(
        &self,
        request: Request<v1::ExplainFaultRequest>,
    ) -> Result<Response<v1::ExplainFaultResponse>, Status> {
        let request = request.into_inner();
        known(request.vcpu.as_ref())?;
        Ok(Response::new(v1::ExplainFaultResponse {
            explanation: format!("{request:?}"),
            provenance: Some(provenance()),
            ..v1::ExplainFaultResponse::default()
        }))
    }
}

type Parts<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send + 'static>>;

fn extent(start: u64) -> v1::Extent {
    let page = v1::Translation {
        gpa: 0x0010_5000 + start,
        page_size: v1::PageSize::PageSize4k.into(),
        effective: Some(v1::Rights { read: true, write: true, ..v1::Rights::default() }),
        backing: v1::Backing::Ram.into(),
        pat_type: v1::MemoryType::Wb.into(),
        ..v1::Translation::default()
    };
    v1::Extent { start, bytes: 0x1000, outcome: Some(v1::extent::Outcome::Translation(page)) }
}

#[tonic::async_trait]
impl mapping::MappingService for Scripted {
    async fn list_address_spaces(
        &self,
        request: Request<v1::ListAddressSpacesRequest>,
    ) -> Result<Response<v1::ListAddressSpacesResponse>, Status> {
        if request.get_ref().machine == "nobody" {
            return Err(not_found("machine `nobody`"));
        }
        let kernel = v1::AddressSpace {
            cr3: 0x2_0000,
            sightings: 12,
            generation: 7,
            age: Some(prost_types::Duration { seconds: 0, nanos: 3_000_000 }),
            isolation_pair: Some(0x2_1000),
            tasks: tasks(0),
            ..v1::AddressSpace::default()
        };
        let user = v1::AddressSpace {
            cr3: 0x2_1000,
            sightings: 3,
            vcpu: 1,
            isolation_pair: Some(0x2_0000),
            user_half: true,
            ..kernel.clone()
        };
        let other = v1::AddressSpace {
            cr3: 0x3_0000,
            isolation_pair: None,
            tasks: tasks(1),
            tasks_left_out: 3,
            ..kernel.clone()
        };
        let unseen = v1::AddressSpace { cr3: 0x4_0000, tasks: tasks(0), ..v1::AddressSpace::default() };
        Ok(Response::new(v1::ListAddressSpacesResponse {
            spaces: vec![kernel, user, other, unseen],
            left_out: 2,
            provenance: Some(provenance()),
            task_list: Some(task_list()),
        }))
    }

    type ListMappingsStream = Parts<v1::ListMappingsResponse>;

    /// Two messages and an end; with a budget of one extent, the end is truncated; of machine `cut`, the end is missing; of `slow`,
    /// each message takes its time, and three with nothing but a position come first.
    async fn list_mappings(
        &self,
        request: Request<v1::ListMappingsRequest>,
    ) -> Result<Response<Self::ListMappingsStream>, Status> {
        let request = request.into_inner();
        known(request.vcpu.as_ref())?;
        let slow = is_slow(request.vcpu.as_ref());
        let cut = request.vcpu.is_some_and(|vcpu| vcpu.machine == "cut");
        let truncated = request.budget.is_some_and(|budget| budget.extents == Some(1));
        let truncation =
            v1::Truncation { limit: v1::MappingLimit::Extents.into(), continue_at: 0xffff_8000_0000_2000 };
        let tally = v1::MappingTally {
            tables: 4,
            entries: 2048,
            extents: 2,
            mapped_bytes: 0x2000,
            reserved_entries: 1,
            ..v1::MappingTally::default()
        };
        let part = |start| v1::ListMappingsResponse {
            extents: vec![extent(start)],
            tally: Some(tally),
            provenance: Some(provenance()),
            ..v1::ListMappingsResponse::default()
        };
        let end = v1::ListMappingsResponse {
            extents: Vec::new(),
            last: true,
            truncation: truncated.then_some(truncation),
            ..part(0)
        };
        let mut parts = Vec::new();
        if slow {
            let reached = |position| v1::ListMappingsResponse { extents: Vec::new(), position, ..part(0) };
            parts.extend([0x1000_0000, 0x2000_0000, 0x3000_0000].map(|position| Ok(reached(position))));
        }
        parts.extend([Ok(part(0x1000)), Ok(part(0xffff_8000_0000_0000))]);
        if !cut {
            parts.push(Ok(end));
        }
        let parts = tokio_stream::iter(parts);
        Ok(Response::new(if slow { Box::pin(parts.throttle(SLOW)) } else { Box::pin(parts) }))
    }

    type FindMappingsStream = Parts<v1::FindMappingsResponse>;

    /// What came over the wire decides: below 0x1000 there is nothing.
    async fn find_mappings(
        &self,
        request: Request<v1::FindMappingsRequest>,
    ) -> Result<Response<Self::FindMappingsStream>, Status> {
        let request = request.into_inner();
        known(request.vcpu.as_ref())?;
        let found =
            matches!(request.gpa.and_then(|gpa| gpa.value), Some(v1::address::Value::Number(0x1000..)));
        let part = v1::FindMappingsResponse {
            extents: if found { vec![extent(0x1000)] } else { Vec::new() },
            last: true,
            provenance: Some(provenance()),
            ..v1::FindMappingsResponse::default()
        };
        Ok(Response::new(Box::pin(tokio_stream::iter([Ok(part)]))))
    }
}

#[tonic::async_trait]
impl walker::WalkerService for Scripted {
    async fn get_walker_state(
        &self,
        request: Request<v1::GetWalkerStateRequest>,
    ) -> Result<Response<v1::GetWalkerStateResponse>, Status> {
        known(request.get_ref().vcpu.as_ref())?;
        Ok(Response::new(v1::GetWalkerStateResponse {
            provenance: Some(provenance()),
            ..v1::GetWalkerStateResponse::default()
        }))
    }

    async fn set_nested_mode(
        &self,
        request: Request<v1::SetNestedModeRequest>,
    ) -> Result<Response<v1::SetNestedModeResponse>, Status> {
        let request = request.into_inner();
        known(request.vcpu.as_ref())?;
        Ok(Response::new(v1::SetNestedModeResponse {
            effect: Some(v1::NestedEffect {
                kind: v1::NestedEffectKind::WalkerOnly.into(),
                reason: format!("{request:?}"),
            }),
            ..v1::SetNestedModeResponse::default()
        }))
    }

    type WatchWalkerStateStream =
        Pin<Box<dyn Stream<Item = Result<v1::GetWalkerStateResponse, Status>> + Send + 'static>>;

    /// As many updates as asked for; without a number two, and then the machine goes.
    async fn watch_walker_state(
        &self,
        request: Request<v1::WatchWalkerStateRequest>,
    ) -> Result<Response<Self::WatchWalkerStateStream>, Status> {
        let request = request.into_inner();
        known(request.vcpu.as_ref())?;
        let state = |generation| {
            let provenance = v1::Provenance { generation, ..provenance() };
            Ok(v1::GetWalkerStateResponse {
                provenance: Some(provenance),
                ..v1::GetWalkerStateResponse::default()
            })
        };
        let mut updates: Vec<_> = (1..=u64::from(request.max_updates.unwrap_or(2))).map(state).collect();
        if request.max_updates.is_none() {
            updates.push(Err(Status::unavailable("the machine has gone")));
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(updates))))
    }
}

#[tonic::async_trait]
impl vcpu::VcpuService for Scripted {
    async fn list_vcpus(
        &self,
        request: Request<v1::ListVcpusRequest>,
    ) -> Result<Response<v1::ListVcpusResponse>, Status> {
        if request.get_ref().machine == "nobody" {
            return Err(not_found("machine `nobody`"));
        }
        let vcpus = vec![info(0, v1::RunState::Running)];
        Ok(Response::new(v1::ListVcpusResponse { vcpus, provenance: Some(provenance()) }))
    }

    async fn get_registers(
        &self,
        request: Request<v1::GetRegistersRequest>,
    ) -> Result<Response<v1::GetRegistersResponse>, Status> {
        known(request.get_ref().vcpu.as_ref())?;
        let registers = v1::Registers { rip: Some(0x1234), cpl: Some(3), ..v1::Registers::default() };
        Ok(Response::new(v1::GetRegistersResponse {
            registers: Some(registers),
            provenance: Some(provenance()),
        }))
    }

    async fn set_registers(
        &self,
        request: Request<v1::SetRegistersRequest>,
    ) -> Result<Response<v1::SetRegistersResponse>, Status> {
        let request = request.into_inner();
        known(request.vcpu.as_ref())?;
        Ok(Response::new(v1::SetRegistersResponse {
            registers: request.registers,
            provenance: Some(provenance()),
        }))
    }

    async fn pause_vcpu(
        &self,
        request: Request<v1::PauseVcpuRequest>,
    ) -> Result<Response<v1::PauseVcpuResponse>, Status> {
        known(request.get_ref().vcpu.as_ref())?;
        let vcpu = Some(info(0, v1::RunState::Paused));
        Ok(Response::new(v1::PauseVcpuResponse { vcpu, provenance: Some(provenance()) }))
    }

    async fn resume_vcpu(
        &self,
        request: Request<v1::ResumeVcpuRequest>,
    ) -> Result<Response<v1::ResumeVcpuResponse>, Status> {
        known(request.get_ref().vcpu.as_ref())?;
        let vcpu = Some(info(0, v1::RunState::Running));
        Ok(Response::new(v1::ResumeVcpuResponse { vcpu, provenance: Some(provenance()) }))
    }

    async fn step_vcpu(
        &self,
        request: Request<v1::StepVcpuRequest>,
    ) -> Result<Response<v1::StepVcpuResponse>, Status> {
        known(request.get_ref().vcpu.as_ref())?;
        let registers = v1::Registers { rip: Some(0x1236), ..v1::Registers::default() };
        Ok(Response::new(v1::StepVcpuResponse {
            vcpu: Some(info(0, v1::RunState::Paused)),
            registers: Some(registers),
            provenance: Some(provenance()),
        }))
    }
}

#[tonic::async_trait]
impl memory::MemoryService for Scripted {
    /// Sevens; symbols are the last MiB of all addresses. Of machine `short`, 16 at most, for a reason that steers a terminal.
    async fn read_memory(
        &self,
        request: Request<v1::ReadMemoryRequest>,
    ) -> Result<Response<v1::ReadMemoryResponse>, Status> {
        use v1::{address::Value, read_memory_request::At};
        let request = request.into_inner();
        known(request.vcpu.as_ref())?;
        let Some(At::Gva(at) | At::Gpa(at)) = request.at else {
            return Err(Status::invalid_argument("where from?"));
        };
        let address = match at.value {
            Some(Value::Number(address)) => address,
            _ => 0xffff_ffff_fff0_0000,
        };
        let short = request.vcpu.is_some_and(|vcpu| vcpu.machine == "short");
        let length = if short { request.length.min(16) } else { request.length };
        let stop = || v1::MemoryStop {
            address: address + length,
            gpa: 0x5000,
            reason: "\u{1b}[2Jno memory".into(),
            fault: None,
        };
        Ok(Response::new(v1::ReadMemoryResponse {
            data: vec![7; length as usize],
            stop: (length < request.length).then(stop),
            address,
            provenance: Some(provenance()),
        }))
    }

    /// As a service that is no daemon answers.
    async fn write_memory(
        &self,
        _: Request<v1::WriteMemoryRequest>,
    ) -> Result<Response<v1::WriteMemoryResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[tonic::async_trait]
impl machine::MachineService for Scripted {
    async fn list_machines(
        &self,
        _: Request<v1::ListMachinesRequest>,
    ) -> Result<Response<v1::ListMachinesResponse>, Status> {
        Ok(Response::new(v1::ListMachinesResponse {
            machines: vec![script_machine()],
            provenance: Some(v1::Provenance::default()),
            daemon_version: "9.9.9".into(),
        }))
    }

    async fn attach_machine(
        &self,
        request: Request<v1::AttachMachineRequest>,
    ) -> Result<Response<v1::AttachMachineResponse>, Status> {
        Ok(Response::new(v1::AttachMachineResponse {
            machine: Some(v1::Machine { description: request.into_inner().spec, ..script_machine() }),
            provenance: Some(v1::Provenance::default()),
        }))
    }

    type SaveImageStream = Parts<v1::SaveImageResponse>;

    /// An image of two pages, the second of which is set. Of machine `torn` it has no end; of `wide`, a piece too many; of
    /// `stuck`, nothing after the start.
    async fn save_image(
        &self,
        request: Request<v1::SaveImageRequest>,
    ) -> Result<Response<Self::SaveImageStream>, Status> {
        use v1::save_image_response::Part;
        let request = request.into_inner();
        let start = v1::ImageStart {
            description: format!("# {}\n", request.memory_file),
            memory_file_bytes: 0x2000,
            provenance: None,
        };
        let piece = |offset| Part::Piece(v1::ImagePiece { offset, contents: vec![7; 0x1000] });
        let parts = match request.machine.as_str() {
            "torn" => vec![Part::Start(start), piece(0x1000)],
            "wide" => vec![Part::Start(start), piece(0x2000)],
            "stuck" => vec![Part::Start(start)],
            _ => vec![Part::Start(start), piece(0x1000), Part::End(v1::ImageEnd { contents_bytes: 0x1000 })],
        };
        let part = |part| Ok(v1::SaveImageResponse { part: Some(part) });
        let parts = tokio_stream::iter(parts.into_iter().map(part).collect::<Vec<_>>());
        Ok(Response::new(if request.machine == "stuck" {
            Box::pin(parts.chain(tokio_stream::pending()))
        } else {
            Box::pin(parts)
        }))
    }

    async fn detach_machine(
        &self,
        _: Request<v1::DetachMachineRequest>,
    ) -> Result<Response<v1::DetachMachineResponse>, Status> {
        Ok(Response::new(v1::DetachMachineResponse { provenance: Some(v1::Provenance::default()) }))
    }

    async fn get_machine(
        &self,
        request: Request<v1::GetMachineRequest>,
    ) -> Result<Response<v1::GetMachineResponse>, Status> {
        if request.get_ref().machine == "nobody" {
            return Err(not_found("machine `nobody`"));
        }
        Ok(Response::new(v1::GetMachineResponse {
            machine: Some(script_machine()),
            provenance: Some(provenance()),
        }))
    }
}
