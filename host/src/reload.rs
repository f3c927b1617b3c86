//! SIGHUP: the program reads its settings file again. The signal may come to a process outside the sandbox, which waits
//! for the one that serves: an eventfd that both have carries it in.

use crate::live::Live;
use nix::sys::signal::{SigSet, Signal};
use std::fmt;
use std::io;
use std::os::fd::IntoRawFd;
use std::sync::atomic::{AtomicI32, Ordering};
use tunnelfs_ring::Eventfd;

/// The eventfd's descriptor, for the signal handler; -1: none.
static SIGNALLED: AtomicI32 = AtomicI32::new(-1);

/// What a program does on SIGHUP, on a thread of its own.
pub struct Reload(Box<dyn FnMut(&Live) + Send>);

impl fmt::Debug for Reload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reload")
    }
}

impl Reload {
    /// Calls `work` after each SIGHUP.
    pub fn new(work: impl FnMut(&Live) + Send + 'static) -> Self {
        Reload(Box::new(work))
    }

    /// Starts the thread. The caller's other threads, which must be started afterwards, do not get the signal.
    pub(crate) fn start(mut self, live: Live) -> io::Result<()> {
        let mut hangup = SigSet::empty();
        hangup.add(Signal::SIGHUP);
        hangup.thread_block()?;
        let work = move || {
            let _ = hangup.thread_unblock();
            loop {
                wait();
                (self.0)(&live);
            }
        };
        tunnelfs_program::thread::spawn("reload", work).map(|_| ())
    }
}

/// Has SIGHUP write to an eventfd, in this process and its children.
///
/// # Errors
/// The system has no descriptor left.
pub fn handle_signal() -> io::Result<()> {
    let eventfd = Eventfd::new().map_err(io::Error::other)?;
    // Open as long as the process.
    SIGNALLED.store(eventfd.into_raw_fd(), Ordering::Release);
    // SAFETY: the handler makes one call, which is safe in one.
    unsafe { libc::signal(libc::SIGHUP, on_signal as extern "C" fn(_) as usize) };
    Ok(())
}

extern "C" fn on_signal(_: libc::c_int) {
    let one = 1u64;
    // SAFETY: the errno of this thread, which a handler must leave as it is; and eight bytes for an eventfd.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        libc::write(SIGNALLED.load(Ordering::Acquire), (&raw const one).cast(), size_of::<u64>());
        *errno = before;
    }
}

/// Waits for the signal.
fn wait() {
    let fd = SIGNALLED.load(Ordering::Acquire);
    let mut fds = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut count = 0u64;
    // SAFETY: one `pollfd`, and room for an eventfd's count.
    unsafe {
        while libc::poll(&raw mut fds, 1, -1) < 1 {}
        libc::read(fd, (&raw mut count).cast(), size_of::<u64>());
    }
}
