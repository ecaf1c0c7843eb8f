//! What every call passes through, outermost first: a bound on the calls in flight, a span, the client's deadline, and a
//! reason for what the transport refuses.

mod deadline;
mod limit;
mod reason;
mod trace;

pub(crate) use deadline::{Deadline, DeadlineLayer};
pub(crate) use limit::LimitLayer;
pub(crate) use reason::ReasonLayer;
pub(crate) use trace::TraceLayer;
