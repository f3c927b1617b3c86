//! See `src/stream.rs`.
#![no_main]

#[path = "../src/stream.rs"]
mod stream;
#[path = "../src/server.rs"]
mod server;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stream::once(bytes));
