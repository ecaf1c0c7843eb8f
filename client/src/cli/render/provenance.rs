//! Where an answer comes from, in parentheses behind it.

use std::time::Duration;

use pagewalk_proto::readable;

use super::{names, paint};
use crate::v1::{Provenance, RunState};

/// `(vcpu 0, generation 12, 3 ms old, halted)`.
pub(in crate::cli) fn short(provenance: Option<&Provenance>) -> String {
    let Some(provenance) = provenance else {
        return paint::dim("(origin unknown)");
    };
    let mut words =
        vec![format!("vcpu {}", provenance.vcpu), format!("generation {}", provenance.generation)];
    words.extend(age(provenance.snapshot_age.as_ref()).map(|age| format!("{age} old")));
    if provenance.run_state() != RunState::Unspecified {
        words.push(names::run_state(provenance.run_state()).into());
    }
    if !provenance.assumed.is_empty() {
        words.push(format!("assumed {}", readable(&provenance.assumed.join(" "))));
    }
    if provenance.torn {
        words.push("torn: an entry changed during the walk".into());
    } else if provenance.validated {
        words.push("validated".into());
    }
    if provenance.repeated_walks > 0 {
        words.push(format!("{} walks repeated", provenance.repeated_walks));
    }
    paint::dim(format!("({})", words.join(", ")))
}

/// The same with machine, source and host.
pub(in crate::cli) fn long(provenance: &Provenance) -> String {
    let machine = format!("machine {} ({})", readable(&provenance.machine), readable(&provenance.source));
    let host = match provenance.host.as_str() {
        "" => String::new(),
        host => format!(" on {}", readable(host)),
    };
    format!("{machine}{host} {}", short(Some(provenance)))
}

/// A span of time with one unit; `None` where there is none, or a negative one.
pub(in crate::cli) fn age(age: Option<&prost_types::Duration>) -> Option<String> {
    let age = Duration::try_from(*age?).ok()?;
    Some(match age.as_micros() {
        micros @ ..1_000 => format!("{micros} us"),
        micros @ 1_000..1_000_000 => format!("{} ms", micros / 1_000),
        micros @ 1_000_000..60_000_000 => format!("{}.{} s", micros / 1_000_000, micros / 100_000 % 10),
        micros => format!("{} min", micros / 60_000_000),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_of_time_with_one_unit() {
        for (seconds, nanos, text) in [
            (0, 0, "0 us"),
            (0, 999_999, "999 us"),
            (0, 3_900_000, "3 ms"),
            (1, 250_000_000, "1.2 s"),
            (59, 999_999_999, "59.9 s"),
            (3600, 0, "60 min"),
        ] {
            assert_eq!(age(Some(&prost_types::Duration { seconds, nanos })).as_deref(), Some(text));
        }
        assert_eq!(age(Some(&prost_types::Duration { seconds: -1, nanos: 0 })), None);
        assert_eq!(age(None), None);
    }
}
