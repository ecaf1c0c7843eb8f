//! The walker's own judges' tables and second dimensions.

#![allow(dead_code, reason = "only a part is used here")]

#[path = "../../../../walker/tests/nested/guest_mode.rs"]
pub(crate) mod guest_mode;
#[path = "../../../../walker/tests/nested/second.rs"]
pub(crate) mod second;
#[path = "../../../../walker/tests/nested/tables.rs"]
pub(crate) mod tables;
#[path = "../../../../walker/tests/nested/vmcs12.rs"]
pub(crate) mod vmcs12;
