//! The guest side: links to a host, the driver side of the three transports behind the trait [`Transport`], and mounts.
//!
//! A program that embeds a mount starts a [`Service`], which reports [`Event`]s. [`connect_over`] makes a
//! [`Connection`] over a socket that the program has opened.

pub mod channel;
mod coherence;
pub mod config;
pub mod connect;
mod error;
pub mod events;
pub mod figures;
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
