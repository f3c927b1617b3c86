//! A host that does not answer: neither the thread that mounts nor a program may wait for ever.

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

/// Between two cuts, for connections that were made after the first.
const AGAIN: Duration = Duration::from_millis(100);
/// How long a host may take to listen after it was started, and how often is looked.
const HOST_START: Duration = Duration::from_secs(2);
const START_LOOK: Duration = Duration::from_millis(20);
/// How long connect(2) may wait for room in a listener's backlog.
const BACKLOG: Duration = Duration::from_secs(5);

/// The connections made under a deadline: these, and no other descriptors of the process, are shut down when it passes.
#[derive(Default)]
pub struct Opened {
    made: Mutex<Vec<OwnedFd>>,
    /// A connection that the caller had already: the first one.
    given: Mutex<Option<UnixStream>>,
    /// Until when a host that does not listen yet is waited for.
    starts_until: Option<Instant>,
}

impl Opened {
    /// Connections of which the first is there already.
    pub fn with(given: UnixStream) -> Opened {
        Opened { given: Mutex::new(Some(given)), ..Opened::default() }
    }

    /// Connections to a host that may be starting: a script starts it just before.
    pub fn with_start() -> Opened {
        Opened { starts_until: Some(Instant::now() + HOST_START), ..Opened::default() }
    }

    /// Connects to the host at `path`.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub fn connect(&self, path: &Path) -> Result<UnixStream, Error> {
        let mut opened = self.open(path);
        while opened.as_ref().is_err_and(nobody_listens)
            && self.starts_until.is_some_and(|until| Instant::now() < until)
        {
            std::thread::sleep(START_LOOK);
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
        // connect(2) waits for room in the backlog as long as a send may wait.
        setsockopt(&fd, sockopt::SendTimeout, &TimeVal::new(BACKLOG.as_secs() as i64, 0))?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        setsockopt(&fd, sockopt::SendTimeout, &TimeVal::new(0, 0))?;
        self.made.lock().push(fd.try_clone()?);
        Ok(fd.into())
    }

    fn cut(&self) {
        for fd in self.made.lock().iter() {
            let _ = shutdown(fd.as_raw_fd(), Shutdown::Both);
        }
    }
}

fn nobody_listens(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// Calls `work`, and shuts down the connections that it has opened when it takes longer than `limit`.
///
/// # Errors
/// Those of `work`, or that the host at `path` does not answer.
pub fn with_timeout<T>(
    limit: Duration,
    path: &Path,
    work: impl FnOnce(&Opened) -> Result<T, Error>,
) -> Result<T, Error> {
    with_opened(limit, path, Opened::default(), work)
}

/// As [`with_timeout`], with a connection that is there already.
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

/// Looks at the requests under way; ended when dropped.
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
    /// Calls `give_up` when any request of `queues` has waited for `timeout`.
    ///
    /// # Errors
    /// When the system has no thread left.
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

    /// Whether the host has been given up.
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
