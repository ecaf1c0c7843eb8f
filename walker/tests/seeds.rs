//! The inputs that the fuzz targets start from, and those that once made one fail, checked as the targets check them.
//!
//! `walker/fuzz` has the targets, which search (`cargo +nightly fuzz run -s none walk`); this only remembers. The seeds
//! together reach every outcome that a target counts.

#![allow(clippy::unwrap_used, unreachable_pub, reason = "a test, and a library taken in by its files")]

use std::fs;
use std::path::Path;

#[path = "../fuzz/src/input.rs"]
mod input;
#[path = "../fuzz/src/memory.rs"]
mod memory;
#[path = "../fuzz/src/registers.rs"]
mod registers;
#[path = "../fuzz/src/setup.rs"]
mod setup;
#[path = "../fuzz/src/walk.rs"]
mod walk;

fn replay(target: &str, classes: &[&str], mut check: impl FnMut(&[u8], &mut [u64])) {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let mut counts = vec![0; classes.len()];
    for seed in fs::read_dir(seeds).unwrap() {
        check(&fs::read(seed.unwrap().path()).unwrap(), &mut counts);
    }
    let missed: Vec<_> = classes.iter().zip(counts).filter(|(_, count)| *count == 0).collect();
    assert!(missed.is_empty(), "no seed of {target} reaches {missed:?}");
}

#[test]
#[cfg_attr(miri, ignore = "takes minutes")]
fn walks() {
    let mut ram = memory::Ram::new();
    replay("walk", &walk::CLASSES, |bytes, counts| walk::check(bytes, &mut ram, counts));
}

#[test]
#[cfg_attr(miri, ignore = "takes minutes")]
fn control_registers() {
    replay("registers", &registers::CLASSES, registers::check);
}
