//! The answer to `Translate`.

use pagewalk::{Gva, NoTrace, Step, Trace, Validated};
use pagewalk_proto::v1;
use pagewalk_proto::v1::translate_response::Outcome;

use super::Daemon;
use super::resolve::Target;
use super::translation::{ad_policy, check_width, ladder, may_set, title, walker};
use crate::convert;
use crate::machine::GuestRam;
use crate::render::Ladder;
use crate::status::Error;
use crate::vcpu::Snapshot;

/// What `gva` means to a vCPU in this state, as the request wants it told.
pub(super) fn answer(
    daemon: &Daemon,
    target: &Target,
    snapshot: &Snapshot,
    memory: &GuestRam,
    gva: u64,
    request: &v1::TranslateRequest,
) -> Result<v1::TranslateResponse, Error> {
    let access = convert::access::access(request.access, &snapshot.registers)?;
    let policy = ad_policy(request.ad_policy)?;
    let walker = walker(request.r#override.as_ref(), snapshot)?;
    check_width(&walker, gva, "address")?;
    convert::access::check(&access, &walker)?;
    may_set(policy, target)?;

    let told = |validated: Validated, steps: &[Step]| {
        let Validated { outcome, repeated, torn } = validated;
        let names = target.names(memory, snapshot, &walker, gva, steps);
        let explanation = if request.explain {
            let title = title(target, snapshot, &walker, &access, gva, names.gva.as_ref());
            Ladder { names: &names.entries, ..ladder(&title, &walker, steps, &outcome) }.to_string()
        } else {
            String::new()
        };
        Ok(v1::TranslateResponse {
            outcome: Some(match &outcome {
                Ok(page) => {
                    Outcome::Translation(convert::translation::translation(page, walker.gva_walk().format()))
                }
                Err(fault) => Outcome::Fault(convert::fault::fault(fault)),
            }),
            steps: names.steps(if request.trace { steps } else { &[] }, &walker),
            explanation,
            provenance: Some(v1::Provenance {
                validated: request.validate,
                torn: torn.is_some(),
                repeated_walks: repeated,
                ..daemon.provenance(target, snapshot)?
            }),
            address: gva,
            symbol: names.gva.map(convert::symbol::symbol),
        })
    };
    if !(request.validate || request.trace || request.explain) {
        let outcome = walker.translate_with(memory, Gva(gva), &access, policy, &mut NoTrace);
        return told(Validated::not(outcome), &[]);
    }
    let mut trace = Box::new(Trace::new());
    let validated = if request.validate {
        walker.translate_validated(memory, Gva(gva), &access, policy, &mut trace)
    } else {
        Validated::not(walker.translate_with(memory, Gva(gva), &access, policy, &mut *trace))
    };
    told(validated, trace.steps())
}
