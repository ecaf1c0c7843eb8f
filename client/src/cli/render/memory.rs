//! Bytes of memory, sixteen a line.

use std::fmt::Write as _;

use pagewalk_proto::readable;

use super::{hex, paint, provenance};
use crate::v1::{MemoryStop, ReadMemoryResponse, WriteMemoryResponse};

/// Address, hex, and what can be printed of it; after the last bytes, why they end early and where they come from.
pub(in crate::cli) fn dump(first: u64, answer: &ReadMemoryResponse, last: bool) -> String {
    let mut text = String::new();
    for (line, bytes) in answer.data.chunks(16).enumerate() {
        let at = first.wrapping_add(line as u64 * 16);
        let mut digits = String::new();
        for (column, byte) in bytes.iter().enumerate() {
            let gap = if column == 8 {
                "  "
            } else if column == 0 {
                ""
            } else {
                " "
            };
            // Writing to a string does not fail.
            let _ = write!(digits, "{gap}{byte:02x}");
        }
        let printed: String =
            bytes.iter().map(|&b| if (0x20..0x7f).contains(&b) { char::from(b) } else { '.' }).collect();
        let _ = writeln!(text, "{at:016x}  {digits:<48}  {printed}");
    }
    if last {
        if let Some(early) = &answer.stop {
            let _ = writeln!(text, "{}", stop(early));
        }
        let _ = write!(text, "{}", provenance::short(answer.provenance.as_ref()));
    }
    text
}

pub(in crate::cli) fn written(answer: &WriteMemoryResponse) -> String {
    let what = match &answer.stop {
        None if answer.written == 1 => "1 byte written".to_owned(),
        None => format!("{} bytes written", answer.written),
        Some(early) => format!("nothing written: {}", stop(early)),
    };
    format!("{what}  {}", provenance::short(answer.provenance.as_ref()))
}

/// Where bytes end early, and why.
pub(in crate::cli) fn stop(stop: &MemoryStop) -> String {
    let why = match &stop.fault {
        Some(fault) => super::outcome::fault(fault),
        None => format!("GPA {}: {}", hex(stop.gpa), readable(&stop.reason)),
    };
    format!("{} at {}: {why}", paint::bad("stopped"), hex(stop.address))
}
