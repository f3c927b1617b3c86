//! Read leases on the files whose data a guest keeps: whoever opens such a file for writing, or truncates it, waits
//! until the guest has dropped the data (fcntl(2), F_SETLEASE).
//!
//! A lease holds as long as its descriptor is open. The kernel tells of somebody who waits by a signal, to the one
//! thread that was named for it. The guest has [`DROP_WITHIN`] to answer; then the lease is given up, and until the
//! guest has answered for all such files it gets no other lease.

use super::sys::check;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use std::time::{Duration, Instant};

/// How long somebody who wants to write waits for a guest.
pub const DROP_WITHIN: Duration = Duration::from_millis(100);

/// The signal's number: a real-time signal, which few programs use. The thread that it is sent to blocks it.
pub fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 7
}

/// `fcntl`'s commands and `struct f_owner_ex` of asm-generic/fcntl.h.
const F_SETSIG: libc::c_int = 10;
const F_SETOWN_EX: libc::c_int = 15;
const F_OWNER_TID: libc::c_int = 0;

#[repr(C)]
struct Owner {
    kind: libc::c_int,
    pid: libc::pid_t,
}

/// A lease on a file: given up when it is dropped.
#[derive(Debug)]
struct Lease {
    fd: OwnedFd,
    /// When it was of use last.
    turn: u64,
    /// The open file with which it was taken: until that is closed nobody knows whether older data has been dropped.
    first: Option<u64>,
}

impl Lease {
    fn take(fd: OwnedFd, thread: libc::pid_t, turn: u64, first: u64) -> io::Result<Lease> {
        let (raw, owner) = (fd.as_raw_fd(), Owner { kind: F_OWNER_TID, pid: thread });
        // SAFETY: a descriptor of this function's, numbers, and a structure.
        unsafe {
            check(libc::fcntl(raw, F_SETSIG, signal()))?;
            check(libc::fcntl(raw, F_SETOWN_EX, &raw const owner))?;
            check(libc::fcntl(raw, libc::F_SETLEASE, libc::F_RDLCK))?;
        }
        Ok(Lease { fd, turn, first: Some(first) })
    }

    /// Whether somebody waits for it.
    fn is_wanted(&self) -> bool {
        // SAFETY: a descriptor and a command.
        unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_GETLEASE) != libc::F_RDLCK }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // A process that was forked meanwhile may have the open file too. SAFETY: a descriptor and numbers.
        unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
    }
}

#[derive(Debug, Default)]
struct Table {
    by_node: HashMap<u64, Lease>,
    by_fd: HashMap<RawFd, u64>,
    by_turn: BTreeMap<u64, u64>,
    turn: u64,
    /// Files that somebody waits for, and until when.
    wanted: HashMap<u64, Instant>,
    /// Files whose data the guest was told to drop, and did not in time.
    late: HashSet<u64>,
}

impl Table {
    fn remove(&mut self, node: u64) -> Option<Lease> {
        let lease = self.by_node.remove(&node)?;
        self.by_fd.remove(&lease.fd.as_raw_fd());
        self.by_turn.remove(&lease.turn);
        self.wanted.remove(&node);
        Some(lease)
    }

    fn insert(&mut self, node: u64, lease: Lease) {
        self.by_fd.insert(lease.fd.as_raw_fd(), node);
        self.by_turn.insert(lease.turn, node);
        self.by_node.insert(node, lease);
    }

    /// The turn of a lease that is used now.
    fn next_turn(&mut self) -> u64 {
        self.turn += 1;
        self.turn
    }
}

/// The leases of one guest, by the numbers of its inodes.
#[derive(Debug)]
pub struct Leases {
    table: Mutex<Table>,
    /// Leases, to see at once that there are none.
    count: AtomicUsize,
    late: AtomicBool,
    budget: usize,
    thread: libc::pid_t,
}

impl Leases {
    /// At most `budget` leases, whose signals go to `thread`.
    pub fn new(budget: usize, thread: libc::pid_t) -> Leases {
        let (count, late) = (AtomicUsize::new(0), AtomicBool::new(false));
        Leases { table: Mutex::default(), count, late, budget, thread }
    }

    /// The guest opens `node` for reading, as its open file `fh`. Whether it may keep the data that it has of it.
    ///
    /// `open` opens the file once more for the lease: if both were one open file, the guest's locks would not end when
    /// the guest closes it.
    pub fn opened(&self, node: u64, fh: u64, open: impl FnOnce() -> io::Result<OwnedFd>) -> bool {
        let mut table = self.table.lock();
        let (turn, wanted) = (table.next_turn(), table.wanted.contains_key(&node));
        if let Some(lease) = table.by_node.get_mut(&node) {
            let before = std::mem::replace(&mut lease.turn, turn);
            let keep = !wanted && lease.first.is_none();
            table.by_turn.remove(&before);
            table.by_turn.insert(turn, node);
            return keep;
        }
        if self.budget == 0 || !table.late.is_empty() {
            return false;
        }
        while table.by_node.len() >= self.budget {
            // What the guest has of that file it drops when it opens it again, since there is no lease then.
            let Some(&oldest) = table.by_turn.values().next() else { break };
            table.remove(oldest);
        }
        match open().and_then(|fd| Lease::take(fd, self.thread, turn, fh)) {
            Ok(lease) => table.insert(node, lease),
            // Somebody has it open for writing, it is another user's, or the file system has no leases.
            Err(e) => tracing::trace!("no lease on node {node}: {e}"),
        }
        self.count.store(table.by_node.len(), Release);
        false
    }

    /// The guest has closed its open file `fh`: so it had the reply to its OPEN, and has dropped what was older.
    pub fn closed(&self, node: u64, fh: u64) {
        if self.is_empty() {
            return;
        }
        if let Some(lease) = self.table.lock().by_node.get_mut(&node) {
            if lease.first == Some(fh) {
                lease.first = None;
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.count.load(Acquire) == 0
    }

    /// Gives the lease up without asking the guest: it has forgotten the file, or is about to change it itself.
    pub fn give_up(&self, node: u64) {
        if self.is_empty() {
            return;
        }
        let mut table = self.table.lock();
        let lease = table.remove(node);
        self.count.store(table.by_node.len(), Release);
        drop(table);
        drop(lease);
    }

    /// The guest has forgotten the file.
    pub fn forget(&self, node: u64) {
        self.give_up(node);
        if self.late.load(Acquire) {
            self.caught_up(node);
        }
    }

    /// Somebody wants to write to a file whose lease has this descriptor, or, without one, to any: the files whose
    /// data the guest must drop.
    pub fn broken(&self, fd: Option<RawFd>, now: Instant) -> Vec<u64> {
        let mut table = self.table.lock();
        let nodes: Vec<u64> = match fd {
            Some(fd) => table.by_fd.get(&fd).copied().into_iter().collect(),
            None => table.by_node.keys().copied().collect(),
        };
        let mut wanted = Vec::new();
        for node in nodes {
            // The signal may be of another lease, which had this descriptor before.
            if !table.wanted.contains_key(&node) && table.by_node.get(&node).is_some_and(Lease::is_wanted) {
                table.wanted.insert(node, now + DROP_WITHIN);
                wanted.push(node);
            }
        }
        wanted
    }

    /// The guest has dropped the file's data.
    pub fn dropped(&self, node: u64) {
        let mut table = self.table.lock();
        let lease = if table.wanted.contains_key(&node) { table.remove(node) } else { None };
        self.count.store(table.by_node.len(), Release);
        drop(table);
        drop(lease);
        if self.late.load(Acquire) {
            self.caught_up(node);
        }
    }

    fn caught_up(&self, node: u64) {
        let mut table = self.table.lock();
        if table.late.remove(&node) && table.late.is_empty() {
            self.late.store(false, Release);
            tracing::info!("the guest has caught up: it may keep data again");
        }
    }

    /// Gives up the leases for which somebody has waited for too long; when to look again.
    pub fn expire(&self, now: Instant) -> Option<Instant> {
        if self.is_empty() {
            return None;
        }
        let mut table = self.table.lock();
        let late: Vec<u64> = table.wanted.iter().filter(|(_, until)| **until <= now).map(|(node, _)| *node).collect();
        let mut given_up = Vec::new();
        for node in late {
            given_up.extend(table.remove(node));
            if table.late.insert(node) && !self.late.swap(true, AcqRel) {
                tracing::warn!(
                    "the guest has not dropped a file's data within {DROP_WITHIN:?}: until it has, it may keep names, \
                     attributes and data only as with cache = \"auto\""
                );
            }
        }
        self.count.store(table.by_node.len(), Release);
        let next = table.wanted.values().min().copied();
        drop(table);
        drop(given_up);
        next
    }

    /// Gives all of them up: the guest has gone.
    pub fn clear(&self) {
        let old = std::mem::take(&mut *self.table.lock());
        self.count.store(0, Release);
        drop(old);
    }

    /// Whether the guest owes an answer for a lease that was given up.
    pub fn is_late(&self) -> bool {
        self.late.load(Acquire)
    }

    /// Leases at present.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.table.lock().by_node.len()
    }
}
