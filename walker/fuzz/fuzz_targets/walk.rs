//! Walks through arbitrary memory: see `walk` in the library.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use pagewalk_fuzz::memory::Ram;
use pagewalk_fuzz::{report, walk};

thread_local! {
    static RAM: RefCell<Ram> = RefCell::default();
}

fuzz_target!(init: report::begin("fuzz-walk", &walk::CLASSES, 500_000), |bytes: &[u8]| {
    report::case(|counts| RAM.with_borrow_mut(|ram| walk::check(bytes, ram, counts)));
});
