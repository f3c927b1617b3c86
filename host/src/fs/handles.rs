//! Files and directories that the guest has open.

use super::inodes::{Held, Inodes};
use super::sys::errno;
use foldhash::HashMap;
use parking_lot::{Mutex, RwLock};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::*};
use std::sync::Arc;

/// Parts of the table, each behind a lock of its own.
const SHARDS: u64 = 64;

/// One open file or directory.
#[derive(Debug)]
pub struct Handle {
    file: OwnedFd,
    /// Its inode keeps its descriptor meanwhile.
    pub held: Held,
    /// The flags that it was opened with.
    pub flags: i32,
    /// A directory's position; `None`: not known.
    pub position: Mutex<Option<u64>>,
    _count: Counted,
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Handle {
    /// Of a file that has just been opened with `flags`.
    pub fn new(file: OwnedFd, held: Held, flags: i32, count: Counted) -> Handle {
        Handle { file, held, flags, position: Mutex::new(Some(0)), _count: count }
    }

    /// Closes the file, unless somebody else uses the handle, and lets its mount be unmounted then.
    pub fn close(self: Arc<Handle>, inodes: &Inodes) {
        let inode = self.held.inode.clone();
        drop(self);
        inodes.released(&inode);
    }

    /// Whether the file can be written through this handle.
    pub fn writes(&self) -> bool {
        self.flags & libc::O_ACCMODE != libc::O_RDONLY
    }
}

/// One of the descriptors that open files may take.
#[derive(Debug)]
pub struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// The table.
#[derive(Debug)]
pub struct Handles {
    shards: Vec<RwLock<HashMap<u64, Arc<Handle>>>>,
    next: AtomicU64,
    /// In the table.
    known: AtomicUsize,
    /// Descriptors.
    open: Arc<AtomicUsize>,
    most: usize,
}

impl Handles {
    /// For at most so many open files.
    pub fn new(most: usize) -> Handles {
        Handles {
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            next: AtomicU64::new(1),
            known: AtomicUsize::new(0),
            open: Arc::default(),
            most,
        }
    }

    /// Takes one of the descriptors, before a file is opened.
    ///
    /// # Errors
    /// `ENFILE` when too many are open.
    pub fn reserve(&self) -> io::Result<Counted> {
        let counted = Counted(self.open.clone());
        if self.open.fetch_add(1, Relaxed) >= self.most {
            return Err(errno(libc::ENFILE));
        }
        Ok(counted)
    }

    /// Keeps an open file; its number, which is never 0 and never used again.
    pub fn add(&self, handle: Arc<Handle>) -> u64 {
        let id = self.next.fetch_add(1, Relaxed);
        self.known.fetch_add(1, Relaxed);
        self.shard(id).write().insert(id, handle);
        id
    }

    /// The open file with this number, of this inode.
    ///
    /// # Errors
    /// `EBADF` when there is none.
    pub fn get(&self, id: u64, inode: u64) -> io::Result<Arc<Handle>> {
        let found = self.shard(id).read().get(&id).cloned();
        found.filter(|handle| handle.held.inode.id == inode).ok_or_else(|| errno(libc::EBADF))
    }

    /// Takes it out of the table; closed when nobody uses it any more.
    ///
    /// # Errors
    /// As [`get`](Handles::get).
    pub fn remove(&self, id: u64, inode: u64) -> io::Result<Arc<Handle>> {
        let mut shard = self.shard(id).write();
        match shard.remove(&id) {
            Some(handle) if handle.held.inode.id == inode => {
                self.known.fetch_sub(1, Relaxed);
                Ok(handle)
            }
            Some(other) => {
                shard.insert(id, other);
                Err(errno(libc::EBADF))
            }
            None => Err(errno(libc::EBADF)),
        }
    }

    /// Takes those of an inode out of the table: nobody can have them any more.
    pub fn forget(&self, inode: u64) {
        if self.known.load(Relaxed) == 0 {
            return;
        }
        for shard in &self.shards {
            let of_inode = |(_, handle): &(&u64, &Arc<Handle>)| handle.held.inode.id == inode;
            let ids: Vec<u64> = shard.read().iter().filter(of_inode).map(|(&id, _)| id).collect();
            let old: Vec<_> = ids.iter().filter_map(|id| shard.write().remove(id)).collect();
            self.known.fetch_sub(old.len(), Relaxed);
        }
    }

    /// Closes all of them.
    pub fn clear(&self) {
        for shard in &self.shards {
            let old = std::mem::take(&mut *shard.write());
            self.known.fetch_sub(old.len(), Relaxed);
            drop(old);
        }
    }

    fn shard(&self, id: u64) -> &RwLock<HashMap<u64, Arc<Handle>>> {
        &self.shards[(id % SHARDS) as usize]
    }
}
