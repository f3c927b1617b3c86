//! A host that does not answer must not hang whoever mounts.

use crate::link::local::connections;
use crate::Error;
use nix::sys::socket::{shutdown, Shutdown};
use std::path::Path;
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::time::Duration;

/// Between two cuts, when the first was not enough.
const AGAIN: Duration = Duration::from_millis(100);

/// Calls `work`, and cuts the connections that it has made to the host when it takes longer than `limit`.
///
/// # Errors
/// Those of `work`, or that the host at `path` does not answer.
pub fn within<T>(limit: Duration, path: &Path, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let before = connections();
    let (working, done) = channel::<()>();
    std::thread::scope(|scope| {
        let watch = scope.spawn(move || {
            let (mut wait, mut late) = (limit, false);
            while done.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                for (fd, _) in connections().iter().filter(|c| !before.contains(c)) {
                    let _ = shutdown(*fd, Shutdown::Both);
                }
                (wait, late) = (AGAIN, true);
            }
            late
        });
        let result = work();
        drop(working);
        match (result, watch.join()) {
            (Err(_), Ok(true)) => Err(Error::Setup(format!(
                "the host at {} does not answer within {} s: does it serve another guest, or use another transport?",
                path.display(),
                limit.as_secs()
            ))),
            (result, _) => result,
        }
    })
}
