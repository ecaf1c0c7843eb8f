//! What every call passes through, outermost first: bounds on the calls in flight and on idle ones, a span, the client's
//! deadline, and a reason for what the transport refuses.

mod deadline;
mod limit;
mod line;
mod reason;
mod trace;

pub(crate) use deadline::Deadline;
pub use deadline::DeadlineLayer;
pub use limit::LimitLayer;
pub(crate) use limit::is_bulk;
pub(crate) use line::{LOOK, Line, Peer, STALLED};
pub use reason::ReasonLayer;
pub(crate) use reason::reason;
pub use trace::TraceLayer;
