//! FUSE messages: headers, names, and the offsets of nodeids and handles.
//!
//! Source: the structures of `linux/fuse.h`. Offsets are in bytes from the start of a message.

use tunnelfs_fuse_abi::opcode::{self, *};

/// Bytes of `struct fuse_in_header`.
pub const IN_HEADER: usize = 40;
/// Bytes of `struct fuse_out_header`.
pub const OUT_HEADER: usize = 16;

/// Makes a request's first bytes: `fuse_in_header` with this process's ids, and `body`. `payload` is the number of
/// bytes that follow in the slot.
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

/// Returns the `len` and `error` fields of a `fuse_out_header`.
pub fn parse_reply_header(head: &[u8]) -> (usize, i32) {
    let word = |at: usize| <[u8; 4]>::try_from(&head[at..at + 4]).expect("four bytes");
    (u32::from_ne_bytes(word(0)) as usize, i32::from_ne_bytes(word(4)))
}

/// Returns `true` if the kernel expects a reply to this opcode, `false` for FORGET, BATCH_FORGET and INTERRUPT.
pub fn has_reply(opcode: u32) -> bool {
    !matches!(opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT)
}

/// `fuse_in_header.len`, in bytes.
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

/// Most bytes of a reply that is not data, a list or an extended attribute. Larger than any structure, and PATH_MAX for
/// READLINK.
const SMALL_REPLY: u32 = 4096;

/// Returns the most bytes that a reply may have behind its header, in a slot of `slot_size` bytes.
///
/// For a READ that is the requested size: stock virtiofsd 1.14 reads as much of a file as there is room. For a request
/// without a reply it is 0. It is small for a reply that is a structure: the socket transport lets only small requests
/// pass while another one is in flight. An INTERRUPT must pass, and so must the FLUSH of a killed program.
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

/// Makes a `fuse_out_header`. `len` includes the header; `error` is 0 or a negative errno.
pub fn reply_header(len: usize, error: i32, unique: u64) -> [u8; 16] {
    let mut out = [0; 16];
    out[..4].copy_from_slice(&(len as u32).to_ne_bytes());
    out[4..8].copy_from_slice(&error.to_ne_bytes());
    out[8..].copy_from_slice(&unique.to_ne_bytes());
    out
}

/// Returns the `u32` at a byte offset; 0 if it is not inside `bytes`.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_ne_bytes(b.try_into().expect("four bytes")))
}

/// Offset of `fuse_in_header.nodeid`.
pub const NODE: usize = 16;
/// Offset of the first field behind a request's header: a handle, another nodeid, or flags.
pub const BODY: usize = IN_HEADER;
/// Nodeid of the root.
pub const ROOT: u64 = 1;
/// Bytes of `struct fuse_entry_out`.
pub const ENTRY: usize = 128;
/// Bytes of `struct fuse_open_out`.
pub const OPENED: usize = 16;
/// Bytes of `struct fuse_dirent` before the name.
const DIRENT: usize = 24;
/// Most bytes of a name, without the NUL.
const NAME_MAX: usize = 255;
/// The file type bits of a mode.
pub const TYPE: u32 = libc::S_IFMT;

/// Returns the `u64` at a byte offset; 0 if it is not inside `bytes`.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |b| u64::from_ne_bytes(b.try_into().expect("eight bytes")))
}

/// Writes a `u64` at a byte offset; does nothing if it is not inside `bytes`.
pub fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    if let Some(place) = bytes.get_mut(at..at + 8) {
        place.copy_from_slice(&value.to_ne_bytes());
    }
}

/// Returns the offset of a request's second nodeid; `None` if it has only the one in its header.
pub fn other_node(opcode: u32) -> Option<usize> {
    match opcode {
        LINK | RENAME | RENAME2 => Some(BODY),
        COPY_FILE_RANGE | COPY_FILE_RANGE_64 => Some(BODY + 16),
        _ => None,
    }
}

/// Returns the offsets of a request's handles, each with the offset of its nodeid.
pub fn handles(opcode: u32, head: &[u8]) -> &'static [(usize, usize)] {
    const FIRST: &[(usize, usize)] = &[(BODY, NODE)];
    const THIRD: &[(usize, usize)] = &[(BODY + 8, NODE)];
    match opcode {
        READ | READDIR | READDIRPLUS | WRITE | RELEASE | RELEASEDIR | FSYNC | FSYNCDIR | FLUSH | GETLK | SETLK
        | SETLKW | IOCTL | POLL | FALLOCATE | LSEEK => FIRST,
        // FUSE_GETATTR_FH, FATTR_FH.
        GETATTR | STATX if u32_at(head, BODY) & 1 != 0 => THIRD,
        SETATTR if u32_at(head, BODY) & 1 << 6 != 0 => THIRD,
        COPY_FILE_RANGE | COPY_FILE_RANGE_64 => &[(BODY, NODE), (BODY + 24, BODY + 16)],
        _ => &[],
    }
}

/// Number of bytes between a request's header and its first name.
pub fn fixed_body_len(opcode: u32) -> usize {
    match opcode {
        MKNOD | CREATE | TMPFILE | RENAME2 => 16,
        MKDIR | LINK | RENAME => 8,
        _ => 0,
    }
}

/// Splits a request's names: returns the first one, which ends with a NUL, and the bytes behind it. `None` if it is not
/// a valid name.
pub fn next_name(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|&b| b == 0)?;
    Some((&bytes[..end], &bytes[end + 1..])).filter(|(name, _)| is_valid_name(name))
}

/// Returns `true` for a name that a directory entry may have: not empty, not too long, without `/`, not `.` or `..`.
pub fn is_valid_name(name: &[u8]) -> bool {
    (1..=NAME_MAX).contains(&name.len()) && !name.contains(&b'/') && !matches!(name, b"." | b"..")
}

/// The fields of a `fuse_entry_out` that the guest uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The host's nodeid.
    pub node: u64,
    /// The file's identity.
    pub identity: Identity,
    /// `fuse_attr.nlink`.
    pub links: u32,
}

/// Identity of a file, which does not depend on the nodeid that a host gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// `fuse_attr.ino`.
    pub ino: u64,
    /// The file type bits of its mode.
    pub kind: u32,
    /// The device number of a device node; otherwise 0.
    pub rdev: u32,
}

impl Identity {
    /// Reads the identity from a `struct fuse_attr`.
    pub fn of(attr: &[u8]) -> Identity {
        let kind = u32_at(attr, 60) & TYPE;
        let is_device = matches!(kind, libc::S_IFCHR | libc::S_IFBLK);
        Identity { ino: u64_at(attr, 0), kind, rdev: if is_device { u32_at(attr, 76) } else { 0 } }
    }
}

impl Entry {
    /// Reads a `struct fuse_entry_out`; `None` if the bytes are too few, or if it is a negative entry (nodeid 0).
    pub fn read(bytes: &[u8]) -> Option<Entry> {
        let attr = bytes.get(40..ENTRY)?;
        let node = u64_at(bytes, 0);
        (node != 0).then(|| Entry { node, identity: Identity::of(attr), links: u32_at(attr, 64) })
    }
}

/// Returns the entries of a READDIRPLUS reply that have a nodeid and a valid name: for each its offset, its fields and
/// its name.
pub fn direntplus_entries(reply: &[u8]) -> Vec<(usize, Entry, &[u8])> {
    let (mut found, mut at) = (Vec::new(), 0);
    while let Some(rest) = reply.get(at..).filter(|rest| rest.len() >= ENTRY + DIRENT) {
        let length = u32_at(rest, ENTRY + 16) as usize;
        let Some(name) = rest.get(ENTRY + DIRENT..).and_then(|names| names.get(..length)) else { break };
        if let Some(entry) = Entry::read(rest).filter(|_| is_valid_name(name)) {
            found.push((at, entry, name));
        }
        at += (ENTRY + DIRENT + length).next_multiple_of(8);
    }
    found
}

#[cfg(test)]
pub(crate) mod tests {
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

    /// A READ or WRITE of `size` bytes from `offset` on: the first fields of `fuse_read_in` and `fuse_write_in` are the
    /// same. A WRITE's bytes follow elsewhere.
    pub fn transfer(opcode: u32, node: u64, unique: u64, offset: u64, size: u32) -> Vec<u8> {
        let mut body = [0; 40];
        put_u64(&mut body, 8, offset);
        body[16..20].copy_from_slice(&size.to_ne_bytes());
        request(opcode, node, unique, &body, if opcode == WRITE { size as usize } else { 0 })
    }

    /// A `fuse_entry_out`.
    pub fn entry(node: u64, ino: u64, mode: u32, links: u32) -> Vec<u8> {
        let mut bytes = vec![0; ENTRY];
        put_u64(&mut bytes, 0, node);
        put_u64(&mut bytes, 40, ino);
        bytes[100..104].copy_from_slice(&mode.to_ne_bytes());
        bytes[104..108].copy_from_slice(&links.to_ne_bytes());
        bytes
    }

    pub fn direntplus(node: u64, ino: u64, name: &[u8]) -> Vec<u8> {
        direntplus_of(entry(node, ino, libc::S_IFREG, 1), name)
    }

    /// A `fuse_direntplus` of an entry.
    pub fn direntplus_of(entry: Vec<u8>, name: &[u8]) -> Vec<u8> {
        let mut bytes = entry;
        bytes.extend([0; 16]);
        bytes.extend((name.len() as u32).to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn a_listing_has_its_nodes() {
        let listing =
            [direntplus(0, 9, b"."), direntplus(7, 70, b"a"), direntplus(8, 80, b"bcd"), direntplus(9, 90, b"..")];
        let listing = listing.concat();
        let found: Vec<_> =
            direntplus_entries(&listing).iter().map(|(at, e, name)| (*at, e.node, e.identity.ino, *name)).collect();
        assert_eq!(found, [(160, 7, 70, &b"a"[..]), (320, 8, 80, b"bcd")]);
    }

    #[test]
    fn listings_that_cannot_be_end_where_they_stop_making_sense() {
        let good = direntplus(7, 70, b"a");
        for cut in 0..good.len() - 7 {
            assert!(direntplus_entries(&good[..cut]).is_empty(), "{cut}");
        }
        let mut long = good.clone();
        long[ENTRY + 16..ENTRY + 20].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(direntplus_entries(&long).is_empty());
        for name in [&b"a/b"[..], b"", b"..", &[b'x'; 256]] {
            let listing = [direntplus(7, 70, name), good.clone()].concat();
            assert_eq!(direntplus_entries(&listing).len(), 1);
        }
    }

    #[test]
    fn names_of_requests() {
        assert_eq!(next_name(b"a\0b\0"), Some((&b"a"[..], &b"b\0"[..])));
        for bad in [&b""[..], b"a", b"\0", b"..\0", b"a/b\0"] {
            assert_eq!(next_name(bad), None);
        }
    }
}
