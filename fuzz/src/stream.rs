//! Any bytes on a connection of the streamed transport: served to their end, or the connection is closed.

use crate::server::SERVER;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use tunnelfs_host::handler::Handler;
use tunnelfs_host::transport::socket;
use tunnelfs_ring::WaitConfig;

/// Fits the sockets' buffers, and so do its answers: nobody reads them.
const MOST: usize = 16 << 10;

/// First byte: raw frames, or messages with honest headers: each its body's length, its opcode, and the body.
pub fn once(bytes: &[u8]) {
    let Some((kind, mut rest)) = bytes.split_first() else { return };
    let mut frames = Vec::new();
    if kind % 2 == 0 {
        frames.extend_from_slice(rest);
    }
    while let (1, [len, opcode, tail @ ..]) = (kind % 2, rest) {
        let (body, next) = tail.split_at(tail.len().min((*len).into()));
        let words = [(40 + body.len()) as u32, (*opcode).into(), 1, 0, 1, 0, 0, 0, 1, 0];
        frames.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        frames.extend_from_slice(body);
        rest = next;
    }
    frames.truncate(MOST);
    let (mut guest, host) = UnixStream::pair().unwrap();
    host.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    guest.write_all(&frames).unwrap();
    guest.shutdown(Shutdown::Write).unwrap();
    let _ = socket::serve(host, &*SERVER, WaitConfig::default());
    SERVER.reset();
}
