//! Addresses as people and programs write them.

use pagewalk_proto::{NumberError, v1};

use crate::status::Error;

/// An address as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// A number.
    Number(u64),
    /// A symbol, and what is to be added to its address.
    Symbol(SymbolOffset),
}

/// `symbol+offset`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SymbolOffset {
    pub(crate) name: String,
    pub(crate) offset: i128,
}

/// Reads an address; `field` is what the client called it.
pub(crate) fn written(address: Option<v1::Address>, field: &'static str) -> Result<Written, Error> {
    use v1::address::Value;
    match address.and_then(|address| address.value) {
        Some(Value::Number(number)) => Ok(Written::Number(number)),
        Some(Value::Text(text)) => parse_text(&text).map_err(|problem| Error::invalid(field, problem)),
        None => Err(Error::invalid(field, r#"an address is required: {"number": N} or {"text": "0x..."}"#)),
    }
}

/// Reads an address that no symbol of the machine's kernel stands for: a physical one, or one of an L2.
pub(crate) fn number(address: Option<v1::Address>, field: &'static str) -> Result<u64, Error> {
    match written(address, field)? {
        Written::Number(number) => Ok(number),
        Written::Symbol(SymbolOffset { name, .. }) => {
            let problem = format!(
                "`{name}` is no number: a symbol is a virtual address of the machine's own kernel, which this is not{}",
                hex_hint(&name)
            );
            Err(Error::invalid(field, problem))
        }
    }
}

/// Longest text that is looked at: the kernel's longest name and an offset would fit, a client's novel does not.
const TEXT_MAX: usize = 600;

fn parse_text(text: &str) -> Result<Written, String> {
    let trimmed = text.trim();
    if trimmed.is_empty() || trimmed.len() > TEXT_MAX {
        return Err(
            "the text is empty or too long: write 0x and hex digits, decimal digits, or symbol+offset"
                .to_owned(),
        );
    }
    if !is_name(trimmed.split(['+', '-']).next().unwrap_or_default().trim_end()) {
        return parse_number(trimmed).map(Written::Number);
    }
    let number = |offset: &str| {
        // A name with a dash in it, more likely than not: a symbol has none.
        let problem =
            || format!("`{trimmed}` is neither a number nor symbol+offset: `{offset}` is no offset");
        parse_number(offset.trim_start()).map(i128::from).map_err(|_| problem())
    };
    let (name, offset) = match trimmed.split_once('+') {
        Some((name, offset)) => (name, number(offset)?),
        None => match trimmed.split_once('-') {
            Some((name, offset)) => (name, -number(offset)?),
            None => (trimmed, 0),
        },
    };
    Ok(Written::Symbol(SymbolOffset { name: name.trim_end().to_owned(), offset }))
}

/// What an error about a name adds: kernels have names of hex digits alone, such as `edd`, but most who write them forgot 0x.
pub(crate) fn hex_hint(name: &str) -> &'static str {
    if name.chars().all(|c| c.is_ascii_hexdigit() || c == '_') { "; hex needs 0x in front" } else { "" }
}

/// Whether this may be the name of a symbol.
fn is_name(text: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '$' | '@');
    text.starts_with(|c: char| !c.is_ascii_digit() && known(c))
        && text.chars().all(known)
        && text.contains(|c: char| c.is_ascii_alphanumeric())
}

fn parse_number(text: &str) -> Result<u64, String> {
    pagewalk_proto::number(text).map_err(|problem| match problem {
        NumberError::TooLarge => format!("`{text}` does not fit 64 bits"),
        NumberError::Separator => format!("`{text}`: {problem}"),
        NumberError::DigitsMissing | NumberError::HexWithoutPrefix | NumberError::NotANumber => format!(
            "`{text}` is neither a number nor symbol+offset: write 0x and hex digits, or decimal digits{}",
            hex_hint(text)
        ),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{SymbolOffset, Written, parse_text};

    #[test]
    fn numbers() {
        for (text, number) in [
            ("0xffff_8000_0000_1000", 0xffff_8000_0000_1000),
            (" 4096 ", 4096),
            ("0Xff", 255),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_text(text), Ok(Written::Number(number)), "{text}");
        }
    }

    #[test]
    fn symbols() {
        for (text, name, offset) in [
            ("linux_banner", "linux_banner", 0),
            (" _text+0x1_0 ", "_text", 0x10),
            ("schedule + 16", "schedule", 16),
            ("_end-1", "_end", -1),
            (".Lx$1@2", ".Lx$1@2", 0),
            ("edd", "edd", 0),
            ("af+0xf", "af", 15),
            ("x+18446744073709551615", "x", i128::from(u64::MAX)),
        ] {
            let expected = SymbolOffset { name: name.to_owned(), offset };
            assert_eq!(parse_text(text), Ok(Written::Symbol(expected)), "{text}");
        }
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
            "1fff",
            "1fff+1",
            "0xg",
            "1 2",
            "_",
            "0x_1",
            "1_",
            "main+",
            "main+x",
            "main+-1",
            "main+1+1",
            "ma in",
            "na\u{efad}e",
            "1+1",
        ] {
            assert!(parse_text(text).is_err(), "{text:?}");
        }
        assert!(parse_text(&"1".repeat(1000)).is_err());
        assert!(parse_text("7fff").is_err_and(|e| e.contains("0x in front")));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,80}") {
            let _ = parse_text(&text);
        }

        #[test]
        fn what_is_written_is_read(name in "[g-zG-Z_.$][a-zA-Z][0-9a-zA-Z_.$@]{0,40}z", offset: u64, minus: bool) {
            let offset = if minus { -i128::from(offset) } else { i128::from(offset) };
            let text = format!("{name}{}{:#x}", if minus { '-' } else { '+' }, offset.unsigned_abs());
            prop_assert_eq!(parse_text(&text), Ok(Written::Symbol(SymbolOffset { name, offset })));
        }
    }
}
