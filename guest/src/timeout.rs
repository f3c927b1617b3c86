//! Timeouts for a host that does not answer, for the thread that mounts and for the programs that use the mount.

use crate::error::Error;
use crate::stats::QueueStats;
use nix::sys::socket::{
    connect, setsockopt, shutdown, socket, sockopt, AddressFamily, Shutdown, SockFlag, SockType, UnixAddr,
};
use nix::sys::time::TimeVal;
use parking_lot::Mutex;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Interval at which the connections are shut down again after the deadline: `work` may have opened more.
const AGAIN: Duration = Duration::from_millis(100);
/// Most time that a host which is just starting may take until it listens, and the time between two tries.
const HOST_START: Duration = Duration::from_secs(2);
const START_RETRY: Duration = Duration::from_millis(20);
/// Most time that connect(2) waits for room in the host's backlog.
const BACKLOG: Duration = Duration::from_secs(5);

/// The connections opened under a deadline. At the deadline these are shut down, and no other descriptors of the
/// process.
#[derive(Default)]
pub struct Opened {
    made: Mutex<Vec<OwnedFd>>,
    /// A connection that the caller has opened; the first [`Self::connect`] returns it.
    given: Mutex<Option<UnixStream>>,
    /// The time until which a host that does not listen is retried; `None`: one try.
    starts_until: Option<Instant>,
}

impl Opened {
    /// Makes a set whose first connection is `given`.
    pub fn with(given: UnixStream) -> Opened {
        Opened { given: Mutex::new(Some(given)), ..Opened::default() }
    }

    /// Connections to a host that may not listen yet, because a script has just started it.
    pub fn with_start() -> Opened {
        Opened { starts_until: Some(Instant::now() + HOST_START), ..Opened::default() }
    }

    /// Connects to the host at `path`, or returns the given connection.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub fn connect(&self, path: &Path) -> Result<UnixStream, Error> {
        let mut opened = self.open(path);
        while opened.as_ref().is_err_and(nobody_listens)
            && self.starts_until.is_some_and(|until| Instant::now() < until)
        {
            std::thread::sleep(START_RETRY);
            opened = self.open(path);
        }
        opened.map_err(|source| Error::Connect { path: path.display().to_string(), source })
    }

    fn open(&self, path: &Path) -> io::Result<UnixStream> {
        if let Some(given) = self.given.lock().take() {
            self.made.lock().push(given.try_clone()?.into());
            return Ok(given);
        }
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        // SO_SNDTIMEO also limits how long connect(2) waits for room in the backlog.
        setsockopt(&fd, sockopt::SendTimeout, &TimeVal::new(BACKLOG.as_secs() as i64, 0))?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        setsockopt(&fd, sockopt::SendTimeout, &TimeVal::new(0, 0))?;
        self.made.lock().push(fd.try_clone()?);
        Ok(fd.into())
    }

    /// Shuts down the connections.
    fn cut(&self) {
        for fd in self.made.lock().iter() {
            let _ = shutdown(fd.as_raw_fd(), Shutdown::Both);
        }
    }
}

fn nobody_listens(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// Calls `work`. Shuts down the connections that it has opened if it takes longer than `limit`.
///
/// # Errors
/// Those of `work`; after `limit`, [`Error::Setup`]: the host at `path` does not answer.
pub fn with_timeout<T>(
    limit: Duration,
    path: &Path,
    work: impl FnOnce(&Opened) -> Result<T, Error>,
) -> Result<T, Error> {
    with_opened(limit, path, Opened::default(), work)
}

/// As [`with_timeout`]; `opened` may have a connection already.
///
/// # Errors
/// As [`with_timeout`].
pub fn with_opened<T>(
    limit: Duration,
    path: &Path,
    opened: Opened,
    work: impl FnOnce(&Opened) -> Result<T, Error>,
) -> Result<T, Error> {
    let (working, done) = channel::<()>();
    std::thread::scope(|scope| {
        let cut = || opened.cut();
        let watch = Builder::new().name("timeout".into()).spawn_scoped(scope, move || {
            let (mut wait, mut late) = (limit, false);
            while done.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                cut();
                (wait, late) = (AGAIN, true);
            }
            late
        });
        let watch = watch.map_err(|e| Error::Setup(format!("no thread to watch how long the host takes: {e}")))?;
        let result = work(&opened);
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

/// A thread that watches how long requests wait for the host. Ends when dropped.
pub struct Watchdog {
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    over: AtomicBool,
    late: AtomicBool,
}

impl Watchdog {
    /// Starts the thread. It calls `give_up`, once, when a request of `queues` has waited for `timeout`.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub fn start(
        timeout: Duration,
        queues: Vec<Arc<QueueStats>>,
        give_up: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Watchdog> {
        let state = Arc::new(State::default());
        let watched = state.clone();
        let work = move || {
            while !watched.over.load(Ordering::Acquire) {
                std::thread::park_timeout(timeout / 8);
                if queues.iter().any(|q| q.longest_wait() >= timeout) {
                    tracing::error!("the host has not answered for {timeout:?} (mount.timeout): giving it up");
                    watched.late.store(true, Ordering::Release);
                    return give_up();
                }
            }
        };
        let thread = Builder::new().name("watchdog".into()).spawn(work)?;
        Ok(Watchdog { state, thread: Some(thread) })
    }

    /// Returns `true` if a request has waited for the timeout, `false` if none has.
    pub fn timed_out(&self) -> bool {
        self.state.late.load(Ordering::Acquire)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.state.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    #[test]
    fn only_the_connections_of_the_work_are_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut before = UnixStream::connect(&path).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        let mut meanwhile = None;
        let result = with_timeout(Duration::from_millis(50), &path, |opened| {
            let mut ours = opened.connect(&path)?;
            // Another thread of the process connects to the same path.
            meanwhile = Some(UnixStream::connect(&path)?);
            assert_eq!(ours.read(&mut [0]).unwrap(), 0, "shut down");
            Err::<(), _>(Error::HostGone)
        });
        assert!(result.unwrap_err().to_string().contains("does not answer within"));
        theirs.write_all(b"x").unwrap();
        before.read_exact(&mut [0]).unwrap();
        let (_ours, mut other) = (listener.accept().unwrap(), listener.accept().unwrap().0);
        other.write_all(b"y").unwrap();
        meanwhile.unwrap().read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn what_comes_in_time_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut ours = with_timeout(Duration::from_secs(60), &path, |opened| opened.connect(&path)).unwrap();
        listener.accept().unwrap().0.write_all(b"x").unwrap();
        ours.read_exact(&mut [0]).unwrap();
    }
}
