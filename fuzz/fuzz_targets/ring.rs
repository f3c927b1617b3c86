//! See `src/ring.rs`.
#![no_main]

#[path = "../src/ring.rs"]
mod ring;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ring::once(bytes));
