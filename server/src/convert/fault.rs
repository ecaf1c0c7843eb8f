//! Faults, and the bits of error codes.

use pagewalk::{
    Dimension, EXIT_INFO_1_FINAL, EXIT_INFO_1_TABLE, Fault, FaultKind, PFEC_FETCH, PFEC_KEY, PFEC_PRESENT,
    PFEC_RESERVED, PFEC_SHADOW_STACK, PFEC_USER, PFEC_WRITE,
};
use pagewalk_proto::v1;

pub(crate) fn fault(fault: &Fault) -> v1::Fault {
    v1::Fault { reason: fault.reason.to_string(), ..without_reason(fault) }
}

/// A fault in a batch, as the word of its address: `BatchTranslateResponse.words` says how.
pub(crate) fn word(fault: &Fault) -> u64 {
    let code = match fault.kind {
        FaultKind::PageFault { error_code } => u64::from(error_code),
        FaultKind::NestedPageFault { exit_info_1 } => exit_info_1,
        FaultKind::EptViolation { exit_qualification } => exit_qualification,
        _ => 0,
    };
    let nested = u64::from(fault.dimension == Dimension::Nested);
    (kind(fault.kind) as u64) << 1 | u64::from(fault.level) << 5 | nested << 8 | code << 16
}

fn kind(kind: FaultKind) -> v1::FaultKind {
    match kind {
        FaultKind::PageFault { .. } => v1::FaultKind::PageFault,
        FaultKind::GeneralProtection => v1::FaultKind::GeneralProtection,
        FaultKind::StackFault => v1::FaultKind::StackFault,
        FaultKind::NestedPageFault { .. } => v1::FaultKind::NestedPageFault,
        FaultKind::EptViolation { .. } => v1::FaultKind::EptViolation,
        FaultKind::EptMisconfiguration => v1::FaultKind::EptMisconfiguration,
        FaultKind::Unbacked => v1::FaultKind::Unbacked,
        FaultKind::Contended => v1::FaultKind::Contended,
    }
}

/// A fault, but for the sentence that tells its cause.
pub(crate) fn without_reason(fault: &Fault) -> v1::Fault {
    let error_code = match fault.kind {
        FaultKind::PageFault { error_code } => Some(error_code),
        _ => None,
    };
    let exit_qualification = match fault.kind {
        FaultKind::EptViolation { exit_qualification } => Some(exit_qualification),
        _ => None,
    };
    let exit_info_1 = match fault.kind {
        FaultKind::NestedPageFault { exit_info_1 } => Some(exit_info_1),
        _ => None,
    };
    v1::Fault {
        kind: kind(fault.kind).into(),
        address: fault.address,
        level: fault.level,
        dimension: dimension(fault.dimension).into(),
        entry_gpa: fault.entry_gpa.0,
        entry: fault.entry,
        error_code,
        exit_qualification,
        exit_info_1,
        nested_gpa: fault.nested_gpa.map_or(0, |gpa| gpa.0),
        reason: String::new(),
        bits: fault.bits,
    }
}

pub(crate) fn dimension(dimension: Dimension) -> v1::Dimension {
    match dimension {
        Dimension::Guest => v1::Dimension::Guest,
        Dimension::Nested => v1::Dimension::Nested,
    }
}

/// A bit that the manuals define: number, name, what it says when set and when clear.
type Bit = (u32, &'static str, &'static str, &'static str);

/// Intel SDM volume 3, "Page-Fault Exceptions"; AMD APM volume 2, "Page-Fault Exception".
const ERROR_CODE: [Bit; 7] = [
    (PFEC_PRESENT.trailing_zeros(), "P", "a present page refused the access", "an entry is not present"),
    (PFEC_WRITE.trailing_zeros(), "W/R", "the access was a write", "the access was a read or a fetch"),
    (PFEC_USER.trailing_zeros(), "U/S", "user-mode access", "supervisor-mode access"),
    (PFEC_RESERVED.trailing_zeros(), "RSVD", "an entry has reserved bits set", "no reserved bit was met"),
    (
        PFEC_FETCH.trailing_zeros(),
        "I/D",
        "instruction fetch",
        "a data access, or a fetch with EFER.NXE and CR4.SMEP clear",
    ),
    (PFEC_KEY.trailing_zeros(), "PK", "a protection key refused", "no protection key refused"),
    (PFEC_SHADOW_STACK.trailing_zeros(), "SS", "shadow-stack access", "no shadow-stack access"),
];

/// AMD APM volume 2, "Nested Paging": the upper half of EXITINFO1.
const EXIT_INFO_1: [Bit; 2] = [
    (
        EXIT_INFO_1_FINAL.trailing_zeros(),
        "FINAL",
        "met at the final guest-physical address",
        "not met at the final address",
    ),
    (
        EXIT_INFO_1_TABLE.trailing_zeros(),
        "TABLE",
        "met at a paging structure of the guest",
        "not met at a paging structure",
    ),
];

/// Intel SDM volume 3, "Exit Qualification for EPT Violations".
const EXIT_QUALIFICATION: [Bit; 16] = [
    (0, "READ", "the access was a data read", "no data read"),
    (1, "WRITE", "the access was a data write", "no data write"),
    (2, "FETCH", "the access was an instruction fetch", "no instruction fetch"),
    (3, "R", "all entries allow reads", "an entry forbids reads"),
    (4, "W", "all entries allow writes", "an entry forbids writes"),
    (5, "X", "all entries allow fetches", "an entry forbids fetches"),
    (6, "XU", "all entries allow user-mode fetches", "an entry forbids them, or they are not told apart"),
    (7, "GVA", "on behalf of a linear address", "not on behalf of a linear address"),
    (8, "FINAL", "met at the translation of the linear address", "met at a paging structure of the guest"),
    (9, "USER", "user-mode linear address", "supervisor-mode linear address, or not told"),
    (10, "RW", "the guest maps the page for writing", "the guest does not, or it is not told"),
    (11, "XD", "the guest maps the page as no-execute", "the guest does not, or it is not told"),
    (12, "IRET", "IRET had unblocked NMIs", "no IRET had unblocked NMIs"),
    (13, "SS", "shadow-stack access", "no shadow-stack access"),
    (14, "SSS", "the page is a supervisor shadow stack", "the page is none, or it is not told"),
    (16, "ASYNC", "not caused by an instruction", "caused by an instruction"),
];

/// Whose bits [`decode`] tells.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    /// #PF.
    PageFault,
    /// #VMEXIT(NPF).
    NestedPageFault,
    /// An EPT violation.
    EptViolation,
}

/// The bits of a code.
pub(crate) fn decode(code: u64, whose: Code) -> Vec<v1::DecodedBit> {
    let known: Vec<Bit> = match whose {
        Code::PageFault => ERROR_CODE.to_vec(),
        Code::NestedPageFault => {
            // The second dimension has no protection keys.
            let shared = ERROR_CODE.iter().filter(|bit| bit.0 != PFEC_KEY.trailing_zeros());
            shared.chain(&EXIT_INFO_1).copied().collect()
        }
        Code::EptViolation => EXIT_QUALIFICATION.to_vec(),
    };
    let mut decoded: Vec<_> = (0..64)
        .filter(|bit| code >> bit & 1 != 0 && known.iter().all(|known| known.0 != *bit))
        .map(|bit| v1::DecodedBit {
            bit,
            name: String::new(),
            set: true,
            meaning: "not known here".to_owned(),
        })
        .collect();
    decoded.extend(known.into_iter().map(|(bit, name, when_set, when_clear)| {
        let set = code >> bit & 1 != 0;
        let meaning = if set { when_set } else { when_clear };
        v1::DecodedBit { bit, name: name.to_owned(), set, meaning: meaning.to_owned() }
    }));
    decoded.sort_by_key(|bit| bit.bit);
    decoded
}
