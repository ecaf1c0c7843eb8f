//! Between the contract and the walker: one file a concept of the walker, in both directions where both exist.
//!
//! Everything that comes from a client is checked here, and every refusal names the field.

pub(crate) mod access;
pub(crate) mod address;
pub(crate) mod fault;
pub(crate) mod format;
pub(crate) mod machine;
pub(crate) mod mapping;
pub(crate) mod nested;
pub(crate) mod registers;
pub(crate) mod rights;
pub(crate) mod snapshot;
pub(crate) mod step;
pub(crate) mod symbol;
pub(crate) mod translation;
pub(crate) mod walker_override;
