//! `tunnelfs-guest status`: a mount's process tells how it is, by a socket in the abstract namespace that is named after
//! the mount's device number. Nothing of the mount itself is asked: it could hang.

use nix::sys::socket::{
    accept4, bind, connect, getsockopt, listen, socket, sockopt, AddressFamily, Backlog, SockFlag, SockType, UnixAddr,
};
use nix::unistd::geteuid;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use tunnelfs_guest::fuse::mountinfo;

/// How long an answer may take on either side.
const PATIENCE: Duration = Duration::from_secs(5);

/// What answers for one mount.
pub struct Status(OwnedFd);

fn address(point: &Path) -> io::Result<UnixAddr> {
    let mounted = mountinfo::topmost(point).filter(|mounted| mounted.kind == "fuse.tunnelfs");
    let mounted = mounted.ok_or_else(|| io::Error::other(format!("{}: no TunnelFS mount", point.display())))?;
    Ok(UnixAddr::new_abstract(format!("tunnelfs-guest/{}", mounted.minor).as_bytes())?)
}

fn unix_socket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?)
}

/// Whether the other side is this user's or root's.
fn is_trusted(peer: &impl AsFd) -> bool {
    getsockopt(peer, sockopt::PeerCredentials).is_ok_and(|peer| peer.uid() == 0 || peer.uid() == geteuid().as_raw())
}

impl Status {
    /// Listens for the mount on `point`.
    ///
    /// # Errors
    /// The system's.
    pub fn new(point: &Path) -> io::Result<Self> {
        let socket = unix_socket()?;
        bind(socket.as_raw_fd(), &address(point)?)?;
        listen(&socket, Backlog::new(8)?)?;
        Ok(Status(socket))
    }

    /// Readable when somebody asks.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Answers one that asks.
    pub fn answer(&self, text: impl FnOnce() -> String) {
        let Ok(fd) = accept4(self.0.as_raw_fd(), SockFlag::SOCK_CLOEXEC) else { return };
        // SAFETY: a new descriptor that nobody else knows.
        let mut stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
        if is_trusted(&stream) {
            // Not waited for: whoever asks and does not read gets less.
            let _ = stream.set_nonblocking(true);
            let _ = stream.write_all(text().as_bytes());
        }
    }
}

/// What the mount on `point` tells of itself.
///
/// # Errors
/// Nothing of ours is mounted there, or nobody answers.
pub fn ask(point: &Path) -> io::Result<String> {
    let address = address(point)?;
    let gone =
        |e: io::Error| io::Error::new(e.kind(), format!("{}: its process does not answer: {e}", point.display()));
    let socket = unix_socket()?;
    connect(socket.as_raw_fd(), &address).map_err(|e| gone(e.into()))?;
    let mut stream = UnixStream::from(socket);
    if !is_trusted(&stream) {
        return Err(gone(io::Error::other("another user has its place")));
    }
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(gone)?;
    if text.is_empty() {
        return Err(gone(io::ErrorKind::PermissionDenied.into()));
    }
    Ok(text)
}
