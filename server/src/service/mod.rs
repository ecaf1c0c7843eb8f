//! The services. Each call resolves what it names, calls the vCPU or the walker, and converts the answer.

mod batch;
mod by_size;
mod client_files;
mod explain;
mod machine;
mod mapping;
mod memory;
mod names;
mod nested_gpa;
mod outlet;
mod parts;
mod range;
mod resolve;
mod save_image;
mod spaces;
mod stream;
mod translate;
mod translation;
mod turns;
mod vcpu;
mod walker;

use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::available_parallelism;

use pagewalk_proto::v1::machine_service_server::MachineServiceServer;
use pagewalk_proto::v1::mapping_service_server::MappingServiceServer;
use pagewalk_proto::v1::memory_service_server::MemoryServiceServer;
use pagewalk_proto::v1::translation_service_server::TranslationServiceServer;
use pagewalk_proto::v1::vcpu_service_server::VcpuServiceServer;
use pagewalk_proto::v1::walker_service_server::WalkerServiceServer;
use tokio::sync::{Semaphore, watch};
use tonic::service::Routes;

use by_size::BySize;
use client_files::ClientFiles;
use turns::Turns;

use crate::machine::Machines;

/// What all services share. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Daemon {
    machines: Arc<Machines>,
    host: Arc<str>,
    /// Turns true when the daemon drains: streams end.
    draining: watch::Receiver<bool>,
    /// Places for calls that read memory which may block: see `resolve::Target::read`.
    blocking: Arc<Semaphore>,
    /// Turns of bulk work.
    turns: Arc<Turns>,
    /// Places for looks at a guest's address spaces and tasks, which it can make long: nobody's turn waits for them.
    looks: Arc<Semaphore>,
    /// Places for machines that are being attached.
    attaching: Arc<Semaphore>,
    /// Where clients may have files made.
    client_files: Arc<ClientFiles>,
}

impl Daemon {
    /// A daemon that serves `machines`, until `draining` says so. To be called within a runtime.
    pub(crate) fn new(
        machines: Machines,
        host: Arc<str>,
        draining: watch::Receiver<bool>,
        client_files: Option<PathBuf>,
    ) -> Self {
        Self {
            machines: Arc::new(machines),
            host,
            draining,
            blocking: Arc::new(Semaphore::new(BLOCKING)),
            turns: Arc::new(Turns::new()),
            looks: Arc::new(Semaphore::new(looks())),
            attaching: Arc::new(Semaphore::new(ATTACHING)),
            client_files: Arc::new(ClientFiles::new(client_files)),
        }
    }
}

/// Calls that may wait for the host to give them memory, at once. More wait for a place, up to their deadlines.
const BLOCKING: usize = 16;
/// Machines that are attached at once: each may read a file of symbols, and wait for a QEMU that says nothing. More wait for a
/// place, up to their deadlines.
const ATTACHING: usize = 4;

/// Looks at address spaces and tasks at once: half as many as there are processors. More wait for a place, up to their deadlines.
fn looks() -> usize {
    (available_parallelism().map_or(1, NonZero::get) / 2).max(1)
}

/// Largest request that is decoded. No request of this contract, but for batches, needs a tenth of it.
const REQUEST_BYTES: usize = 64 << 10;
/// Largest answer that is encoded.
const RESPONSE_BYTES: usize = 4 << 20;
/// Largest batch that is decoded. Not packed, which is legal, an address takes nine bytes.
const BATCH_REQUEST_BYTES: usize = batch::MAX_ADDRESSES * 9 + REQUEST_BYTES;
/// Largest answer to a batch that is encoded: an answer with all the faults that can be asked for is smaller.
const BATCH_RESPONSE_BYTES: usize = 12 << 20;

/// Adds every service to `routes`.
pub(crate) fn add_to(routes: Routes, daemon: &Daemon) -> Routes {
    macro_rules! server {
        ($server:ident, $request:expr, $response:expr) => {
            $server::new(daemon.clone())
                .max_decoding_message_size($request)
                .max_encoding_message_size($response)
        };
        ($server:ident) => {
            server!($server, REQUEST_BYTES, RESPONSE_BYTES)
        };
    }
    let bulk = server!(TranslationServiceServer, BATCH_REQUEST_BYTES, BATCH_RESPONSE_BYTES);
    routes
        .add_service(BySize { small: server!(TranslationServiceServer), bulk })
        .add_service(server!(WalkerServiceServer))
        .add_service(server!(MappingServiceServer))
        .add_service(server!(VcpuServiceServer))
        .add_service(server!(MachineServiceServer))
        .add_service(server!(MemoryServiceServer))
}
