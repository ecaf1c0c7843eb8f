//! Loom's primitives, and stand-ins for arc-swap's and tokio's, in place of `server/src/vcpu/sync.rs`.

pub(super) use std::sync::Arc;

pub(super) use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
pub(super) use loom::sync::{Condvar, Mutex};
pub(super) use std::sync::PoisonError;

use loom::cell::UnsafeCell;

/// Loom's threads, which know no time. Loom's own `unpark` also wakes a thread that waits for a lock, so that parking is a token
/// under a lock here.
pub(super) mod thread {
    use std::time::Duration;

    use super::{Arc, Condvar, Mutex};

    pub(crate) use loom::thread::spawn;

    #[derive(Clone, Default)]
    pub(crate) struct Thread(Arc<(Mutex<bool>, Condvar)>);

    loom::thread_local! {
        static CURRENT: Thread = Thread::default();
    }

    pub(crate) fn current() -> Thread {
        CURRENT.with(Clone::clone)
    }

    impl Thread {
        pub(crate) fn unpark(&self) {
            *self.0.0.lock().unwrap() = true;
            self.0.1.notify_one();
        }
    }

    pub(crate) fn park() {
        let Thread(own) = current();
        let mut token = own.0.lock().unwrap();
        while !std::mem::take(&mut *token) {
            token = own.1.wait(token).unwrap();
        }
    }

    pub(crate) fn park_timeout(_: Duration) {
        unreachable!("no wait of the model has an end");
    }
}

const SLOTS: usize = 8;

/// Like arc-swap, a store releases and a load acquires, and nothing else synchronises the two. One thread stores at a time.
pub(super) struct ArcSwap<T> {
    slots: [UnsafeCell<Option<Arc<T>>>; SLOTS],
    latest: AtomicU64,
}

// SAFETY: a slot is written once, before its number is released, and read by those who have acquired it; loom checks that.
#[allow(unsafe_code, reason = "what the model is about is whether these accesses are ordered")]
unsafe impl<T: Send + Sync> Sync for ArcSwap<T> {}

impl<T> ArcSwap<T> {
    pub(super) fn from_pointee(first: T) -> Self {
        let mut first = Some(Arc::new(first));
        Self { slots: std::array::from_fn(|_| UnsafeCell::new(first.take())), latest: AtomicU64::new(0) }
    }

    pub(super) fn store(&self, value: Arc<T>) {
        let next = self.latest.load(Ordering::Relaxed) as usize + 1;
        self.slots[next].with_mut(|slot| {
            // SAFETY: nobody knows of this slot yet.
            #[allow(unsafe_code, reason = "as above")]
            unsafe {
                *slot = Some(value);
            }
        });
        self.latest.store(next as u64, Ordering::Release);
    }

    pub(super) fn load_full(&self) -> Arc<T> {
        let latest = self.latest.load(Ordering::Acquire) as usize;
        self.slots[latest].with(|slot| {
            // SAFETY: the slot was written before its number was released, and never again.
            #[allow(unsafe_code, reason = "as above")]
            unsafe {
                (*slot).clone().unwrap()
            }
        })
    }
}

/// A value and its waiters under a lock, as tokio's watch channel is.
pub(super) mod watch {
    use super::{Arc, Condvar, Mutex};

    pub(crate) struct Sender<T>(Arc<(Mutex<T>, Condvar)>);
    pub(crate) struct Receiver<T>(Arc<(Mutex<T>, Condvar)>);

    pub(crate) fn channel<T>(first: T) -> (Sender<T>, Receiver<T>) {
        let shared = Arc::new((Mutex::new(first), Condvar::new()));
        (Sender(Arc::clone(&shared)), Receiver(shared))
    }

    impl<T> Sender<T> {
        pub(crate) fn send_replace(&self, value: T) {
            self.send_if_modified(|held| {
                *held = value;
                true
            });
        }

        pub(crate) fn send_if_modified(&self, modify: impl FnOnce(&mut T) -> bool) {
            if modify(&mut self.0.0.lock().unwrap()) {
                self.0.1.notify_all();
            }
        }
    }

    impl<T> Receiver<T> {
        pub(crate) fn wait_for(&self, wanted: impl Fn(&T) -> bool) {
            let mut held = self.0.0.lock().unwrap();
            while !wanted(&held) {
                held = self.0.1.wait(held).unwrap();
            }
        }
    }
}
