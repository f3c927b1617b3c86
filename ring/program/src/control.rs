//! How a running program tells how it is: by sockets in the abstract namespace, which work for a daemon that sees no file
//! and for a mount that hangs. A client gets one text, and the end.

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{
    accept4, bind, connect, getsockopt, listen, socket, sockopt, AddressFamily, Backlog, SockFlag, SockType, UnixAddr,
};
use nix::unistd::geteuid;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long an answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub enum What {
    /// A text for people.
    Status,
    /// The figures, as Prometheus reads them.
    Metrics,
}

/// A listening socket.
#[derive(Debug)]
pub struct Answering(OwnedFd);

fn unix_socket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?)
}

/// Whether the other side is this user's or root's.
fn is_trusted(peer: &impl AsFd) -> bool {
    getsockopt(peer, sockopt::PeerCredentials).is_ok_and(|peer| peer.uid() == 0 || peer.uid() == geteuid().as_raw())
}

impl Answering {
    /// Listens by this name.
    ///
    /// # Errors
    /// The system's.
    pub fn new(name: &str) -> io::Result<Self> {
        let socket = unix_socket()?;
        bind(socket.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
        listen(&socket, Backlog::new(8)?)?;
        Ok(Answering(socket))
    }

    /// Readable when somebody asks.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Answers one that asks.
    pub fn answer(&self, text: impl FnOnce() -> String) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let Ok(fd) = accept4(self.0.as_raw_fd(), flags) else { return };
        // SAFETY: a new descriptor that nobody else knows.
        let mut stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
        if is_trusted(&stream) {
            // Not waited for: a client that does not read gets less.
            let _ = stream.write_all(text().as_bytes());
        }
    }
}

/// Waits until one of the descriptors is readable. Returns which are.
///
/// # Errors
/// The system's.
pub fn readable(fds: &[BorrowedFd<'_>], limit: PollTimeout) -> io::Result<Vec<bool>> {
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    match poll(&mut polled, limit) {
        Ok(_) | Err(nix::Error::EINTR) => Ok(polled.iter().map(|fd| fd.any() == Some(true)).collect()),
        Err(e) => Err(e.into()),
    }
}

/// What the program that listens by this name tells.
///
/// # Errors
/// Nobody answers.
pub fn ask(name: &str) -> io::Result<String> {
    let gone = |e: io::Error| io::Error::new(e.kind(), format!("its process does not answer: {e}"));
    let socket = unix_socket()?;
    connect(socket.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?).map_err(|e| gone(e.into()))?;
    let mut stream = UnixStream::from(socket);
    if !is_trusted(&stream) {
        return Err(gone(io::Error::other("another user has its place")));
    }
    stream.set_read_timeout(Some(ANSWER_WITHIN))?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(gone)?;
    if text.is_empty() {
        return Err(gone(io::ErrorKind::PermissionDenied.into()));
    }
    Ok(text)
}
