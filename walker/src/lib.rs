#![no_std]
//! An x86 page walker.
