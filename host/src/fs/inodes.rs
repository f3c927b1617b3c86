//! The inodes that a guest knows: by their numbers in messages, and by what they are on this machine.
//!
//! An inode that is in use is held by a descriptor (O_PATH), so that it is found at once, whatever happens to its
//! names. Descriptors are few and trees are large: beyond a budget the inodes that have not been used for longest are
//! kept by their file handles, and opened again when they are needed. What the guest has open, or has unlinked, keeps
//! its descriptor: a handle of it would lead nowhere.
//!
//! Locks are held for table look-ups alone, never across a system call, and descriptors are closed outside of them.

use super::cover::Cover;
use super::forgotten::Forgotten;
use super::inode::{birth, Place};
pub use super::inode::{Held, Inode, Key, Pin};
use super::mounts::Mounts;
use super::sys::{self, errno, FileHandle};
use foldhash::{fast::RandomState, HashMap};
use parking_lot::{Mutex, RwLock};
use std::collections::{HashSet, VecDeque};
use std::hash::BuildHasher;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::ROOT_ID;

/// Parts of the table, each behind a lock of its own; a power of two. An inode's number tells its part.
const SHARDS: u64 = 64;
/// Inodes looked at, at most, to free one descriptor.
const TRIES: usize = 64;
/// How long a file that a program in the guest has closed may be open here.
const CLOSING: Duration = Duration::from_millis(200);

#[derive(Debug, Default)]
struct Shard {
    by_key: HashMap<Key, Arc<Inode>>,
    by_id: HashMap<u64, Arc<Inode>>,
}

/// The table.
#[derive(Debug)]
pub struct Inodes {
    shards: Vec<RwLock<Shard>>,
    hasher: RandomState,
    root: Arc<Inode>,
    next: AtomicU64,
    /// Descriptors in use, and how many there should be.
    pins: Arc<AtomicUsize>,
    budget: usize,
    /// Numbers of inodes with descriptors, the longest unused first; others may be among them.
    clock: Mutex<VecDeque<u64>>,
    /// Whether handles are to be had at all.
    handles: bool,
    /// Whether an inode has ever been kept by its handle.
    cooled: AtomicBool,
    /// Whether the guest has removed a name since [`reclaim`](Inodes::reclaim) looked last.
    removed: AtomicBool,
    mounts: Mounts,
    forgotten: Forgotten,
}

impl Inodes {
    /// A table of the root alone, whose descriptor is given; `budget`: descriptors to keep, at least one.
    pub fn new(root: OwnedFd, budget: usize, handles: bool) -> io::Result<Inodes> {
        let st = sys::stat(root.as_fd())?;
        let mounts = Mounts::new(root.as_fd(), st.stx_mnt_id, handles)?;
        let handles = handles && mounts.has_handles(st.stx_mnt_id);
        let pins = Arc::new(AtomicUsize::new(0));
        let root = Arc::new(Inode {
            id: ROOT_ID,
            key: Key::of(&st),
            birth: birth(&st),
            kind: u32::from(st.stx_mode) & libc::S_IFMT,
            lookups: AtomicU64::new(1),
            opens: AtomicU32::new(1),
            used: AtomicBool::new(true),
            place: RwLock::new(Place::Pinned(Pin::new(root, &pins))),
            cover: Cover::default(),
        });
        let table = Inodes {
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            hasher: RandomState::default(),
            root,
            next: AtomicU64::new(1),
            pins,
            budget: budget.max(1),
            clock: Mutex::default(),
            handles,
            cooled: AtomicBool::new(false),
            removed: AtomicBool::new(false),
            mounts,
            forgotten: Forgotten::default(),
        };
        table.clear();
        Ok(table)
    }

    /// The shared directory.
    pub fn root(&self) -> &Arc<Inode> {
        &self.root
    }

    /// Whether an inode lies on the mount of the shared directory, not on one below it.
    pub fn is_of_share(&self, inode: &Inode) -> bool {
        inode.key.mount == self.root.key.mount
    }

    /// Whether inodes of the share's own file system have handles.
    pub fn has_handles(&self) -> bool {
        self.handles
    }

    /// Whether an unlinked inode may be known by a handle alone.
    pub fn has_cooled(&self) -> bool {
        self.cooled.load(Relaxed)
    }

    /// Descriptors in use.
    #[cfg(test)]
    pub fn descriptors(&self) -> usize {
        self.pins.load(Relaxed)
    }

    /// Numbers on the clock.
    #[cfg(test)]
    fn clock_len(&self) -> usize {
        self.clock.lock().len()
    }

    /// Inodes known.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.read().by_id.len()).sum()
    }

    fn shard_of_key(&self, key: &Key) -> u64 {
        self.hasher.hash_one(key) % SHARDS
    }

    fn shard(&self, id: u64) -> &RwLock<Shard> {
        let shard = if id == ROOT_ID { self.shard_of_key(&self.root.key) } else { id % SHARDS };
        &self.shards[shard as usize]
    }

    /// The inode with this number.
    ///
    /// # Errors
    /// `EBADF` when the guest does not know it.
    pub fn get(&self, id: u64) -> io::Result<Arc<Inode>> {
        if id == ROOT_ID {
            return Ok(self.root.clone());
        }
        self.shard(id).read().by_id.get(&id).cloned().ok_or_else(|| errno(libc::EBADF))
    }

    /// A descriptor (O_PATH) of the inode with this number, and the inode.
    ///
    /// # Errors
    /// `EBADF` when the guest does not know it, `ESTALE` when it is no more.
    pub fn open(&self, id: u64) -> io::Result<(Arc<Inode>, Arc<Pin>)> {
        let inode = self.get(id)?;
        let pin = self.pin(&inode)?;
        Ok((inode, pin))
    }

    /// A descriptor (O_PATH) of the inode.
    ///
    /// # Errors
    /// `ESTALE` when the inode is no more.
    pub fn pin(&self, inode: &Arc<Inode>) -> io::Result<Arc<Pin>> {
        // Also the cold ones: a second use says that they are hot.
        if !inode.used.load(Relaxed) {
            inode.used.store(true, Relaxed);
        }
        if let Some(pin) = inode.pinned() {
            return Ok(pin);
        }
        self.reopen(inode)
    }

    #[cold]
    fn reopen(&self, inode: &Arc<Inode>) -> io::Result<Arc<Pin>> {
        let Some(handle) = inode.handle() else {
            return inode.pinned().ok_or_else(|| errno(libc::ESTALE));
        };
        let pin = Pin::new(self.mounts.open(inode.key.mount, &handle)?, &self.pins);
        // A mount that the guest only looks at can be unmounted: only open files pin it.
        if self.is_of_share(inode) || inode.opens.load(Acquire) > 0 {
            self.warm(inode, &pin);
        }
        Ok(pin)
    }

    fn warm(&self, inode: &Arc<Inode>, pin: &Arc<Pin>) {
        let mut place = inode.place.write();
        if matches!(*place, Place::Handle(_)) {
            *place = Place::Pinned(pin.clone());
            drop(place);
            // On another mount only what is open has a descriptor, for as long as it is.
            if self.is_of_share(inode) {
                self.clock.lock().push_back(inode.id);
                self.make_room();
            }
        }
    }

    /// A descriptor that stays the inode's as long as the guest has the inode open.
    ///
    /// # Errors
    /// As [`pin`](Inodes::pin).
    pub fn hold(&self, inode: &Arc<Inode>) -> io::Result<Held> {
        inode.opens.fetch_add(1, AcqRel);
        match self.pin(inode) {
            Ok(pin) => {
                self.warm(inode, &pin);
                Ok(Held { inode: inode.clone(), pin })
            }
            Err(e) => {
                inode.opens.fetch_sub(1, AcqRel);
                Err(e)
            }
        }
    }

    /// A descriptor that a regular file can be read by. It takes the place of the O_PATH one, so that such a file has one
    /// descriptor and not two. `open` opens the file for reading.
    ///
    /// # Errors
    /// As [`pin`](Inodes::pin), and those of `open`.
    pub fn read_by(
        &self,
        inode: &Arc<Inode>,
        open: impl FnOnce(BorrowedFd<'_>) -> io::Result<OwnedFd>,
    ) -> io::Result<Arc<Pin>> {
        let pin = self.pin(inode)?;
        if pin.reads() {
            Ok(pin)
        } else if self.is_of_share(inode) {
            self.hold_reading(inode, open).map(|held| held.pin.clone())
        } else {
            // Another mount can be unmounted when nobody reads.
            Ok(Pin::reading(open(pin.as_fd())?, &self.pins))
        }
    }

    /// The same, and it stays the inode's until it is dropped.
    ///
    /// # Errors
    /// As [`read_by`](Inodes::read_by).
    pub fn hold_reading(
        &self,
        inode: &Arc<Inode>,
        open: impl FnOnce(BorrowedFd<'_>) -> io::Result<OwnedFd>,
    ) -> io::Result<Held> {
        let mut held = self.hold(inode)?;
        if !held.pin.reads() {
            held.pin = Pin::reading(open(held.pin.as_fd())?, &self.pins);
            let before = std::mem::replace(&mut *inode.place.write(), Place::Pinned(held.pin.clone()));
            drop(before);
        }
        Ok(held)
    }

    /// Lets go of a descriptor that the guest's open file had kept on a mount.
    pub fn released(&self, inode: &Arc<Inode>) {
        if !self.is_of_share(inode) && inode.opens.load(Acquire) == 0 {
            let _ = self.cool(inode);
        }
    }

    /// The inode, if the guest knows it already, of what has just been opened or looked at.
    pub fn find(&self, st: &libc::statx) -> Option<Arc<Inode>> {
        self.find_key(&Key::of(st))
    }

    /// The inode, if the guest knows it, that is this one here.
    pub fn find_key(&self, key: &Key) -> Option<Arc<Inode>> {
        self.shards[self.shard_of_key(key) as usize].read().by_key.get(key).cloned()
    }

    /// Counts a look-up of what `fd` (O_PATH) has opened. `parent` and `name`: where it was found.
    ///
    /// # Errors
    /// `ENFILE` when there are too many descriptors, none of which can be closed.
    pub fn enter(
        &self,
        fd: OwnedFd,
        st: &libc::statx,
        parent: &Arc<Inode>,
        name: &std::ffi::CStr,
    ) -> io::Result<Arc<Inode>> {
        let key = Key::of(st);
        let shard = self.shard_of_key(&key);
        let lock = &self.shards[shard as usize];
        if let Some(known) = self.count_known(lock, &key) {
            if !known.is_handle() {
                return Ok(known);
            }
            if let Some(known) = self.settle_known(lock, known, &fd)? {
                return Ok(known);
            }
        }
        if key.mount != parent.key.mount {
            let path = self.pin(parent)?;
            self.mounts.found(key.mount, parent.clone(), path.as_fd(), name, fd.as_fd());
        }
        let id = self.forgotten.take_id(&key, birth(st), fd.as_fd());
        self.insert(fd, st, id, shard)
    }

    fn count_known(&self, lock: &RwLock<Shard>, key: &Key) -> Option<Arc<Inode>> {
        let shard = lock.read();
        let known = shard.by_key.get(key)?;
        known.lookups.fetch_add(1, AcqRel);
        Some(known.clone())
    }

    /// An inode that is known by its handle has been found again: it is the same one, or another with its number.
    fn settle_known(&self, lock: &RwLock<Shard>, known: Arc<Inode>, fd: &OwnedFd) -> io::Result<Option<Arc<Inode>>> {
        let same = match (known.handle(), FileHandle::of(fd.as_fd())) {
            (Some(old), Ok(new)) => old == new,
            _ => true,
        };
        if same {
            if self.is_of_share(&known) {
                let pin = Pin::new(fd.try_clone()?, &self.pins);
                self.warm(&known, &pin);
            }
            return Ok(Some(known));
        }
        // The number was used again: whoever has the old inode gets ESTALE.
        let mut shard = lock.write();
        if shard.by_key.get(&known.key).is_some_and(|now| Arc::ptr_eq(now, &known)) {
            shard.by_key.remove(&known.key);
        }
        if known.lookups.fetch_sub(1, AcqRel) == 1 {
            shard.by_id.remove(&known.id);
        }
        Ok(None)
    }

    fn insert(&self, fd: OwnedFd, st: &libc::statx, id: Option<u64>, shard: u64) -> io::Result<Arc<Inode>> {
        let key = Key::of(st);
        let place = match self.mounts.handle_for(key.mount, fd.as_fd()) {
            Some(handle) => Place::Handle(handle),
            None => Place::Pinned(Pin::new(fd, &self.pins)),
        };
        let hot = matches!(place, Place::Pinned(_));
        if hot && self.pins.load(Relaxed) > self.budget {
            self.make_room();
            if self.pins.load(Relaxed) > self.budget + self.budget / 4 + 1 {
                return Err(errno(libc::ENFILE));
            }
        }
        let id = id.unwrap_or_else(|| self.next.fetch_add(1, Relaxed) * SHARDS + shard);
        let new = Arc::new(Inode {
            id,
            key,
            birth: birth(st),
            kind: u32::from(st.stx_mode) & libc::S_IFMT,
            lookups: AtomicU64::new(1),
            opens: AtomicU32::new(0),
            used: AtomicBool::new(false),
            place: RwLock::new(place),
            cover: Cover::default(),
        });
        let mut maps = self.shards[shard as usize].write();
        if let Some(known) = maps.by_key.get(&key).cloned() {
            // Another thread was faster.
            known.lookups.fetch_add(1, AcqRel);
            drop(maps);
            return Ok(known);
        }
        maps.by_key.insert(key, new.clone());
        maps.by_id.insert(id, new.clone());
        drop(maps);
        if hot {
            self.clock.lock().push_back(id);
            self.sweep();
        }
        Ok(new)
    }

    /// Forgets `count` look-ups of the inode; `remember`: it may be asked for again by its number. The inode, if those
    /// were all.
    pub fn forget(&self, id: u64, count: u64, remember: bool) -> Option<Arc<Inode>> {
        if id == ROOT_ID {
            return None;
        }
        let inode = self.get(id).ok()?;
        let lock = self.shard(id);
        let left = inode.lookups.load(Acquire).saturating_sub(count);
        // Names the inode outside of the lock; wasted when it is looked up again meanwhile.
        let handle = if left == 0 && remember { self.name(&inode) } else { None };
        let mut maps = lock.write();
        let left = inode.lookups.load(Acquire).saturating_sub(count);
        inode.lookups.store(left, Release);
        if left > 0 || !maps.by_id.get(&id).is_some_and(|now| Arc::ptr_eq(now, &inode)) {
            return None;
        }
        maps.by_id.remove(&id);
        if maps.by_key.get(&inode.key).is_some_and(|now| Arc::ptr_eq(now, &inode)) {
            maps.by_key.remove(&inode.key);
        }
        drop(maps);
        if let Some(handle) = handle {
            self.forgotten.remember(&inode, handle);
        }
        Some(inode)
    }

    fn name(&self, inode: &Arc<Inode>) -> Option<FileHandle> {
        if !self.handles {
            return None;
        }
        let Some(pin) = inode.pinned() else { return inode.handle() };
        // The handle of one without names leads nowhere, and a guest that removes much forgets as many of them.
        let may_be_gone = self.removed.load(Relaxed);
        if may_be_gone && is_nameless(&pin) {
            return None;
        }
        FileHandle::of(pin.as_fd()).ok()
    }

    /// An inode by the number that it had before the guest forgot it, looked up once more.
    ///
    /// # Errors
    /// `ESTALE` when it is no more, or was forgotten too long ago.
    pub fn recall(&self, id: u64) -> io::Result<Arc<Inode>> {
        if id == ROOT_ID {
            return Ok(self.root.clone());
        }
        let stale = || errno(libc::ESTALE);
        if let Some(known) = self.shard(id).read().by_id.get(&id) {
            known.lookups.fetch_add(1, AcqRel);
            return Ok(known.clone());
        }
        let (key, handle) = self.forgotten.find(id).ok_or_else(stale)?;
        let fd = self.mounts.open(key.mount, &handle)?;
        let st = sys::stat(fd.as_fd())?;
        if Key::of(&st) != key || self.shard_of_key(&key) != id % SHARDS {
            return Err(stale());
        }
        self.forgotten.take_id(&key, birth(&st), fd.as_fd());
        self.insert(fd, &st, Some(id), id % SHARDS)
    }

    /// Closes descriptors until there are no more than the budget has, if that can be done soon.
    fn make_room(&self) {
        for _ in 0..TRIES {
            if self.pins.load(Relaxed) <= self.budget {
                return;
            }
            let Some(id) = self.clock.lock().pop_front() else { return };
            let Ok(inode) = self.get(id) else { continue };
            if inode.is_handle() {
                continue;
            }
            if inode.used.swap(false, Relaxed) || !self.cool(&inode) {
                self.clock.lock().push_back(id);
            }
        }
    }

    /// Takes numbers off the clock that are no inodes any more.
    fn sweep(&self) {
        self.make_room();
        let most = 2 * self.pins.load(Relaxed) + 1024;
        if self.clock.lock().len() <= most {
            return;
        }
        let mut ids = std::mem::take(&mut *self.clock.lock());
        // One that was forgotten and found again has its number more than once.
        let mut seen = HashSet::new();
        ids.retain(|&id| seen.insert(id) && self.get(id).is_ok_and(|inode| !inode.is_handle()));
        let mut clock = self.clock.lock();
        ids.append(&mut clock);
        *clock = ids;
    }

    /// Keeps the inode by its handle, if that leads back to it; whether it has one now.
    fn cool(&self, inode: &Arc<Inode>) -> bool {
        if inode.opens.load(Acquire) > 0 || !self.mounts.has_handles(inode.key.mount) {
            return false;
        }
        let Some(pin) = inode.pinned() else { return true };
        let linked = || sys::stat(pin.as_fd()).is_ok_and(|st| st.stx_nlink > 0);
        let Ok(handle) = FileHandle::of(pin.as_fd()) else { return false };
        if !linked() {
            return false;
        }
        self.cooled.store(true, SeqCst);
        if !inode.keep_by_handle(handle) {
            return false;
        }
        // It may have been unlinked in between; and who unlinks looks at `cooled` first.
        if !linked() {
            *inode.place.write() = Place::Pinned(pin);
            return false;
        }
        true
    }

    /// The guest has removed a name, perhaps the last one of a file.
    pub fn removed(&self) {
        if !self.removed.load(Relaxed) {
            self.removed.store(true, Release);
        }
    }

    /// Has the space of files without names given back, as far as the guest does not use them; whether there were any.
    ///
    /// A descriptor keeps the file's space, and the guest tells only by and by what it has forgotten. Where it asks to open
    /// files (`asks`), all that it does not have open are given up: a program that holds one by an O_PATH descriptor
    /// loses it, so this is only for when the space is wanted. The guest's kernel does not wait for RELEASE when
    /// a program closes a file, so one that is still open may be closed at once. Where it does not ask, nobody knows what it
    /// uses, and all that can be done is to wait for what it forgets.
    pub fn reclaim(&self, asks: bool) -> bool {
        if !self.removed.swap(false, AcqRel) {
            return false;
        }
        let mut nameless = self.nameless_files();
        let end = Instant::now() + CLOSING;
        let is_gone = |inode: &Arc<Inode>| if asks { give_up(inode) } else { self.get(inode.id).is_err() };
        loop {
            let before = nameless.len();
            nameless.retain(|inode| !is_gone(inode));
            if nameless.len() < before {
                return true;
            }
            if nameless.is_empty() || Instant::now() >= end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Files with a descriptor and without a name.
    fn nameless_files(&self) -> Vec<Arc<Inode>> {
        let mut found = Vec::new();
        for lock in &self.shards {
            let files: Vec<_> = lock.read().by_id.values().filter(|inode| inode.is_file()).cloned().collect();
            found.extend(files.into_iter().filter(|inode| inode.pinned().is_some_and(|pin| is_nameless(&pin))));
        }
        found
    }

    /// Forgets all but the root: the guest has gone.
    pub fn clear(&self) {
        for (index, lock) in self.shards.iter().enumerate() {
            let mut new = Shard::default();
            if index as u64 == self.shard_of_key(&self.root.key) {
                new.by_key.insert(self.root.key, self.root.clone());
            }
            let old = std::mem::replace(&mut *lock.write(), new);
            drop(old);
        }
        self.clock.lock().clear();
        self.forgotten.clear();
        self.mounts.clear();
    }
}

/// Whether an inode has lost its last name.
fn is_nameless(pin: &Pin) -> bool {
    sys::stat(pin.as_fd()).is_ok_and(|st| st.stx_nlink == 0)
}

/// Gives up a file's descriptor, if the guest does not have the file open; returns whether it did.
fn give_up(inode: &Inode) -> bool {
    let handle = inode.pinned().and_then(|pin| FileHandle::of(pin.as_fd()).ok());
    handle.is_some_and(|handle| inode.keep_by_handle(handle))
}

#[cfg(test)]
#[path = "inodes_tests.rs"]
mod tests;
