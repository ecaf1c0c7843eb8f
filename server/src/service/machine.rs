//! `MachineService`.

use pagewalk_proto::v1;
use pagewalk_proto::v1::machine_service_server::MachineService;
use tonic::{Request, Response, Status};

use super::Daemon;
use crate::convert;
use crate::status::Error;

#[tonic::async_trait]
impl MachineService for Daemon {
    async fn list_machines(
        &self,
        _: Request<v1::ListMachinesRequest>,
    ) -> Result<Response<v1::ListMachinesResponse>, Status> {
        Ok(Response::new(v1::ListMachinesResponse {
            machines: self.machines.iter().map(|machine| convert::machine::machine(machine)).collect(),
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
            machine: Some(convert::machine::machine(machine)),
            provenance: Some(self.machine_provenance(machine)),
        }))
    }
}
