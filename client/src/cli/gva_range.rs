//! Ranges of guest virtual addresses on the command line.

use super::address::{Written, address};
use crate::v1::GvaRange;

/// A range as it is written: either end may be left out.
#[derive(Clone, Debug)]
pub(super) struct Range {
    start: Option<Written>,
    end: Option<Written>,
}

impl Range {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let bound = |text: &str| match text {
            "" => Ok(None),
            text => address(text).map(Some).map_err(|problem| format!("{text}: {problem}")),
        };
        if let Some((start, end)) = text.split_once("..") {
            return Ok(Self { start: bound(start)?, end: bound(end)? });
        }
        let Some((start, size)) = text.split_once('+') else {
            return Err("write START..END, or START+SIZE; either end may be left out".into());
        };
        let (start, size) = match (bound(start)?, bound(size)?) {
            (Some(Written::Number(start)), Some(Written::Number(size))) => (start, size),
            (Some(Written::Symbol(start)), Some(Written::Number(size))) => {
                let end = Written::Symbol(format!("{start}+{size}"));
                return Ok(Self { start: Some(Written::Symbol(start)), end: Some(end) });
            }
            _ => return Err("write START+SIZE".into()),
        };
        let end = match start.checked_add(size) {
            Some(end) => Some(Written::Number(end)),
            // Up to the last byte that there is.
            None if start.wrapping_add(size) == 0 => None,
            None => return Err("it ends above 2^64".into()),
        };
        Ok(Self { start: Some(Written::Number(start)), end })
    }

    pub(super) fn message(&self) -> GvaRange {
        let bound = |written: &Option<Written>| written.as_ref().map(Written::message);
        GvaRange { start: bound(&self.start), end: bound(&self.end) }
    }

    pub(super) fn end(&self) -> Option<&Written> {
        self.end.as_ref()
    }
}
