//! The streamed baseline: whole FUSE messages over a UNIX stream socket, as a
//! separate process without shared memory would have them. Payloads are
//! copied into and out of private buffers, and counted.

use crate::server::{Outcome, Server};
use crate::shared::Shared;
use libc::iovec;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use tunnelfs_ring::{WaitConfig, Waiter, MAX_SLOT_SIZE};
use virtiofsd::filesystem::FileSystem;

const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// Most bytes of a message: the largest slot and room for headers.
const MAX_MESSAGE: usize = MAX_SLOT_SIZE as usize + 4096;

/// Serves one connection until the guest closes it.
///
/// # Errors
/// The socket's error, or `InvalidData` when the guest breaks the framing.
pub fn serve<F: FileSystem + Sync>(mut stream: UnixStream, server: &Server<F>, wait: WaitConfig) -> io::Result<()> {
    let mut waiter = Waiter::new(wait);
    let (mut input, mut output) = (Vec::new(), vec![0u8; OUT_HEADER + MAX_SLOT_SIZE as usize]);
    loop {
        waiter.spin(|| readable(&stream));
        if !read_message(&mut stream, &mut input)? {
            return Ok(());
        }
        waiter.awake();
        let head_len = input.len().min(IN_HEADER + 40);
        let rest = [iovec { iov_base: input[head_len..].as_ptr().cast_mut().cast(), iov_len: input.len() - head_len }];
        let room = output.len() - OUT_HEADER;
        let out = [iovec { iov_base: output[OUT_HEADER..].as_mut_ptr().cast(), iov_len: room }];
        // SAFETY: both are private buffers of this function.
        let (payload, out) = unsafe { (Shared::new(&rest), Shared::new(&out)) };
        let Outcome::Reply(reply) = server.handle(&input[..head_len], payload, out, true) else { continue };
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

/// Reads one message; `false` at the end of the stream.
fn read_message(stream: &mut UnixStream, message: &mut Vec<u8>) -> io::Result<bool> {
    message.resize(IN_HEADER, 0);
    match stream.read(message)? {
        0 => return Ok(false),
        n => stream.read_exact(&mut message[n..])?,
    }
    let len = u32::from_ne_bytes(message[..4].try_into().expect("four bytes")) as usize;
    if !(IN_HEADER..=MAX_MESSAGE).contains(&len) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "message length out of range"));
    }
    message.resize(len, 0);
    stream.read_exact(&mut message[IN_HEADER..])?;
    Ok(true)
}
