//! The inputs that the fuzz targets start from, and those that once made one fail, checked as the targets check them.
//!
//! `server/fuzz` has the targets, which search; this only remembers. The seeds together reach every outcome that a target counts.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    unreachable_pub,
    reason = "a test, and a library taken in by its files"
)]

use std::fs;
use std::path::Path;

#[path = "../fuzz/src/dumps.rs"]
mod dumps;
#[path = "../fuzz/src/images.rs"]
mod images;
#[path = "../fuzz/src/requests.rs"]
mod requests;
#[path = "../fuzz/src/walked.rs"]
mod walked;
#[path = "../fuzz/src/words.rs"]
mod words;

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
fn dumps() {
    let bed = dumps::Bed::default();
    replay("dumps", &dumps::CLASSES, |bytes, counts| bed.check(bytes, counts));
}

#[test]
fn images() {
    let bed = images::Bed::default();
    replay("images", &images::CLASSES, |bytes, counts| bed.check(bytes, counts));
}

#[test]
fn requests() {
    let bed = requests::Bed::new();
    replay("requests", &requests::CLASSES, |bytes, counts| bed.check(bytes, counts));
}

#[test]
fn words() {
    let bed = words::Bed::default();
    replay("words", &words::CLASSES, |bytes, counts| bed.check(bytes, counts));
}
