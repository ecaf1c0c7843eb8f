//! What kicks and publications are synchronised by, in one place: the model in `server/tests/model` puts its own here.

pub(super) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
pub(super) use std::sync::{Arc, Mutex, PoisonError};
pub(super) use std::thread;

pub(super) use arc_swap::ArcSwap;
pub(super) use tokio::sync::watch;
