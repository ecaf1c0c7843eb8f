//! The walker without std: `nostd/` builds into a program that walks tables with no C library, no allocator and no
//! panic in what was linked, and its answers are right.
//!
//! Link-time optimisation has removed what cannot be reached when the symbols are read, so that a panic found there is one
//! that the optimiser could not prove impossible.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use object::read::{Object, ObjectSymbol};

/// What the names of panic machinery contain, in either mangling.
const PANICS: [&str; 5] =
    ["panicking", "panic_fmt", "rust_begin_unwind", "panic_is_reachable", "unwrap_failed"];

fn build(variant: &str, features: &[&str]) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nostd").join(variant);
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--release", "--quiet", "--offline", "--locked", "--manifest-path"]);
    cargo.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/nostd/Cargo.toml")).arg("--target-dir").arg(&target);
    // What is asked of the host's build is not asked of this one.
    cargo.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("CARGO_BUILD_TARGET");
    let output = cargo.args(features).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    target.join("release/pagewalk-nostd")
}

fn symbols(program: &Path) -> Vec<String> {
    let bytes = fs::read(program).unwrap();
    let file = object::File::parse(&*bytes).unwrap();
    let names: Vec<String> =
        file.symbols().filter_map(|symbol| symbol.name().ok().map(str::to_owned)).collect();
    assert!(names.iter().any(|name| name.contains("8pagewalk")), "the program was stripped: {names:?}");
    names
}

fn panics(program: &Path) -> Vec<String> {
    let names = symbols(program).into_iter();
    names.filter(|name| PANICS.iter().any(|panic| name.contains(panic))).collect()
}

#[test]
#[cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    ignore = "the program makes Linux system calls"
)]
fn walks_right_and_cannot_panic() {
    let program = build("plain", &[]);
    let status = Command::new(&program).status().unwrap();
    assert_eq!(
        status.code(),
        Some(0),
        "100: the registers were refused, 101: a panic, else the number of the wrong check"
    );
    assert_eq!(panics(&program), Vec::<String>::new());
}

#[test]
#[cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    ignore = "the program makes Linux system calls"
)]
fn a_panic_would_be_found() {
    assert_ne!(panics(&build("panicking", &["--features", "panicking"])), Vec::<String>::new());
}
