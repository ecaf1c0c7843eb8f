//! Calls with arbitrary messages: see `requests` in the library.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pagewalk_fuzz::report;
use pagewalkd_fuzz::requests::{Bed, CLASSES};

thread_local! {
    static BED: Bed = Bed::new();
}

fuzz_target!(init: report::begin("fuzz-requests", &CLASSES, 20_000), |bytes: &[u8]| {
    report::case(|counts| BED.with(|bed| bed.check(bytes, counts)));
});
