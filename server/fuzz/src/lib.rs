//! What the daemon's fuzz targets check, apart from what drives them.
//!
//! A check panics where the daemon does not answer, or answers with something that is no answer; the driver looks for such an
//! input, for a panic of the daemon's own, and for a hang. Whether an answer is right is for other judges.

pub mod dumps;
pub mod images;
pub mod requests;
mod walked;
pub mod words;
