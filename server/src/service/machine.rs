//! `MachineService`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pagewalk_proto::v1;
use pagewalk_proto::v1::machine_service_server::MachineService;
use tokio::time::timeout_at;
use tonic::{Request, Response, Status};

use super::outlet::Answers;
use super::resolve::{deadline, patience, still_there};
use super::save_image;
use super::{Daemon, RESPONSE_BYTES};
use crate::convert;
use crate::machine::{MACHINES_MAX, Machine, MachineSpec};
use crate::status::Error;

/// Longest specification that is looked at: a path and some options.
const SPEC_MAX: usize = 8192;
/// What all machines take of a list. The rest of it is the daemon's version and its host.
const LISTED: usize = RESPONSE_BYTES - (64 << 10);
const _: () = assert!(MACHINES_MAX * convert::machine::ABRIDGED_MAX <= LISTED);
/// How long an attach may take if its client set no deadline.
const ATTACH: Duration = Duration::from_secs(30);
/// How often it is looked whether a detached machine is still in use.
const IN_USE: Duration = Duration::from_millis(20);

#[tonic::async_trait]
impl MachineService for Daemon {
    async fn list_machines(
        &self,
        _: Request<v1::ListMachinesRequest>,
    ) -> Result<Response<v1::ListMachinesResponse>, Status> {
        let machines = self.machines.all();
        let machines = machines.iter().map(|machine| convert::machine::machine(machine));
        Ok(Response::new(v1::ListMachinesResponse {
            machines: convert::machine::list(machines, LISTED),
            provenance: Some(v1::Provenance { host: self.host.to_string(), ..Default::default() }),
            daemon_version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }

    async fn get_machine(
        &self,
        request: Request<v1::GetMachineRequest>,
    ) -> Result<Response<v1::GetMachineResponse>, Status> {
        let machine = self.machines.get(&request.into_inner().machine).map_err(Error::from)?;
        Ok(Response::new(v1::GetMachineResponse {
            machine: Some(convert::machine::machine(&machine)),
            provenance: Some(self.machine_provenance(&machine)),
        }))
    }

    async fn attach_machine(
        &self,
        request: Request<v1::AttachMachineRequest>,
    ) -> Result<Response<v1::AttachMachineResponse>, Status> {
        let patience = deadline(&request).unwrap_or_else(|| Instant::now() + ATTACH);
        let mut spec = spec(&request.get_ref().spec)?;
        self.client_files.confine(&mut spec, &request)?;
        let place = timeout_at(patience.into(), Arc::clone(&self.attaching).acquire_owned()).await;
        let place = place.map_err(|_| Error::Deadline)?;
        let machines = Arc::clone(&self.machines);
        let opened = tokio::task::spawn_blocking(move || {
            let opened = machines.open(&spec);
            drop(place);
            opened
        });
        // Whoever stops waiting leaves an attach behind that ends by itself, one way or the other.
        let machine = match timeout_at(patience.into(), opened).await {
            Ok(Ok(opened)) => opened.map_err(Error::from)?,
            Ok(Err(panicked)) => return Err(Error::Failed(panicked.to_string()).into()),
            Err(_) => return Err(Error::Deadline.into()),
        };
        Ok(Response::new(v1::AttachMachineResponse {
            machine: Some(convert::machine::machine(&machine)),
            provenance: Some(self.machine_provenance(&machine)),
        }))
    }

    async fn detach_machine(
        &self,
        request: Request<v1::DetachMachineRequest>,
    ) -> Result<Response<v1::DetachMachineResponse>, Status> {
        let request = request.into_inner();
        if request.machine.is_empty() {
            return Err(Error::invalid(
                "machine",
                "required: the id of the machine to detach, also of the only one",
            )
            .into());
        }
        let machine = self.machines.detach(&request.machine, request.end_guest).map_err(Error::from)?;
        tracing::info!(machine = %machine.id(), "detached");
        let provenance = Some(self.machine_provenance(&machine));
        tokio::spawn(let_go(machine));
        Ok(Response::new(v1::DetachMachineResponse { provenance }))
    }

    type SaveImageStream = Answers<v1::SaveImageResponse>;

    async fn save_image(
        &self,
        request: Request<v1::SaveImageRequest>,
    ) -> Result<Response<Self::SaveImageStream>, Status> {
        let patience = patience(&request);
        let request = request.into_inner();
        let machine = self.machines.get(&request.machine).map_err(Error::from)?;
        still_there(&machine)?;
        let memory_file = save_image::memory_file(request.memory_file)?;
        Ok(Response::new(save_image::start(self.clone(), machine, memory_file, patience)))
    }
}

fn spec(text: &str) -> Result<MachineSpec, Error> {
    if text.len() > SPEC_MAX {
        return Err(Error::invalid("spec", format!("longer than {SPEC_MAX} bytes")));
    }
    text.parse().map_err(|problem| Error::invalid("spec", format!("{problem}")))
}

/// Drops a machine once no call uses it, on a thread that may wait for its vCPUs to end.
async fn let_go(machine: Arc<Machine>) {
    while Arc::strong_count(&machine) > 1 {
        tokio::time::sleep(IN_USE).await;
    }
    // A runtime that stops drops the machine as well.
    let _ = tokio::task::spawn_blocking(move || drop(machine)).await;
}
