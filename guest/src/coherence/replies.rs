//! Clears the timeouts of replies that a change has overtaken, so that the kernel does not cache their content.

use super::counters::{ChangeCounters, Key};
use crate::fuse::message::{direntplus_entries, next_name, put_u64, request_opcode, u32_at, u64_at, ENTRY, NODE};
use tunnelfs_fuse_abi::opcode::*;

/// `fuse_entry_out`: offsets of the timeouts of the name and of the attributes, then of their nanoseconds.
const ENTRY_VALID: usize = 16;
const ATTR_VALID: usize = 24;
const ENTRY_NSEC: usize = 32;
const ATTR_NSEC: usize = 36;
/// `fuse_attr_out` and `fuse_statx_out`: offsets of the timeout and of its nanoseconds.
const LIMIT: usize = 0;
const LIMIT_NSEC: usize = 8;
/// Offset of `fuse_open_out.open_flags`.
const OPEN_FLAGS: usize = 8;
/// FOPEN_KEEP_CACHE and FOPEN_CACHE_DIR.
const KEEP_CACHE: u32 = 1 << 1;
const CACHE_DIR: u32 = 1 << 3;

/// Returns `true` if the kernel caches something of a reply to this opcode that a change may make stale.
pub fn is_cached(opcode: u32) -> bool {
    matches!(
        opcode,
        LOOKUP
            | GETATTR
            | SETATTR
            | STATX
            | MKNOD
            | MKDIR
            | SYMLINK
            | LINK
            | CREATE
            | TMPFILE
            | OPEN
            | OPENDIR
            | READDIRPLUS
    )
}

/// Clears the timeouts of the names and inodes in a reply that have changed since `stamp`. `head` has the kernel's
/// nodeids, `names` are the request's bytes from its first name on, and `reply` has the host's nodeids. Returns `true`
/// if it has changed the reply, `false` if not.
pub fn expire(counters: &ChangeCounters, stamp: u64, head: &[u8], names: &[u8], reply: &mut [u8]) -> bool {
    let (opcode, node) = (request_opcode(head), u64_at(head, NODE));
    let changed = |key| counters.changed_since(stamp, key);
    match opcode {
        LOOKUP | MKNOD | MKDIR | SYMLINK | LINK | CREATE | TMPFILE => {
            let name = next_name(names).map(|(name, _)| name).filter(|_| opcode != TMPFILE);
            let of_name = name.is_some_and(|name| changed(Key::name(node, name)));
            let of_node = changed(Key::host_node(u64_at(reply, 0)));
            if of_node && matches!(opcode, CREATE | TMPFILE) {
                clear_flags(reply, ENTRY + OPEN_FLAGS, KEEP_CACHE);
            }
            expire_entry(reply, 0, of_name, of_node)
        }
        GETATTR | SETATTR | STATX if changed(Key::node(node)) => {
            put_u64(reply, LIMIT, 0);
            put_u32(reply, LIMIT_NSEC, 0);
            true
        }
        OPEN | OPENDIR if changed(Key::node(node)) => {
            clear_flags(reply, OPEN_FLAGS, if opcode == OPEN { KEEP_CACHE } else { KEEP_CACHE | CACHE_DIR });
            true
        }
        READDIRPLUS => {
            let stale = |(at, entry, name): (usize, crate::fuse::message::Entry, &[u8])| {
                (at, changed(Key::name(node, name)), changed(Key::host_node(entry.node)))
            };
            let stale: Vec<_> = direntplus_entries(reply).into_iter().map(stale).collect();
            stale.into_iter().fold(false, |any, (at, name, node)| expire_entry(reply, at, name, node) || any)
        }
        _ => false,
    }
}

/// Clears the timeouts of one entry. A changed name clears those of the attributes too, as the link count has changed.
/// Returns `true` if it has cleared any.
fn expire_entry(reply: &mut [u8], at: usize, name: bool, node: bool) -> bool {
    if name {
        put_u64(reply, at + ENTRY_VALID, 0);
        put_u32(reply, at + ENTRY_NSEC, 0);
    }
    if name || node {
        put_u64(reply, at + ATTR_VALID, 0);
        put_u32(reply, at + ATTR_NSEC, 0);
    }
    name || node
}

fn clear_flags(reply: &mut [u8], at: usize, flags: u32) {
    let kept = u32_at(reply, at) & !flags;
    put_u32(reply, at, kept);
}

fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    if let Some(place) = bytes.get_mut(at..at + 4) {
        place.copy_from_slice(&value.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::message::request;
    use crate::fuse::message::tests::direntplus_of;

    const PARENT: u64 = 1;

    fn entry(node: u64) -> Vec<u8> {
        let mut bytes = vec![0; ENTRY];
        put_u64(&mut bytes, 0, node);
        put_u64(&mut bytes, ENTRY_VALID, 86_400);
        put_u64(&mut bytes, ATTR_VALID, 86_400);
        put_u32(&mut bytes, ENTRY_NSEC, 5);
        put_u32(&mut bytes, ATTR_NSEC, 5);
        bytes
    }

    fn limits(bytes: &[u8]) -> (bool, bool) {
        let name = u64_at(bytes, ENTRY_VALID) != 0 && u32_at(bytes, ENTRY_NSEC) != 0;
        let attributes = u64_at(bytes, ATTR_VALID) != 0 && u32_at(bytes, ATTR_NSEC) != 0;
        (name, attributes)
    }

    fn ask(opcode: u32, node: u64) -> Vec<u8> {
        request(opcode, node, 1, &[0; 16], 0)
    }

    #[test]
    fn a_changed_name_or_inode_has_no_time_limit() {
        for (note, wanted) in [
            (None, (true, true)),
            (Some(Key::name(PARENT, b"b")), (true, true)),
            (Some(Key::name(PARENT, b"a")), (false, false)),
            (Some(Key::host_node(7)), (true, false)),
        ] {
            let counters = ChangeCounters::new(1);
            let stamp = counters.stamp();
            note.into_iter().for_each(|key| counters.note(key));
            let mut reply = entry(7);
            let changed = expire(&counters, stamp, &ask(LOOKUP, PARENT), b"a\0", &mut reply);
            assert_eq!((limits(&reply), changed), (wanted, wanted != (true, true)), "{note:?}");
            // A request that is sent afterwards.
            let mut reply = entry(7);
            assert!(!expire(&counters, counters.stamp(), &ask(LOOKUP, PARENT), b"a\0", &mut reply));
        }
    }

    #[test]
    fn attributes_and_flags_of_a_changed_inode() {
        let counters = ChangeCounters::new(1);
        let stamp = counters.stamp();
        counters.note(Key::node(7));
        let mut attributes = vec![1; 104];
        assert!(expire(&counters, stamp, &ask(GETATTR, 7), b"", &mut attributes));
        assert_eq!((u64_at(&attributes, LIMIT), u32_at(&attributes, LIMIT_NSEC)), (0, 0));
        assert!(!expire(&counters, stamp, &ask(GETATTR, 8), b"", &mut attributes));
        for (opcode, kept) in [(OPEN, CACHE_DIR), (OPENDIR, 0)] {
            let mut opened = vec![0; 16];
            put_u32(&mut opened, OPEN_FLAGS, KEEP_CACHE | CACHE_DIR | 1);
            assert!(expire(&counters, stamp, &ask(opcode, 7), b"", &mut opened));
            assert_eq!(u32_at(&opened, OPEN_FLAGS), kept | 1);
        }
        counters.note(Key::host_node(9));
        let mut created = [entry(9), vec![0xff; 16]].concat();
        assert!(expire(&counters, stamp, &ask(CREATE, PARENT), b"a\0", &mut created));
        assert_eq!(u32_at(&created, ENTRY + OPEN_FLAGS), !KEEP_CACHE);
    }

    #[test]
    fn each_entry_of_a_listing_is_compared() {
        let counters = ChangeCounters::new(1);
        let stamp = counters.stamp();
        counters.note(Key::name(PARENT, b"b"));
        counters.note(Key::host_node(9));
        let listed = |node: u64, name: &[u8]| direntplus_of(entry(node), name);
        let mut reply = [listed(7, b"a"), listed(8, b"b"), listed(9, b"c")].concat();
        assert!(expire(&counters, stamp, &ask(READDIRPLUS, PARENT), b"", &mut reply));
        let got: Vec<_> = direntplus_entries(&reply).iter().map(|(at, _, _)| limits(&reply[*at..])).collect();
        assert_eq!(got, [(true, true), (false, false), (true, false)]);
    }

    #[test]
    fn replies_that_are_cut_off() {
        let counters = ChangeCounters::new(1);
        counters.note_everything();
        for opcode in 0..54 {
            for len in 0..160 {
                let mut reply = vec![0xff; len];
                expire(&counters, 0, &ask(opcode, 7), b"a", &mut reply);
            }
        }
    }
}
