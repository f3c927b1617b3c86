//! The atomics and locks of handover.rs; its model has loom's in their place.

pub use std::sync::atomic::{fence, AtomicBool, AtomicU64, Ordering};
pub use std::sync::Mutex;
