//! Formats of arbitrary control registers: see `registers` in the library.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pagewalk_fuzz::{registers, report};

fuzz_target!(init: report::begin("fuzz-registers", &registers::CLASSES, 500_000), |bytes: &[u8]| {
    report::case(|counts| registers::check(bytes, counts));
});
