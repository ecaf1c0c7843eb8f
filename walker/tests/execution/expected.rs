//! From the walker's answer to what the guest has to meet.

use pagewalk::{Backing, Fault, FaultKind, PFEC_FETCH, PFEC_PRESENT, PFEC_RESERVED, PagingMode, Translation};

use super::Decides;
use crate::bed::case::Controls;
use crate::bed::ground::{Act, Outcome, Play};

/// What has to happen when the guest executes the access.
pub(crate) struct Expected {
    pub(crate) outcome: Outcome,
    /// What may happen instead, by rule.
    pub(crate) or: Option<Outcome>,
    pub(crate) fetch_unreported: bool,
    /// The deviation that decided the error code, if one did.
    pub(crate) deviation: Option<&'static str>,
}

impl Expected {
    pub(crate) fn new(
        answer: &Result<Translation, Fault>,
        decides: Decides,
        mode: PagingMode,
        controls: Controls,
        play: &Play,
    ) -> Expected {
        let in_bed = decides != Decides::Kernel;
        let reports_fetch = (controls.nxe && mode != PagingMode::TwoLevel) || controls.smep;
        let fetch_unreported = play.act == Act::Fetch && !reports_fetch;
        let exception = |vector, code, cr2| Outcome::Exception { vector, code, cr2 };
        let (code, deviation) = match answer {
            Err(fault) => error_code(fault, decides, reports_fetch, controls.nxe, play),
            Ok(_) => (0, None),
        };
        let outcome = match answer {
            Ok(page) if page.backing() == Backing::None && play.act == Act::Fetch => Outcome::NotEmulated,
            Ok(_) => Outcome::Done,
            Err(fault) => match fault.kind {
                FaultKind::PageFault { .. } => exception(14, code, fault.address),
                FaultKind::GeneralProtection => exception(13, 0, 0),
                FaultKind::StackFault => exception(12, 0, 0),
                FaultKind::Unbacked => exception(14, code, play.gva),
                _ => Outcome::Lost("not an outcome of this bed"),
            },
        };
        let or = match answer {
            Ok(_) if in_bed && outcome == Outcome::NotEmulated && play.cpl == 3 => Some(Outcome::Done),
            Err(_) if in_bed && outcome == exception(12, 0, 0) => Some(exception(13, 0, 0)),
            Ok(page)
                if outcome == Outcome::NotEmulated
                    && play.cpl != 3
                    && mode != PagingMode::None
                    && controls.smap
                    && !play.ac
                    && page.rights().user() =>
            {
                Some(exception(14, 1 | u64::from(reports_fetch) << 4, play.gva))
            }
            _ => None,
        };
        Expected { outcome, or, fetch_unreported, deviation }
    }
}

/// The code of the #PF that the guest has to see, and what about it is not the walker's.
fn error_code(
    fault: &Fault,
    decides: Decides,
    reports_fetch: bool,
    nxe: bool,
    play: &Play,
) -> (u64, Option<&'static str>) {
    let fetch = play.act == Act::Fetch;
    let code = match fault.kind {
        FaultKind::PageFault { error_code } => error_code,
        FaultKind::Unbacked => {
            let user = play.cpl == 3 && !play.act.is_implicit();
            // A descriptor is read before it is written.
            let write = matches!(play.act, Act::Store | Act::StackStore);
            u32::from(write) << 1 | u32::from(user) << 2 | u32::from(fetch && reports_fetch) << 4
        }
        _ => return (0, None),
    };
    let (code, deviation) = match decides {
        Decides::Shadows if fetch && nxe && !reports_fetch => {
            (code | PFEC_FETCH, Some("fetch reported under EFER.NXE in 32-bit paging"))
        }
        Decides::Emulator if code & PFEC_RESERVED != 0 => {
            (code & !PFEC_PRESENT, Some("reserved bits reported without P"))
        }
        _ => (code, None),
    };
    (code.into(), deviation)
}
