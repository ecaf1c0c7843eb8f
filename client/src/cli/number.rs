//! Numbers on the command line, as the contract writes them.

use pagewalk_proto::NumberError;

/// An address or a 64-bit register.
pub(super) fn u64(text: &str) -> Result<u64, String> {
    pagewalk_proto::number(text).map_err(|problem| match problem {
        NumberError::HexWithoutPrefix => format!("{problem}: 0x{text}"),
        _ => problem.to_string(),
    })
}

/// An address that memory may have. What is beyond is most likely a virtual one.
pub(super) fn gpa(text: &str) -> Result<u64, String> {
    u64(text).and_then(|gpa| {
        if gpa >> 52 == 0 {
            Ok(gpa)
        } else {
            Err("no physical address has more than 52 bits; `translate` takes virtual ones".into())
        }
    })
}

/// A 32-bit register.
pub(super) fn u32(text: &str) -> Result<u32, String> {
    u32::try_from(u64(text)?).map_err(|_| "it does not fit 32 bits; the largest is 0xffff_ffff".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_decimal_and_separators() {
        for (text, value) in [
            ("0", 0),
            ("42", 42),
            ("1_000", 1000),
            ("0x10", 16),
            ("0XfF", 255),
            ("0xffff_8000_0000_1234", 0xffff_8000_0000_1234),
            ("0x0000000000000000000000001", 1),
            ("18446744073709551615", u64::MAX),
            ("0xffffffffffffffff", u64::MAX),
        ] {
            assert_eq!(u64(text), Ok(value), "{text}");
        }
    }

    #[test]
    fn everything_else_is_refused_with_the_reason() {
        for (text, reason) in [
            ("", "missing"),
            ("0x", "missing"),
            ("0x_1", "between digits"),
            ("1_", "between digits"),
            ("-1", "no number"),
            ("+1", "no number"),
            ("0x+1", "no number"),
            ("main+0x10", "no number"),
            ("٣", "no number"),
            ("ffff8000", "0xffff8000"),
            ("0x1_0000_0000_0000_0000", "64 bits"),
            ("18446744073709551616", "64 bits"),
        ] {
            let error = u64(text).expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
        }
        assert!(u32("0x1_0000_0000").expect_err("33 bits").contains("32 bits"));
    }
}
