//! How far a long answer has come: a line on standard error while that is a terminal, gone again before anything else is said.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How long an answer may take before anybody wonders.
const PATIENCE: Duration = Duration::from_millis(500);

/// Dropping it clears the line.
pub(super) struct Progress {
    line: ProgressBar,
    begun: Instant,
}

impl Progress {
    pub(super) fn new() -> Self {
        // Cut to the terminal's width: of a line that wraps, a part would stay behind.
        let style =
            ProgressStyle::with_template("{wide_msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
        Self { line: ProgressBar::hidden().with_style(style), begun: Instant::now() }
    }

    pub(super) fn tell(&self, how_far: impl FnOnce() -> String) {
        if self.begun.elapsed() < PATIENCE {
            return;
        }
        if self.line.is_hidden() {
            self.line.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.line.set_message(how_far());
    }

    /// Does what writes to the terminal.
    pub(super) fn aside<T>(&self, write: impl FnOnce() -> T) -> T {
        self.line.suspend(write)
    }
}
