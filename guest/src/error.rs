//! The error type of the guest.

/// An error of the guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host is not reachable, or refuses the connection.
    #[error("cannot connect to the host at {path}: {source}; {}", hint(source))]
    Connect {
        /// The socket's path.
        path: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// The host has died: no submitted request will be answered.
    #[error("the host has gone away")]
    HostGone,
    /// The host has not answered within `mount.timeout`.
    #[error("the host does not answer")]
    HostSilent,
    /// The host cannot take over from the last one; the text says why.
    #[error("the host cannot go on from where the one before it was: {0}")]
    Refused(String),
    /// The host broke the protocol.
    #[error("the host broke the protocol: {0}")]
    Protocol(&'static str),
    /// Something on this machine, or the host, prevents the mount; the text says what to do.
    #[error("{0}")]
    Setup(String),
    /// An invalid setting.
    #[error(transparent)]
    Settings(#[from] tunnelfs_settings::Error),
    /// An error of the ring or its memory.
    #[error(transparent)]
    Ring(#[from] tunnelfs_ring::Error),
    /// A failed system call.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Returns what to do about a failed connection.
fn hint(e: &std::io::Error) -> &'static str {
    use std::io::ErrorKind::*;
    match e.kind() {
        NotFound | ConnectionRefused => "is tunnelfs-host running there?",
        PermissionDenied => "the socket is its owner's: mount as the user who runs tunnelfs-host, or as root",
        _ => "does a vhost-user-fs host listen there (tunnelfs-host with the same transport, or virtiofsd)?",
    }
}
