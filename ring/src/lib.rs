//! Messages and large buffers between two processes, or two threads, that do not trust each other: submission and
//! completion rings in memory that both map. The crate knows nothing of FUSE or networks.
//!
//! [`Driver`] submits requests and [`Device`] completes each of them once. A short message travels inside a ring's entry
//! (104 bytes there, 48 back), a long one in a [`Slot`], a buffer of whole pages that goes with the request and comes
//! back with the reply. Nothing is copied on the way, and as long as both sides have work nothing enters the kernel.
//!
//! ```
//! use std::time::Duration;
//! use tunnelfs_ring::{Device, Driver, Error, Geometry, WaitConfig};
//!
//! // 8 entries in each ring, and 4 buffers of 64 KiB.
//! let geometry = Geometry { entries: 8, slots: 4, slot_size: 64 << 10 };
//! let (mut driver, handoff) = Driver::create(geometry, WaitConfig::default())?;
//!
//! // The device is a thread here; another process is below.
//! let server = std::thread::spawn(move || -> Result<(), Error> {
//!     let mut device = Device::attach(handoff, WaitConfig::default())?;
//!     loop {
//!         let mut request = match device.next_within(None) {
//!             Err(Error::PeerGone) => return Ok(()),
//!             request => request?,
//!         };
//!         // The driver can still write the buffer: work on a copy.
//!         let mut text = vec![0; request.payload_len()];
//!         device.payload(&mut request).read_at(0, &mut text)?;
//!         text.make_ascii_uppercase();
//!         // The driver may want fewer bytes than it has sent.
//!         text.truncate(request.reply_max());
//!         device.payload(&mut request).write_at(0, &text)?;
//!         device.complete(request, b"done", text.len() as u32)?;
//!     }
//! });
//!
//! let mut slot = driver.alloc().expect("no buffer is in use yet");
//! driver.payload(&mut slot).write_at(0, b"hello")?;
//! driver.submit(b"upper", slot, 5, geometry.slot_size)?;
//! let reply = driver.reap_within(Some(Duration::from_secs(5)))?;
//! assert_eq!(reply.msg(), b"done");
//! let (mut text, mut slot) = (vec![0; reply.payload_len()], reply.slot);
//! driver.payload(&mut slot).read_at(0, &mut text)?;
//! assert_eq!(text, b"HELLO");
//! driver.free(slot);
//!
//! drop(driver); // The device sees it at once, and ends.
//! server.join().expect("no panic")?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Two processes
//! The hand-off goes over a UNIX socket, for example one that a child gets as its standard input:
//!
//! ```no_run
//! # use std::os::{fd::{AsFd, OwnedFd}, unix::net::UnixStream};
//! # use std::process::{Command, Stdio};
//! # use tunnelfs_ring::{Device, Driver, Geometry, Handoff, WaitConfig};
//! # fn parent(handoff: Handoff) -> Result<(), Box<dyn std::error::Error>> {
//! let (ours, theirs) = UnixStream::pair()?;
//! let child = Command::new("device-program").stdin(Stdio::from(OwnedFd::from(theirs))).spawn()?;
//! handoff.send(&ours)?;
//! # Ok(()) }
//! # fn child() -> Result<(), Box<dyn std::error::Error>> {
//! // In the child:
//! let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
//! let device = Device::attach(Handoff::recv(&socket)?, WaitConfig::default())?;
//! # Ok(()) }
//! ```
//!
//! What one needs: [`Driver`], [`Device`], [`Handoff`], [`Geometry`], [`WaitConfig`], [`Slot`], [`Payload`] and [`Error`].
//! All else belongs to the raw layer below.
//!
//! # Layout
//! ```text
//! one queue in the region (all offsets in bytes, from `Geometry`)
//! +------------+------------+---------------+---------------+----------+---------+-------+
//! | sq head    | cq head    | device wakeup | driver wakeup | SQEs     | CQEs    | slots |
//! | 128,device | 128,driver | 128, both     | 128, both     | 128 each | 64 each | pages |
//! +------------+------------+---------------+---------------+----------+---------+-------+
//! ```
//! The control part (all but the slots) lies in one piece; with the raw queues a slot may lie anywhere.
//!
//! An entry carries its own sequence number: one release store into the entry's first cache line publishes it, and one
//! acquire load finds it. The consumer's head only serves flow control.
//!
//! # Trust
//! Neither side trusts the other. Each keeps its positions privately. It copies an entry out once and looks only at the
//! copy. A head out of range is an error ([`Error::Corrupt`]), never an index. The memory is sealed, so that it cannot
//! be truncated under the other side, and a descriptor that should be an eventfd is checked to be one. What a peer can do
//! is to write into a buffer at any time, and to stop answering: [`Payload`] copies in and out instead of lending a
//! slice, and each wait has a time limit and ends at once when the peer's process ends.
//!
//! # Two layers
//! [`Driver`] and [`Device`] are safe and wait by themselves. [`DriverQueue`] and [`DeviceQueue`] are the raw ends below
//! them, for whoever has memory, notification and waiting already (`unsafe`: the memory must stay mapped).

#[cfg(not(loom))]
mod cpu;
#[cfg(not(loom))]
mod endpoint;
mod error;
#[cfg(not(loom))]
mod geometry;
mod layout;
#[cfg(not(loom))]
mod live;
mod notify;
#[cfg(not(loom))]
mod policy;
#[cfg(not(loom))]
mod pressure;
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
pub use live::LiveWait;
#[cfg(not(loom))]
pub use notify::Eventfd;
pub use notify::{NeedWakeup, PeerCpu};
#[cfg(not(loom))]
pub use policy::{Goal, Policy, WaitConfig};
#[cfg(not(loom))]
pub use pressure::open_cpu_pressure;
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
pub use wait::{hand_off, Counters, Parker, SpinMode, Wait};
