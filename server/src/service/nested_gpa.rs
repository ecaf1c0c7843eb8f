//! `TranslateNestedGpa`: an L2's physical address, by the second dimension alone.

use std::sync::Arc;

use pagewalk::{Gpa, Memory as _, NestedGpa, NoTrace, Trace, Validated};
use pagewalk_proto::v1;
use pagewalk_proto::v1::translate_nested_gpa_response::Outcome;

use super::Daemon;
use super::resolve::Target;
use super::translation::{ad_policy, ladder, may_set, second, walker};
use crate::convert;
use crate::machine::GuestRam;
use crate::render::{self, Ladder};
use crate::status::Error;
use crate::vcpu::Snapshot;

pub(super) fn translate(
    daemon: &Daemon,
    target: &Target,
    snapshot: &Arc<Snapshot>,
    memory: &GuestRam,
    request: v1::TranslateNestedGpaRequest,
) -> Result<v1::TranslateNestedGpaResponse, Error> {
    let ngpa = convert::address::number(request.address, "address")?;
    let access = convert::access::nested(request.access, &snapshot.registers)?;
    let phase = convert::access::phase(request.phase)?;
    let policy = ad_policy(request.ad_policy)?;
    may_set(policy, target)?;
    let walker = walker(request.r#override.as_ref(), snapshot)?;
    convert::access::check(&access, &walker)?;
    let asked = format!(
        "nGPA {ngpa:#x}, {}, {}",
        convert::access::describe(&access),
        convert::access::describe_phase(phase)
    );
    let whose = format!(
        "(vCPU {} of {}, generation {})",
        target.vcpu.index(),
        target.machine.id(),
        snapshot.generation
    );
    let provenance = |torn, repeated_walks| {
        let provenance = daemon.provenance(target, snapshot)?;
        Ok::<_, Error>(Some(v1::Provenance {
            validated: request.validate,
            torn,
            repeated_walks,
            ..provenance
        }))
    };
    let Some(walk) = walker.ngpa_walk() else {
        let backing = memory.backing(Gpa(ngpa));
        let explanation = format!(
            "{asked}: no second dimension {whose}\n  no entry was read\n=> GPA {ngpa:#x}: the nGPA itself, {}\n",
            render::backing(backing)
        );
        return Ok(v1::TranslateNestedGpaResponse {
            outcome: Some(Outcome::Translation(convert::translation::identity(ngpa, backing))),
            steps: Vec::new(),
            explanation: if request.explain { explanation } else { String::new() },
            provenance: provenance(false, 0)?,
            identity: true,
        });
    };

    let mut trace = Trace::new();
    let ngpa = NestedGpa(ngpa);
    let Validated { outcome, repeated, torn } = if request.validate {
        walk.translate_validated(memory, ngpa, &access, phase, policy, &mut trace)
    } else if request.trace || request.explain {
        Validated::not(walk.translate_with(memory, ngpa, &access, phase, policy, &mut trace))
    } else {
        Validated::not(walk.translate_with(memory, ngpa, &access, phase, policy, &mut NoTrace))
    };
    let explanation = if request.explain {
        let title = format!("{asked}: {} {whose}", second(walk));
        Ladder { nested_alone: true, ..ladder(&title, &walker, trace.steps(), &outcome) }.to_string()
    } else {
        String::new()
    };
    let steps = if request.trace { trace.steps() } else { &[] };
    Ok(v1::TranslateNestedGpaResponse {
        outcome: Some(match &outcome {
            Ok(page) => Outcome::Translation(convert::translation::nested(page, walker.gva_walk().format())),
            Err(fault) => Outcome::Fault(convert::fault::fault(fault)),
        }),
        steps: steps.iter().map(|step| convert::step::step(step, &walker, None)).collect(),
        explanation,
        provenance: provenance(torn.is_some(), repeated)?,
        identity: false,
    })
}
