//! Memory that the host takes away while it is read.
//!
//! A mapping of a file raises SIGBUS where the file does not reach any more: another process may truncate it at any time, and
//! a machine check may take a page. Unhandled, that ends the daemon and every other machine with it. Each mapping that can
//! shrink is registered here; a fault inside one marks it as broken and puts zeroes in its place, so that the load that faulted
//! ends. Whoever reads looks at [`Guard::is_broken`] before believing what was read. A SIGBUS anywhere else goes to the handler
//! that was there before.
#![allow(unsafe_code)] // Signal handlers, and mapping over a range that faults, have no safe interface.

use std::ffi::c_void;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Mappings that can be registered at once.
const SLOTS: usize = 1024;

/// One registered mapping. The handler reads `start` and `end` without a lock: `end` is 0 while the slot is free or being
/// filled.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    broken: AtomicBool,
}

static TABLE: [Slot; SLOTS] =
    [const { Slot { start: AtomicUsize::new(0), end: AtomicUsize::new(0), broken: AtomicBool::new(false) } };
        SLOTS];
/// Held while slots are taken and given back. The handler does not take it.
static CHANGES: Mutex<()> = Mutex::new(());
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();
static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();

/// Keeps a mapping registered. It must be dropped before the range is unmapped.
#[derive(Debug)]
pub(super) struct Guard {
    slot: usize,
}

impl Guard {
    /// Registers `size` bytes from `start`.
    ///
    /// # Safety
    /// The range must be one mapping, or several, that the caller owns, and that stays mapped as long as the guard lives; its
    /// contents may turn into zeroes at any time.
    pub(super) unsafe fn register(start: *const u8, size: usize) -> io::Result<Self> {
        (*INSTALLED.get_or_init(install)).map_err(io::Error::from_raw_os_error)?;
        let _changing = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
        let free = TABLE.iter().position(|slot| slot.end.load(Ordering::Relaxed) == 0);
        let slot = free.ok_or_else(|| io::Error::other(format!("more than {SLOTS} mapped files")))?;
        let Slot { start: first, end, broken } = &TABLE[slot];
        broken.store(false, Ordering::Relaxed);
        first.store(start.addr(), Ordering::Release);
        end.store(start.addr() + size, Ordering::Release);
        Ok(Self { slot })
    }

    /// Whether something of the mapping was gone when it was read.
    pub(super) fn is_broken(&self) -> bool {
        TABLE[self.slot].broken.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _changing = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
        TABLE[self.slot].end.store(0, Ordering::Release);
    }
}

fn install() -> Result<(), i32> {
    let failed = || Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL));
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut c_void) = on_sigbus;
    let mut previous = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: a null action changes nothing, and `previous` has room for what there is now.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), previous.as_mut_ptr()) } != 0 {
        return failed();
    }
    // SAFETY: the call succeeded, so it was filled in.
    let previous = unsafe { previous.assume_init() };
    // Before the handler, which reads it.
    let _ = PREVIOUS.set(previous);
    // SAFETY: all-zero bytes are a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as usize;
    // On the alternate stack, where the previous handler (Rust's, for stack overflows) needs to run.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, and only does what a signal handler may.
    if unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) } != 0 {
        return failed();
    }
    Ok(())
}

/// Touches atomics, and makes system calls: nothing else is allowed in here.
extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid `siginfo_t`.
    let about = unsafe { &*info };
    // SAFETY: the address is set for SIGBUS.
    let at = unsafe { about.si_addr() }.addr();
    let hit = TABLE.iter().find_map(|slot| {
        let end = slot.end.load(Ordering::Acquire);
        let start = slot.start.load(Ordering::Acquire);
        // A slot that is given away meanwhile is another mapping's: the one that faults is in use, and keeps its own.
        let same = slot.end.load(Ordering::Acquire) == end;
        (same && start <= at && at < end).then_some((slot, start, end))
    });
    let Some((slot, start, end)) = hit else { return forward(signal, info, context) };
    slot.broken.store(true, Ordering::Release);
    // The whole mapping, not the page: its pages may be huge, and nothing of it is believed any more.
    // SAFETY: `Guard::register` was promised that the range is its caller's, stays mapped, and may turn into zeroes.
    let mapped = unsafe {
        libc::mmap(
            ptr::without_provenance_mut(start),
            end - start,
            libc::PROT_READ,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        forward(signal, info, context);
    }
}

/// Hands the signal to whoever handled it before us.
fn forward(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    match PREVIOUS.get() {
        Some(previous) if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: with SA_SIGINFO the kernel knew this address as a handler of three arguments.
            let handler = unsafe {
                std::mem::transmute::<usize, extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut c_void)>(
                    previous.sa_sigaction,
                )
            };
            handler(signal, info, context);
        }
        Some(previous) if previous.sa_sigaction > libc::SIG_IGN => {
            // SAFETY: neither the default nor ignored: the kernel knew it as a handler of one argument.
            let handler =
                unsafe { std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(previous.sa_sigaction) };
            handler(signal);
        }
        _ => {
            // The access faults again when the handler returns, and then ends the process, as it would have.
            // SAFETY: async-signal-safe, with valid arguments.
            unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        }
    }
}
