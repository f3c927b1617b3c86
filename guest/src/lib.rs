//! The guest side: a link to a host, and the driver side of the three
//! transports behind one interface, [`Transport`].

pub mod channel;
mod coherence;
pub mod config;
pub mod connect;
mod error;
pub mod figures;
pub mod fuse;
pub mod link;
pub mod mount;
mod reconnect;
pub mod recording;
mod split_queue;
pub mod stats;
mod timeout;
pub mod transport;

pub use config::{GuestConfig, PciTarget};
pub use connect::{connect, Connection, RetainedMemory};
pub use error::Error;
pub use transport::{Completion, Transport};
