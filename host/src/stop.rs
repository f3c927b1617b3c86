//! Stops a daemon from another thread.

use nix::fcntl::{fcntl, FcntlArg};
use nix::sys::socket::{getsockname, getsockopt, shutdown, sockopt::AcceptConn, Shutdown, UnixAddr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

/// Stops a [`crate::Daemon`]: no more guests come, and present ones lose their connections.
///
/// The listening socket is shut down for all who have it: not for one that a service manager keeps.
#[derive(Clone, Debug)]
pub struct Stopper {
    stopping: Arc<AtomicBool>,
    /// Another descriptor of the listening socket.
    listener: Arc<OwnedFd>,
}

impl Stopper {
    pub(crate) fn new(stopping: Arc<AtomicBool>, listener: BorrowedFd<'_>) -> io::Result<Stopper> {
        Ok(Stopper { stopping, listener: Arc::new(listener.try_clone_to_owned()?) })
    }

    /// Has [`crate::Daemon::run`] return once its guests' requests have ended.
    ///
    /// # Errors
    /// The process has no descriptor left: its guests keep their connections then.
    pub fn stop(&self) -> io::Result<()> {
        self.stopping.store(true, Ordering::SeqCst);
        // From now on nothing is accepted.
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        self.end_connections()
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Ends the guests' connections. The daemon does so itself once it accepts nothing any more: [`Stopper::stop`] may
    /// miss one that is being accepted.
    pub(crate) fn end_connections(&self) -> io::Result<()> {
        let name = getsockname::<UnixAddr>(self.listener.as_raw_fd())?;
        for entry in std::fs::read_dir("/proc/self/fd")? {
            if let Some(fd) = entry?.file_name().to_str().and_then(|number| number.parse().ok()) {
                end_connection(fd, &name);
            }
        }
        Ok(())
    }
}

/// Whether this is a connection that the listening socket of this name has accepted: it has that name. The program's
/// own connections to the socket have none.
fn is_accepted(fd: RawFd, name: &UnixAddr) -> bool {
    getsockname::<UnixAddr>(fd).is_ok_and(|its| its == *name)
}

fn end_connection(fd: RawFd, name: &UnixAddr) {
    // Before it is duplicated: closing the duplicate of a file would drop the process's record locks on it.
    if !is_accepted(fd, name) {
        return;
    }
    // SAFETY: only duplicated; the number may be another descriptor's by now, or nobody's.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    // A duplicate, so that it is one and the same socket that is looked at and shut down.
    let Ok(copy) = fcntl(borrowed, FcntlArg::F_DUPFD_CLOEXEC(0)) else { return };
    // SAFETY: just made, and nobody else's.
    let copy = unsafe { OwnedFd::from_raw_fd(copy) };
    if is_accepted(copy.as_raw_fd(), name) && getsockopt(&copy, AcceptConn).is_ok_and(|listens| !listens) {
        let _ = shutdown(copy.as_raw_fd(), Shutdown::Both);
    }
}
