//! EPT violations and misconfigurations that somebody saw.
//!
//! Intel SDM volume 3, "Exit Qualification for EPT Violations" and "EPT Misconfigurations".

use std::fmt::Write as _;

use pagewalk::{
    Access, AccessKind, AdPolicy, EPT_VIOLATION_FETCH, EPT_VIOLATION_GVA_TRANSLATED, EPT_VIOLATION_GVA_VALID,
    EPT_VIOLATION_NO_EXECUTE_PAGE, EPT_VIOLATION_READ, EPT_VIOLATION_SHADOW_STACK, EPT_VIOLATION_USER_PAGE,
    EPT_VIOLATION_WRITABLE_PAGE, EPT_VIOLATION_WRITE, FaultKind, Gva, NestedGpa, NestedPhase, NgpaWalk,
    NoTrace, Privilege, Trace, Walker,
};
use pagewalk_proto::v1;

use super::{Again, explain};
use crate::convert::{self, fault::Code};
use crate::machine::GuestRam;
use crate::render::Ladder;
use crate::service::names::Names;
use crate::service::translation::{check_width, ladder, second};
use crate::status::Error;

/// Bits that tell of the exit and not of the access: NMI unblocking due to IRET, asynchronous to the instruction.
const OF_THE_EXIT: u64 = 1 << 12 | 1 << 16;
/// What advanced information tells of the guest's own paging, which is not walked again.
const OF_THE_GUEST: u64 =
    EPT_VIOLATION_USER_PAGE | EPT_VIOLATION_WRITABLE_PAGE | EPT_VIOLATION_NO_EXECUTE_PAGE;
const KNOWN: u64 = 0x7fff | OF_THE_EXIT;

pub(super) fn violation(walker: &Walker, memory: &GuestRam, seen: v1::EptViolation) -> Result<Again, Error> {
    let code = seen.exit_qualification;
    let ngpa = convert::address::number(seen.nested_gpa, "ept_violation.nested_gpa")?;
    let walk = ept(walker)?;
    let (kind, phase) = access(code)?;
    let gva = match seen.gva {
        None => None,
        Some(_) if code & EPT_VIOLATION_GVA_VALID == 0 => {
            let problem = "bit 7 of the qualification is clear: the guest-linear address is not valid";
            return Err(Error::invalid("ept_violation.gva", problem));
        }
        given => {
            let gva = convert::address::number(given, "ept_violation.gva")?;
            check_width(walker, gva, "ept_violation.gva")?;
            Some(gva)
        }
    };

    // Where the linear address leads now, whatever EPT allows there.
    let linear = gva.map(|gva| {
        let exempt = Access::new(kind, Privilege::Exempt);
        let outcome = walker.translate_with(memory, Gva(gva), &exempt, AdPolicy::Observe, &mut NoTrace);
        (gva, outcome)
    });
    let user_page = match &linear {
        Some((_, Ok(page))) => page.rights().user(),
        _ => code & EPT_VIOLATION_USER_PAGE != 0,
    };
    let access = Access::new(kind, if user_page { Privilege::User } else { Privilege::Supervisor });
    let mut trace = Trace::new();
    let outcome = walk.translate(memory, NestedGpa(ngpa), &access, phase, &mut trace);
    // A write may be a read as well: one that modifies, or of a guest's table, which not every CPU reports as both.
    let either = if code & EPT_VIOLATION_WRITE != 0 { EPT_VIOLATION_READ } else { 0 };
    let ignored = OF_THE_EXIT | OF_THE_GUEST | either;
    let matches = outcome.as_ref().is_err_and(|fault| match fault.kind {
        FaultKind::EptViolation { exit_qualification } => (exit_qualification ^ code) & !ignored == 0,
        _ => false,
    });

    let decoded = convert::fault::decode(code, Code::EptViolation);
    let title = format!(
        "nGPA {ngpa:#x}, {}, {}: {}",
        convert::access::describe(&access),
        convert::access::describe_phase(phase),
        second(walk)
    );
    let mut said = format!("EPT violation, exit qualification {code:#x}, guest-physical address {ngpa:#x}");
    if let Some((gva, _)) = &linear {
        let _ = write!(said, ", guest-linear address {gva:#x}");
    }
    let mut explanation = explain(
        &said,
        &decoded,
        matches,
        &Ladder { nested_alone: true, ..ladder(&title, walker, trace.steps(), &outcome) },
    );
    if let Some((gva, leads)) = linear {
        let now = match leads.map(|page| page.nested.map_or(page.gpa.0, |nested| nested.ngpa.0)) {
            Ok(found) if found == ngpa => "leads to that nGPA now".to_owned(),
            Ok(found) if phase == NestedPhase::Final => format!("leads to nGPA {found:#x} now"),
            Ok(found) => {
                format!("leads to nGPA {found:#x} now; the exit was met on the way, at one of its tables")
            }
            Err(fault) => format!("leads nowhere now: {}", fault.reason),
        };
        let _ = writeln!(explanation, "GVA {gva:#x} {now}.");
    }
    Ok(Again { outcome, trace, matches, decoded, explanation, names: Names::default() })
}

/// A misconfigured entry is so for every access: one that is exempt from rights meets it.
pub(super) fn misconfiguration(
    walker: &Walker,
    memory: &GuestRam,
    seen: v1::EptMisconfiguration,
) -> Result<Again, Error> {
    let ngpa = convert::address::number(seen.nested_gpa, "ept_misconfiguration.nested_gpa")?;
    let walk = ept(walker)?;
    let access = Access::new(AccessKind::Read, Privilege::Exempt);
    let mut trace = Trace::new();
    let outcome = walk.translate(memory, NestedGpa(ngpa), &access, NestedPhase::Final, &mut trace);
    let matches = outcome.as_ref().is_err_and(|fault| fault.kind == FaultKind::EptMisconfiguration);
    let title = format!("nGPA {ngpa:#x}, {}: {}", convert::access::describe(&access), second(walk));
    let explanation = explain(
        &format!("EPT misconfiguration, guest-physical address {ngpa:#x}"),
        &[],
        matches,
        &Ladder { nested_alone: true, ..ladder(&title, walker, trace.steps(), &outcome) },
    );
    Ok(Again { outcome, trace, matches, decoded: Vec::new(), explanation, names: Names::default() })
}

fn ept(walker: &Walker) -> Result<&NgpaWalk, Error> {
    let refuse = |what: &str| {
        Err(Error::Precondition(format!("{what}: switch nested mode to EPT, or bring `override.ept`")))
    };
    match walker.ngpa_walk() {
        Some(walk @ NgpaWalk::Ept(_)) => Ok(walk),
        Some(NgpaWalk::Npt(_)) => refuse("the second dimension is NPT, which causes no such exits"),
        None => refuse("there is no second dimension to explain an exit of EPT by"),
    }
}

/// What a qualification says of the access.
fn access(code: u64) -> Result<(AccessKind, NestedPhase), Error> {
    let refuse = |problem: &str| {
        Err(Error::invalid("ept_violation.exit_qualification", format!("{code:#x}: {problem}")))
    };
    let has = |bit: u64| code & bit != 0;
    if code & !KNOWN != 0 {
        return refuse("bit 15 and bits above 16 are not known here");
    }
    let phase = match (has(EPT_VIOLATION_GVA_VALID), has(EPT_VIOLATION_GVA_TRANSLATED)) {
        // Bit 8 has no meaning where bit 7 is clear.
        (false, _) => NestedPhase::Pdpte,
        (true, false) => NestedPhase::Table,
        (true, true) => NestedPhase::Final,
    };
    let (read, write, fetch) = (has(EPT_VIOLATION_READ), has(EPT_VIOLATION_WRITE), has(EPT_VIOLATION_FETCH));
    if !(read || write || fetch) {
        return refuse("at least one of bits 2:0 is set");
    }
    if fetch && (read || write) {
        return refuse("a fetch (bit 2) neither reads (bit 0) nor writes (bit 1) data");
    }
    if phase != NestedPhase::Final && fetch {
        return refuse("a paging structure (bit 8 clear) is not fetched from (bit 2)");
    }
    let shadow_stack = has(EPT_VIOLATION_SHADOW_STACK);
    if shadow_stack && (fetch || phase != NestedPhase::Final) {
        return refuse("a shadow-stack access (bit 13) is no fetch, and to no paging structure");
    }
    let kind = match (shadow_stack, write) {
        (true, true) => AccessKind::ShadowStackWrite,
        (true, false) => AccessKind::ShadowStackRead,
        (false, true) => AccessKind::Write,
        (false, false) if fetch => AccessKind::Fetch,
        _ => AccessKind::Read,
    };
    Ok((kind, phase))
}
