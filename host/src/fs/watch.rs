//! Which directories and files are watched for one guest: marks within a budget.
//!
//! A mark keeps its inode in this kernel's memory. One that the kernel may take away (`FAN_MARK_EVICTABLE`) would not,
//! but nobody tells when it has gone, and the guest would keep for a day what has changed since. So marks are few: one
//! for a directory that the guest has looked into, one for a file with several names, none for any other file, which
//! its directory's mark covers. When there are too many, the one that was of no use for longest is taken away; the
//! guest is told so first.

use super::change_queue::ChangeQueue;
use super::changes::Change;
use super::cover::Watch;
use super::fanotify::{handle_ino, Group, Object};
use super::inodes::{Inode, Inodes, Key};
use super::sys::{is_local_kind, FdName, FileHandle};
use nix::sys::statfs;
use parking_lot::{Mutex, RwLock};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use tunnelfs_fuse_abi::changes::kind;

/// A file system, by mount and device.
type System = (u64, u64);

#[derive(Debug)]
struct Marked {
    /// The inode's number.
    id: u64,
    watch: Arc<Watch>,
}

#[derive(Debug, Default)]
struct Marks {
    by_key: HashMap<Key, Marked>,
    /// Those that were marked; some of them may have no mark any more.
    clock: VecDeque<Key>,
    /// How many there may be.
    budget: usize,
}

#[derive(Debug, Default)]
struct Systems {
    /// Whether one reports changes.
    known: HashMap<System, bool>,
    by_fsid: HashMap<[u8; 8], Vec<System>>,
}

/// The marks.
#[derive(Debug)]
pub struct Watches {
    group: Group,
    inodes: Arc<Inodes>,
    queue: Arc<ChangeQueue>,
    /// `/proc/self/fd`.
    descriptors: OwnedFd,
    marks: Mutex<Marks>,
    systems: RwLock<Systems>,
}

impl Watches {
    /// Without a mark yet; at most `budget`.
    ///
    /// # Errors
    /// The system has no fanotify for this process.
    pub fn new(
        inodes: Arc<Inodes>,
        queue: Arc<ChangeQueue>,
        descriptors: BorrowedFd<'_>,
        budget: usize,
    ) -> io::Result<Watches> {
        Ok(Watches {
            group: Group::new()?,
            inodes,
            queue,
            descriptors: descriptors.try_clone_to_owned()?,
            marks: Mutex::new(Marks { budget: budget.max(1), ..Marks::default() }),
            systems: RwLock::default(),
        })
    }

    /// What reports the changes.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Marks an inode, which `pin` has open, unless it is marked. What is found out afterwards may be kept as long as
    /// the mark is alive.
    pub fn watch(&self, inode: &Arc<Inode>, pin: BorrowedFd<'_>) -> Option<Arc<Watch>> {
        if let Some(own) = inode.cover.own() {
            return Some(own);
        }
        if !self.reports(&inode.key, pin) {
            return None;
        }
        let mut marks = self.marks.lock();
        // Another thread may have been faster.
        if let Some(own) = inode.cover.own() {
            return Some(own);
        }
        if marks.budget == 0 {
            return None;
        }
        if marks.by_key.len() >= marks.budget {
            self.evict(&mut marks);
        }
        let mark = || self.group.mark(self.descriptors.as_fd(), FdName::new(pin).as_c_str(), inode.is_dir());
        let marked = match mark() {
            // The user's limit, which other programs and hosts share.
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => {
                marks.budget = marks.by_key.len().max(1);
                self.evict(&mut marks);
                mark()
            }
            other => other,
        };
        marked.inspect_err(|e| tracing::debug!("inode {} is not watched: {e}", inode.key.ino)).ok()?;
        let watch = Watch::new();
        marks.by_key.insert(inode.key, Marked { id: inode.id, watch: watch.clone() });
        marks.clock.push_back(inode.key);
        inode.cover.set_own(watch.clone());
        Some(watch)
    }

    /// Whether the inode's file system reports all changes.
    pub fn reports(&self, key: &Key, file: BorrowedFd<'_>) -> bool {
        let system = (key.mount, key.device);
        if let Some(reports) = self.systems.read().known.get(&system) {
            return *reports;
        }
        let fsid = self.fsid(key, file);
        let mut systems = self.systems.write();
        if let Some(fsid) = fsid {
            let all = systems.by_fsid.entry(fsid).or_default();
            if !all.contains(&system) {
                all.push(system);
            }
        }
        systems.known.insert(system, fsid.is_some());
        fsid.is_some()
    }

    /// The number that events have of a file system; `None`, and a line in the log, if its events do not do.
    fn fsid(&self, key: &Key, file: BorrowedFd<'_>) -> Option<[u8; 8]> {
        let st = statfs::fstatfs(file).ok()?;
        let magic = st.filesystem_type();
        // The number as a handle has it: events are told apart by it.
        let readable = FileHandle::of(file).is_ok_and(|handle| {
            let (kind, bytes) = handle.parts();
            handle_ino(kind, bytes) == Some(key.ino)
        });
        if !is_local_kind(magic) || !readable {
            tracing::warn!(
                "a file system of type {:#x} does not report all changes: its files are cached as with cache = \"auto\"",
                magic.0
            );
            return None;
        }
        let fsid = st.filesystem_id();
        // SAFETY: two numbers of 32 bits, which the C library hides.
        Some(unsafe { std::mem::transmute::<libc::fsid_t, [u8; 8]>(fsid) })
    }

    /// The inode that an event names, if the guest knows it.
    pub fn find(&self, object: &Object<'_>) -> Option<Arc<Inode>> {
        let ino = object.ino()?;
        let systems = self.systems.read();
        let all = systems.by_fsid.get(&object.fsid)?;
        all.iter().find_map(|&(mount, device)| self.inodes.find_key(&Key { device, ino, mount }))
    }

    /// Takes one mark away: of those that were not of use lately, the oldest.
    fn evict(&self, marks: &mut Marks) {
        for _ in 0..2 * marks.clock.len() {
            let Some(key) = marks.clock.pop_front() else { return };
            match marks.by_key.get(&key) {
                None => {}
                Some(marked) if marked.watch.take_used() => marks.clock.push_back(key),
                Some(_) => {
                    let Some(marked) = marks.by_key.remove(&key) else { return };
                    self.end(&marked);
                    return;
                }
            }
        }
    }

    fn end(&self, marked: &Marked) {
        // From now on answers are short-lived; those before are taken back before the first change is missed.
        marked.watch.end();
        let Ok(inode) = self.inodes.get(marked.id) else { return };
        let kind = if inode.is_dir() { kind::UNWATCHED } else { kind::ATTRIBUTES };
        self.queue.push(Change { kind, node: marked.id, ..Change::default() });
        self.unmark(&inode);
    }

    fn unmark(&self, inode: &Arc<Inode>) {
        if let Ok(pin) = self.inodes.pin(inode) {
            // It has none any more if the inode was deleted.
            let name = FdName::new(pin.as_fd());
            let _ = self.group.unmark(self.descriptors.as_fd(), name.as_c_str(), inode.is_dir());
        }
    }

    /// The guest has forgotten the inode.
    pub fn forget(&self, inode: &Arc<Inode>) {
        let Some(own) = inode.cover.own() else { return };
        let mut marks = self.marks.lock();
        // It may have been found again, and be watched as another one.
        if marks.by_key.get(&inode.key).is_some_and(|marked| Arc::ptr_eq(&marked.watch, &own)) {
            marks.by_key.remove(&inode.key);
            own.end();
            self.unmark(inode);
            if marks.clock.len() > 2 * marks.by_key.len() + 1024 {
                let Marks { by_key, clock, .. } = &mut *marks;
                clock.retain(|key| by_key.contains_key(key));
            }
        }
    }

    /// No mark counts any more, and there will be no other.
    pub fn end_all(&self) {
        let marks = std::mem::take(&mut *self.marks.lock());
        marks.by_key.values().for_each(|marked| marked.watch.end());
    }

    /// Marks at present.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.marks.lock().by_key.len()
    }
}
