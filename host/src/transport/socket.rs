//! The streamed baseline: whole FUSE messages over a UNIX stream socket, as a
//! separate process without shared memory would have them. Payloads are
//! copied into and out of private buffers, and counted.
//!
//! The host goes on reading while a reply does not fit the socket: what is left of it waits in the connection's outbox.
//! So two sides that both write large messages do not wait for each other.

use crate::guest_buf::GuestBuf;
use crate::handler::{Handler, Outcome};
use crate::live::Live;
use crate::request::{interrupted_unique, unique, waits_for_changes};
use crate::takeover::{Task, Worker, WorkerPool};
use libc::iovec;
use memmap2::MmapMut;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_ring::{Eventfd, LiveWait, Parker, WaitConfig, MAX_SLOT_SIZE, PAGE};

/// Bytes of `struct fuse_in_header`.
pub const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// Header and structure of WRITE, whose data follows.
const WRITE_HEAD: usize = IN_HEADER + 40;
/// Most bytes of a message: the largest slot and room for headers.
const MAX_MESSAGE: usize = MAX_SLOT_SIZE as usize + 4096;
/// Bytes of replies that wait for the guest to read, from which on the host reads no more requests.
const OUTBOX_LIMIT: usize = 64 << 20;
/// Pause between two checks whether all threads of a guest that has left have ended.
const ENDING: Duration = Duration::from_millis(10);

/// Private memory whose byte `at` starts a page: files with O_DIRECT want their data so. A mapping of its own, which
/// costs what is touched of it, and is gone with the connection: an allocator would keep it for the next one.
struct Buffer {
    bytes: MmapMut,
    start: usize,
}

impl Buffer {
    fn new(at: usize) -> io::Result<Self> {
        Ok(Buffer { bytes: MmapMut::map_anon(MAX_MESSAGE + PAGE)?, start: at.wrapping_neg() % PAGE })
    }

    fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..MAX_MESSAGE]
    }
}

/// One request's room, and its reply's.
struct Buffers {
    input: Buffer,
    output: Buffer,
}

impl Buffers {
    fn new() -> io::Result<Self> {
        Ok(Buffers { input: Buffer::new(WRITE_HEAD)?, output: Buffer::new(OUT_HEADER)? })
    }

    /// Handles the request of `len` bytes in `input`; the reply's bytes in `output`, 0 for none.
    fn handle<H: Handler>(&mut self, len: usize, handler: &H) -> io::Result<usize> {
        let (input, output) = (&mut self.input.get()[..len], self.output.get());
        let head_len = len.min(WRITE_HEAD);
        let rest = [iovec { iov_base: input[head_len..].as_mut_ptr().cast(), iov_len: len - head_len }];
        let room = MAX_SLOT_SIZE as usize;
        let out = [iovec { iov_base: output[OUT_HEADER..].as_mut_ptr().cast(), iov_len: room }];
        // SAFETY: both are private buffers of this call.
        let (payload, out) = unsafe { (GuestBuf::new(&rest), GuestBuf::new(&out)) };
        let Outcome::Reply(reply) = handler.handle(&input[..head_len], payload, out, None) else { return Ok(0) };
        out.write(0, reply.body())?;
        let reply_len = OUT_HEADER + reply.body().len() + reply.payload_len;
        output[..4].copy_from_slice(&(reply_len as u32).to_ne_bytes());
        output[4..8].copy_from_slice(&reply.error.to_ne_bytes());
        output[8..16].copy_from_slice(&input[8..16]);
        // The kernel copied the request in and copies the reply out: two trips that shared memory saves.
        handler.count_copied((len - head_len + reply.payload_len) as u64);
        Ok(reply_len)
    }
}

/// Replies that the socket has no room for.
#[derive(Default)]
struct Outbox {
    parts: VecDeque<Vec<u8>>,
    /// Bytes of the first part that have been sent.
    sent: usize,
    /// Bytes that have not.
    queued: usize,
}

/// One connection.
pub struct Connection {
    stream: UnixStream,
    outbox: Mutex<Outbox>,
    /// Tells the reading thread that the outbox is not empty any more.
    wakeup: OwnedFd,
}

impl Connection {
    fn new(stream: UnixStream) -> io::Result<Self> {
        let wakeup = Eventfd::new().map_err(io::Error::other)?;
        Ok(Connection { stream, outbox: Mutex::default(), wakeup })
    }

    /// Sends what the socket takes, and keeps the rest.
    fn reply(&self, message: &[u8]) -> io::Result<()> {
        let mut outbox = self.outbox.lock();
        let sent = if outbox.queued == 0 { self.send(message)? } else { 0 };
        if sent < message.len() {
            outbox.parts.push_back(message[sent..].to_vec());
            outbox.queued += message.len() - sent;
            Eventfd::signal(self.wakeup.as_fd());
        }
        Ok(())
    }

    /// As much as fits now.
    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: readable bytes, as many.
        let n = unsafe { libc::send(self.stream.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
        if n >= 0 {
            return Ok(n as usize);
        }
        match io::Error::last_os_error() {
            e if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
            e => Err(e),
        }
    }

    fn flush(&self) -> io::Result<()> {
        let mut outbox = self.outbox.lock();
        while let Some(part) = outbox.parts.front() {
            let sent = self.send(&part[outbox.sent..])?;
            if sent == 0 {
                return Ok(());
            }
            let done = outbox.sent + sent == part.len();
            outbox.queued -= sent;
            outbox.sent += sent;
            if done {
                outbox.parts.pop_front();
                outbox.sent = 0;
            }
        }
        Ok(())
    }

    fn queued(&self) -> usize {
        self.outbox.lock().queued
    }

    /// Waits until there is something to read; sends meanwhile.
    fn wait(&self) -> io::Result<()> {
        loop {
            let queued = self.queued();
            let mut wanted = if queued > OUTBOX_LIMIT { PollFlags::empty() } else { PollFlags::POLLIN };
            if queued > 0 {
                wanted |= PollFlags::POLLOUT;
            }
            let mut fds =
                [PollFd::new(self.stream.as_fd(), wanted), PollFd::new(self.wakeup.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::Error::EINTR) => continue,
                other => other?,
            };
            let (stream, wakeup) =
                (fds[0].revents().unwrap_or(PollFlags::empty()), fds[1].revents().unwrap_or(PollFlags::empty()));
            if wakeup.contains(PollFlags::POLLIN) {
                Eventfd::drain(self.wakeup.as_fd());
            }
            if stream.contains(PollFlags::POLLOUT) {
                self.flush()?;
            }
            // A broken stream is for `read` to report.
            if stream.intersects(PollFlags::POLLIN | PollFlags::POLLERR | PollFlags::POLLHUP) {
                return Ok(());
            }
        }
    }

    /// Reads one message, and returns its length; `None` at the end of the stream.
    fn read_message(&self, room: &mut [u8]) -> io::Result<Option<usize>> {
        let mut stream = &self.stream;
        let n = loop {
            match recv_now(&self.stream, &mut room[..IN_HEADER], 0) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.wait()?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if n == 0 {
            return Ok(None);
        }
        stream.read_exact(&mut room[n..IN_HEADER])?;
        let len = u32::from_ne_bytes(room[..4].try_into().expect("four bytes")) as usize;
        if !(IN_HEADER..=MAX_MESSAGE).contains(&len) {
            return Err(io::Error::new(ErrorKind::InvalidData, "message length out of range"));
        }
        stream.read_exact(&mut room[IN_HEADER..len])?;
        Ok(Some(len))
    }
}

/// Reads what is there.
fn recv_now(stream: &UnixStream, room: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
    let flags = flags | libc::MSG_DONTWAIT;
    // SAFETY: as much room as is told.
    let n = unsafe { libc::recv(stream.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), flags) };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(n as usize)
    }
}

fn readable(stream: &UnixStream) -> bool {
    // A broken stream is for `read` to report.
    recv_now(stream, &mut [0], libc::MSG_PEEK).err().is_none_or(|e| e.kind() != ErrorKind::WouldBlock)
}

/// Serves one connection until the guest closes it, on the calling thread alone.
///
/// # Errors
/// The socket's error, or `InvalidData` when the guest breaks the framing.
pub fn serve<H: Handler>(stream: UnixStream, handler: &H, wait: WaitConfig) -> io::Result<()> {
    let (mut parker, mut buffers) = (Parker::new(wait), Buffers::new()?);
    let connection = Connection::new(stream)?;
    loop {
        parker.spin(|| readable(&connection.stream));
        let Some(len) = connection.read_message(buffers.input.get())? else { return Ok(()) };
        parker.unparked();
        let reply = buffers.handle(len, handler)?;
        connection.reply(&buffers.output.get()[..reply])?;
    }
}

/// One guest: its connections share a handler.
pub struct Session<H: Handler> {
    handler: H,
    pool: WorkerPool<Reader<H>>,
    wait: LiveWait,
    connections: Mutex<Connections>,
    less: Condvar,
    numbers: AtomicUsize,
}

#[derive(Default)]
struct Connections {
    open: usize,
    /// The last one has gone: nobody may join any more.
    closed: bool,
}

impl<H: Handler> Session<H> {
    /// A session without connections.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn new(handler: H, live: &Live) -> io::Result<Arc<Self>> {
        let wait = live.wait.clone();
        let (connections, less, numbers) = (Mutex::default(), Condvar::new(), AtomicUsize::new(0));
        Ok(Arc::new(Session { handler, pool: WorkerPool::new(live.spares.clone())?, wait, connections, less, numbers }))
    }

    /// Serves a connection from now on.
    ///
    /// # Errors
    /// The system has no thread or descriptor left, or the guest has just left.
    pub fn join(self: &Arc<Self>, stream: UnixStream) -> io::Result<()> {
        let mut connections = self.connections.lock();
        if connections.closed {
            return Err(io::Error::other("its guest has just left"));
        }
        let reader = Reader {
            session: self.clone(),
            connection: Arc::new(Connection::new(stream)?),
            parker: Parker::new(&self.wait),
            number: self.numbers.fetch_add(1, Ordering::Relaxed),
        };
        self.pool.start(reader)?;
        connections.open += 1;
        Ok(())
    }

    /// Waits until all connections have gone, calls `closed`, and ends the session: nobody may join any more.
    pub fn wait(&self, closed: impl FnOnce()) {
        let mut connections = self.connections.lock();
        while connections.open > 0 {
            self.less.wait(&mut connections);
        }
        connections.closed = true;
        drop(connections);
        closed();
        self.pool.stop();
        while !self.pool.join(ENDING) {}
        self.handler.reset();
    }
}

/// Owned by the thread that reads the connection.
struct Reader<H: Handler> {
    session: Arc<Session<H>>,
    connection: Arc<Connection>,
    parker: Parker,
    number: usize,
}

impl<H: Handler> Task for Reader<H> {
    fn run(self: Box<Self>, worker: &Worker<Self>) {
        worker.set_number(self.number);
        let (session, connection) = (self.session.clone(), self.connection.clone());
        match self.serve(worker) {
            Ok(TakenOver) => return,
            Err(None) => {}
            Err(Some(e)) => tracing::info!("guest's socket: {e}"),
        }
        let _ = connection.stream.shutdown(Shutdown::Both);
        session.pool.finished();
        session.connections.lock().open -= 1;
        session.less.notify_all();
    }

    fn taken(&mut self) {}
}

/// Another thread reads the connection.
struct TakenOver;

impl<H: Handler> Reader<H> {
    /// # Errors
    /// The connection has ended: by an error, or (`None`) by the guest.
    fn serve(mut self: Box<Self>, worker: &Worker<Self>) -> Result<TakenOver, Option<io::Error>> {
        let (session, connection) = (self.session.clone(), self.connection.clone());
        let mut buffers = Buffers::new()?;
        loop {
            self.parker.spin(|| readable(&connection.stream));
            let len = connection.read_message(buffers.input.get())?.ok_or(None)?;
            self.parker.unparked();
            let head = &buffers.input.get()[..len.min(WRITE_HEAD)];
            if let Some(interrupted) = interrupted_unique(head) {
                session.pool.interrupt(interrupted);
            }
            let waits = waits_for_changes(head);
            worker.lend(self, unique(head));
            let reply = if waits {
                session.pool.wait_apart(worker, || buffers.handle(len, &session.handler))
            } else {
                buffers.handle(len, &session.handler)
            };
            let kept = worker.reclaim();
            let sent = reply.and_then(|len| connection.reply(&buffers.output.get()[..len]));
            match (kept, sent) {
                (Some(reader), sent) => {
                    self = reader;
                    sent?;
                }
                (None, sent) => {
                    if let Err(e) = sent {
                        tracing::info!("guest's socket: {e}");
                        let _ = connection.stream.shutdown(Shutdown::Both);
                    }
                    worker.leave();
                    return Ok(TakenOver);
                }
            }
        }
    }
}
