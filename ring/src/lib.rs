//! Submission and completion rings in memory that two processes share and neither trusts. The crate knows nothing of
//! FUSE, files or sockets.
//!
//! ```text
//! one queue in the region (all offsets in bytes, from `Geometry`)
//! +------------+------------+---------------+---------------+----------+---------+-------+
//! | sq head    | cq head    | device wakeup | driver wakeup | SQEs     | CQEs    | slots |
//! | 128,device | 128,driver | 128, both     | 128, both     | 128 each | 64 each | pages |
//! +------------+------------+---------------+---------------+----------+---------+-------+
//! ```
//! The control part (all but the slots) lies in one piece; a slot may lie anywhere.
//!
//! The *driver* submits and reaps, the *device* consumes and completes. An entry carries its own sequence number: one
//! release store into the entry's first cache line publishes it, and one acquire load finds it. The consumer's head
//! only serves flow control.
//!
//! Neither side trusts the other. Each keeps its positions privately. It copies an entry out once and looks only at the
//! copy. A head out of range is an error ([`Error::Corrupt`]), never an index.

#[cfg(not(loom))]
mod cpu;
#[cfg(not(loom))]
mod endpoint;
mod error;
#[cfg(not(loom))]
mod geometry;
mod layout;
mod notify;
#[cfg(not(loom))]
mod queue;
#[cfg(not(loom))]
mod region;
#[cfg(not(loom))]
mod setup;
#[cfg(not(loom))]
mod slots;
mod spsc;
mod sync;
#[cfg(not(loom))]
mod wait;

#[cfg(not(loom))]
pub use cpu::{allowed_cpus, first_unusable_cpu, set_affinity};
#[cfg(not(loom))]
pub use endpoint::{Device, Driver, Handoff, Payload, Reply, Request, Slot, SubmitError};
pub use error::Error;
#[cfg(not(loom))]
pub use geometry::{Geometry, MAX_ENTRIES, MAX_SLOT_SIZE};
pub use layout::{Cqe, Sqe, CQE_INLINE_BYTES, NO_SLOT, PAGE, SQE_INLINE_BYTES};
#[cfg(not(loom))]
pub use notify::Eventfd;
pub use notify::{NeedWakeup, PeerCpu};
#[cfg(not(loom))]
pub use queue::{DeviceQueue, DriverQueue};
#[cfg(not(loom))]
pub use region::Region;
#[cfg(not(loom))]
pub use setup::{RingSetup, SlotRun, CPU_UNKNOWN, MAGIC, MAX_RUNS, VERSION};
#[cfg(not(loom))]
pub use slots::{SlotPool, SlotTable};
pub use spsc::{CacheLine, Cell, Consumer, Producer};
pub use sync::Entry;
#[cfg(not(loom))]
pub use wait::{hand_off, Counters, Parker, Policy, SpinMode, Wait, WaitConfig};
