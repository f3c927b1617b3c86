//! `tunnelfs-guest status` and `top`: a mount's process tells how it is, by sockets that are named after the mount's
//! device number. Nothing of the mount itself is asked: it could hang.

use std::io;
use std::path::Path;
use tunnelfs_guest::fuse::mountinfo;
use tunnelfs_program::control::{self, Answering, What};

fn name(point: &Path, what: What) -> io::Result<String> {
    let mounted = mountinfo::topmost(point).filter(|mounted| mounted.kind == "fuse.tunnelfs");
    let mounted = mounted.ok_or_else(|| io::Error::other(format!("{}: no TunnelFS mount", point.display())))?;
    let suffix = match what {
        What::Status => "",
        What::Metrics => "/metrics",
    };
    Ok(format!("tunnelfs-guest/{}{suffix}", mounted.minor))
}

/// Listens for the mount on `point`.
///
/// # Errors
/// The system's.
pub fn listen(point: &Path, what: What) -> io::Result<Answering> {
    Answering::new(&name(point, what)?)
}

/// What the mount on `point` tells of itself.
///
/// # Errors
/// Nothing of ours is mounted there, or nobody answers.
pub fn ask(point: &Path, what: What) -> io::Result<String> {
    let told = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", point.display()));
    control::ask(&name(point, what)?).map_err(told)
}
