//! Repeats a READ that may have overtaken a WRITE of the same bytes.
//!
//! The kernel unlocks a page before it sends the WRITE with the page's new bytes. If a program then opens the file or
//! sees its times change, the kernel may drop the page and read it again. That READ may travel on another queue and be
//! served first. It returns the old bytes and the kernel caches them: the writer would read the bytes from before its
//! write.
//!
//! The kernel keeps a page locked while it reads it. So if a WRITE of the page arrives during the READ, the kernel
//! started the WRITE before the READ. A WRITE counts if it is in flight when the READ is sent, or if it arrives before
//! the first reply to the READ. Later WRITEs do not count.

use crate::fuse::message::{request_opcode, request_unique, u32_at, u64_at, BODY, NODE};
use crossbeam_utils::CachePadded;
use parking_lot::Mutex;
use tunnelfs_fuse_abi::opcode;

/// Number of lists of transfers. A file uses the list of its nodeid modulo this number, so that queues seldom contend
/// for a lock.
const BUCKETS: usize = 32;
/// Most repeats of one READ. They take longer than any WRITE that is not stuck. The last reply then goes to the kernel
/// as it is: a reader must not wait for a stuck writer (without a page cache it does not have to either).
const MAX_REPEATS: u16 = 1000;

/// READs and WRITEs of a mount that are in flight.
#[derive(Default)]
pub struct WriteOrder {
    buckets: [CachePadded<Mutex<Bucket>>; BUCKETS],
}

#[derive(Default)]
struct Bucket {
    transfers: Vec<Transfer>,
    /// Number of WRITEs so far; the next WRITE gets this number.
    writes: u64,
}

struct Transfer {
    unique: u64,
    range: Range,
    kind: Kind,
}

enum Kind {
    /// Its number in the bucket, counted from 0.
    Write(u64),
    Read {
        /// Whether a WRITE of its bytes was in flight at any time since it was sent.
        overlaps_write: bool,
    },
}

/// A READ's state between its repeats, valid from its first reply on.
#[derive(Clone, Copy, Default)]
pub struct Repeats {
    /// Number of repeats so far.
    count: u16,
    /// Number of the first WRITE that does not count.
    until: u64,
    /// Whether a WRITE that counts was in flight when the READ was last sent.
    overlaps_write: bool,
}

struct Range {
    node: u64,
    start: u64,
    end: u64,
}

impl Range {
    /// Returns the bytes of a READ or WRITE. `fuse_read_in` and `fuse_write_in` both begin with `fh`, `offset`, `size`.
    fn of(head: &[u8]) -> Range {
        let start = u64_at(head, BODY + 8);
        let end = start.saturating_add(u64::from(u32_at(head, BODY + 16)));
        Range { node: u64_at(head, NODE), start, end }
    }

    fn overlaps(&self, other: &Range) -> bool {
        self.node == other.node && self.start < other.end && other.start < self.end
    }
}

impl Bucket {
    fn add_write(&mut self, unique: u64, range: Range) {
        for transfer in &mut self.transfers {
            if let (Kind::Read { overlaps_write }, true) = (&mut transfer.kind, transfer.range.overlaps(&range)) {
                *overlaps_write = true;
            }
        }
        self.transfers.push(Transfer { unique, range, kind: Kind::Write(self.writes) });
        self.writes += 1;
    }

    fn add_read(&mut self, unique: u64, range: Range) {
        let overlaps_write = self.has_write(&range, self.writes);
        self.transfers.push(Transfer { unique, range, kind: Kind::Read { overlaps_write } });
    }

    /// Returns `true` if a WRITE with a number below `until` is in flight in `range`, `false` if none is.
    fn has_write(&self, range: &Range, until: u64) -> bool {
        let mut transfers = self.transfers.iter();
        transfers
            .any(|other| matches!(other.kind, Kind::Write(number) if number < until) && other.range.overlaps(range))
    }

    fn remove(&mut self, unique: u64) -> Option<Kind> {
        let at = self.transfers.iter().position(|transfer| transfer.unique == unique)?;
        Some(self.transfers.swap_remove(at).kind)
    }
}

impl WriteOrder {
    /// Records a READ or WRITE that is about to be sent; `head` is its header and body. Ignores other requests.
    pub fn begin(&self, head: &[u8]) {
        match request_opcode(head) {
            opcode::WRITE => self.bucket(head).lock().add_write(request_unique(head), Range::of(head)),
            opcode::READ => self.bucket(head).lock().add_read(request_unique(head), Range::of(head)),
            _ => {}
        }
    }

    /// Records a reply. Returns `true` if the request is a READ that must be sent again (unless the reply is an error),
    /// `false` if the reply can go to the kernel.
    pub fn end(&self, head: &[u8], repeats: &mut Repeats) -> bool {
        if !matches!(request_opcode(head), opcode::READ | opcode::WRITE) {
            return false;
        }
        let mut bucket = self.bucket(head).lock();
        match bucket.remove(request_unique(head)) {
            Some(Kind::Read { overlaps_write }) => {
                (repeats.overlaps_write, repeats.until) = (overlaps_write, bucket.writes)
            }
            Some(Kind::Write(_)) => return false,
            None => {}
        }
        if !repeats.overlaps_write || repeats.count == MAX_REPEATS {
            return false;
        }
        repeats.count += 1;
        repeats.overlaps_write = bucket.has_write(&Range::of(head), repeats.until);
        true
    }

    fn bucket(&self, head: &[u8]) -> &Mutex<Bucket> {
        &self.buckets[u64_at(head, NODE) as usize % BUCKETS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::message::tests::transfer;

    /// A request under way.
    struct Begun<'a>(&'a WriteOrder, Vec<u8>, Repeats);

    impl Begun<'_> {
        fn end(&mut self) -> bool {
            self.0.end(&self.1, &mut self.2)
        }
    }

    fn begin(order: &WriteOrder, opcode: u32, unique: u64, (node, offset, size): (u64, u64, u32)) -> Begun<'_> {
        let head = transfer(opcode, node, unique, offset, size);
        order.begin(&head);
        Begun(order, head, Repeats::default())
    }

    #[test]
    fn a_read_beside_a_write_of_its_bytes_is_repeated_until_that_has_ended() {
        let order = WriteOrder::default();
        let mut write = begin(&order, opcode::WRITE, 2, (5, 1000, 3000));
        let mut read = begin(&order, opcode::READ, 4, (5, 0, 4096));
        assert!(read.end());
        assert!(!write.end());
        // It was sent while the WRITE was under way; the next time it was not.
        assert!(read.end() && !read.end());
    }

    #[test]
    fn a_write_that_comes_and_goes_during_the_read_counts() {
        let order = WriteOrder::default();
        let mut read = begin(&order, opcode::READ, 4, (5, 0, 4096));
        let mut write = begin(&order, opcode::WRITE, 2, (5, 1000, 3000));
        write.end();
        assert!(read.end() && !read.end());
    }

    #[test]
    fn later_writes_do_not() {
        let order = WriteOrder::default();
        let mut read = begin(&order, opcode::READ, 4, (5, 0, 4096));
        let mut write = begin(&order, opcode::WRITE, 2, (5, 0, 1));
        assert!(read.end());
        begin(&order, opcode::WRITE, 6, (5, 0, 1));
        write.end();
        assert!(read.end() && !read.end());
    }

    #[test]
    fn reads_of_other_bytes_go_on() {
        let order = WriteOrder::default();
        begin(&order, opcode::WRITE, 2, (5, 1000, 3000));
        for (node, offset, size) in [(5, 0, 1000), (5, 4000, 4096), (5 + BUCKETS as u64, 0, 4096)] {
            let mut read = begin(&order, opcode::READ, 4, (node, offset, size));
            assert!(!read.end());
        }
    }

    #[test]
    fn a_stuck_write_lets_readers_go_on() {
        let order = WriteOrder::default();
        begin(&order, opcode::WRITE, 2, (5, 0, 1));
        let mut read = begin(&order, opcode::READ, 4, (5, 0, 4096));
        assert_eq!((0..=MAX_REPEATS).filter(|_| read.end()).count(), usize::from(MAX_REPEATS));
    }
}
