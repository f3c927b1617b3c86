//! Threads of the host, and what to do where the system has none left.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Starts a thread.
///
/// # Errors
/// That the system has none left, and what may be done.
pub fn spawn<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> io::Result<JoinHandle<T>> {
    Builder::new().name(name.into()).spawn(work).map_err(|e| {
        let told = format!(
            "the system gives no thread \"{name}\": {e}; raise the limit of processes and threads (ulimit -u, \
             systemd's TasksMax, pids.max of a cgroup)"
        );
        io::Error::new(e.kind(), told)
    })
}
