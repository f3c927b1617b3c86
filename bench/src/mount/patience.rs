//! Waiting for other processes.

use std::io;
use std::time::{Duration, Instant};

/// How long anything may take to come up or go away.
const PATIENCE: Duration = Duration::from_secs(10);

/// Polls until `done` says so.
///
/// # Errors
/// When that takes too long; names `what`.
pub fn await_that(what: &str, mut done: impl FnMut() -> bool) -> io::Result<()> {
    let start = Instant::now();
    while !done() {
        if start.elapsed() > PATIENCE {
            return Err(io::Error::other(format!("{what}: not within {PATIENCE:?}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
