//! How the walker is put before the oracle: memory both can read, their answers side by side, and what is asked.

pub(crate) mod answers;
mod checks;
pub(crate) mod classes;
pub(crate) mod ground;
mod host;
mod nested;
pub(crate) mod odometer;
mod path;
pub(crate) mod race;
pub(crate) mod setup;
pub(crate) mod sheets;
pub(crate) mod soup;
