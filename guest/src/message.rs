//! FUSE headers, as `linux/fuse.h` has them.

/// Bytes of `struct fuse_in_header`.
pub const IN_HEADER: usize = 40;
/// Bytes of `struct fuse_out_header`.
pub const OUT_HEADER: usize = 16;

/// A request's first bytes: `fuse_in_header` (as the calling user) and `body`;
/// `payload` more bytes follow elsewhere.
pub fn request(opcode: u32, nodeid: u64, unique: u64, body: &[u8], payload: usize) -> Vec<u8> {
    let mut head = Vec::with_capacity(IN_HEADER + body.len());
    head.extend_from_slice(&((IN_HEADER + body.len() + payload) as u32).to_ne_bytes());
    head.extend_from_slice(&opcode.to_ne_bytes());
    head.extend_from_slice(&unique.to_ne_bytes());
    head.extend_from_slice(&nodeid.to_ne_bytes());
    for id in [nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw(), std::process::id(), 0] {
        head.extend_from_slice(&id.to_ne_bytes());
    }
    head.extend_from_slice(body);
    head
}

/// A reply's `len` and `error` fields.
pub fn reply_header(head: &[u8]) -> (usize, i32) {
    let word = |at: usize| <[u8; 4]>::try_from(&head[at..at + 4]).expect("four bytes");
    (u32::from_ne_bytes(word(0)) as usize, i32::from_ne_bytes(word(4)))
}
