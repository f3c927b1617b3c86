//! See `src/request.rs`.
#![no_main]

#[path = "../src/request.rs"]
mod request;
#[path = "../src/server.rs"]
mod server;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| request::once(bytes));
