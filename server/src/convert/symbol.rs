//! Symbols.

use pagewalk_proto::v1;

use crate::symbols::{Near, Symbols};

pub(crate) fn symbol(near: Near) -> v1::Symbol {
    v1::Symbol { name: near.name, offset: near.offset }
}

/// Where a machine's symbols come from, and what is known of its kernel.
pub(crate) fn symbols(symbols: &Symbols) -> v1::Symbols {
    let (placement, slide, reason) = match symbols.last_placed() {
        Ok(placed) => match placed.slide() {
            Some(slide) => (v1::SymbolPlacement::Found, Some(slide), placed.reason()),
            None => (v1::SymbolPlacement::AsWritten, None, placed.reason()),
        },
        Err(why) => (v1::SymbolPlacement::NotFound, None, why),
    };
    v1::Symbols {
        file: symbols.file().display().to_string(),
        count: symbols.count() as u64,
        placement: placement.into(),
        slide,
        reason,
    }
}
