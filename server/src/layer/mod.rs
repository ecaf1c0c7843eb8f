//! What every call passes through, outermost first: a bound on the calls in flight, a span, the client's deadline.

mod deadline;
mod limit;
mod trace;

pub(crate) use deadline::{Deadline, DeadlineLayer};
pub(crate) use limit::LimitLayer;
pub(crate) use trace::TraceLayer;
