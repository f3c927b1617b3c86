//! The guest side: a link to a host, and the driver side of the three
//! transports behind one interface, [`Transport`].
//!
//! A program that has a mount of its own starts a [`Service`], and is told by [`Event`]s what becomes of it.
//! [`connect_over`] makes a [`Connection`] of a socket that the program was given.

pub mod channel;
mod coherence;
pub mod config;
pub mod connect;
mod error;
pub mod events;
pub mod fuse;
pub mod link;
pub mod mount;
mod reconnect;
pub mod recording;
pub mod service;
mod split_queue;
pub mod stats;
mod timeout;
pub mod transport;

pub use config::{GuestConfig, PciTarget};
pub use connect::{connect, connect_over, Connection, RetainedMemory};
pub use error::Error;
pub use events::Event;
pub use service::Service;
pub use transport::{Completion, Transport};
