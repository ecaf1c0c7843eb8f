//! `MappingService`.

use pagewalk::map::{Filter, Report};
use pagewalk_proto::v1;
use pagewalk_proto::v1::mapping_service_server::MappingService;
use tonic::{Request, Response, Status};

use super::parts::{Parts, Sending};
use super::resolve::{deadline, patience};
use super::translation::walker;
use super::{Daemon, spaces};
use crate::convert;

#[tonic::async_trait]
impl MappingService for Daemon {
    type ListMappingsStream = Parts<v1::ListMappingsResponse>;

    async fn list_mappings(
        &self,
        request: Request<v1::ListMappingsRequest>,
    ) -> Result<Response<Self::ListMappingsStream>, Status> {
        let (patience, deadline) = (patience(&request), deadline(&request));
        let request = request.into_inner();
        let target = self.target(request.vcpu)?;
        let filter = convert::mapping::filter(request.filter)?;
        let budget = convert::mapping::budget(request.budget)?;
        let snapshot = target.snapshot(request.freshness, patience).await?;
        let walker = walker(request.r#override.as_ref(), &snapshot)?;
        let range = target.range(self, patience, request.range).await?;
        let report = if request.problems { Report::Problems } else { Report::Pages };
        let map = convert::mapping::over(walker.into_owned(), range)?;
        let map = map.filtered(filter).reporting(report).within(budget);
        let sending = Sending { daemon: self.clone(), target, snapshot, map, deadline };
        Ok(Response::new(sending.stream()))
    }

    async fn list_address_spaces(
        &self,
        request: Request<v1::ListAddressSpacesRequest>,
    ) -> Result<Response<v1::ListAddressSpacesResponse>, Status> {
        let patience = patience(&request);
        let machine = request.into_inner().machine;
        let target = self.target(Some(v1::VcpuRef { machine, vcpu: 0 }))?;
        Ok(Response::new(spaces::list(self, &target, patience).await?))
    }

    type FindMappingsStream = Parts<v1::FindMappingsResponse>;

    async fn find_mappings(
        &self,
        request: Request<v1::FindMappingsRequest>,
    ) -> Result<Response<Self::FindMappingsStream>, Status> {
        let (patience, deadline) = (patience(&request), deadline(&request));
        let request = request.into_inner();
        let target = self.target(request.vcpu)?;
        let gpas = convert::mapping::gpas(request.gpa, request.bytes)?;
        let filter = Filter { gpas, ..convert::mapping::filter(request.filter)? };
        let budget = convert::mapping::budget(request.budget)?;
        let snapshot = target.snapshot(request.freshness, patience).await?;
        let walker = walker(request.r#override.as_ref(), &snapshot)?;
        let range = target.range(self, patience, request.range).await?;
        let map = convert::mapping::over(walker.into_owned(), range)?.filtered(filter).within(budget);
        let sending = Sending { daemon: self.clone(), target, snapshot, map, deadline };
        Ok(Response::new(sending.stream()))
    }
}
