//! `TranslationService`.

use std::borrow::Cow;

use pagewalk::{Access, AdPolicy, Fault, NgpaWalk, PagingMode, Step, Translation, Walker};
use pagewalk_proto::v1;
use pagewalk_proto::v1::explain_fault_request::Seen;
use pagewalk_proto::v1::translation_service_server::TranslationService;
use tonic::{Request, Response, Status, Streaming};

use super::parts::{Parts, Sending};
use super::resolve::{Target, deadline, patience};
use super::{Daemon, batch, explain, nested_gpa, range, spaces, stream, translate};
use crate::convert;
use crate::machine::GuestRam;
use crate::render::Ladder;
use crate::status::Error;
use crate::symbols::Near;
use crate::vcpu::Snapshot;

#[tonic::async_trait]
impl TranslationService for Daemon {
    async fn translate(
        &self,
        request: Request<v1::TranslateRequest>,
    ) -> Result<Response<v1::TranslateResponse>, Status> {
        let patience = patience(&request);
        let mut request = request.into_inner();
        let target = self.target(request.vcpu.take())?;
        let snapshot = target.snapshot(request.freshness, patience).await?;
        let gva = target.gva(self, patience, request.address.take(), "address").await?;
        let walk = |memory: &GuestRam| translate::answer(self, &target, &snapshot, memory, gva, &request);
        Ok(Response::new(target.read(self, patience, walk).await??))
    }

    async fn translate_across(
        &self,
        request: Request<v1::TranslateAcrossRequest>,
    ) -> Result<Response<v1::TranslateAcrossResponse>, Status> {
        let patience = patience(&request);
        let request = request.into_inner();
        let target = self.target(request.vcpu.clone())?;
        let snapshot = target.snapshot(request.freshness, patience).await?;
        Ok(Response::new(spaces::across(self, &target, &snapshot, request, patience).await?))
    }

    async fn batch_translate(
        &self,
        request: Request<v1::BatchTranslateRequest>,
    ) -> Result<Response<v1::BatchTranslateResponse>, Status> {
        let (patience, deadline) = (patience(&request), deadline(&request));
        Ok(Response::new(batch::translate(self, request.into_inner(), patience, deadline).await?))
    }

    type StreamTranslateStream = stream::Answers;

    async fn stream_translate(
        &self,
        request: Request<Streaming<v1::StreamTranslateRequest>>,
    ) -> Result<Response<Self::StreamTranslateStream>, Status> {
        Ok(Response::new(stream::translate(self, request)))
    }

    type TranslateRangeStream = Parts<v1::TranslateRangeResponse>;

    async fn translate_range(
        &self,
        request: Request<v1::TranslateRangeRequest>,
    ) -> Result<Response<Self::TranslateRangeStream>, Status> {
        let (patience, deadline) = (patience(&request), deadline(&request));
        let request = request.into_inner();
        let target = self.target(request.vcpu.clone())?;
        let (map, snapshot) = range::map(self, &target, request, patience).await?;
        let sending = Sending { daemon: self.clone(), target, snapshot, map, deadline };
        Ok(Response::new(sending.stream()))
    }

    async fn translate_nested_gpa(
        &self,
        request: Request<v1::TranslateNestedGpaRequest>,
    ) -> Result<Response<v1::TranslateNestedGpaResponse>, Status> {
        let patience = patience(&request);
        let request = request.into_inner();
        let target = self.target(request.vcpu.clone())?;
        let snapshot = target.snapshot(request.freshness, patience).await?;
        let walk = |memory: &GuestRam| nested_gpa::translate(self, &target, &snapshot, memory, request);
        Ok(Response::new(target.read(self, patience, walk).await??))
    }

    async fn explain_fault(
        &self,
        request: Request<v1::ExplainFaultRequest>,
    ) -> Result<Response<v1::ExplainFaultResponse>, Status> {
        let patience = patience(&request);
        let mut request = request.into_inner();
        let target = self.target(request.vcpu.clone())?;
        let snapshot = target.snapshot(request.freshness, patience).await?;
        if let Some(Seen::PageFault(seen)) = &mut request.seen {
            let cr2 = target.gva(self, patience, seen.cr2.take(), "page_fault.cr2").await?;
            seen.cr2 = Some(v1::Address { value: Some(v1::address::Value::Number(cr2)) });
        }
        let walk = |memory: &GuestRam| explain::fault(self, &target, &snapshot, memory, request);
        Ok(Response::new(target.read(self, patience, walk).await??))
    }
}

/// The vCPU's walkers, or those that the request brings.
pub(super) fn walker<'a>(
    request: Option<&v1::WalkerOverride>,
    snapshot: &'a Snapshot,
) -> Result<Cow<'a, Walker>, Error> {
    match (request, &snapshot.walker) {
        (Some(request), _) => convert::walker_override::walker(request, snapshot).map(Cow::Owned),
        (None, Ok(walker)) => Ok(Cow::Borrowed(walker)),
        (None, Err(problem)) => Err(Error::VcpuState(*problem)),
    }
}

pub(super) fn check_width(walker: &Walker, gva: u64, field: &'static str) -> Result<(), Error> {
    let mode = walker.gva_walk().format().mode();
    if mode.is_long() || u32::try_from(gva).is_ok() {
        return Ok(());
    }
    let problem = format!("{gva:#x} does not fit the 32 bits of a linear address outside long mode ({mode})");
    Err(Error::invalid(field, problem))
}

pub(super) fn ad_policy(policy: i32) -> Result<AdPolicy, Error> {
    match v1::AdPolicy::try_from(policy) {
        Ok(v1::AdPolicy::Unspecified | v1::AdPolicy::Observe) => Ok(AdPolicy::Observe),
        Ok(v1::AdPolicy::Set) => Ok(AdPolicy::Set),
        Err(_) => Err(Error::invalid("ad_policy", format!("{policy} is no policy"))),
    }
}

/// The second dimension, by its registers.
pub(super) fn second(walk: &NgpaWalk) -> String {
    match walk {
        NgpaWalk::Npt(npt) => {
            format!("{} NPT, nCR3 {:#x}", npt.page_walk().format().mode(), npt.page_walk().root())
        }
        NgpaWalk::Ept(ept) => {
            format!("{} EPT, EPTP {:#x}", ept.page_walk().format().mode(), ept.eptp())
        }
    }
}

/// Whether the tables of this machine may be written.
pub(super) fn may_set(policy: AdPolicy, target: &Target) -> Result<(), Error> {
    if policy == AdPolicy::Observe || target.machine.source().capabilities().can_write_memory {
        return Ok(());
    }
    let kind = target.machine.source().kind();
    Err(Error::Precondition(format!(
        "AD_POLICY_SET writes accessed and dirty bits, and the memory of a machine from source `{kind}` is only read: use AD_POLICY_OBSERVE"
    )))
}

/// What was asked, of whom: the first line of a ladder.
pub(super) fn title(
    target: &Target,
    snapshot: &Snapshot,
    walker: &Walker,
    access: &Access,
    gva: u64,
    name: Option<&Near>,
) -> String {
    let walk = walker.gva_walk();
    let mode = walk.format().mode();
    let root = match mode {
        PagingMode::None => String::new(),
        _ => format!(", root {:#x}", walk.root()),
    };
    let second = walker.ngpa_walk().map_or_else(String::new, |walk| format!(", under {}", second(walk)));
    let name = name.map_or_else(String::new, |near| format!(" <{near}>"));
    format!(
        "GVA {gva:#x}{name}, {}: {mode}{root}{second} (vCPU {} of {}, generation {})",
        convert::access::describe(access),
        target.vcpu.index(),
        target.machine.id(),
        snapshot.generation,
    )
}

pub(super) fn ladder<'a>(
    title: &'a str,
    walker: &'a Walker,
    steps: &'a [Step],
    outcome: &'a Result<Translation, Fault>,
) -> Ladder<'a> {
    Ladder { title, walker, steps, outcome, nested_alone: false, names: &[] }
}
