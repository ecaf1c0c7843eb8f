//! A guest's serial port as far as most guests here need it: text written to port 0x3f8 goes to the log, line by line.
//!
//! A guest may write as much as it likes: lines are cut at a bound, and lines beyond a budget are counted, not logged.

use std::time::{Duration, Instant};

use super::backend::Exit;
use super::devices::Devices;

/// Data port of the first serial line.
const PORT: u16 = 0x3f8;
const LINE_MAX: usize = 256;
const LINES_PER_SECOND: u32 = 20;

/// A line buffer with a budget.
#[derive(Debug)]
pub(crate) struct Console {
    name: String,
    line: Vec<u8>,
    window: Instant,
    logged: u32,
    dropped: u64,
}

impl Console {
    pub(crate) fn new(name: String) -> Self {
        Self { name, line: Vec::with_capacity(LINE_MAX), window: Instant::now(), logged: 0, dropped: 0 }
    }

    pub(crate) fn log(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
            }
            if byte == b'\n' || self.line.len() >= LINE_MAX {
                if self.within_budget(Instant::now()) {
                    let text = self.line.escape_ascii();
                    tracing::debug!(vcpu = %self.name, dropped_before = self.dropped, "guest: {text}");
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

/// The whole of a machine that has nothing else.
impl Devices for Console {
    fn read(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, port: u16, data: &[u8]) -> Option<Exit> {
        if port == PORT {
            self.log(data);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_in_length_and_number() {
        let mut console = Console::new("test/vcpu0".into());
        console.log(&[b'x'; LINE_MAX * 3 + 5]);
        assert_eq!((console.line.len(), console.logged), (5, 3));
        let now = Instant::now();
        console.window = now;
        console.logged = 0;
        let allowed = (0..1000).filter(|_| console.within_budget(now)).count();
        assert_eq!(allowed, LINES_PER_SECOND as usize);
        assert!(console.within_budget(now + Duration::from_secs(1)));
    }
}
