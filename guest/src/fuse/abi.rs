//! Numbers and structures of `linux/fuse.h`.

/// Bytes of `struct fuse_in_header`.
pub const IN_HEADER: usize = 40;
/// Bytes of `struct fuse_out_header`.
pub const OUT_HEADER: usize = 16;

/// Whether the kernel expects a reply to a request of this opcode.
pub fn has_reply(opcode: u32) -> bool {
    !matches!(opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT)
}

/// `enum fuse_opcode`.
pub mod opcode {
    /// FUSE_LOOKUP.
    pub const LOOKUP: u32 = 1;
    /// FUSE_FORGET: no reply.
    pub const FORGET: u32 = 2;
    /// FUSE_GETATTR.
    pub const GETATTR: u32 = 3;
    /// FUSE_SETATTR.
    pub const SETATTR: u32 = 4;
    /// FUSE_READLINK.
    pub const READLINK: u32 = 5;
    /// FUSE_SYMLINK.
    pub const SYMLINK: u32 = 6;
    /// FUSE_MKNOD.
    pub const MKNOD: u32 = 8;
    /// FUSE_MKDIR.
    pub const MKDIR: u32 = 9;
    /// FUSE_UNLINK.
    pub const UNLINK: u32 = 10;
    /// FUSE_RMDIR.
    pub const RMDIR: u32 = 11;
    /// FUSE_RENAME.
    pub const RENAME: u32 = 12;
    /// FUSE_LINK.
    pub const LINK: u32 = 13;
    /// FUSE_OPEN.
    pub const OPEN: u32 = 14;
    /// FUSE_READ.
    pub const READ: u32 = 15;
    /// FUSE_WRITE.
    pub const WRITE: u32 = 16;
    /// FUSE_STATFS.
    pub const STATFS: u32 = 17;
    /// FUSE_RELEASE.
    pub const RELEASE: u32 = 18;
    /// FUSE_FSYNC.
    pub const FSYNC: u32 = 20;
    /// FUSE_SETXATTR.
    pub const SETXATTR: u32 = 21;
    /// FUSE_GETXATTR.
    pub const GETXATTR: u32 = 22;
    /// FUSE_LISTXATTR.
    pub const LISTXATTR: u32 = 23;
    /// FUSE_FLUSH.
    pub const FLUSH: u32 = 25;
    /// FUSE_INIT.
    pub const INIT: u32 = 26;
    /// FUSE_OPENDIR.
    pub const OPENDIR: u32 = 27;
    /// FUSE_READDIR.
    pub const READDIR: u32 = 28;
    /// FUSE_RELEASEDIR.
    pub const RELEASEDIR: u32 = 29;
    /// FUSE_FSYNCDIR.
    pub const FSYNCDIR: u32 = 30;
    /// FUSE_GETLK.
    pub const GETLK: u32 = 31;
    /// FUSE_SETLK.
    pub const SETLK: u32 = 32;
    /// FUSE_SETLKW.
    pub const SETLKW: u32 = 33;
    /// FUSE_ACCESS.
    pub const ACCESS: u32 = 34;
    /// FUSE_CREATE.
    pub const CREATE: u32 = 35;
    /// FUSE_INTERRUPT: no reply.
    pub const INTERRUPT: u32 = 36;
    /// FUSE_BMAP.
    pub const BMAP: u32 = 37;
    /// FUSE_DESTROY.
    pub const DESTROY: u32 = 38;
    /// FUSE_IOCTL.
    pub const IOCTL: u32 = 39;
    /// FUSE_POLL.
    pub const POLL: u32 = 40;
    /// FUSE_BATCH_FORGET: no reply.
    pub const BATCH_FORGET: u32 = 42;
    /// FUSE_FALLOCATE.
    pub const FALLOCATE: u32 = 43;
    /// FUSE_READDIRPLUS.
    pub const READDIRPLUS: u32 = 44;
    /// FUSE_RENAME2.
    pub const RENAME2: u32 = 45;
    /// FUSE_LSEEK.
    pub const LSEEK: u32 = 46;
    /// FUSE_COPY_FILE_RANGE.
    pub const COPY_FILE_RANGE: u32 = 47;
    /// FUSE_SYNCFS.
    pub const SYNCFS: u32 = 50;
    /// FUSE_TMPFILE.
    pub const TMPFILE: u32 = 51;
    /// FUSE_STATX.
    pub const STATX: u32 = 52;
    /// FUSE_COPY_FILE_RANGE_64.
    pub const COPY_FILE_RANGE_64: u32 = 53;

    const NAMES: [&str; 54] = [
        "",
        "LOOKUP",
        "FORGET",
        "GETATTR",
        "SETATTR",
        "READLINK",
        "SYMLINK",
        "",
        "MKNOD",
        "MKDIR",
        "UNLINK",
        "RMDIR",
        "RENAME",
        "LINK",
        "OPEN",
        "READ",
        "WRITE",
        "STATFS",
        "RELEASE",
        "",
        "FSYNC",
        "SETXATTR",
        "GETXATTR",
        "LISTXATTR",
        "REMOVEXATTR",
        "FLUSH",
        "INIT",
        "OPENDIR",
        "READDIR",
        "RELEASEDIR",
        "FSYNCDIR",
        "GETLK",
        "SETLK",
        "SETLKW",
        "ACCESS",
        "CREATE",
        "INTERRUPT",
        "BMAP",
        "DESTROY",
        "IOCTL",
        "POLL",
        "NOTIFY_REPLY",
        "BATCH_FORGET",
        "FALLOCATE",
        "READDIRPLUS",
        "RENAME2",
        "LSEEK",
        "COPY_FILE_RANGE",
        "SETUPMAPPING",
        "REMOVEMAPPING",
        "SYNCFS",
        "TMPFILE",
        "STATX",
        "COPY_FILE_RANGE_64",
    ];

    /// The operation's name, for people.
    pub fn name(opcode: u32) -> &'static str {
        NAMES.get(opcode as usize).filter(|n| !n.is_empty()).unwrap_or(&"?")
    }
}

/// Bits of INIT's `flags` (low word) and `flags2` (high word).
pub mod init_flag {
    /// FUSE_ATOMIC_O_TRUNC: OPEN truncates.
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    /// FUSE_POSIX_LOCKS: the host has record locks.
    pub const POSIX_LOCKS: u64 = 1 << 1;
    /// FUSE_FLOCK_LOCKS: the host has flock(2)'s locks.
    pub const FLOCK_LOCKS: u64 = 1 << 10;
    /// FUSE_WRITEBACK_CACHE.
    pub const WRITEBACK_CACHE: u64 = 1 << 16;
    /// FUSE_MAX_PAGES: `max_pages` counts.
    pub const MAX_PAGES: u64 = 1 << 22;
    /// FUSE_MAP_ALIGNMENT: DAX.
    pub const MAP_ALIGNMENT: u64 = 1 << 26;
    /// FUSE_INIT_EXT: `flags2` counts.
    pub const INIT_EXT: u64 = 1 << 30;
    /// FUSE_SECURITY_CTX: extensions in requests.
    pub const SECURITY_CTX: u64 = 1 << 32;
    /// FUSE_HAS_INODE_DAX.
    pub const HAS_INODE_DAX: u64 = 1 << 33;
    /// FUSE_PASSTHROUGH: files of the guest's own kernel.
    pub const PASSTHROUGH: u64 = 1 << 37;
    /// FUSE_HAS_RESEND.
    pub const HAS_RESEND: u64 = 1 << 39;
    /// FUSE_ALLOW_IDMAP.
    pub const ALLOW_IDMAP: u64 = 1 << 40;
    /// FUSE_OVER_IO_URING.
    pub const OVER_IO_URING: u64 = 1 << 41;
    /// FUSE_REQUEST_TIMEOUT.
    pub const REQUEST_TIMEOUT: u64 = 1 << 42;
}

/// A field of a request's header: `len`, `opcode`, `unique`.
pub fn request_len(head: &[u8]) -> usize {
    u32_at(head, 0) as usize
}

/// `fuse_in_header.opcode`.
pub fn request_opcode(head: &[u8]) -> u32 {
    u32_at(head, 4)
}

/// `fuse_in_header.unique`.
pub fn request_unique(head: &[u8]) -> u64 {
    u64::from(u32_at(head, 8)) | u64::from(u32_at(head, 12)) << 32
}

/// Bytes that every reply fits which is no data, list or extended attribute: more than any structure, as much as PATH_MAX.
const SMALL_REPLY: u32 = 4096;

/// Most bytes that a reply may have behind its header, in a slot of `slot_size` bytes.
///
/// Not more than was asked for: stock virtiofsd 1.14 reads as much of a file as there is room. None for a request without
/// a reply, and little where the reply is a structure: the socket lets only small ones pass one that is under way. An
/// INTERRUPT must, and so must a killed program's FLUSH.
pub fn reply_capacity(head: &[u8], slot_size: usize) -> u32 {
    let slot_size = slot_size as u32;
    match request_opcode(head) {
        // `fuse_read_in.size`
        opcode::READ | opcode::READDIR | opcode::READDIRPLUS => u32_at(head, IN_HEADER + 16).min(slot_size),
        opcode if !has_reply(opcode) => 0,
        opcode::GETXATTR | opcode::LISTXATTR | opcode::IOCTL => slot_size,
        // A structure, or a link's target.
        1..=opcode::COPY_FILE_RANGE_64 => slot_size.min(SMALL_REPLY),
        _ => slot_size,
    }
}

/// `fuse_out_header`.
pub fn reply_header(len: usize, error: i32, unique: u64) -> [u8; 16] {
    let mut out = [0; 16];
    out[..4].copy_from_slice(&(len as u32).to_ne_bytes());
    out[4..8].copy_from_slice(&error.to_ne_bytes());
    out[8..].copy_from_slice(&unique.to_ne_bytes());
    out
}

/// The `u32` at a byte offset; 0 beyond the end.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_ne_bytes(b.try_into().expect("four bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_has_no_more_room_than_was_asked_for() {
        let mut head = [0; 80];
        head[4..8].copy_from_slice(&opcode::READ.to_ne_bytes());
        head[56..60].copy_from_slice(&4096u32.to_ne_bytes());
        assert_eq!((reply_capacity(&head, 1 << 20), reply_capacity(&head, 1024)), (4096, 1024));
        head[4..8].copy_from_slice(&opcode::INIT.to_ne_bytes());
        assert_eq!(reply_capacity(&head, 1 << 20), SMALL_REPLY);
        head[4..8].copy_from_slice(&opcode::GETXATTR.to_ne_bytes());
        assert_eq!(reply_capacity(&head, 1 << 20), 1 << 20);
        head[4..8].copy_from_slice(&0x5446_0005u32.to_ne_bytes());
        assert_eq!(reply_capacity(&head, 1 << 20), 1 << 20);
        assert_eq!(reply_capacity(&head[..40], 100), 100);
        for silent in [opcode::INTERRUPT, opcode::FORGET, opcode::BATCH_FORGET] {
            head[4..8].copy_from_slice(&silent.to_ne_bytes());
            assert_eq!(reply_capacity(&head, 1 << 20), 0);
        }
    }
}
