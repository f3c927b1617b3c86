//! What can go wrong on the guest side.

/// An error of the guest side.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host cannot be reached, or refuses to talk.
    #[error("cannot connect to the host at {path}: {source}; {}", hint(source))]
    Connect {
        /// The socket's path.
        path: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The host has gone: nothing that was submitted will be answered.
    #[error("the host has gone away")]
    HostGone,
    /// The host has not answered within `mount.timeout`.
    #[error("the host does not answer")]
    HostSilent,
    /// The host cannot take over from the one before.
    #[error("the host cannot go on from where the one before it was: {0}")]
    Refused(String),
    /// The host broke the protocol.
    #[error("the host broke the protocol: {0}")]
    Protocol(&'static str),
    /// Something on this machine stands in the way; the text says what to do.
    #[error("{0}")]
    Setup(String),
    /// A setting that cannot be.
    #[error(transparent)]
    Settings(#[from] tunnelfs_settings::Error),
    /// The ring or its memory.
    #[error(transparent)]
    Ring(#[from] tunnelfs_ring::Error),
    /// A system call.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// What to do about a connection that cannot be made.
fn hint(e: &std::io::Error) -> &'static str {
    use std::io::ErrorKind::*;
    match e.kind() {
        NotFound | ConnectionRefused => "is tunnelfs-host running there?",
        PermissionDenied => "the socket is its owner's: mount as the user who runs tunnelfs-host, or as root",
        _ => "does a vhost-user-fs host listen there (tunnelfs-host with the same transport, or virtiofsd)?",
    }
}
