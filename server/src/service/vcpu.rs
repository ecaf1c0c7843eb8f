//! `VcpuService`.

use pagewalk_proto::v1;
use pagewalk_proto::v1::vcpu_service_server::VcpuService;
use tonic::{Request, Response, Status};

use super::Daemon;
use super::resolve::{patience, refused};
use crate::convert;
use crate::status::Error;
use crate::vcpu::VcpuError;

#[tonic::async_trait]
impl VcpuService for Daemon {
    async fn list_vcpus(
        &self,
        request: Request<v1::ListVcpusRequest>,
    ) -> Result<Response<v1::ListVcpusResponse>, Status> {
        let machine = self.machines.get(&request.into_inner().machine).map_err(Error::from)?;
        let vcpus = machine.source().vcpus();
        Ok(Response::new(v1::ListVcpusResponse {
            vcpus: vcpus.iter().map(|vcpu| convert::snapshot::vcpu_info(vcpu, &vcpu.latest())).collect(),
            provenance: Some(self.machine_provenance(&machine)),
        }))
    }

    async fn get_registers(
        &self,
        request: Request<v1::GetRegistersRequest>,
    ) -> Result<Response<v1::GetRegistersResponse>, Status> {
        let patience = patience(&request);
        let request = request.into_inner();
        let target = self.target(request.vcpu)?;
        let snapshot = target.snapshot(request.freshness, patience).await?;
        Ok(Response::new(v1::GetRegistersResponse {
            registers: Some(convert::registers::registers(&snapshot.registers)),
            provenance: Some(self.provenance(&target, &snapshot)?),
        }))
    }

    async fn set_registers(
        &self,
        request: Request<v1::SetRegistersRequest>,
    ) -> Result<Response<v1::SetRegistersResponse>, Status> {
        let patience = patience(&request);
        let request = request.into_inner();
        let target = self.target(request.vcpu)?;
        let changes = convert::registers::changes(request.registers)?;
        let snapshot = target
            .vcpu
            .set_registers(changes, patience)
            .await
            .map_err(|problem| refused(&target.machine, problem))?;
        Ok(Response::new(v1::SetRegistersResponse {
            registers: Some(convert::registers::registers(&snapshot.registers)),
            provenance: Some(self.provenance(&target, &snapshot)?),
        }))
    }

    async fn pause_vcpu(
        &self,
        request: Request<v1::PauseVcpuRequest>,
    ) -> Result<Response<v1::PauseVcpuResponse>, Status> {
        let patience = patience(&request);
        let target = self.target(request.into_inner().vcpu)?;
        let snapshot =
            target.vcpu.pause(patience).await.map_err(|problem| refused(&target.machine, problem))?;
        let source = target.machine.source();
        if !source.capabilities().ends_when_detached {
            // A guest that runs elsewhere stops as a whole: when this is answered, each vCPU has published where it stopped.
            for vcpu in source.vcpus() {
                match vcpu.sync(patience).await {
                    // It has stopped with the others.
                    Ok(_) | Err(VcpuError::Unread { .. }) => {}
                    Err(problem) => return Err(refused(&target.machine, problem).into()),
                }
            }
        }
        Ok(Response::new(v1::PauseVcpuResponse {
            vcpu: Some(convert::snapshot::vcpu_info(&target.vcpu, &snapshot)),
            provenance: Some(self.provenance(&target, &snapshot)?),
        }))
    }

    async fn resume_vcpu(
        &self,
        request: Request<v1::ResumeVcpuRequest>,
    ) -> Result<Response<v1::ResumeVcpuResponse>, Status> {
        let patience = patience(&request);
        let target = self.target(request.into_inner().vcpu)?;
        let snapshot =
            target.vcpu.resume(patience).await.map_err(|problem| refused(&target.machine, problem))?;
        Ok(Response::new(v1::ResumeVcpuResponse {
            vcpu: Some(convert::snapshot::vcpu_info(&target.vcpu, &snapshot)),
            provenance: Some(self.provenance(&target, &snapshot)?),
        }))
    }

    async fn step_vcpu(
        &self,
        request: Request<v1::StepVcpuRequest>,
    ) -> Result<Response<v1::StepVcpuResponse>, Status> {
        let patience = patience(&request);
        let target = self.target(request.into_inner().vcpu)?;
        let snapshot =
            target.vcpu.step(patience).await.map_err(|problem| refused(&target.machine, problem))?;
        Ok(Response::new(v1::StepVcpuResponse {
            vcpu: Some(convert::snapshot::vcpu_info(&target.vcpu, &snapshot)),
            registers: Some(convert::registers::registers(&snapshot.registers)),
            provenance: Some(self.provenance(&target, &snapshot)?),
        }))
    }
}
