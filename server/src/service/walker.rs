//! `WalkerService`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use pagewalk_proto::v1;
use pagewalk_proto::v1::set_nested_mode_request::Mode;
use pagewalk_proto::v1::walker_service_server::WalkerService;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::Daemon;
use super::outlet::Outlet;
use super::resolve::{Target, gone, patience, refused};
use crate::convert;
use crate::layer::STALLED;
use crate::status::Error;
use crate::vcpu::{EnterL2, NestedEffectKind, NestedRequest, Snapshot};

impl Daemon {
    fn walker_state(
        &self,
        target: &Target,
        snapshot: &Snapshot,
    ) -> Result<v1::GetWalkerStateResponse, Error> {
        let walker = snapshot.walker.as_ref().map_err(|error| Error::VcpuState(*error))?;
        Ok(v1::GetWalkerStateResponse {
            gva_walk: Some(convert::format::page_walk(walker.gva_walk())),
            ngpa_walk: walker.ngpa_walk().map(|walk| convert::format::page_walk(walk.page_walk())),
            nested: Some(convert::nested::nested_mode(snapshot)),
            provenance: Some(self.provenance(target, snapshot)?),
        })
    }
}

#[tonic::async_trait]
impl WalkerService for Daemon {
    async fn get_walker_state(
        &self,
        request: Request<v1::GetWalkerStateRequest>,
    ) -> Result<Response<v1::GetWalkerStateResponse>, Status> {
        let patience = patience(&request);
        let request = request.into_inner();
        let target = self.target(request.vcpu)?;
        let snapshot = target.snapshot(request.freshness, patience).await?;
        Ok(Response::new(self.walker_state(&target, &snapshot)?))
    }

    async fn set_nested_mode(
        &self,
        request: Request<v1::SetNestedModeRequest>,
    ) -> Result<Response<v1::SetNestedModeResponse>, Status> {
        let patience = patience(&request);
        let request = request.into_inner();
        let target = self.target(request.vcpu.clone())?;
        let control_structure = convert::nested::control_structure(&request)?;
        let second = match &request.mode {
            Some(Mode::Npt(npt)) => Some(convert::nested::npt(npt)),
            Some(Mode::Ept(ept)) => Some(convert::nested::ept(ept)),
            Some(Mode::Off(true)) if request.l2.is_some() => {
                return Err(
                    Error::invalid("l2", "there is no L2 when nested mode is off: leave it out").into()
                );
            }
            Some(Mode::Off(true)) => None,
            Some(Mode::Off(false)) => return Err(Error::invalid("off", "must be true").into()),
            None => return Err(Error::invalid("mode", "required: npt, ept or off").into()),
        };
        let walker_only = request.walker_only;
        let wanted = match second {
            Some(second) => NestedRequest::Enter(EnterL2 {
                second,
                l2: convert::registers::l2(request.l2)?,
                control_structure,
                walker_only,
            }),
            None => NestedRequest::Off { walker_only },
        };
        let (snapshot, effect) = target
            .vcpu
            .set_nested(wanted, patience)
            .await
            .map_err(|problem| refused(&target.machine, problem))?;
        let kind = match effect.kind {
            NestedEffectKind::RealVcpu => v1::NestedEffectKind::RealVcpu,
            NestedEffectKind::WalkerOnly => v1::NestedEffectKind::WalkerOnly,
            NestedEffectKind::Unchanged => v1::NestedEffectKind::Unchanged,
        };
        Ok(Response::new(v1::SetNestedModeResponse {
            effect: Some(v1::NestedEffect { kind: kind.into(), reason: effect.reason }),
            state: Some(self.walker_state(&target, &snapshot)?),
        }))
    }

    type WatchWalkerStateStream =
        Pin<Box<dyn Stream<Item = Result<v1::GetWalkerStateResponse, Status>> + Send>>;

    async fn watch_walker_state(
        &self,
        request: Request<v1::WatchWalkerStateRequest>,
    ) -> Result<Response<Self::WatchWalkerStateStream>, Status> {
        let request = request.into_inner();
        let target = self.target(request.vcpu)?;
        let pace = interval(request.min_interval)?;
        if request.max_updates == Some(0) {
            return Err(Error::invalid("max_updates", "from 1, or leave it out for no end").into());
        }
        let (updates, stream) = Outlet::new(STALLED);
        let watcher = Watcher {
            daemon: self.clone(),
            generation: target.vcpu.subscribe(),
            target,
            pace,
            left: request.max_updates,
        };
        tokio::spawn(watcher.run(updates));
        Ok(Response::new(Box::pin(stream)))
    }
}

fn interval(request: Option<prost_types::Duration>) -> Result<Duration, Error> {
    const LONGEST: Duration = Duration::from_secs(3600);
    let Some(interval) = request else { return Ok(Duration::ZERO) };
    // prost's own conversion normalizes first, and overflows at the extremes.
    let seconds = u64::try_from(interval.seconds).ok();
    let nanos = u32::try_from(interval.nanos).ok().filter(|nanos| *nanos < 1_000_000_000);
    seconds
        .zip(nanos)
        .map(|(seconds, nanos)| Duration::new(seconds, nanos))
        .filter(|interval| *interval <= LONGEST)
        .ok_or_else(|| Error::invalid("min_interval", "from 0 to 3600 seconds"))
}

/// Sends a vCPU's walker state whenever it has changed.
struct Watcher {
    daemon: Daemon,
    target: Target,
    generation: watch::Receiver<u64>,
    pace: Duration,
    left: Option<u32>,
}

impl Watcher {
    async fn run(mut self, updates: Outlet<v1::GetWalkerStateResponse>) {
        let mut draining = self.daemon.draining.clone();
        let machine = Arc::clone(&self.target.machine);
        let ended = tokio::select! {
            ended = self.send_all(&updates) => ended,
            () = updates.closed() => return,
            _ = draining.wait_for(|draining| *draining) => Some(Error::ShuttingDown),
            lost = machine.when_gone() => Some(gone(&machine, lost)),
        };
        if let Some(error) = ended {
            updates.end(error);
        }
    }

    async fn send_all(&mut self, updates: &Outlet<v1::GetWalkerStateResponse>) -> Option<Error> {
        let mut sent = 0;
        loop {
            // Wait for a place first, so that what goes into it is new.
            let place = match updates.place().await {
                Ok(place) => place,
                Err(error) => return Some(error),
            };
            self.generation.borrow_and_update();
            let snapshot = self.target.vcpu.latest();
            if snapshot.generation == sent {
                // A snapshot is there a moment before its generation is announced: this one was sent then.
                drop(place);
                if self.generation.changed().await.is_err() {
                    return Some(Error::ShuttingDown);
                }
                continue;
            }
            sent = snapshot.generation;
            let state = self.daemon.walker_state(&self.target, &snapshot);
            place.send(state.map_err(Status::from));
            if let Some(left) = &mut self.left {
                *left -= 1;
                if *left == 0 {
                    return None;
                }
            }
            sleep(self.pace).await;
            if self.generation.changed().await.is_err() {
                return Some(Error::ShuttingDown);
            }
        }
    }
}
