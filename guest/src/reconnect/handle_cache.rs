//! One queue's cache of translated handles. After a reconnect most READs and WRITEs find the host's numbers here,
//! without the lock of the tables and without their hashing.
//!
//! An entry is valid for one host only, and as long as that host lives: the kernel holds an inode while it has a handle
//! of it open, and a handle's number is not reused (`Translator::opened`).

use crate::fuse::message::{put_u64, request_opcode, u64_at, BODY, NODE};
use tunnelfs_fuse_abi::opcode::{READ, RELEASE, WRITE};
use tunnelfs_fuse_abi::NO_HANDLE;

/// Number of entries, direct-mapped; 8 KiB per queue.
const ENTRIES: usize = 256;

/// The kernel's and the host's numbers of one open handle.
#[derive(Clone, Copy, Default)]
struct Entry {
    node: u64,
    handle: u64,
    host_node: u64,
    host_handle: u64,
}

/// The cache.
pub struct HandleCache {
    /// Id of the host that the entries belong to.
    time: u64,
    entries: Box<[Entry; ENTRIES]>,
}

impl Default for HandleCache {
    fn default() -> Self {
        HandleCache { time: 0, entries: Box::new([Entry::default(); ENTRIES]) }
    }
}

/// Returns `true` for a READ or WRITE: these have no numbers but one nodeid and one handle. Without a handle the kernel
/// may forget the inode at any time.
fn is_cached(head: &[u8]) -> bool {
    matches!(request_opcode(head), READ | WRITE) && !matches!(u64_at(head, BODY), 0 | NO_HANDLE)
}

fn index(node: u64, handle: u64) -> usize {
    // Fibonacci hashing: the upper bits of the product.
    ((node ^ handle.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as usize % ENTRIES
}

impl HandleCache {
    /// Replaces the numbers in a READ or WRITE with those of the host `time`. Returns `false`, and changes nothing, if
    /// they are not cached or it is another request.
    pub fn translate(&self, time: u64, head: &mut [u8]) -> bool {
        if time != self.time || !is_cached(head) {
            return false;
        }
        let (node, handle) = (u64_at(head, NODE), u64_at(head, BODY));
        let entry = &self.entries[index(node, handle)];
        // No inode has the nodeid 0, so an empty entry never matches.
        let known = node != 0 && (entry.node, entry.handle) == (node, handle);
        if known {
            put_u64(head, NODE, entry.host_node);
            put_u64(head, BODY, entry.host_handle);
        }
        known
    }

    /// Caches the numbers of a READ or WRITE: `before` has the kernel's, `after` those of the host `time`.
    pub fn note(&mut self, time: u64, before: &[u8], after: &[u8]) {
        if !is_cached(before) {
            return;
        }
        if time != self.time {
            self.entries.fill(Entry::default());
            self.time = time;
        }
        let (node, handle) = (u64_at(before, NODE), u64_at(before, BODY));
        let (host_node, host_handle) = (u64_at(after, NODE), u64_at(after, BODY));
        self.entries[index(node, handle)] = Entry { node, handle, host_node, host_handle };
    }

    /// Removes the handle that a RELEASE closes.
    pub fn release(&mut self, head: &[u8]) {
        if request_opcode(head) == RELEASE {
            self.entries[index(u64_at(head, NODE), u64_at(head, BODY))] = Entry::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::message::request;
    use tunnelfs_fuse_abi::opcode::{FSYNC, GETATTR};

    fn ask(opcode: u32, node: u64, handle: u64) -> Vec<u8> {
        request(opcode, node, 1, &handle.to_ne_bytes(), 0)
    }

    #[test]
    fn a_handle_is_known_for_one_host_and_until_it_is_closed() {
        let mut cache = HandleCache::default();
        let read = ask(READ, 2, 7);
        assert!(!cache.translate(1, &mut read.clone()));
        cache.note(1, &read, &ask(READ, 50, 3));
        for opcode in [READ, WRITE] {
            let mut head = ask(opcode, 2, 7);
            assert!(cache.translate(1, &mut head));
            assert_eq!((u64_at(&head, NODE), u64_at(&head, BODY)), (50, 3));
        }
        for (opcode, node, handle) in [(READ, 3, 7), (READ, 2, 8), (READ, 0, 0), (FSYNC, 2, 7), (GETATTR, 2, 7)] {
            assert!(!cache.translate(1, &mut ask(opcode, node, handle)), "{opcode} {node} {handle}");
        }
        assert!(!cache.translate(2, &mut read.clone()), "another host");
        cache.note(2, &ask(READ, 9, 9), &ask(READ, 90, 91));
        assert!(!cache.translate(2, &mut read.clone()), "of the host before");
        cache.release(&ask(RELEASE, 9, 9));
        assert!(!cache.translate(2, &mut ask(READ, 9, 9)));
    }

    #[test]
    fn what_falls_on_one_place_is_not_mistaken() {
        let mut cache = HandleCache::default();
        for n in 1..10_000u64 {
            cache.note(1, &ask(READ, n, n * 3), &ask(READ, n + 1, n));
        }
        for n in 1..10_000u64 {
            let mut head = ask(READ, n, n * 3);
            if cache.translate(1, &mut head) {
                assert_eq!((u64_at(&head, NODE), u64_at(&head, BODY)), (n + 1, n));
            }
        }
    }
}
