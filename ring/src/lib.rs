//! Submission and completion rings in memory that two mutually distrusting
//! processes share. This crate knows nothing of FUSE, files or sockets.
//!
//! ```text
//! one queue in the region (all offsets in bytes, from `Geometry`)
//! +-----------+-----------+--------------+--------------+----------+----------+-------+
//! | sq head   | cq head   | host sleeps  | guest sleeps | SQEs     | CQEs     | slots |
//! | 128, host | 128,guest | 128, both    | 128, both    | 128 each | 64 each  | pages |
//! +-----------+-----------+--------------+--------------+----------+----------+-------+
//! ```
//! The control part (all but the slots) is in one piece; a slot may lie anywhere.
//!
//! The *guest* submits and reaps, the *host* consumes and completes. Each entry
//! carries its own sequence number, so that publishing one is a single release
//! store into the very line that carries the message, and finding it one
//! acquire load. The consumer's head only serves flow control.
//!
//! Neither side trusts the other: positions are kept privately, an entry is
//! copied out once and only the copy is looked at, and a head that lies out of
//! range is an error ([`Error::Corrupt`]), never an index.

#[cfg(not(loom))]
mod config;
#[cfg(not(loom))]
mod control;
#[cfg(not(loom))]
mod cpu;
mod doorbell;
mod error;
mod layout;
#[cfg(not(loom))]
mod queue;
#[cfg(not(loom))]
mod region;
#[cfg(not(loom))]
mod slots;
mod spsc;
mod sync;
#[cfg(not(loom))]
mod wait;

#[cfg(not(loom))]
pub use config::{Geometry, MAX_ENTRIES, MAX_SLOT_SIZE, MIN_SLOT_SIZE};
#[cfg(not(loom))]
pub use control::{
    RingSetup, Run, JOIN_TOKEN_BYTES, MAGIC, MAX_RUNS, NO_CPU, OP_COPIED, OP_JOIN, OP_NOOP, OP_SETUP, VERSION,
};
#[cfg(not(loom))]
pub use cpu::{allowed_cpus, stay_on};
#[cfg(not(loom))]
pub use doorbell::{drain, new_eventfd, ring_bell};
pub use doorbell::{Hint, SleepFlag};
pub use error::Error;
pub use layout::{Cqe, Sqe, CQE_HEAD_BYTES, NO_SLOT, PAGE, SQE_HEAD_BYTES};
#[cfg(not(loom))]
pub use queue::{DeviceQueue, DriverQueue, SlotTable};
#[cfg(not(loom))]
pub use region::Region;
#[cfg(not(loom))]
pub use slots::Slots;
pub use spsc::{Cell, Consumer, Line, Producer};
pub use sync::Entry;
#[cfg(not(loom))]
pub use wait::{offer_core, Policy, WaitConfig, WaitStats, Waiter};
