//! `ExplainFault`: what somebody saw, decoded, and the same access made again now.

mod ept;

use std::fmt::Write as _;
use std::sync::Arc;

use pagewalk::{
    Access, AccessKind, AdPolicy, EXIT_INFO_1_FINAL, EXIT_INFO_1_TABLE, Fault, FaultKind, Gva, NestedGpa,
    NestedPhase, NgpaWalk, PFEC_FETCH, PFEC_KEY, PFEC_PRESENT, PFEC_RESERVED, PFEC_SHADOW_STACK, PFEC_USER,
    PFEC_WRITE, Privilege, Trace, Translation, Walker,
};
use pagewalk_proto::v1;
use pagewalk_proto::v1::explain_fault_request::Seen;

use super::Daemon;
use super::names::Names;
use super::resolve::Target;
use super::translation::{check_width, ladder, title, walker};
use crate::convert::{self, fault::Code};
use crate::machine::GuestRam;
use crate::render::Ladder;
use crate::status::Error;
use crate::vcpu::{Registers, Snapshot};

pub(super) fn fault(
    daemon: &Daemon,
    target: &Target,
    snapshot: &Arc<Snapshot>,
    memory: &GuestRam,
    request: v1::ExplainFaultRequest,
) -> Result<v1::ExplainFaultResponse, Error> {
    let mut state = request.r#override;
    if let Some(cr3) = request.cr3 {
        let state = state.get_or_insert_default();
        if state.cr3.replace(cr3).is_some() {
            return Err(Error::invalid("cr3", "given twice: here and in `override`"));
        }
    }
    let walker = walker(state.as_ref(), snapshot)?;
    let again = match request.seen {
        Some(Seen::PageFault(seen)) => page_fault(target, snapshot, &walker, memory, seen)?,
        Some(Seen::NestedPageFault(seen)) => nested_page_fault(&walker, memory, seen)?,
        Some(Seen::EptViolation(seen)) => ept::violation(&walker, memory, seen)?,
        Some(Seen::EptMisconfiguration(seen)) => ept::misconfiguration(&walker, memory, seen)?,
        None => {
            let kinds = "page_fault, nested_page_fault, ept_violation or ept_misconfiguration";
            return Err(Error::invalid("seen", format!("required: {kinds}")));
        }
    };
    Ok(v1::ExplainFaultResponse {
        would_fault_now: again.outcome.is_err(),
        matches: again.matches,
        explanation: again.explanation,
        decoded: again.decoded,
        steps: again.names.steps(again.trace.steps(), &walker),
        fault: again.outcome.as_ref().err().map(convert::fault::fault),
        translation: again
            .outcome
            .as_ref()
            .ok()
            .map(|page| convert::translation::translation(page, walker.gva_walk().format())),
        provenance: Some(daemon.provenance(target, snapshot)?),
        symbol: again.names.gva.map(convert::symbol::symbol),
    })
}

/// The access made again.
struct Again {
    outcome: Result<Translation, Fault>,
    trace: Trace,
    matches: bool,
    decoded: Vec<v1::DecodedBit>,
    explanation: String,
    names: Names,
}

fn page_fault(
    target: &Target,
    snapshot: &Snapshot,
    walker: &Walker,
    memory: &GuestRam,
    seen: v1::PageFault,
) -> Result<Again, Error> {
    let code = seen.error_code;
    let gva = convert::address::number(seen.cr2, "page_fault.cr2")?;
    check_width(walker, gva, "page_fault.cr2")?;
    let access = access(code, &snapshot.registers)?;
    let mut trace = Trace::new();
    let outcome = walker.translate_with(memory, Gva(gva), &access, AdPolicy::Observe, &mut trace);
    let kind = FaultKind::PageFault { error_code: code };
    let matches = outcome.as_ref().is_err_and(|fault| fault.kind == kind);
    let decoded = convert::fault::decode(u64::from(code), Code::PageFault);
    let names = target.names(memory, snapshot, walker, gva, trace.steps());
    let title = title(target, snapshot, walker, &access, gva, names.gva.as_ref());
    let explanation = explain(
        &format!("#PF, error code {code:#x}, CR2 {gva:#x}"),
        &decoded,
        matches,
        &Ladder { names: &names.entries, ..ladder(&title, walker, trace.steps(), &outcome) },
    );
    Ok(Again { outcome, trace, matches, decoded, explanation, names })
}

fn nested_page_fault(walker: &Walker, memory: &GuestRam, seen: v1::NestedPageFault) -> Result<Again, Error> {
    let info = seen.exit_info_1;
    let ngpa = convert::address::number(seen.nested_gpa, "nested_page_fault.nested_gpa")?;
    let Some(second) = walker.ngpa_walk() else {
        return Err(Error::Precondition(
            "there is no second dimension to explain a nested page fault by: switch nested mode on, \
             or bring `override.npt`"
                .to_owned(),
        ));
    };
    let NgpaWalk::Npt(npt) = second else {
        return Err(Error::Precondition(
            "the second dimension is EPT, which raises no nested page faults: switch nested mode to NPT, \
             or bring `override.npt`"
                .to_owned(),
        ));
    };
    let refuse =
        |problem: &str| Err(Error::invalid("nested_page_fault.exit_info_1", format!("{info:#x}: {problem}")));
    let phase = match info & (EXIT_INFO_1_FINAL | EXIT_INFO_1_TABLE) {
        EXIT_INFO_1_FINAL => NestedPhase::Final,
        EXIT_INFO_1_TABLE => NestedPhase::Table,
        _ => return refuse("exactly one of bits 32 (final address) and 33 (guest table) is set"),
    };
    let has = |bit: u32| info & u64::from(bit) != 0;
    let known = PFEC_PRESENT | PFEC_WRITE | PFEC_USER | PFEC_RESERVED | PFEC_FETCH | PFEC_SHADOW_STACK;
    if info & !(EXIT_INFO_1_FINAL | EXIT_INFO_1_TABLE | u64::from(known)) != 0 {
        return refuse("only bits 4 to 0, 6, 32 and 33 are known here");
    }
    let supervisor = !has(PFEC_USER);
    if supervisor && !(npt.controls().guest_mode_execute_trap && phase == NestedPhase::Final) {
        return refuse("U/S is set: every access under NPT is a user access, but final ones under GMET");
    }
    if has(PFEC_WRITE) && has(PFEC_FETCH) {
        return refuse("no access is both a write (W/R) and a fetch (I/D)");
    }
    if has(PFEC_SHADOW_STACK) && (has(PFEC_FETCH) || phase != NestedPhase::Final) {
        return refuse("a shadow-stack access (SS) is no fetch (I/D), and reads no table (bit 33)");
    }
    if has(PFEC_RESERVED) && !has(PFEC_PRESENT) {
        return refuse("RSVD comes with P: only a present entry has reserved bits");
    }
    let kind = match phase {
        NestedPhase::Final => kind(info as u32),
        _ => AccessKind::Write,
    };
    let access = Access::new(kind, if supervisor { Privilege::Supervisor } else { Privilege::User });
    let mut trace = Trace::new();
    let outcome = second.translate(memory, NestedGpa(ngpa), &access, phase, &mut trace);
    let kind = FaultKind::NestedPageFault { exit_info_1: info };
    let matches = outcome.as_ref().is_err_and(|fault| fault.kind == kind);
    let decoded = convert::fault::decode(info, Code::NestedPageFault);
    let walk = second.page_walk();
    let title = format!(
        "nGPA {ngpa:#x}, {}: {} NPT, nCR3 {:#x}",
        convert::access::describe(&access),
        walk.format().mode(),
        walk.root()
    );
    let explanation = explain(
        &format!("#VMEXIT(NPF), EXITINFO1 {info:#x}, EXITINFO2 {ngpa:#x}"),
        &decoded,
        matches,
        &Ladder { nested_alone: true, ..ladder(&title, walker, trace.steps(), &outcome) },
    );
    Ok(Again { outcome, trace, matches, decoded, explanation, names: Names::default() })
}

fn explain(seen: &str, decoded: &[v1::DecodedBit], matches: bool, ladder: &Ladder<'_>) -> String {
    let mut text = format!("Seen: {seen}\n");
    for bit in decoded {
        let state = u8::from(bit.set);
        let _ = writeln!(text, "  bit {:<2} {:<5} = {state}: {}", bit.bit, bit.name, bit.meaning);
    }
    let verdict = match (ladder.outcome, matches) {
        (Err(_), true) => "The same access faults in the same way now:",
        (Err(_), false) => {
            "The same access faults now, but in another way than was seen: the guest has changed since."
        }
        (Ok(_), _) => {
            "The same access would not fault now: the guest has changed its tables since, \
             or the CPU used a stale TLB entry."
        }
    };
    let _ = write!(text, "{verdict}\n\n{ladder}");
    text
}

/// The access that an error code tells of.
fn access(code: u32, registers: &Registers) -> Result<Access, Error> {
    let known =
        PFEC_PRESENT | PFEC_WRITE | PFEC_USER | PFEC_RESERVED | PFEC_FETCH | PFEC_KEY | PFEC_SHADOW_STACK;
    let has = |bit| code & bit != 0;
    let refuse =
        |problem: &str| Err(Error::invalid("page_fault.error_code", format!("{code:#x}: {problem}")));
    if code & !known != 0 {
        return refuse("bits above 6 are not known here");
    }
    if has(PFEC_WRITE) && has(PFEC_FETCH) {
        return refuse("no access is both a write (W/R) and a fetch (I/D)");
    }
    if has(PFEC_RESERVED) && !has(PFEC_PRESENT) {
        return refuse(
            "RSVD comes with P: only a present entry has reserved bits (QEMU's TCG gets this wrong: add 1)",
        );
    }
    if has(PFEC_KEY) && (!has(PFEC_PRESENT) || has(PFEC_FETCH) || has(PFEC_RESERVED)) {
        return refuse("PK comes with P, and neither with I/D nor with RSVD");
    }
    if has(PFEC_SHADOW_STACK) && has(PFEC_FETCH) {
        return refuse("no access is both a fetch (I/D) and one to a shadow stack (SS)");
    }
    let privilege = if has(PFEC_USER) { Privilege::User } else { Privilege::Supervisor };
    Ok(convert::access::by_vcpu(kind(code), privilege, registers))
}

/// What an error code says the access did.
fn kind(code: u32) -> AccessKind {
    let has = |bit| code & bit != 0;
    match (has(PFEC_SHADOW_STACK), has(PFEC_WRITE), has(PFEC_FETCH)) {
        (true, true, _) => AccessKind::ShadowStackWrite,
        (true, false, _) => AccessKind::ShadowStackRead,
        (false, true, _) => AccessKind::Write,
        (false, _, true) => AccessKind::Fetch,
        _ => AccessKind::Read,
    }
}
