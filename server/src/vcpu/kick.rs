//! Making a vCPU's thread look up: from a wait, or from inside KVM_RUN.
//!
//! A signal alone would be lost when it arrives just before KVM_RUN. Its handler therefore sets `immediate_exit` in the
//! thread's own `kvm_run`, found through a thread-local pointer, and the next KVM_RUN returns at once. Kicks coalesce:
//! while one is pending, others cost one atomic operation and send nothing.
//!
//! A timer sends the same signal to each vCPU's thread, [`REFRESH`] apart, so that a guest that never leaves by itself is
//! looked at all the same. The signal is SIGRTMIN+4; its handler is installed for the whole process.
#![allow(unsafe_code)] // Signals and the byte that KVM shares with us have no safe interface.

use std::cell::Cell;
use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use vmm_sys_util::signal::{SIGRTMIN, SignalHandler, register_signal_handler, unblock_signal};

use super::backend::ImmediateExit;

/// How often a running guest is interrupted, if nothing else does.
pub(super) const REFRESH: Duration = Duration::from_millis(100);

thread_local! {
    /// The `immediate_exit` byte of the vCPU that this thread owns; null on all other threads. Constant-initialised and
    /// without a destructor, so that a signal handler may read it at any time.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

fn signal() -> libc::c_int {
    SIGRTMIN() + 4
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    set_immediate_exit(IMMEDIATE_EXIT.get(), 1);
}

fn set_immediate_exit(byte: *mut u8, value: u8) {
    if !byte.is_null() {
        // SAFETY: `OnThread` keeps only a pointer that `ImmediateExit` vouches for, and clears it before the backend
        // goes; this thread is the only one in the process that accesses the byte, its signal handler included.
        let byte = unsafe { AtomicU8::from_ptr(byte) };
        byte.store(value, Ordering::Relaxed);
    }
}

/// Installs the handler, once for the process.
fn install() -> Result<(), String> {
    static INSTALLED: OnceLock<Result<(), String>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            register_signal_handler(signal(), on_kick as SignalHandler)
                .map_err(|e| format!("cannot install the kick signal's handler: {e}"))
        })
        .clone()
}

struct Target {
    pthread: libc::pthread_t,
    thread: Thread,
}

/// The way to reach a vCPU's thread.
#[derive(Default)]
pub(super) struct Kicker {
    pending: AtomicBool,
    /// The thread while it lives. Held during `pthread_kill`, so that the id cannot go stale under it.
    target: Mutex<Option<Target>>,
}

impl Kicker {
    /// Has the thread come out and look. What was written before is seen by it.
    pub(super) fn kick(&self) {
        if self.pending.swap(true, Ordering::AcqRel) {
            return;
        }
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = target.as_ref() {
            target.thread.unpark();
            // SAFETY: the thread has not ended: it clears the target, under this lock, before it does.
            unsafe { libc::pthread_kill(target.pthread, signal()) };
        }
    }

    /// Makes the calling thread the one that kicks reach.
    pub(super) fn enter(&self, immediate_exit: Option<ImmediateExit>) -> Result<OnThread<'_>, String> {
        install()?;
        unblock_signal(signal()).map_err(|e| format!("cannot unblock the kick signal: {e:?}"))?;
        let timer = Timer::start().map_err(|e| format!("cannot start the refresh timer: {e}"))?;
        // Last among what can fail: only the guard below takes the pointer back.
        IMMEDIATE_EXIT.set(immediate_exit.map_or(ptr::null_mut(), ImmediateExit::as_ptr));
        // SAFETY: has no preconditions.
        let pthread = unsafe { libc::pthread_self() };
        let target = Target { pthread, thread: thread::current() };
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = Some(target);
        Ok(OnThread { kicker: self, _timer: timer, not_send: PhantomData })
    }
}

/// Held by the thread that kicks reach, and dropped by it before its backend.
pub(super) struct OnThread<'a> {
    kicker: &'a Kicker,
    _timer: Timer,
    not_send: PhantomData<*mut u8>,
}

impl OnThread<'_> {
    /// Takes note of the kicks so far. What was written before any of them is visible afterwards.
    pub(super) fn acknowledge(&self) {
        self.kicker.pending.swap(false, Ordering::AcqRel);
        // A kick that comes between these two lines is seen by the caller, who looks for work only after both.
        set_immediate_exit(IMMEDIATE_EXIT.get(), 0);
    }

    /// Whether there was a kick that nobody has taken note of.
    pub(super) fn pending(&self) -> bool {
        self.kicker.pending.load(Ordering::Acquire)
    }

    /// Sleeps until a kick, or until `deadline`.
    pub(super) fn wait(&self, deadline: Option<Instant>) {
        while !self.pending() {
            match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
                None => thread::park(),
                Some(left) if left.is_zero() => return,
                Some(left) => thread::park_timeout(left),
            }
        }
    }
}

/// Sends the kick signal to the thread that started it, until it is dropped.
struct Timer(libc::timer_t);

impl Timer {
    fn start() -> io::Result<Self> {
        // SAFETY: all-zero bytes are a valid `sigevent`.
        let mut event: libc::sigevent = unsafe { MaybeUninit::zeroed().assume_init() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal();
        // SAFETY: has no preconditions.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer = ptr::null_mut();
        // SAFETY: both pointers are to live values of the types that the call takes.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let timer = Self(timer);
        let interval = libc::timespec { tv_sec: 0, tv_nsec: REFRESH.subsec_nanos().into() };
        let times = libc::itimerspec { it_interval: interval, it_value: interval };
        // SAFETY: the timer exists, `times` is live, and the old times are not asked for.
        if unsafe { libc::timer_settime(timer.0, 0, &times, ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(timer)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer exists, and nobody uses it after this.
        unsafe { libc::timer_delete(self.0) };
    }
}

impl Drop for OnThread<'_> {
    fn drop(&mut self) {
        *self.kicker.target.lock().unwrap_or_else(PoisonError::into_inner) = None;
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::ptr::NonNull;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn a_kick_sets_the_byte_of_its_thread_and_ends_its_wait() {
        let kicker = Arc::new(Kicker::default());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = thread::spawn({
            let kicker = Arc::clone(&kicker);
            move || {
                let mut byte = 0u8;
                // SAFETY: `byte` outlives `on_thread`, and is read only after it.
                let exit = unsafe { ImmediateExit::new(NonNull::from(&mut byte)) };
                let on_thread = kicker.enter(Some(exit)).unwrap();
                ready.send(()).unwrap();
                on_thread.wait(Some(Instant::now() + Duration::from_secs(20)));
                let pending = on_thread.pending();
                // The signal may arrive a moment after the wake-up.
                thread::sleep(Duration::from_millis(50));
                drop(on_thread);
                (pending, byte)
            }
        });
        is_ready.recv().unwrap();
        kicker.kick();
        assert_eq!(thread.join().unwrap(), (true, 1));
    }

    #[test]
    fn kicks_before_and_after_the_thread_reach_nobody() {
        let kicker = Kicker::default();
        kicker.kick();
        let on_thread = kicker.enter(None).unwrap();
        assert!(on_thread.pending(), "a kick is not lost for coming early");
        on_thread.acknowledge();
        assert!(!on_thread.pending());
        let start = Instant::now();
        on_thread.wait(Some(start + Duration::from_millis(20)));
        assert!(start.elapsed() >= Duration::from_millis(20));
        drop(on_thread);
        kicker.kick();
        assert!(kicker.target.lock().unwrap().is_none());
    }
}
