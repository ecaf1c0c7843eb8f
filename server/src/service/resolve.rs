//! From the names in a request to a vCPU and the state to answer from.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pagewalk_proto::v1;
use tonic::Request;

use super::Daemon;
use crate::convert::snapshot::{age, run_state};
use crate::layer::Deadline;
use crate::machine::Machine;
use crate::status::Error;
use crate::vcpu::{Snapshot, Vcpu};

/// How long a call waits for a vCPU if its client set no deadline.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// A vCPU and the machine it belongs to.
pub(super) struct Target {
    pub(super) machine: Arc<Machine>,
    pub(super) vcpu: Arc<Vcpu>,
}

impl Daemon {
    pub(super) fn target(&self, vcpu: Option<v1::VcpuRef>) -> Result<Target, Error> {
        let named = vcpu.unwrap_or_default();
        let machine = Arc::clone(self.machines.get(&named.machine)?);
        let vcpu = Arc::clone(machine.vcpu(named.vcpu)?);
        Ok(Target { machine, vcpu })
    }

    /// Where an answer about a vCPU comes from.
    pub(super) fn provenance(&self, target: &Target, snapshot: &Snapshot) -> v1::Provenance {
        v1::Provenance {
            machine: target.machine.id().to_owned(),
            vcpu: target.vcpu.index(),
            source: target.machine.source().kind().to_owned(),
            generation: snapshot.generation,
            run_state: run_state(target.vcpu.run_state(snapshot)).into(),
            snapshot_age: Some(age(snapshot)),
            assumed: snapshot.assumed.clone(),
            validated: false,
            torn: false,
            host: self.host.to_string(),
        }
    }

    /// Where an answer about a machine comes from.
    pub(super) fn machine_provenance(&self, machine: &Machine) -> v1::Provenance {
        v1::Provenance {
            machine: machine.id().to_owned(),
            source: machine.source().kind().to_owned(),
            host: self.host.to_string(),
            ..Default::default()
        }
    }
}

impl Target {
    /// The state to answer from, as fresh as the request wants it.
    pub(super) async fn snapshot(&self, freshness: i32, deadline: Instant) -> Result<Arc<Snapshot>, Error> {
        match v1::Freshness::try_from(freshness) {
            Ok(v1::Freshness::Unspecified | v1::Freshness::Latest) => Ok(self.vcpu.latest()),
            Ok(v1::Freshness::Sync) => Ok(self.vcpu.sync(deadline).await?),
            Err(_) => Err(Error::invalid("freshness", format!("{freshness} is no freshness"))),
        }
    }
}

/// When a call has to be answered.
pub(super) fn deadline<T>(request: &Request<T>) -> Instant {
    client_deadline(request).unwrap_or_else(|| Instant::now() + PATIENCE)
}

/// When the client wants a call to be over.
pub(super) fn client_deadline<T>(request: &Request<T>) -> Option<Instant> {
    request.extensions().get::<Deadline>().map(|deadline| deadline.0)
}
