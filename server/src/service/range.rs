//! `TranslateRange`: what each address of a range means for one access.

use pagewalk::map::{Map, Report};
use pagewalk_proto::v1;

use super::Daemon;
use super::resolve::Target;
use super::translation::walker;
use crate::convert;
use crate::status::Error;
use crate::vcpu::Snapshot;
use std::sync::Arc;
use std::time::Instant;

/// The map that answers a request, and the state that it was made from.
pub(super) async fn map(
    daemon: &Daemon,
    target: &Target,
    request: v1::TranslateRangeRequest,
    patience: Instant,
) -> Result<(Map, Arc<Snapshot>), Error> {
    let budget = convert::mapping::budget(request.budget)?;
    if request.range.is_none() {
        return Err(Error::invalid("range", "required: a start and an end"));
    }
    let range = target.range(daemon, patience, request.range).await?;
    let snapshot = target.snapshot(request.freshness, patience).await?;
    let access = convert::access::access(request.access, &snapshot.registers)?;
    let walker = walker(request.r#override.as_ref(), &snapshot)?;
    convert::access::check(&access, &walker)?;
    let map = convert::mapping::over(walker.into_owned(), range)?;
    Ok((map.for_access(&access).reporting(Report::Everything).within(budget), snapshot))
}
