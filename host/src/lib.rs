//! Serves a directory to a guest: a vhost-user-fs back end whose queues carry
//! plain virtqueues or the shared-memory ring, and the same server over a socket.
//!
//! Transports hand requests to a [`Handler`]; [`Server`] is one over any [`fs::FileSystem`], and [`fs::Passthrough`]
//! is that of a directory, which [`fs_builder::FsBuilder`] makes of the settings. [`serve()`] and [`serve_confined`]
//! serve it; a [`Daemon`] serves a handler of your own.
//!
//! All memory that a guest can write is reached through [`guest_buf::GuestBuf`]
//! (raw copies and iovecs) and decoded once, in [`request`]: the trust boundary.

mod admission;
pub mod asked;
mod backend;
pub mod copy_helper;
mod counted;
mod daemon;
mod detach;
mod extensions;
pub mod figures;
pub mod fs;
pub mod fs_builder;
mod gate;
pub mod guest_buf;
pub mod handler;
pub mod in_process;
mod in_process_memory;
mod interrupt;
mod listen;
mod live;
mod memory;
mod placement;
mod queue_thread;
mod reload;
pub mod request;
pub mod sandbox;
mod seccomp;
mod serve;
mod server;
mod stop;
mod streams;
mod takeover;
pub mod transport;
mod vring;
mod zero_copy;

pub use counted::{Counted, Meter, Statistics};
pub use daemon::{listener_from_fd, Daemon, Guests};
pub use handler::Handler;
pub use in_process::Host;
pub use live::{Live, LIVE_KEYS};
pub use reload::Reload;
pub use serve::{serve, serve_confined, Start};
pub use server::Server;
pub use stop::Stopper;
