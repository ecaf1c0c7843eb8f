//! Arbitrary text as what an operator says: see `words` in the library.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pagewalk_fuzz::report;
use pagewalkd_fuzz::words::{Bed, CLASSES};

thread_local! {
    static BED: Bed = Bed::default();
}

fuzz_target!(init: report::begin("fuzz-words", &CLASSES, 20_000), |bytes: &[u8]| {
    report::case(|counts| BED.with(|bed| bed.check(bytes, counts)));
});
