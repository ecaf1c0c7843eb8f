//! Numbers of a description: TOML's own end at 2^63, registers do not.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A number from 0 to 2^64-1: as TOML has them (`4096`, `0x1000`), or as text (`"0xffffffff81000000"`). Written as text in hex.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Number(pub u64);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{:#x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Visitor)
    }
}

struct Visitor;

impl de::Visitor<'_> for Visitor {
    type Value = Number;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number from 0 to 2^64-1, as such or as text such as \"0x1000\"")
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Number, E> {
        Ok(Number(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Number, E> {
        u64::try_from(value).map(Number).map_err(|_| E::invalid_value(de::Unexpected::Signed(value), &self))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Number, E> {
        pagewalk_proto::number(text)
            .map(Number)
            .map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[derive(Deserialize)]
    struct Value {
        v: Number,
    }

    #[test]
    fn reads_toml_numbers_and_text() {
        for (text, value) in [
            ("4096", 4096),
            ("0x1000", 4096),
            ("0x7fff_ffff_ffff_ffff", i64::MAX as u64),
            ("\"0x1000\"", 4096),
            ("\"0X1000\"", 4096),
            ("\"4096\"", 4096),
            ("\"0xffff_ffff_8100_0000\"", 0xffff_ffff_8100_0000),
            ("\"18446744073709551615\"", u64::MAX),
        ] {
            assert_eq!(toml::from_str::<Value>(&format!("v = {text}")).unwrap().v.0, value, "{text}");
        }
        for text in ["-1", "1.5", "true", "\"\"", "\"0x\"", "\"+1\"", "\"1e3\"", "\"18446744073709551616\""] {
            assert!(toml::from_str::<Value>(&format!("v = {text}")).is_err(), "{text}");
        }
    }
}
