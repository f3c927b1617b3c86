//! `tunnelfs-guest status` and `top`: a mount's process answers on sockets that are named after the mount's device
//! number. They do not use the mount itself, which could block.

use std::io;
use std::path::Path;
use tunnelfs_guest::fuse::mountinfo;
use tunnelfs_program::control::{self, Answering, What};

/// Returns the name of the socket of the mount on `point`.
fn name(point: &Path, what: What) -> io::Result<String> {
    let mounted = mountinfo::topmost(point).filter(|mounted| mounted.kind == "fuse.tunnelfs");
    let mounted = mounted.ok_or_else(|| io::Error::other(format!("{}: no TunnelFS mount", point.display())))?;
    let suffix = match what {
        What::Status => "",
        What::Metrics => "/metrics",
    };
    Ok(format!("tunnelfs-guest/{}{suffix}", mounted.minor))
}

/// Opens the socket of the mount on `point`, for its process.
///
/// # Errors
/// The system's.
pub fn listen(point: &Path, what: What) -> io::Result<Answering> {
    Answering::new(&name(point, what)?)
}

/// Asks the process of the mount on `point`.
///
/// # Errors
/// If no TunnelFS mount is there, or its process does not answer.
pub fn ask(point: &Path, what: What) -> io::Result<String> {
    let told = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", point.display()));
    control::ask(&name(point, what)?).map_err(told)
}
