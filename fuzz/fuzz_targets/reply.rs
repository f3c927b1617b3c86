//! See `src/reply.rs`.
#![no_main]

#[path = "../src/reply.rs"]
mod reply;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| reply::once(bytes));
