//! Arbitrary bytes as a dump: see `dumps` in the library.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pagewalk_fuzz::report;
use pagewalkd_fuzz::dumps::{Bed, CLASSES};

thread_local! {
    static BED: Bed = Bed::default();
}

fuzz_target!(init: report::begin("fuzz-dumps", &CLASSES, 20_000), |bytes: &[u8]| {
    report::case(|counts| BED.with(|bed| bed.check(bytes, counts)));
});
