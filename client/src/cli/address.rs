//! Guest virtual addresses on the command line: numbers, or symbols of the guest's kernel, which the daemon looks up.

use super::number;
use crate::v1::{Address, address::Value};

/// An address as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Written {
    Number(u64),
    /// `symbol+offset`.
    Symbol(String),
}

impl Written {
    pub(super) fn message(&self) -> Address {
        Address {
            value: Some(match self {
                Self::Number(number) => Value::Number(*number),
                Self::Symbol(text) => Value::Text(text.clone()),
            }),
        }
    }

    /// The number that it is, which the daemon knows of a symbol.
    pub(super) fn number(&self, answered: u64) -> u64 {
        match self {
            Self::Number(number) => *number,
            Self::Symbol(_) => answered,
        }
    }
}

/// Takes for a symbol what begins as one. Kernels have some of hex digits alone, such as `edd`: the daemon knows which.
pub(super) fn address(text: &str) -> Result<Written, String> {
    let symbol = text.starts_with(|c: char| c.is_ascii_alphabetic() || matches!(c, '_' | '.' | '$'));
    if symbol { Ok(Written::Symbol(text.to_owned())) } else { number::u64(text).map(Written::Number) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_symbols() {
        assert_eq!(address("0x10"), Ok(Written::Number(16)));
        for text in ["linux_banner", "_text+0x10", "_end - 1", ".Lx", "d_add", "edd+1"] {
            assert_eq!(address(text), Ok(Written::Symbol(text.to_owned())));
        }
        for (text, reason) in
            [("", "missing"), ("-1", "no number"), ("7fff8000", "0x7fff8000"), ("1_", "between")]
        {
            assert!(address(text).is_err_and(|error| error.contains(reason)), "{text}");
        }
    }
}
