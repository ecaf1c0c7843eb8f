//! What the fuzz targets check, apart from what drives them: `walker/tests/seeds.rs` runs the same on the inputs that are kept.
//!
//! A check panics where the walker contradicts itself or a rule that holds for all inputs; the driver looks for such an input,
//! and for a panic of the walker's own. What an entry means is not judged here: other judges compare with the kernel and with
//! the oracle.

pub mod input;
pub mod memory;
pub mod registers;
pub mod report;
pub mod setup;
pub mod walk;
