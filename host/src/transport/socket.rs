//! The streamed baseline: whole FUSE messages over a UNIX stream socket, as a
//! separate process without shared memory would have them. Payloads are
//! copied into and out of private buffers, and counted.

use crate::server::{Caller, Outcome, Server};
use crate::shared::Shared;
use libc::iovec;
use memmap2::MmapMut;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use tunnelfs_ring::{Parker, WaitConfig, MAX_SLOT_SIZE, PAGE};
use virtiofsd::filesystem::FileSystem;

const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// Header and structure of WRITE, whose data follows.
const WRITE_HEAD: usize = IN_HEADER + 40;
/// Most bytes of a message: the largest slot and room for headers.
const MAX_MESSAGE: usize = MAX_SLOT_SIZE as usize + 4096;

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

/// Serves one connection until the guest closes it.
///
/// # Errors
/// The socket's error, or `InvalidData` when the guest breaks the framing.
pub fn serve<F: FileSystem + Sync>(mut stream: UnixStream, server: &Server<F>, wait: WaitConfig) -> io::Result<()> {
    let mut parker = Parker::new(wait);
    let (mut input, mut output) = (Buffer::new(WRITE_HEAD)?, Buffer::new(OUT_HEADER)?);
    let output = output.get();
    loop {
        parker.spin(|| readable(&stream));
        let Some(input) = read_message(&mut stream, input.get())? else { return Ok(()) };
        parker.unparked();
        let head_len = input.len().min(WRITE_HEAD);
        let rest = [iovec { iov_base: input[head_len..].as_mut_ptr().cast(), iov_len: input.len() - head_len }];
        let room = MAX_SLOT_SIZE as usize;
        let out = [iovec { iov_base: output[OUT_HEADER..].as_mut_ptr().cast(), iov_len: room }];
        // SAFETY: both are private buffers of this function.
        let (payload, out) = unsafe { (Shared::new(&rest), Shared::new(&out)) };
        let Outcome::Reply(reply) = server.handle(&input[..head_len], payload, out, Caller::Patient) else { continue };
        out.write(0, reply.fixed())?;
        let len = OUT_HEADER + reply.fixed().len() + reply.in_place;
        output[..4].copy_from_slice(&(len as u32).to_ne_bytes());
        output[4..8].copy_from_slice(&reply.error.to_ne_bytes());
        output[8..16].copy_from_slice(&input[8..16]);
        // The kernel copied the request in and copies the reply out: two trips that shared memory saves.
        server.copied.fetch_add((input.len() - head_len + reply.in_place) as u64, Ordering::Relaxed);
        stream.write_all(&output[..len])?;
    }
}

fn readable(stream: &UnixStream) -> bool {
    let mut byte = 0u8;
    // SAFETY: one byte of room; peeking takes nothing off the stream.
    let n = unsafe { libc::recv(stream.as_raw_fd(), (&raw mut byte).cast(), 1, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
    // A broken stream is for `read` to report.
    n >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::WouldBlock
}

/// Reads one message; `None` at the end of the stream.
fn read_message<'a>(stream: &mut UnixStream, room: &'a mut [u8]) -> io::Result<Option<&'a mut [u8]>> {
    match stream.read(&mut room[..IN_HEADER])? {
        0 => return Ok(None),
        n => stream.read_exact(&mut room[n..IN_HEADER])?,
    }
    let len = u32::from_ne_bytes(room[..4].try_into().expect("four bytes")) as usize;
    if !(IN_HEADER..=MAX_MESSAGE).contains(&len) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "message length out of range"));
    }
    stream.read_exact(&mut room[IN_HEADER..len])?;
    Ok(Some(&mut room[..len]))
}
