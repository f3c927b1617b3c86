//! Accepts streamed connections, and groups them by guest: those that begin with the same token are one guest's. A
//! connection without a token is a guest of its own.

use crate::admission::{next_guest, Permit, Semaphore, MAX_GUESTS, RETRY_PAUSE};
use crate::handler::Handler;
use crate::listen::SocketFile;
use crate::live::Live;
use crate::stop::Stopper;
use crate::transport::socket::{Session, IN_HEADER};
use parking_lot::{Condvar, Mutex};
use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_fuse_abi::control::{JOIN_TOKEN_BYTES, OP_JOIN};
use vhost::vhost_user::Listener;

/// Connections at a time that have sent nothing yet. One more is refused.
const MAX_SILENT: usize = 256;
/// Pause between two looks whether all guests have gone.
const ENDING: Duration = Duration::from_millis(10);

type Token = [u8; JOIN_TOKEN_BYTES];

/// Guests that are there.
type Sessions<H> = HashMap<Token, Arc<Session<H>>>;

/// The guests of a host.
struct Streams<H: Handler, O> {
    live: Live,
    open: O,
    /// The file system that was opened at the start, for the first guest.
    first: Mutex<Option<H>>,
    guests: Semaphore,
    silent: Semaphore,
    sessions: Mutex<Sessions<H>>,
    /// Guests that have left.
    left: Mutex<usize>,
    changed: Condvar,
}

/// Serves guests.
///
/// # Errors
/// The listening socket's, at the start.
pub fn serve<H: Handler>(
    live: Live,
    once: bool,
    (listener, file): (Listener, Option<SocketFile>),
    stopper: Stopper,
    (first, open): (H, impl Fn() -> io::Result<H> + Send + Sync + 'static),
) -> io::Result<()> {
    // SAFETY: open as long as `listener` lives, which is to the end of this function.
    let accepting = UnixListener::from(unsafe { BorrowedFd::borrow_raw(listener.as_raw_fd()) }.try_clone_to_owned()?);
    let streams = Arc::new(Streams {
        live,
        open,
        first: Mutex::new(Some(first)),
        guests: Semaphore::new(MAX_GUESTS),
        silent: Semaphore::new(MAX_SILENT),
        sessions: Mutex::default(),
        left: Mutex::default(),
        changed: Condvar::new(),
    });
    let its = streams.clone();
    let accept = move || {
        // Dropped at the end: `end_all` waits for that.
        let its = its;
        for stream in accepting.incoming() {
            match stream.and_then(|stream| its.clone().greet_beside(stream)) {
                Ok(()) => {}
                // The listener was shut down: the one guest has left.
                Err(e) if e.kind() == ErrorKind::InvalidInput => break,
                Err(e) => {
                    tracing::warn!("a guest's connection: {e}");
                    std::thread::sleep(RETRY_PAUSE);
                }
            }
        }
    };
    if !once {
        accept();
        return end_all(streams, &stopper);
    }
    let told = streams.clone();
    tunnelfs_program::thread::spawn("accept", move || {
        accept();
        // Nobody comes any more.
        told.count_left();
    })?;
    {
        let mut left = streams.left.lock();
        while *left == 0 {
            streams.changed.wait(&mut left);
        }
    }
    // Ends the accepting thread, and refuses connections that still wait.
    // SAFETY: the listener's descriptor.
    unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RDWR) };
    drop(file);
    if stopper.is_stopping() {
        return end_all(streams, &stopper);
    }
    Ok(())
}

/// After [`Stopper::stop`]: waits for the guests that are there.
fn end_all<H: Handler, O>(streams: Arc<Streams<H, O>>, stopper: &Stopper) -> io::Result<()> {
    stopper.end_connections()?;
    // Each connection's thread has one of its own.
    while Arc::strong_count(&streams) > 1 {
        std::thread::sleep(ENDING);
    }
    Ok(())
}

impl<H: Handler, O> Streams<H, O> {
    /// A guest has left, or no more may come.
    fn count_left(&self) {
        *self.left.lock() += 1;
        self.changed.notify_all();
    }
}

impl<H: Handler, O: Fn() -> io::Result<H> + Send + Sync + 'static> Streams<H, O> {
    /// Waits for a connection's first message on a thread of its own: it may take long.
    fn greet_beside(self: Arc<Self>, stream: UnixStream) -> io::Result<()> {
        let Some(permit) = self.silent.try_acquire() else {
            return Err(io::Error::other(format!("refused: {MAX_SILENT} connections have sent nothing yet")));
        };
        let greet = move || {
            let _permit = permit;
            if let Err(e) = self.greet(stream) {
                tracing::warn!("a guest's connection: {e}");
            }
        };
        tunnelfs_program::thread::spawn("greet", greet).map(|_| ())
    }

    fn greet(self: &Arc<Self>, mut stream: UnixStream) -> io::Result<()> {
        let mut header = [0; IN_HEADER];
        let n = peek(&stream, &mut header)?;
        if n == 0 {
            // A program that only checks whether somebody listens.
            return Ok(());
        }
        let mut token = None;
        if n == IN_HEADER && header[4..8] == OP_JOIN.to_ne_bytes() {
            token = Some(read_token(&mut stream)?);
        }
        let mut sessions = self.sessions.lock();
        let known = token.and_then(|token| sessions.get(&token).cloned());
        let (session, permit) = match known {
            Some(session) => (session, None),
            None => {
                let (session, permit) = self.new_session()?;
                (session, Some(permit))
            }
        };
        // Counted before it is answered: the guest may close its other connections as soon as it has the answer.
        let mut answering = stream.try_clone()?;
        session.join(stream)?;
        if token.is_some() {
            let mut reply = [0; 16];
            reply[..4].copy_from_slice(&16u32.to_ne_bytes());
            reply[8..].copy_from_slice(&header[8..16]);
            answering.write_all(&reply)?;
        }
        if let Some(permit) = permit {
            if let Some(token) = token {
                sessions.insert(token, session.clone());
            }
            drop(sessions);
            let number = next_guest();
            tracing::info!("guest {number} has come, over streams");
            self.see_off(&session, token);
            tracing::info!("guest {number} has gone");
            drop(permit);
        }
        Ok(())
    }

    fn new_session(&self) -> io::Result<(Arc<Session<H>>, Permit)> {
        let permit = self.guests.try_acquire();
        let permit = permit.ok_or_else(|| io::Error::other(format!("a guest is refused: {MAX_GUESTS} are there")))?;
        let first = self.first.lock().take();
        let handler = first.map_or_else(&self.open, Ok)?;
        Ok((Session::new(handler, &self.live)?, permit))
    }

    /// Waits until the guest has left.
    fn see_off(&self, session: &Arc<Session<H>>, token: Option<Token>) {
        session.wait(|| {
            if let Some(token) = token {
                self.sessions.lock().remove(&token);
            }
        });
        self.count_left();
    }
}

/// Waits for a connection's first bytes, and leaves them there. Fewer than wanted: the stream has ended behind them.
fn peek(stream: &UnixStream, room: &mut [u8]) -> io::Result<usize> {
    let flags = libc::MSG_PEEK | libc::MSG_WAITALL;
    loop {
        // SAFETY: as much room as is told.
        let n = unsafe { libc::recv(stream.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), flags) };
        match io::Error::last_os_error() {
            _ if n >= 0 => return Ok(n as usize),
            e if e.kind() == ErrorKind::Interrupted => {}
            e => return Err(e),
        }
    }
}

fn read_token(stream: &mut UnixStream) -> io::Result<Token> {
    let mut message = [0; IN_HEADER + JOIN_TOKEN_BYTES];
    stream.read_exact(&mut message)?;
    if message[..4] != (message.len() as u32).to_ne_bytes() {
        return Err(io::Error::new(ErrorKind::InvalidData, "JOIN of a wrong length"));
    }
    Ok(message[IN_HEADER..].try_into().expect("as many bytes"))
}
