//! The atomics and locks of handover.rs; its loom model replaces them with loom's.

pub use std::sync::atomic::{fence, AtomicBool, AtomicU64, Ordering};
pub use std::sync::Mutex;
