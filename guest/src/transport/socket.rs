//! Driver side of the streamed baseline. Slots are private memory here, and
//! each payload byte crosses the socket: copied, and counted.

use super::{Completion, Transport};
use crate::fuse::abi::{opcode, request_opcode};
use crate::link::GuestConfig;
use crate::message::{reply_header, request, OUT_HEADER};
use crate::Error;
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use tunnelfs_ring::{Geometry, Region, WaitStats, Waiter, CQE_HEAD_BYTES, JOIN_TOKEN_BYTES, OP_JOIN};

/// A request queue over a stream socket.
pub struct Driver {
    stream: UnixStream,
    memory: Arc<Region>,
    geometry: Geometry,
    /// Slot and reply room by the request's `unique`.
    in_flight: HashMap<[u8; 8], (u32, u32)>,
    /// Slots of requests that get no reply, to be given back.
    unanswered: Vec<u32>,
    waiter: Waiter,
    copied: u64,
}

/// Opens one connection; its slots may be those of one that has gone.
///
/// # Errors
/// [`Error::Connect`] when nobody listens.
pub fn connect(config: &GuestConfig, geometry: Geometry, kept: Option<Arc<Region>>) -> Result<Box<Driver>, Error> {
    let path = &config.socket_path;
    let stream =
        UnixStream::connect(path).map_err(|source| Error::Connect { path: path.display().to_string(), source })?;
    let memory = match kept {
        Some(kept) => kept,
        None => Arc::new(Region::new(geometry.slots as usize * geometry.slot_size as usize, false)?),
    };
    let (in_flight, waiter) = (HashMap::new(), Waiter::new(config.wait));
    Ok(Box::new(Driver { stream, memory, geometry, in_flight, unanswered: Vec::new(), waiter, copied: 0 }))
}

/// Random bytes that the connections of one guest have in common.
pub type Token = [u8; JOIN_TOKEN_BYTES];

/// A new guest's token.
///
/// # Errors
/// [`Error::Io`] when the system has no randomness.
pub fn new_token() -> Result<Token, Error> {
    let mut token = [0; JOIN_TOKEN_BYTES];
    std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut token)).map_err(Error::Io)?;
    Ok(token)
}

impl Driver {
    /// Tells the host to which guest this connection belongs. The first message on it.
    ///
    /// # Errors
    /// [`Error::HostGone`] when the host closes the connection: it serves as many guests as it can.
    pub fn join(mut self: Box<Self>, token: &Token) -> Result<Box<Self>, Error> {
        let message = request(OP_JOIN, 0, 0, token, 0);
        self.stream.write_all(&message).map_err(gone)?;
        // A host that does not know the message answers too; it has one guest only.
        self.stream.read_exact(&mut [0; OUT_HEADER]).map_err(gone)?;
        Ok(self)
    }

    /// Where the slots lie.
    pub fn memory(&self) -> &Arc<Region> {
        &self.memory
    }

    /// With other slots, while nothing is under way.
    pub fn with_memory(self, memory: Arc<Region>) -> Driver {
        Driver { memory, ..self }
    }

    fn readable(stream: &UnixStream) -> bool {
        let mut byte = 0u8;
        // SAFETY: one byte of room; peeking takes nothing off the stream.
        let n =
            unsafe { libc::recv(stream.as_raw_fd(), (&raw mut byte).cast(), 1, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
        // A broken stream is for `read` to report.
        n >= 0 || std::io::Error::last_os_error().kind() != ErrorKind::WouldBlock
    }
}

/// A peer that has gone shows as any of these.
fn gone(e: std::io::Error) -> Error {
    match e.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof => Error::HostGone,
        _ => Error::Io(e),
    }
}

impl Transport for Driver {
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
        (unsafe { self.memory.ptr().add(slot as usize * size) }, size)
    }

    fn submit(&mut self, slot: u32, head: &[u8], payload_len: u32, reply_max: u32) -> Result<bool, Error> {
        // A stream has no back-pressure of its own: both sides writing large messages would
        // wait for each other, so only one payload is under way at a time.
        if !self.in_flight.is_empty() && payload_len.max(reply_max) > 4096 {
            return Ok(false);
        }
        let unique = head[8..16].try_into().map_err(|_| Error::Protocol("header too short"))?;
        self.stream.write_all(head).map_err(gone)?;
        let (ptr, size) = self.slot(slot);
        assert!(payload_len as usize <= size);
        // SAFETY: private memory of this driver, which it alone borrows here.
        let payload = unsafe { std::slice::from_raw_parts(ptr, payload_len as usize) };
        self.stream.write_all(payload).map_err(gone)?;
        self.copied += u64::from(payload_len);
        if matches!(request_opcode(head), opcode::FORGET | opcode::BATCH_FORGET) {
            self.unanswered.push(slot);
        } else {
            self.in_flight.insert(unique, (slot, reply_max));
        }
        Ok(true)
    }

    fn reap(&mut self) -> Result<Option<Completion>, Error> {
        if let Some(slot) = self.unanswered.pop() {
            return Ok(Some(Completion { slot, head: [0; CQE_HEAD_BYTES], head_len: OUT_HEADER, payload_len: 0 }));
        }
        if !Self::readable(&self.stream) {
            return Ok(None);
        }
        let mut head = [0; CQE_HEAD_BYTES];
        self.stream.read_exact(&mut head[..OUT_HEADER]).map_err(gone)?;
        let unique: [u8; 8] = head[8..16].try_into().expect("eight bytes");
        let known = self.in_flight.remove(&unique);
        let (slot, room) = known.ok_or(Error::Protocol("completion of a request that was not made"))?;
        let payload_len = reply_header(&head).0.saturating_sub(OUT_HEADER);
        if payload_len > room as usize {
            return Err(Error::Protocol("reply longer than its room"));
        }
        let (ptr, size) = self.slot(slot);
        assert!(payload_len <= size);
        // SAFETY: private memory of this driver, which it alone borrows here.
        let payload = unsafe { std::slice::from_raw_parts_mut(ptr, payload_len) };
        self.stream.read_exact(payload).map_err(gone)?;
        self.copied += payload_len as u64;
        Ok(Some(Completion { slot, head, head_len: OUT_HEADER, payload_len }))
    }

    fn spin(&mut self, other: &mut dyn FnMut() -> bool) -> bool {
        let (stream, unanswered) = (&self.stream, !self.unanswered.is_empty());
        self.waiter.spin(|| unanswered || Self::readable(stream) || other())
    }

    fn announce_sleep(&mut self) -> bool {
        // The stream itself wakes the sleeper.
        self.unanswered.is_empty()
    }

    fn awake(&mut self) {
        self.waiter.awake();
    }

    fn silence(&self) {
        // What can be read is the host's messages.
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    fn alive(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    fn wait_stats(&self) -> WaitStats {
        self.waiter.stats
    }

    fn copied(&self) -> u64 {
        self.copied
    }
}
