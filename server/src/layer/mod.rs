//! What every call passes through, outermost first: a bound on the calls in flight, a span, the client's deadline, and a
//! reason for what the transport refuses.

mod deadline;
mod limit;
mod reason;
mod trace;

pub(crate) use deadline::Deadline;
pub use deadline::DeadlineLayer;
pub use limit::LimitLayer;
pub use reason::ReasonLayer;
pub(crate) use reason::reason;
pub use trace::TraceLayer;
