//! The driver side of the baseline over stream sockets. Slots are private memory here. Each payload byte is copied
//! through the socket, and counted.

use super::{Completion, Transport};
use crate::config::GuestConfig;
use crate::error::Error;
use crate::fuse::message::{has_reply, parse_reply_header, request, request_opcode, OUT_HEADER};
use crate::timeout::Opened;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use tunnelfs_fuse_abi::control::{JOIN_TOKEN_BYTES, OP_JOIN};
use tunnelfs_ring::{Counters, Geometry, LiveWait, Parker, Region, CQE_INLINE_BYTES};

/// A request queue over a stream socket.
pub struct SocketTransport {
    stream: UnixStream,
    memory: Arc<Region>,
    geometry: Geometry,
    /// By the request's `unique`: its slot, and the most reply bytes.
    in_flight: HashMap<[u8; 8], (u32, u32)>,
    /// Slots of sent requests that get no reply: their completions are due.
    unanswered: Vec<u32>,
    /// The reply that is being read.
    reading: Reading,
    /// Replies that have been read, but not been taken.
    replies: VecDeque<Completion>,
    parker: Parker,
    copied: u64,
}

/// A reply that has been read in part. `payload` is set once the header is complete.
#[derive(Default)]
struct Reading {
    head: [u8; OUT_HEADER],
    head_len: usize,
    payload: Option<Payload>,
}

/// A reply's payload, of which `got` bytes have been read into the slot.
#[derive(Clone, Copy)]
struct Payload {
    slot: u32,
    len: usize,
    got: usize,
}

/// Opens one connection. `retained` is the slot memory of an earlier connection; `None`: new memory.
///
/// # Errors
/// [`Error::Connect`] if no host listens; otherwise as [`SocketTransport::new`].
pub(crate) fn connect(
    config: &GuestConfig,
    geometry: Geometry,
    retained: Option<Arc<Region>>,
    opened: &Opened,
) -> Result<Box<SocketTransport>, Error> {
    let stream = opened.connect(&config.socket_path)?;
    Ok(Box::new(SocketTransport::new(stream, &config.wait, geometry, retained)?))
}

/// Random bytes that all connections of one guest send, so that the host knows that they belong together.
pub type Token = [u8; JOIN_TOKEN_BYTES];

/// Makes a token for a new guest.
///
/// # Errors
/// [`Error::Io`] if `/dev/urandom` cannot be read.
pub fn new_token() -> Result<Token, Error> {
    let mut token = [0; JOIN_TOKEN_BYTES];
    std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut token)).map_err(Error::Io)?;
    Ok(token)
}

impl SocketTransport {
    /// Makes a queue over a connection. `retained` is the slot memory of an earlier connection; `None`: new memory.
    ///
    /// # Errors
    /// [`Error::Ring`] if there is no memory.
    pub fn new(
        stream: UnixStream,
        wait: impl Into<LiveWait>,
        geometry: Geometry,
        retained: Option<Arc<Region>>,
    ) -> Result<SocketTransport, Error> {
        let memory = match retained {
            Some(retained) => retained,
            None => Arc::new(Region::new(geometry.slots as usize * geometry.slot_size as usize, false)?),
        };
        Ok(SocketTransport {
            stream,
            memory,
            geometry,
            in_flight: HashMap::new(),
            unanswered: Vec::new(),
            reading: Reading::default(),
            replies: VecDeque::new(),
            parker: Parker::new(wait),
            copied: 0,
        })
    }

    /// Sends the host the guest's token: the first message on a connection.
    ///
    /// # Errors
    /// [`Error::HostGone`] if the host closes the connection, as it does if it serves as many guests as it can.
    pub fn join(mut self: Box<Self>, token: &Token) -> Result<Box<Self>, Error> {
        let message = request(OP_JOIN, 0, 0, token, 0);
        self.stream.write_all(&message).map_err(gone)?;
        // A host that does not know OP_JOIN replies too. It serves only one guest.
        self.stream.read_exact(&mut [0; OUT_HEADER]).map_err(gone)?;
        Ok(self)
    }

    /// Returns the memory of the slots.
    pub fn memory(&self) -> &Arc<Region> {
        &self.memory
    }

    /// Replaces the memory of the slots. No request may be in flight.
    pub fn with_memory(self, memory: Arc<Region>) -> SocketTransport {
        SocketTransport { memory, ..self }
    }

    /// Returns `true` if the stream is readable or broken, `false` if a read would block.
    fn readable(stream: &UnixStream) -> bool {
        let mut byte = 0u8;
        // SAFETY: one byte of room; peeking takes nothing off the stream.
        let n =
            unsafe { libc::recv(stream.as_raw_fd(), (&raw mut byte).cast(), 1, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
        // The next read reports a broken stream.
        n >= 0 || io::Error::last_os_error().kind() != ErrorKind::WouldBlock
    }
}

/// Turns the errors of a closed connection into [`Error::HostGone`].
fn gone(e: io::Error) -> Error {
    match e.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof => Error::HostGone,
        _ => Error::Io(e),
    }
}

/// Returns the number of bytes that recv(2) or send(2) has moved; `None` if it would block.
fn moved(n: isize) -> Result<Option<usize>, Error> {
    match usize::try_from(n) {
        Ok(n) => Ok(Some(n)),
        Err(_) => match io::Error::last_os_error() {
            e if e.kind() == ErrorKind::WouldBlock => Ok(None),
            e if e.kind() == ErrorKind::Interrupted => Ok(Some(0)),
            e => Err(gone(e)),
        },
    }
}

impl SocketTransport {
    /// Sends bytes. Reads replies while the socket is full: a host that blocks on its own write does not read, so two
    /// sides that only write would deadlock.
    ///
    /// # Safety
    /// `len` bytes at `from` must be readable.
    unsafe fn send(&mut self, from: *const u8, len: usize) -> Result<(), Error> {
        let mut sent = 0;
        while sent < len {
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: by this function's contract.
            let n = unsafe { libc::send(self.stream.as_raw_fd(), from.add(sent).cast(), len - sent, flags) };
            match moved(n)? {
                Some(n) => sent += n,
                None => self.read_while_full()?,
            }
        }
        Ok(())
    }

    /// Reads the replies that are there, and waits until the socket is writable or readable again.
    fn read_while_full(&mut self) -> Result<(), Error> {
        self.read_replies()?;
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN | PollFlags::POLLOUT)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(e) => Err(Error::Io(e.into())),
        }
    }

    /// Reads the replies that are there.
    fn read_replies(&mut self) -> Result<(), Error> {
        while self.read_more()? {}
        Ok(())
    }

    /// Reads once. Returns `false` if a read would block.
    fn read_more(&mut self) -> Result<bool, Error> {
        let Some(payload) = self.reading.payload else { return self.read_head() };
        let (at, size) = self.slot(payload.slot);
        assert!(payload.got < payload.len && payload.len <= size);
        // SAFETY: inside the slot, as just asserted.
        let Some(n) = (unsafe { self.receive(at.add(payload.got), payload.len - payload.got)? }) else {
            return Ok(false);
        };
        let got = payload.got + n;
        self.copied += n as u64;
        if got == payload.len {
            self.complete(payload.slot, payload.len);
        } else {
            self.reading.payload = Some(Payload { got, ..payload });
        }
        Ok(true)
    }

    /// Reads the rest of a reply's header, and checks a complete one. Returns `false` if a read would block.
    fn read_head(&mut self) -> Result<bool, Error> {
        let from = self.reading.head_len;
        let at = self.reading.head[from..].as_mut_ptr();
        // SAFETY: the rest of the header.
        let Some(n) = (unsafe { self.receive(at, OUT_HEADER - from)? }) else { return Ok(false) };
        self.reading.head_len += n;
        if self.reading.head_len < OUT_HEADER {
            return Ok(true);
        }
        let head = self.reading.head;
        let unique: [u8; 8] = head[8..16].try_into().expect("eight bytes");
        let known = self.in_flight.remove(&unique);
        let (slot, room) = known.ok_or(Error::Protocol("completion of a request that was not made"))?;
        let len = parse_reply_header(&head).0.saturating_sub(OUT_HEADER);
        if len > room as usize {
            return Err(Error::Protocol("reply longer than its room"));
        }
        if len == 0 {
            self.complete(slot, 0);
        } else {
            self.reading.payload = Some(Payload { slot, len, got: 0 });
        }
        Ok(true)
    }

    fn complete(&mut self, slot: u32, payload_len: usize) {
        let mut head = [0; CQE_INLINE_BYTES];
        head[..OUT_HEADER].copy_from_slice(&self.reading.head);
        self.reading = Reading::default();
        self.replies.push_back(Completion { slot, head, head_len: OUT_HEADER, payload_len });
    }

    /// Receives up to `len` bytes; `None` if a read would block.
    ///
    /// # Safety
    /// `len` bytes at `to` must be writable.
    unsafe fn receive(&self, to: *mut u8, len: usize) -> Result<Option<usize>, Error> {
        // SAFETY: by this function's contract.
        let n = unsafe { libc::recv(self.stream.as_raw_fd(), to.cast(), len, libc::MSG_DONTWAIT) };
        if n == 0 {
            return Err(Error::HostGone);
        }
        moved(n)
    }

    /// Returns `true` if a completion is due that needs no further read.
    fn has_reply(&self) -> bool {
        !self.unanswered.is_empty() || !self.replies.is_empty()
    }
}

impl Transport for SocketTransport {
    fn name(&self) -> &'static str {
        "socket"
    }

    fn slots(&self) -> u32 {
        self.geometry.slots
    }

    fn slot(&self, slot: u32) -> (*mut u8, usize) {
        assert!(slot < self.geometry.slots, "slot {slot} of {}", self.geometry.slots);
        let size = self.geometry.slot_size as usize;
        // SAFETY: the slot's number was just checked.
        (unsafe { self.memory.as_ptr().add(slot as usize * size) }, size)
    }

    fn submit(&mut self, slot: u32, head: &[u8], payload_len: u32, reply_max: u32) -> Result<bool, Error> {
        // Limit large payloads to one in flight: a host that writes a large reply before it reads on then holds at most
        // that one.
        if !self.in_flight.is_empty() && payload_len.max(reply_max) > 4096 {
            return Ok(false);
        }
        let unique = head.get(8..16).and_then(|unique| unique.try_into().ok());
        let unique = unique.ok_or(Error::Protocol("header too short"))?;
        let (ptr, size) = self.slot(slot);
        assert!(payload_len as usize <= size && reply_max as usize <= size);
        let answered = has_reply(request_opcode(head));
        if answered {
            self.in_flight.insert(unique, (slot, reply_max));
        }
        // SAFETY: the header is borrowed here, and the payload is in its slot.
        unsafe {
            self.send(head.as_ptr(), head.len())?;
            self.send(ptr, payload_len as usize)?;
        }
        self.copied += u64::from(payload_len);
        if !answered {
            self.unanswered.push(slot);
        }
        Ok(true)
    }

    fn reap(&mut self) -> Result<Option<Completion>, Error> {
        if let Some(slot) = self.unanswered.pop() {
            return Ok(Some(Completion { slot, head: [0; CQE_INLINE_BYTES], head_len: OUT_HEADER, payload_len: 0 }));
        }
        while self.replies.is_empty() && self.read_more()? {}
        Ok(self.replies.pop_front())
    }

    fn spin(&mut self, other: &mut dyn FnMut() -> bool) -> bool {
        let (stream, has_reply) = (&self.stream, self.has_reply());
        self.parker.spin(|| has_reply || Self::readable(stream) || other())
    }

    fn announce_sleep(&mut self) -> bool {
        // The socket itself is the call descriptor, so there is nothing to ask for.
        !self.has_reply()
    }

    fn awake(&mut self) {
        self.parker.unparked();
    }

    fn drain_call(&self) {
        // The bytes in this socket are replies: `reap` reads them.
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    fn hangup_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    fn wait_counters(&self) -> Counters {
        self.parker.counters
    }

    fn copied(&self) -> u64 {
        self.copied
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::message::request;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;
    use std::time::Duration;
    use tunnelfs_fuse_abi::opcode;
    use tunnelfs_settings::Settings;

    const SIZE: usize = 4096;

    /// A driver of `slots` slots, and the host's end of its stream.
    fn pair(slots: u32) -> (Box<SocketTransport>, UnixStream) {
        let dir = tempfile::tempdir().unwrap();
        let mut config = GuestConfig::from(&Settings::default());
        config.socket_path = dir.path().join("socket");
        let listener = UnixListener::bind(&config.socket_path).unwrap();
        let geometry = Geometry { entries: slots, slots, slot_size: 8192 };
        let driver = connect(&config, geometry, None, &Opened::default()).unwrap();
        (driver, listener.accept().unwrap().0)
    }

    fn reap(driver: &mut SocketTransport) -> Completion {
        loop {
            if let Some(done) = driver.reap().unwrap() {
                return done;
            }
            driver.wait().unwrap();
        }
    }

    /// A host that reads a request, answers it and waits until all of the answer is taken, as simple ones do.
    fn echo(mut stream: UnixStream, count: u32) {
        let mut message = [0; 40 + SIZE];
        for _ in 0..count {
            stream.read_exact(&mut message).unwrap();
            let mut reply = ((OUT_HEADER + SIZE) as u32).to_ne_bytes().to_vec();
            reply.extend([0; 4]);
            reply.extend(&message[8..16]);
            reply.extend(&message[40..]);
            stream.write_all(&reply).unwrap();
        }
    }

    #[test]
    fn two_sides_that_write_do_not_wait_for_each_other() {
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            // More than two socket buffers hold.
            let count = 1024;
            let (mut driver, stream) = pair(count);
            let host = std::thread::spawn(move || echo(stream, count));
            for slot in 0..count {
                let (at, _) = driver.slot(slot);
                // SAFETY: a slot has that many bytes.
                unsafe { at.write_bytes(slot as u8, SIZE) };
                let head = request(opcode::LOOKUP, 1, u64::from(slot), &[], SIZE);
                assert!(driver.submit(slot, &head, SIZE as u32, SIZE as u32).unwrap());
            }
            for _ in 0..count {
                let done = reap(&mut driver);
                assert_eq!((done.error(), done.payload_len), (0, SIZE));
                let (at, _) = driver.slot(done.slot);
                // SAFETY: the slot is ours again.
                assert!((0..SIZE).all(|i| unsafe { at.add(i).read() } == done.slot as u8));
            }
            host.join().unwrap();
            tell.send(()).unwrap();
        });
        told.recv_timeout(Duration::from_secs(60)).expect("no deadlock");
    }

    #[test]
    fn replies_are_read_while_the_host_takes_nothing() {
        let (mut driver, mut stream) = pair(2);
        let head = request(opcode::LOOKUP, 1, 7, &[], 0);
        assert!(driver.submit(0, &head, 0, 100).unwrap());
        let mut reply = (OUT_HEADER as u32).to_ne_bytes().to_vec();
        reply.extend([0; 4]);
        reply.extend(7u64.to_ne_bytes());
        stream.write_all(&reply).unwrap();
        driver.read_while_full().unwrap();
        assert_eq!(driver.replies.len(), 1);
    }

    #[test]
    fn half_a_reply_holds_nobody_up() {
        let (mut driver, mut stream) = pair(2);
        let head = request(opcode::LOOKUP, 1, 7, &[], 0);
        assert!(driver.submit(0, &head, 0, 100).unwrap());
        let mut reply = 20u32.to_ne_bytes().to_vec();
        reply.extend([0; 4]);
        reply.extend(7u64.to_ne_bytes());
        reply.extend(b"data");
        let last = reply.pop().unwrap();
        for byte in reply {
            stream.write_all(&[byte]).unwrap();
            assert!(driver.reap().unwrap().is_none());
        }
        stream.write_all(&[last]).unwrap();
        assert_eq!(reap(&mut driver).payload_len, 4);
        drop(stream);
        assert!(matches!(driver.reap(), Err(Error::HostGone)));
    }

    #[test]
    fn what_was_answered_before_the_end_is_delivered() {
        let (mut driver, mut stream) = pair(2);
        let head = request(opcode::LOOKUP, 1, 7, &[], 0);
        assert!(driver.submit(0, &head, 0, 100).unwrap());
        let mut reply = 16u32.to_ne_bytes().to_vec();
        reply.extend((-libc::ENOENT).to_ne_bytes());
        reply.extend(7u64.to_ne_bytes());
        stream.write_all(&reply).unwrap();
        drop(stream);
        let _ = driver.read_replies();
        assert_eq!(driver.reap().unwrap().unwrap().error(), -libc::ENOENT);
        assert!(matches!(driver.submit(1, &head, 0, 100), Err(Error::HostGone)));
    }
}
