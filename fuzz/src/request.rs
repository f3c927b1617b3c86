//! Any bytes as a request, scattered over private head and shared buffers, to the whole server.

use crate::server::SERVER;
use libc::iovec;
use tunnelfs_host::guest_buf::GuestBuf;
use tunnelfs_host::handler::{Handler, Outcome};

/// First byte: where the head ends; second: where the payload is cut in two; third: the reply's room.
pub fn once(bytes: &[u8]) {
    let [head_len, cut, room, message @ ..] = bytes else { return };
    let mut message = message.to_vec();
    if message.len() >= 40 {
        // An honest length half of the time, and a known node.
        if cut % 2 == 0 {
            let len = message.len() as u32;
            message[..4].copy_from_slice(&len.to_ne_bytes());
        }
        message[20..24].fill(0);
    }
    let (head, payload) = message.split_at((*head_len as usize % 105).min(message.len()));
    let (first, second) = payload.split_at((*cut as usize).min(payload.len()));
    let part = |bytes: &[u8]| iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut reply = vec![0u8; *room as usize * 64];
    let input = [part(first), part(second)];
    let output = [iovec { iov_base: reply.as_mut_ptr().cast(), iov_len: reply.len() }];
    // SAFETY: buffers of this function.
    let (payload, out) = unsafe { (GuestBuf::new(&input), GuestBuf::new(&output)) };
    if let Outcome::Reply(answer) = SERVER.handle(head, payload, out, None) {
        assert!(answer.payload_len <= reply.len());
        assert!((-4095..=0).contains(&answer.error));
    }
}
