//! Stops a daemon from another thread.

use nix::fcntl::{fcntl, FcntlArg};
use nix::sys::socket::{getsockname, getsockopt, shutdown, sockopt::AcceptConn, Shutdown, UnixAddr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

/// Stops a [`crate::Daemon`]: no more guests come, and those that are there lose their connections.
#[derive(Debug)]
pub struct Stopper {
    stopping: Arc<AtomicBool>,
    /// Another descriptor of the listening socket.
    listener: OwnedFd,
}

impl Stopper {
    pub(crate) fn new(stopping: Arc<AtomicBool>, listener: BorrowedFd<'_>) -> io::Result<Stopper> {
        Ok(Stopper { stopping, listener: listener.try_clone_to_owned()? })
    }

    /// Has [`crate::Daemon::run`] return once its guests' requests have ended.
    ///
    /// # Errors
    /// The process has no descriptor left: its guests keep their connections then.
    pub fn stop(&self) -> io::Result<()> {
        self.stopping.store(true, Ordering::Release);
        // From now on nothing is accepted: whoever is there is found below.
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        let name = getsockname::<UnixAddr>(self.listener.as_raw_fd())?;
        for entry in std::fs::read_dir("/proc/self/fd")? {
            if let Some(fd) = entry?.file_name().to_str().and_then(|number| number.parse().ok()) {
                end_connection(fd, &name);
            }
        }
        Ok(())
    }
}

/// Ends a connection that was accepted by the listening socket of this name: it has its name. The programs' own
/// connections to that socket have none.
fn end_connection(fd: i32, name: &UnixAddr) {
    // SAFETY: only duplicated; the number may be another descriptor's by now, or nobody's.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    // A duplicate, so that it is one and the same socket that is looked at and shut down.
    let Ok(copy) = fcntl(borrowed, FcntlArg::F_DUPFD_CLOEXEC(0)) else { return };
    // SAFETY: just made, and nobody else's.
    let copy = unsafe { OwnedFd::from_raw_fd(copy) };
    let accepted = getsockname::<UnixAddr>(copy.as_raw_fd()).is_ok_and(|its| its == *name);
    if accepted && getsockopt(&copy, AcceptConn).is_ok_and(|listens| !listens) {
        let _ = shutdown(copy.as_raw_fd(), Shutdown::Both);
    }
}
