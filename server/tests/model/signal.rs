//! A stand-in for signals and KVM_RUN, in place of `server/src/vcpu/signal.rs`.
//!
//! A signal that was sent is handled by the thread itself: while the guest executes, or at some point before. Its handler sets
//! `immediate_exit`, and KVM_RUN returns at once while that is set. The guest never leaves by itself.

use std::cell::{Cell, RefCell};

use super::backend::ImmediateExit;
use super::sync::{Arc, Condvar, Mutex, thread};

#[derive(Default)]
struct Signals {
    sent: Mutex<bool>,
    arrived: Condvar,
}

loom::thread_local! {
    static SIGNALS: RefCell<Option<Arc<Signals>>> = RefCell::new(None);
    static IMMEDIATE_EXIT: Cell<bool> = Cell::new(false);
}

pub(super) struct Target {
    thread: thread::Thread,
    signals: Arc<Signals>,
}

impl Target {
    pub(super) fn reach(&self) {
        self.thread.unpark();
        *self.signals.sent.lock().unwrap() = true;
        self.signals.arrived.notify_all();
    }
}

pub(super) struct Adopted;

pub(super) fn adopt(_: Option<ImmediateExit>) -> Result<(Target, Adopted), String> {
    let signals = Arc::new(Signals::default());
    SIGNALS.with(|own| own.replace(Some(Arc::clone(&signals))));
    Ok((Target { thread: thread::current(), signals }, Adopted))
}

/// A signal that comes before this line sets the byte in vain, as it may.
pub(super) fn clear_immediate_exit() {
    own(|signals| std::mem::take(&mut *signals.sent.lock().unwrap()));
    IMMEDIATE_EXIT.with(|byte| byte.set(false));
}

/// KVM_RUN.
pub(super) fn run_guest() {
    own(|signals| {
        let mut sent = signals.sent.lock().unwrap();
        while !*sent && !IMMEDIATE_EXIT.with(Cell::get) {
            sent = signals.arrived.wait(sent).unwrap();
        }
        if std::mem::take(&mut *sent) {
            IMMEDIATE_EXIT.with(|byte| byte.set(true));
        }
    });
}

fn own<T>(with: impl FnOnce(&Signals) -> T) -> T {
    let signals = SIGNALS.with(|own| own.borrow().clone().unwrap());
    with(&signals)
}
