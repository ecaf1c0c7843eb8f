//! Numbers as people write them: `0x` or `0X` and hex digits, or decimal digits; `_` may separate digits.

use std::fmt;

/// Why a text is no number of 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumberError {
    /// There is nothing, or nothing after `0x`.
    DigitsMissing,
    /// `_` stands before the first digit or after the last.
    Separator,
    /// It is decimal, and only as hex would its digits be some.
    HexWithoutPrefix,
    /// It is something else.
    NotANumber,
    /// It does not fit 64 bits.
    TooLarge,
}

impl fmt::Display for NumberError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DigitsMissing => "digits are missing",
            Self::Separator => "`_` may only stand between digits",
            Self::HexWithoutPrefix => "hex needs 0x in front",
            Self::NotANumber => "it is no number; write 0x and hex digits, or decimal digits",
            Self::TooLarge => "it does not fit 64 bits; the largest is 0xffff_ffff_ffff_ffff",
        })
    }
}

impl std::error::Error for NumberError {}

/// Reads a number. Whatever stands around it, a sign or spaces, makes it none.
///
/// # Errors
///
/// Says what is wrong with the text.
pub fn number(text: &str) -> Result<u64, NumberError> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    if digits.is_empty() {
        return Err(NumberError::DigitsMissing);
    }
    if digits.starts_with('_') || digits.ends_with('_') {
        return Err(NumberError::Separator);
    }
    let bare = digits.replace('_', "");
    // `from_str_radix` would take a sign.
    if !bare.chars().all(|digit| digit.is_digit(radix)) {
        let hex = radix == 10 && bare.chars().all(|digit| digit.is_ascii_hexdigit());
        return Err(if hex { NumberError::HexWithoutPrefix } else { NumberError::NotANumber });
    }
    u64::from_str_radix(&bare, radix).map_err(|_| NumberError::TooLarge)
}

#[cfg(test)]
mod tests {
    use super::{NumberError, number};

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
            assert_eq!(number(text), Ok(value), "{text}");
        }
    }

    #[test]
    fn everything_else_is_refused_with_the_reason() {
        use NumberError::{DigitsMissing, HexWithoutPrefix, NotANumber, Separator, TooLarge};
        for (text, reason) in [
            ("", DigitsMissing),
            ("0x", DigitsMissing),
            ("_", Separator),
            ("0x_1", Separator),
            ("1_", Separator),
            ("-1", NotANumber),
            ("+1", NotANumber),
            (" 1", NotANumber),
            ("0x+1", NotANumber),
            ("main+0x10", NotANumber),
            ("٣", NotANumber),
            ("ffff_8000", HexWithoutPrefix),
            ("0x1_0000_0000_0000_0000", TooLarge),
            ("18446744073709551616", TooLarge),
        ] {
            assert_eq!(number(text), Err(reason), "{text}");
        }
    }
}
