//! The signal that makes a vCPU's thread come out of KVM_RUN, and the timer that sends it now and then.
//!
//! A signal alone would be lost when it arrives just before KVM_RUN. Its handler therefore sets `immediate_exit` in the
//! thread's own `kvm_run`, found through a thread-local pointer, and the next KVM_RUN returns at once.
//!
//! A timer sends the same signal to each thread that enters KVM_RUN, [`REFRESH`] apart, so that a guest that never leaves by itself is
//! looked at all the same. The signal is SIGRTMIN+4; its handler is installed for the whole process.
#![allow(unsafe_code)] // Signals and the byte that KVM shares with us have no safe interface.

use std::cell::Cell;
use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::{self, Thread};
use std::time::Duration;

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
        // SAFETY: `Adopted` keeps only a pointer that `ImmediateExit` vouches for, and clears it before the backend
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

/// A thread that signals reach.
pub(super) struct Target {
    pthread: libc::pthread_t,
    thread: Thread,
}

impl Target {
    /// Wakes the thread, and has it come out of the guest. The caller knows that it has not ended.
    pub(super) fn reach(&self) {
        self.thread.unpark();
        // SAFETY: the thread has not ended: it clears the kicker's target, under the lock that the caller holds, before it
        // does.
        unsafe { libc::pthread_kill(self.pthread, signal()) };
    }
}

/// Makes the calling thread one that the signal brings out of the guest, until the guard is dropped.
pub(super) fn adopt(immediate_exit: Option<ImmediateExit>) -> Result<(Target, Adopted), String> {
    install()?;
    unblock_signal(signal()).map_err(|e| format!("cannot unblock the kick signal: {e:?}"))?;
    // What never enters KVM_RUN has nothing to be brought out of.
    let timer = immediate_exit.map(|_| Timer::start()).transpose();
    let timer = timer.map_err(|e| format!("cannot start the refresh timer: {e}"))?;
    // Last among what can fail: only the guard below takes the pointer back.
    IMMEDIATE_EXIT.set(immediate_exit.map_or(ptr::null_mut(), ImmediateExit::as_ptr));
    // SAFETY: has no preconditions.
    let pthread = unsafe { libc::pthread_self() };
    Ok((Target { pthread, thread: thread::current() }, Adopted { _timer: timer, not_send: PhantomData }))
}

/// Forgets the signals so far.
pub(super) fn clear_immediate_exit() {
    set_immediate_exit(IMMEDIATE_EXIT.get(), 0);
}

/// Held by the thread that signals reach, and dropped by it before its backend.
pub(super) struct Adopted {
    _timer: Option<Timer>,
    not_send: PhantomData<*mut u8>,
}

impl Drop for Adopted {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::ptr::NonNull;
    use std::sync::Arc;
    use std::thread;
    use std::time::{Duration, Instant};

    use crate::vcpu::backend::ImmediateExit;
    use crate::vcpu::kick::Kicker;

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
    fn only_what_enters_kvm_run_is_interrupted_now_and_then() {
        let mut byte = 0u8;
        // SAFETY: `byte` outlives what is adopted with it, and is not used otherwise.
        let exit = unsafe { ImmediateExit::new(NonNull::from(&mut byte)) };
        let has_timer = |exit| super::adopt(exit).unwrap().1._timer.is_some();
        assert!(has_timer(Some(exit)));
        assert!(!has_timer(None));
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
    }
}
