//! Signals that ask a process to end, for verbs that have something to tidy up.

use std::{fs, future, io, task::Poll};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGINT, SIGTERM and SIGHUP.
pub(super) struct Ending(Vec<Signal>);

impl Ending {
    /// Takes them from now on. One that this process was started to ignore, as nohup does, stays ignored.
    pub(super) fn taken() -> io::Result<Self> {
        let ignored = ignored();
        [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()]
            .into_iter()
            .filter(|kind| ignored >> (kind.as_raw_value() - 1) & 1 == 0)
            .map(signal)
            .collect::<io::Result<_>>()
            .map(Self)
    }

    /// Waits for one.
    pub(super) async fn asked_for(&mut self) {
        future::poll_fn(|context| {
            if self.0.iter_mut().any(|signal| signal.poll_recv(context).is_ready()) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }
}

/// A bit for each signal, from the lowest on; none where the kernel does not say.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap_or_default();
    u64::from_str_radix(mask.trim(), 16).unwrap_or_default()
}
