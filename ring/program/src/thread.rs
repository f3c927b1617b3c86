//! Threads, and what to do where the system has none left.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Starts a thread.
///
/// # Errors
/// As [`refused`] has it.
pub fn spawn<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> io::Result<JoinHandle<T>> {
    Builder::new().name(name.into()).spawn(work).map_err(|e| refused(name, &e))
}

/// That the system gives no thread, and what may be done.
pub fn refused(name: &str, e: &io::Error) -> io::Error {
    let told = format!(
        "the system gives no thread \"{name}\": {e}; raise the limit of processes and threads (ulimit -u, systemd's \
         TasksMax, pids.max of a cgroup)"
    );
    io::Error::new(e.kind(), told)
}
