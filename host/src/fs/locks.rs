//! Record locks and flock(2)'s locks that hold on this machine too (`host.locks = "shared"`).
//!
//! A record lock belongs to a process in the guest, and to an open file description on this machine (`F_OFD_SETLK`):
//! each pair of inode and owner has a file of its own here. It is closed when the owner closes the file in the guest.
//! A flock(2) lock belongs to an open file on both sides.
//!
//! Whoever waits for a lock tries again and again, so that an INTERRUPT or the guest's end is noticed at once; the
//! kernel finds no deadlocks between open file descriptions.

use super::handles::Counted;
use super::sys::{self, errno};
use parking_lot::{Condvar, Mutex};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_fuse_abi::FileLock;

/// Owners of locks at a time, each with a descriptor.
const MOST_OWNERS: usize = 1024;
/// Requests that wait at a time.
const MOST_WAITING: usize = 512;
/// INTERRUPTs kept for requests that have not come yet.
const EARLY: usize = 128;
/// First and longest pause between two tries.
const PAUSES: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(10));

/// An owner's file.
#[derive(Debug)]
struct Owner {
    file: OwnedFd,
    /// One of the guest's descriptors.
    _count: Option<Counted>,
}

impl Owner {
    fn new((file, count): (OwnedFd, Option<Counted>)) -> Arc<Owner> {
        Arc::new(Owner { file, _count: count })
    }
}

#[derive(Debug, Default)]
struct Waiting {
    /// Requests that wait, by their `unique`; whether they are to stop.
    requests: HashMap<u64, bool>,
    early: VecDeque<u64>,
    /// Changes when all must stop.
    round: u64,
}

/// The locks of one guest.
#[derive(Debug, Default)]
pub struct Locks {
    owners: Mutex<HashMap<(u64, u64), Arc<Owner>>>,
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

impl Locks {
    /// The lock that is in the way of this one, or `lock` as unlocked.
    ///
    /// # Errors
    /// The file system's.
    pub fn test(
        &self,
        inode: u64,
        owner: u64,
        lock: &FileLock,
        open: impl FnOnce() -> io::Result<(OwnedFd, Option<Counted>)>,
    ) -> io::Result<FileLock> {
        let known = self.owners.lock().get(&(inode, owner)).cloned();
        let file = known.map_or_else(|| open().map(Owner::new), Ok)?;
        let mut wanted = range(lock)?;
        sys::lock(file.file.as_fd(), libc::F_OFD_GETLK, &mut wanted)?;
        let start = wanted.l_start as u64;
        let end = if wanted.l_len == 0 { i64::MAX as u64 } else { start + wanted.l_len as u64 - 1 };
        // Other owners' processes are not the guest's.
        Ok(FileLock { start, end, kind: wanted.l_type as u32, pid: wanted.l_pid.max(0) as u32 })
    }

    /// Sets or removes a record lock; with `wait`, as soon as that can be done.
    ///
    /// # Errors
    /// `EAGAIN` when another lock is in the way, `EINTR` when the request is interrupted, `ENOLCK` when there are
    /// too many.
    pub fn set(
        &self,
        inode: u64,
        owner: u64,
        lock: &FileLock,
        wait: Option<u64>,
        open: impl FnOnce() -> io::Result<(OwnedFd, Option<Counted>)>,
    ) -> io::Result<()> {
        let wanted = range(lock)?;
        let known = self.owners.lock().get(&(inode, owner)).cloned();
        let file = match known {
            Some(known) => known,
            None if lock.kind == libc::F_UNLCK as u32 => return Ok(()),
            None => self.add_owner(inode, owner, Owner::new(open()?))?,
        };
        self.until_done(wait, || {
            let mut wanted = wanted;
            sys::lock(file.file.as_fd(), libc::F_OFD_SETLK, &mut wanted)
        })
    }

    fn add_owner(&self, inode: u64, owner: u64, new: Arc<Owner>) -> io::Result<Arc<Owner>> {
        let mut owners = self.owners.lock();
        if owners.len() >= MOST_OWNERS {
            return Err(errno(libc::ENOLCK));
        }
        Ok(owners.entry((inode, owner)).or_insert_with(|| new.clone()).clone())
    }

    /// Sets or removes a lock of flock(2) on an open file.
    ///
    /// # Errors
    /// As [`set`](Locks::set).
    pub fn flock(&self, file: BorrowedFd<'_>, lock: &FileLock, wait: Option<u64>) -> io::Result<()> {
        let operation = match lock.kind as i32 {
            libc::F_RDLCK => libc::LOCK_SH,
            libc::F_WRLCK => libc::LOCK_EX,
            libc::F_UNLCK => libc::LOCK_UN,
            _ => return Err(errno(libc::EINVAL)),
        };
        self.until_done(wait, || sys::flock(file, operation | libc::LOCK_NB))
    }

    /// Removes all record locks that an owner has on an inode.
    pub fn close(&self, inode: u64, owner: u64) {
        let old = self.owners.lock().remove(&(inode, owner));
        // A thread that still sets a lock for it holds the file too: unlock, not only close.
        if let Some(old) = old {
            let all = FileLock { start: 0, end: i64::MAX as u64, kind: libc::F_UNLCK as u32, pid: 0 };
            if let Ok(mut all) = range(&all) {
                let _ = sys::lock(old.file.as_fd(), libc::F_OFD_SETLK, &mut all);
            }
        }
    }

    /// Has a request that waits, or is about to, end with `EINTR`.
    pub fn interrupt(&self, unique: u64) {
        let mut waiting = self.waiting.lock();
        if let Some(stop) = waiting.requests.get_mut(&unique) {
            *stop = true;
            self.changed.notify_all();
            return;
        }
        waiting.early.push_back(unique);
        if waiting.early.len() > EARLY {
            waiting.early.pop_front();
        }
    }

    /// Ends all that wait, and removes all record locks.
    pub fn clear(&self) {
        {
            let mut waiting = self.waiting.lock();
            waiting.round += 1;
            waiting.early.clear();
            self.changed.notify_all();
        }
        let old = std::mem::take(&mut *self.owners.lock());
        drop(old);
    }

    fn until_done(&self, wait: Option<u64>, mut attempt: impl FnMut() -> io::Result<()>) -> io::Result<()> {
        let busy = |result: &io::Result<()>| matches!(result, Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)));
        let first = attempt();
        let Some(unique) = wait else {
            return if busy(&first) { Err(errno(libc::EAGAIN)) } else { first };
        };
        if !busy(&first) {
            return first;
        }
        let round = self.start_waiting(unique)?;
        let mut pause = PAUSES.0;
        let result = loop {
            let mut waiting = self.waiting.lock();
            self.changed.wait_for(&mut waiting, pause);
            if waiting.round != round || waiting.requests.get(&unique) != Some(&false) {
                break Err(errno(libc::EINTR));
            }
            drop(waiting);
            let result = attempt();
            if !busy(&result) {
                break result;
            }
            pause = (pause * 2).min(PAUSES.1);
        };
        self.waiting.lock().requests.remove(&unique);
        result
    }

    fn start_waiting(&self, unique: u64) -> io::Result<u64> {
        let mut waiting = self.waiting.lock();
        if let Some(at) = waiting.early.iter().position(|&early| early == unique) {
            waiting.early.remove(at);
            return Err(errno(libc::EINTR));
        }
        if waiting.requests.len() >= MOST_WAITING || waiting.requests.insert(unique, false).is_some() {
            return Err(errno(libc::ENOLCK));
        }
        Ok(waiting.round)
    }
}

/// `struct flock` of a lock.
fn range(lock: &FileLock) -> io::Result<libc::flock> {
    let kind = lock.kind as i32;
    if !matches!(kind, libc::F_RDLCK | libc::F_WRLCK | libc::F_UNLCK) || lock.end < lock.start {
        return Err(errno(libc::EINVAL));
    }
    let start = i64::try_from(lock.start).map_err(|_| errno(libc::EOVERFLOW))?;
    // The kernel's OFFSET_MAX means: to the end of the file.
    let len = if lock.end >= i64::MAX as u64 { 0 } else { (lock.end - lock.start + 1) as i64 };
    Ok(libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: len, l_pid: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::sync::mpsc;

    fn lock(kind: i32, start: u64, end: u64) -> FileLock {
        FileLock { start, end, kind: kind as u32, pid: 0 }
    }

    struct Shared {
        file: tempfile::NamedTempFile,
        locks: Locks,
    }

    impl Shared {
        fn new() -> Shared {
            Shared { file: tempfile::NamedTempFile::new().unwrap(), locks: Locks::default() }
        }

        fn open(&self) -> io::Result<OwnedFd> {
            Ok(OpenOptions::new().read(true).write(true).open(self.file.path())?.into())
        }

        fn set(&self, owner: u64, wanted: FileLock, wait: Option<u64>) -> Option<i32> {
            self.locks.set(1, owner, &wanted, wait, || Ok((self.open()?, None))).err().and_then(|e| e.raw_os_error())
        }
    }

    #[test]
    fn locks_of_two_owners_exclude_each_other() {
        let s = Shared::new();
        assert_eq!(s.set(1, lock(libc::F_WRLCK, 0, 9), None), None);
        assert_eq!(s.set(2, lock(libc::F_RDLCK, 9, 20), None), Some(libc::EAGAIN));
        assert_eq!(s.set(2, lock(libc::F_RDLCK, 10, 20), None), None);
        let met = s.locks.test(1, 2, &lock(libc::F_WRLCK, 5, i64::MAX as u64), || Ok((s.open()?, None))).unwrap();
        assert_eq!((met.kind, met.start, met.end), (libc::F_WRLCK as u32, 0, 9));
        s.locks.close(1, 1);
        let met = s.locks.test(1, 2, &lock(libc::F_WRLCK, 5, 9), || Ok((s.open()?, None))).unwrap();
        assert_eq!(met.kind, libc::F_UNLCK as u32);
    }

    #[test]
    fn a_waiting_lock_comes_when_the_other_goes_or_is_interrupted() {
        let s = Shared::new();
        assert_eq!(s.set(1, lock(libc::F_WRLCK, 0, 9), None), None);
        let (send, receive) = mpsc::channel();
        std::thread::scope(|scope| {
            for (owner, unique) in [(2, 70), (3, 71), (4, 72)] {
                let (send, s) = (send.clone(), &s);
                scope.spawn(move || send.send((unique, s.set(owner, lock(libc::F_WRLCK, 0, 9), Some(unique)))));
            }
            while s.locks.waiting.lock().requests.len() < 3 {
                std::thread::yield_now();
            }
            s.locks.interrupt(71);
            assert_eq!(receive.recv().unwrap(), (71, Some(libc::EINTR)));
            s.locks.close(1, 1);
            let (unique, result) = receive.recv().unwrap();
            assert_eq!(result, None);
            s.locks.clear();
            let (other, result) = receive.recv().unwrap();
            assert!(other != unique && matches!(result, None | Some(libc::EINTR)), "{result:?}");
        });
        assert!(s.locks.waiting.lock().requests.is_empty());
    }

    #[test]
    fn an_interrupt_may_come_first() {
        let s = Shared::new();
        assert_eq!(s.set(1, lock(libc::F_WRLCK, 0, 9), None), None);
        s.locks.interrupt(5);
        assert_eq!(s.set(2, lock(libc::F_WRLCK, 0, 9), Some(5)), Some(libc::EINTR));
        assert_eq!(s.set(2, lock(libc::F_WRLCK, 100, 109), Some(5)), None);
    }

    #[test]
    fn flock_excludes_other_open_files() {
        let s = Shared::new();
        let (a, b) = (s.open().unwrap(), s.open().unwrap());
        let all = |kind| lock(kind, 0, i64::MAX as u64);
        s.locks.flock(a.as_fd(), &all(libc::F_WRLCK), None).unwrap();
        let refused = s.locks.flock(b.as_fd(), &all(libc::F_RDLCK), None).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EAGAIN));
        s.locks.flock(a.as_fd(), &all(libc::F_UNLCK), None).unwrap();
        s.locks.flock(b.as_fd(), &all(libc::F_RDLCK), Some(9)).unwrap();
    }

    #[test]
    fn ranges_that_are_none_are_refused() {
        let s = Shared::new();
        for wrong in [lock(7, 0, 9), lock(libc::F_WRLCK, 9, 0), lock(libc::F_WRLCK, u64::MAX, u64::MAX)] {
            assert!(s.set(1, wrong, None).is_some());
        }
    }
}
