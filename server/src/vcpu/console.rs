//! The guest's serial port, as far as anybody needs it here: text written to port 0x3f8 goes to the log, line by line.
//!
//! A guest may write as much as it likes: lines are cut at a bound, and lines beyond a budget are counted, not logged.

use std::time::{Duration, Instant};

/// Data port of the first serial line.
pub(super) const PORT: u16 = 0x3f8;
const LINE_MAX: usize = 256;
const LINES_PER_SECOND: u32 = 20;

/// A line buffer with a budget.
#[derive(Debug)]
pub(super) struct Console {
    vcpu: String,
    line: Vec<u8>,
    window: Instant,
    logged: u32,
    dropped: u64,
}

impl Console {
    pub(super) fn new(vcpu: String) -> Self {
        Self { vcpu, line: Vec::with_capacity(LINE_MAX), window: Instant::now(), logged: 0, dropped: 0 }
    }

    pub(super) fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
            }
            if byte == b'\n' || self.line.len() >= LINE_MAX {
                if self.within_budget(Instant::now()) {
                    let text = self.line.escape_ascii();
                    tracing::debug!(vcpu = %self.vcpu, dropped_before = self.dropped, "guest: {text}");
                    self.dropped = 0;
                } else {
                    self.dropped += 1;
                }
                self.line.clear();
            }
        }
    }

    fn within_budget(&mut self, now: Instant) -> bool {
        if now.duration_since(self.window) >= Duration::from_secs(1) {
            self.window = now;
            self.logged = 0;
        }
        self.logged += 1;
        self.logged <= LINES_PER_SECOND
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_in_length_and_number() {
        let mut console = Console::new("test/vcpu0".into());
        console.write(&[b'x'; LINE_MAX * 3 + 5]);
        assert_eq!((console.line.len(), console.logged), (5, 3));
        let now = Instant::now();
        console.window = now;
        console.logged = 0;
        let allowed = (0..1000).filter(|_| console.within_budget(now)).count();
        assert_eq!(allowed, LINES_PER_SECOND as usize);
        assert!(console.within_budget(now + Duration::from_secs(1)));
    }
}
