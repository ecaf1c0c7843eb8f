//! Addresses as people and programs write them.

use pagewalk_proto::v1;

use crate::status::Error;

/// Reads an address; `field` is what the client called it.
pub(crate) fn parse(address: Option<v1::Address>, field: &'static str) -> Result<u64, Error> {
    use v1::address::Value;
    match address.and_then(|address| address.value) {
        Some(Value::Number(number)) => Ok(number),
        Some(Value::Text(text)) => parse_text(&text).map_err(|problem| Error::invalid(field, problem)),
        None => Err(Error::invalid(field, r#"an address is required: {"number": N} or {"text": "0x..."}"#)),
    }
}

/// Longest text that is looked at: 64 bits in binary would fit, a client's novel does not.
const TEXT_MAX: usize = 80;

fn parse_text(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    if trimmed.is_empty() || trimmed.len() > TEXT_MAX {
        return Err("the text is empty or too long: write 0x and hex digits, or decimal digits".to_owned());
    }
    let (digits, radix) = match trimmed.strip_prefix("0x").or_else(|| trimmed.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None => (trimmed, 10),
    };
    let digits = digits.replace('_', "");
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        let hint =
            if trimmed.chars().all(|c| c.is_ascii_hexdigit()) { "; hex needs 0x in front" } else { "" };
        return Err(format!("`{trimmed}` is not a number: write 0x and hex digits, or decimal digits{hint}"));
    }
    u64::from_str_radix(&digits, radix).map_err(|_| format!("`{trimmed}` does not fit 64 bits"))
}

#[cfg(test)]
mod tests {
    use super::parse_text;

    #[test]
    fn numbers() {
        assert_eq!(parse_text("0xffff_8000_0000_1000"), Ok(0xffff_8000_0000_1000));
        assert_eq!(parse_text(" 4096 "), Ok(4096));
        assert_eq!(parse_text("0Xff"), Ok(255));
        assert_eq!(parse_text("18446744073709551615"), Ok(u64::MAX));
    }

    #[test]
    fn refusals() {
        for text in [
            "",
            "0x",
            "-1",
            "+1",
            "0x1_0000_0000_0000_0000",
            "18446744073709551616",
            "ffff",
            "0xg",
            "1 2",
            "_",
        ] {
            assert!(parse_text(text).is_err(), "{text:?}");
        }
        assert!(parse_text(&"1".repeat(1000)).is_err());
        assert!(parse_text("ffff").is_err_and(|e| e.contains("0x in front")));
    }
}
