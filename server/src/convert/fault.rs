//! Faults, and the bits of error codes.

use pagewalk::{
    Dimension, EXIT_INFO_1_FINAL, EXIT_INFO_1_TABLE, Fault, FaultKind, PFEC_FETCH, PFEC_KEY, PFEC_PRESENT,
    PFEC_RESERVED, PFEC_USER, PFEC_WRITE,
};
use pagewalk_proto::v1;

pub(crate) fn fault(fault: &Fault) -> v1::Fault {
    let kind = match fault.kind {
        FaultKind::PageFault { .. } => v1::FaultKind::PageFault,
        FaultKind::GeneralProtection => v1::FaultKind::GeneralProtection,
        FaultKind::StackFault => v1::FaultKind::StackFault,
        FaultKind::NestedPageFault { .. } => v1::FaultKind::NestedPageFault,
        FaultKind::Unbacked => v1::FaultKind::Unbacked,
        FaultKind::Contended => v1::FaultKind::Contended,
    };
    let error_code = match fault.kind {
        FaultKind::PageFault { error_code } => Some(error_code),
        _ => None,
    };
    let exit_info_1 = match fault.kind {
        FaultKind::NestedPageFault { exit_info_1 } => Some(exit_info_1),
        _ => None,
    };
    v1::Fault {
        kind: kind.into(),
        address: fault.address,
        level: fault.level,
        dimension: dimension(fault.dimension).into(),
        entry_gpa: fault.entry_gpa.0,
        entry: fault.entry,
        error_code,
        exit_qualification: None,
        exit_info_1,
        nested_gpa: fault.nested_gpa.map_or(0, |gpa| gpa.0),
        reason: fault.reason.to_string(),
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
    (6, "SS", "shadow-stack access", "no shadow-stack access"),
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

/// The bits of an error code, or of an EXITINFO1 if `nested`.
pub(crate) fn decode(code: u64, nested: bool) -> Vec<v1::DecodedBit> {
    let known: Vec<Bit> = if nested {
        ERROR_CODE.iter().take(5).chain(&EXIT_INFO_1).copied().collect()
    } else {
        ERROR_CODE.to_vec()
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
