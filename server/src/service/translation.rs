//! `TranslationService`.

use std::borrow::Cow;

use pagewalk::{
    Access, AdPolicy, Fault, Gva, NgpaWalk, NoTrace, PagingMode, Step, Trace, Translation, Validated, Walker,
};
use pagewalk_proto::v1;
use pagewalk_proto::v1::explain_fault_request::Seen;
use pagewalk_proto::v1::translate_response::Outcome;
use pagewalk_proto::v1::translation_service_server::TranslationService;
use tonic::{Request, Response, Status, Streaming};

use super::parts::{Parts, Sending};
use super::resolve::{Target, client_deadline, deadline};
use super::{Daemon, batch, explain, nested_gpa, range, spaces, stream};
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
        let deadline = deadline(&request);
        let request = request.into_inner();
        let target = self.target(request.vcpu)?;
        let snapshot = target.snapshot(request.freshness, deadline).await?;
        let gva = target.gva(self, deadline, request.address, "address").await?;
        let access = convert::access::access(request.access, &snapshot.registers)?;
        let policy = ad_policy(request.ad_policy)?;
        let walker = walker(request.r#override.as_ref(), &snapshot)?;
        check_width(&walker, gva, "address")?;
        convert::access::check(&access, &walker)?;

        may_set(policy, &target)?;

        let mut trace = Trace::new();
        let walk = |memory: &GuestRam| {
            let walked = if request.validate {
                walker.translate_validated(memory, Gva(gva), &access, policy, &mut trace)
            } else if request.trace || request.explain {
                Validated::not(walker.translate_with(memory, Gva(gva), &access, policy, &mut trace))
            } else {
                Validated::not(walker.translate_with(memory, Gva(gva), &access, policy, &mut NoTrace))
            };
            (walked, target.names(memory, &snapshot, &walker, gva, trace.steps()))
        };
        let (Validated { outcome, repeated, torn }, names) = target.read(self, deadline, walk).await?;
        let provenance = v1::Provenance {
            validated: request.validate,
            torn: torn.is_some(),
            repeated_walks: repeated,
            ..self.provenance(&target, &snapshot)?
        };
        let steps = if request.trace { trace.steps() } else { &[] };
        let explanation = if request.explain {
            let title = title(&target, &snapshot, &walker, &access, gva, names.gva.as_ref());
            Ladder { names: &names.entries, ..ladder(&title, &walker, trace.steps(), &outcome) }.to_string()
        } else {
            String::new()
        };
        Ok(Response::new(v1::TranslateResponse {
            outcome: Some(match &outcome {
                Ok(page) => {
                    Outcome::Translation(convert::translation::translation(page, walker.gva_walk().format()))
                }
                Err(fault) => Outcome::Fault(convert::fault::fault(fault)),
            }),
            steps: names.steps(steps, &walker),
            explanation,
            provenance: Some(provenance),
            address: gva,
            symbol: names.gva.map(convert::symbol::symbol),
        }))
    }

    async fn translate_across(
        &self,
        request: Request<v1::TranslateAcrossRequest>,
    ) -> Result<Response<v1::TranslateAcrossResponse>, Status> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let target = self.target(request.vcpu.clone())?;
        let snapshot = target.snapshot(request.freshness, deadline).await?;
        Ok(Response::new(spaces::across(self, &target, &snapshot, request, deadline).await?))
    }

    async fn batch_translate(
        &self,
        request: Request<v1::BatchTranslateRequest>,
    ) -> Result<Response<v1::BatchTranslateResponse>, Status> {
        let deadline = deadline(&request);
        Ok(Response::new(batch::translate(self, request.into_inner(), deadline).await?))
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
        let (deadline, until) = (deadline(&request), client_deadline(&request));
        let request = request.into_inner();
        let target = self.target(request.vcpu.clone())?;
        let (map, snapshot) = range::map(self, &target, request, deadline).await?;
        let sending = Sending { daemon: self.clone(), target, snapshot, map, until };
        Ok(Response::new(sending.stream()))
    }

    async fn translate_nested_gpa(
        &self,
        request: Request<v1::TranslateNestedGpaRequest>,
    ) -> Result<Response<v1::TranslateNestedGpaResponse>, Status> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let target = self.target(request.vcpu.clone())?;
        let snapshot = target.snapshot(request.freshness, deadline).await?;
        let walk = |memory: &GuestRam| nested_gpa::translate(self, &target, &snapshot, memory, request);
        Ok(Response::new(target.read(self, deadline, walk).await??))
    }

    async fn explain_fault(
        &self,
        request: Request<v1::ExplainFaultRequest>,
    ) -> Result<Response<v1::ExplainFaultResponse>, Status> {
        let deadline = deadline(&request);
        let mut request = request.into_inner();
        let target = self.target(request.vcpu.clone())?;
        let snapshot = target.snapshot(request.freshness, deadline).await?;
        if let Some(Seen::PageFault(seen)) = &mut request.seen {
            let cr2 = target.gva(self, deadline, seen.cr2.take(), "page_fault.cr2").await?;
            seen.cr2 = Some(v1::Address { value: Some(v1::address::Value::Number(cr2)) });
        }
        let walk = |memory: &GuestRam| explain::fault(self, &target, &snapshot, memory, request);
        Ok(Response::new(target.read(self, deadline, walk).await??))
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
