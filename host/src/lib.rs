//! Serves a directory to a guest: a vhost-user-fs back end whose queues carry
//! plain virtqueues or the shared-memory ring, and the same server over a socket.
//!
//! Transports hand requests to a [`handler::Handler`]; [`server::Server`] is one over any [`fs::FileSystem`], and
//! [`fs::Passthrough`] is that of a directory, which [`share::Share`] makes of the settings.
//!
//! Everything that a guest can write is reached only through [`shared::Shared`]
//! (raw copies and iovecs) and decoded once, in [`request`]: the trust boundary.

mod backend;
mod extensions;
pub mod fs;
mod gate;
pub mod handler;
mod helper;
mod in_place;
mod interrupt;
mod listen;
mod memory;
mod placement;
mod queue_thread;
pub mod request;
pub mod sandbox;
mod seccomp;
mod serve;
pub mod server;
pub mod share;
pub mod shared;
mod streams;
mod takeover;
pub mod transport;
mod vring;

pub use handler::Handler;
pub use serve::{inherited, serve, serve_confined, Start};
