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
    fn a_refusal_says_what_to_write() {
        assert_eq!(u64("0xffff_8000_0000_1234"), Ok(0xffff_8000_0000_1234));
        assert_eq!(u64("ffff8000"), Err("hex needs 0x in front: 0xffff8000".to_owned()));
        assert!(u32("0x1_0000_0000").is_err_and(|error| error.contains("32 bits")));
        assert!(gpa("0x10_0000_0000_0000").is_err_and(|error| error.contains("`translate`")));
    }
}
