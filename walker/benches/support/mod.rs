//! What the benches share: guests whose tables are walked, those that walk them beside us, and the record of a run.

#![allow(dead_code, reason = "each bench uses its part of the support")]

pub(crate) mod guest;
pub(crate) mod kept;
pub(crate) mod kvm;
pub(crate) mod memflow;
pub(crate) mod offset_page_table;
pub(crate) mod ram;
pub(crate) mod record;

#[path = "../../tests/bed/mod.rs"]
pub(crate) mod bed;
