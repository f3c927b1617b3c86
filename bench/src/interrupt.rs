//! SIGINT and SIGTERM end a run between two turns, so that nothing stays mounted or in memory.

use nix::sys::signal::{signal, SigHandler, Signal};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn ask(_signal: i32) {
    // The second time without manners.
    if ASKED.swap(true, Ordering::Relaxed) {
        // SAFETY: `_exit` may be called in a signal handler.
        unsafe { libc::_exit(130) }
    }
}

/// From now on signals only ask.
///
/// # Errors
/// The system's.
pub fn watch() -> io::Result<()> {
    for number in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler touches one atomic, and calls what a handler may call.
        unsafe { signal(number, SigHandler::Handler(ask)) }?;
    }
    Ok(())
}

/// # Errors
/// `Interrupted`, once a signal has asked for the end.
pub fn check() -> io::Result<()> {
    if ASKED.load(Ordering::Relaxed) {
        return Err(io::Error::new(io::ErrorKind::Interrupted, "interrupted"));
    }
    Ok(())
}
