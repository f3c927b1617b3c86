//! Read leases on the files whose data a guest keeps: whoever opens such a file for writing, or truncates it, waits
//! until the guest has dropped the data (fcntl(2), F_SETLEASE).
//!
//! A guest that asks to open each file is told then whether it may keep what it has. One that does not ask (see
//! `unopened.rs`) keeps all that it has read as long as it knows the file's attributes: so these last only where a lease
//! covers the data. Of the other files it asks for them each time, and drops the data when it sees another time of change;
//! before they last again it is told to drop what it has.
//!
//! A lease holds as long as its descriptor is open. The kernel tells of somebody who waits by a signal, to the one
//! thread that was named for it. The guest has [`DROP_WITHIN`] to answer; then the lease is given up, and until the
//! guest has answered for all such files it gets no other lease.

use super::inodes::Held;
use super::sys::check;
use parking_lot::{Condvar, Mutex};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use std::time::{Duration, Instant};

/// How long somebody who wants to write waits for a guest.
pub const DROP_WITHIN: Duration = Duration::from_millis(100);
/// How long a guest may take to drop a file's data that nobody waits for.
const MAKE_ROOM_WITHIN: Duration = Duration::from_secs(10);

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
    /// The inode's own descriptor, which is open for reading and stays as long as the lease.
    held: Held,
    /// When it was of use last.
    turn: u64,
    /// The open file with which it was taken: until that is closed nobody knows whether older data has been dropped.
    first: Option<u64>,
}

impl Lease {
    fn take(held: Held, thread: libc::pid_t, turn: u64, first: Option<u64>) -> io::Result<Lease> {
        let (raw, owner) = (held.pin.as_fd().as_raw_fd(), Owner { kind: F_OWNER_TID, pid: thread });
        // SAFETY: a descriptor of this function's, numbers, and a structure.
        unsafe {
            check(libc::fcntl(raw, F_SETSIG, signal()))?;
            check(libc::fcntl(raw, F_SETOWN_EX, &raw const owner))?;
            check(libc::fcntl(raw, libc::F_SETLEASE, libc::F_RDLCK))?;
        }
        Ok(Lease { held, turn, first })
    }

    fn raw(&self) -> RawFd {
        self.held.pin.as_fd().as_raw_fd()
    }

    /// Whether somebody waits for it.
    fn is_wanted(&self) -> bool {
        // SAFETY: a descriptor and a command.
        unsafe { libc::fcntl(self.raw(), libc::F_GETLEASE) != libc::F_RDLCK }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // The descriptor stays. SAFETY: a descriptor and numbers.
        unsafe { libc::fcntl(self.raw(), libc::F_SETLEASE, libc::F_UNLCK) };
    }
}

/// A file of which the guest may have data that no lease covers.
#[derive(Debug, Default)]
struct Uncovered {
    /// How many the guest has that may write to it.
    writers: u32,
    /// Whether the guest's kernel asks for the attributes each time.
    asks: bool,
}

#[derive(Debug, Default)]
struct Table {
    by_node: HashMap<u64, Lease>,
    by_fd: HashMap<RawFd, u64>,
    by_turn: BTreeMap<u64, u64>,
    turn: u64,
    /// Files whose data the guest was told to drop, and until when it must have.
    wanted: HashMap<u64, Instant>,
    /// Files whose data the guest was told to drop, and did not in time.
    late: HashSet<u64>,
    /// Files of which the guest may have data that no lease covers.
    uncovered: HashMap<u64, Uncovered>,
    /// Uncovered files whose data the guest was told to drop, and whether it can have got no other since.
    cleaning: HashMap<u64, bool>,
    /// Files whose attributes the guest was told to ask for again, and until when that is waited for.
    expiring: HashMap<u64, Instant>,
}

impl Table {
    fn remove(&mut self, node: u64) -> Option<Lease> {
        let lease = self.by_node.remove(&node)?;
        self.by_fd.remove(&lease.raw());
        self.by_turn.remove(&lease.turn);
        self.wanted.remove(&node);
        Some(lease)
    }

    fn insert(&mut self, node: u64, lease: Lease) {
        self.by_fd.insert(lease.raw(), node);
        self.by_turn.insert(lease.turn, node);
        self.by_node.insert(node, lease);
    }

    /// The guest may have got other data of a file than it was told to drop.
    fn soil(&mut self, node: u64) {
        if let Some(is_clean) = self.cleaning.get_mut(&node) {
            *is_clean = false;
        }
    }

    /// The turn of a lease that is used now.
    fn next_turn(&mut self) -> u64 {
        self.turn += 1;
        self.turn
    }

    /// The lease on a file that is used now, if nobody waits for it.
    fn touch(&mut self, node: u64) -> Option<&mut Lease> {
        if self.wanted.contains_key(&node) {
            return None;
        }
        let turn = self.next_turn();
        let lease = self.by_node.get_mut(&node)?;
        let before = std::mem::replace(&mut lease.turn, turn);
        self.by_turn.remove(&before);
        self.by_turn.insert(turn, node);
        Some(lease)
    }
}

/// What covers the data that a guest has of a file which it has not asked to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// A lease.
    Leased,
    /// The file's time of change: the guest asks for the attributes each time, and it is the guest itself that writes.
    Written,
    /// The same, but somebody else may have the file open for writing, and stores through a mapping change no time.
    Uncovered,
}

/// The leases of one guest, by the numbers of its inodes.
#[derive(Debug)]
pub struct Leases {
    table: Mutex<Table>,
    /// Signalled when `expiring` gets smaller.
    expired: Condvar,
    /// Leases, and files with uncovered data, to see at once that there are none.
    count: AtomicUsize,
    uncovered: AtomicUsize,
    late: AtomicBool,
    budget: usize,
    thread: libc::pid_t,
}

impl Leases {
    /// At most `budget` leases, whose signals go to `thread`.
    pub fn new(budget: usize, thread: libc::pid_t) -> Leases {
        Leases {
            table: Mutex::default(),
            expired: Condvar::new(),
            count: AtomicUsize::new(0),
            uncovered: AtomicUsize::new(0),
            late: AtomicBool::new(false),
            budget,
            thread,
        }
    }

    /// The guest opens `node` for reading, as its open file `fh`. Whether it may keep the data that it has of it. `hold`
    /// gives a descriptor for the lease.
    pub fn opened(&self, node: u64, fh: u64, hold: impl FnOnce() -> io::Result<Held>) -> bool {
        let mut table = self.table.lock();
        if let Some(lease) = table.touch(node) {
            return lease.first.is_none();
        }
        if !self.may_take(&table, node) {
            return false;
        }
        while table.by_node.len() >= self.budget {
            // What the guest has of that file it drops when it opens it again, since there is no lease then.
            let Some(&oldest) = table.by_turn.values().next() else { break };
            table.remove(oldest);
        }
        self.take(&mut table, node, Some(fh), hold);
        false
    }

    /// Whether the guest may have a lease on a file, and has none.
    fn may_take(&self, table: &Table, node: u64) -> bool {
        self.budget > 0 && table.late.is_empty() && !table.by_node.contains_key(&node)
    }

    /// Takes a lease on a file that has none; whether it could be had.
    fn take(&self, table: &mut Table, node: u64, first: Option<u64>, hold: impl FnOnce() -> io::Result<Held>) -> bool {
        if !self.may_take(table, node) {
            return false;
        }
        let turn = table.next_turn();
        let taken = hold().and_then(|held| Lease::take(held, self.thread, turn, first));
        let has = taken.is_ok();
        match taken {
            Ok(lease) => table.insert(node, lease),
            // Somebody has it open for writing, it is another user's, or the file system has no leases.
            Err(e) => tracing::trace!("no lease on node {node}: {e}"),
        }
        self.recount(table);
        has
    }

    fn recount(&self, table: &Table) {
        self.count.store(table.by_node.len(), Release);
        self.uncovered.store(table.uncovered.len(), Release);
    }

    /// The guest reads `node`, which it has not asked to open: call it before the data is read. `hold` gives a descriptor
    /// for a lease. Without one the guest has to ask for the attributes each time; whether it must be told so.
    pub fn reads(&self, node: u64, hold: impl FnOnce() -> io::Result<Held>) -> (Reading, bool) {
        let mut table = self.table.lock();
        let is_written = table.uncovered.get(&node).is_some_and(|file| file.writers > 0);
        if !is_written && (table.touch(node).is_some() || self.take(&mut table, node, None, hold)) {
            return (Reading::Leased, false);
        }
        table.soil(node);
        let tell = !std::mem::replace(&mut table.uncovered.entry(node).or_default().asks, true);
        if tell {
            table.expiring.insert(node, Instant::now() + DROP_WITHIN);
        }
        self.recount(&table);
        (if is_written { Reading::Written } else { Reading::Uncovered }, tell)
    }

    /// The guest has written to a file: its kernel asks for the attributes then, but for what it has written from its
    /// cache.
    pub fn written(&self, node: u64) {
        let mut table = self.table.lock();
        table.soil(node);
        if let Some(file) = table.uncovered.get_mut(&node) {
            file.asks = true;
        }
    }

    /// Waits, not for long, until the guest asks for the attributes of `node` each time.
    pub fn wait_until_expired(&self, node: u64) {
        let mut table = self.table.lock();
        while let Some(&until) = table.expiring.get(&node) {
            if self.expired.wait_until(&mut table, until).timed_out() {
                return;
            }
        }
    }

    /// What covers the data that the guest has of `node`, whose attributes it is about to be told, and whether it has to
    /// drop that data for more: somebody else may have stored through a mapping while nothing covered it, which changes no
    /// time. `hold` gives a descriptor for a lease.
    pub fn covers(&self, node: u64, hold: impl FnOnce() -> io::Result<Held>) -> (Reading, bool) {
        if self.uncovered.load(Acquire) == 0 {
            return (Reading::Leased, false);
        }
        let mut table = self.table.lock();
        match table.uncovered.get(&node) {
            None => return (Reading::Leased, false),
            Some(file) if file.writers > 0 => return (Reading::Written, false),
            Some(_) => {}
        }
        if table.touch(node).is_none() && !self.take(&mut table, node, None, hold) {
            return (Reading::Uncovered, false);
        }
        let tell = !table.cleaning.contains_key(&node);
        if tell {
            table.cleaning.insert(node, true);
        }
        (Reading::Written, tell)
    }

    /// The files whose data the guest has to drop, since there are too many leases; their leases end when it has.
    pub fn surplus(&self, now: Instant) -> Vec<u64> {
        if self.count.load(Acquire) <= self.budget {
            return Vec::new();
        }
        let mut table = self.table.lock();
        let too_many = (table.by_node.len() - table.wanted.len()).saturating_sub(self.budget);
        let oldest = table.by_turn.values().filter(|node| !table.wanted.contains_key(node));
        let nodes: Vec<u64> = oldest.take(too_many).copied().collect();
        table.wanted.extend(nodes.iter().map(|&node| (node, now + MAKE_ROOM_WITHIN)));
        nodes
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

    /// The guest is about to change the file itself: gives the lease up without asking it. `uncovers`: the guest does not
    /// ask to open files, so it keeps data that nothing covers then.
    pub fn will_write(&self, node: u64, uncovers: bool) {
        if !uncovers && self.is_empty() {
            return;
        }
        let mut table = self.table.lock();
        let lease = table.remove(node);
        if uncovers {
            table.uncovered.entry(node).or_default();
            table.soil(node);
        }
        self.recount(&table);
        drop(table);
        drop(lease);
    }

    /// The guest has one more writer of the file, or, with -1, one less.
    pub fn count_writer(&self, node: u64, change: i32) {
        if let Some(file) = self.table.lock().uncovered.get_mut(&node) {
            file.writers = file.writers.saturating_add_signed(change);
        }
    }

    /// The guest has forgotten the file.
    pub fn forget(&self, node: u64) {
        if self.is_empty() && self.uncovered.load(Acquire) == 0 && !self.late.load(Acquire) {
            return;
        }
        let mut table = self.table.lock();
        let lease = table.remove(node);
        table.uncovered.remove(&node);
        table.expiring.remove(&node);
        table.cleaning.remove(&node);
        self.recount(&table);
        drop(table);
        drop(lease);
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
            if !table.by_node.get(&node).is_some_and(Lease::is_wanted) {
                continue;
            }
            let until = now + DROP_WITHIN;
            match table.wanted.get_mut(&node) {
                Some(earlier) => *earlier = until.min(*earlier),
                None => {
                    table.wanted.insert(node, until);
                    wanted.push(node);
                }
            }
        }
        wanted
    }

    /// The guest has done what it was told to: dropped the file's data, or its attributes.
    pub fn dropped(&self, node: u64) {
        let mut table = self.table.lock();
        if table.expiring.remove(&node).is_some() {
            self.expired.notify_all();
            return;
        }
        // Each thing that the guest was told is answered once, those of one file's data in their order.
        if let Some(is_clean) = table.cleaning.remove(&node) {
            if is_clean && table.uncovered.get(&node).is_some_and(|file| file.writers == 0) {
                table.uncovered.remove(&node);
                self.recount(&table);
            }
            return;
        }
        let lease = if table.wanted.contains_key(&node) { table.remove(node) } else { None };
        self.recount(&table);
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
        self.recount(&table);
        let next = table.wanted.values().min().copied();
        drop(table);
        drop(given_up);
        next
    }

    /// Gives all of them up: the guest has gone.
    pub fn clear(&self) {
        let mut table = self.table.lock();
        let old = std::mem::take(&mut *table);
        self.recount(&table);
        drop(table);
        self.expired.notify_all();
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
