//! Inodes that the guest has forgotten, and may ask for again by their numbers: a file handle in the guest
//! (name_to_handle_at, NFS) holds such a number, and is opened by a LOOKUP of `.` in it.

use super::inodes::Key;
use super::sys::FileHandle;
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::os::fd::BorrowedFd;

/// Inodes remembered at a time, which bounds the memory.
const MOST: usize = 1 << 16;

#[derive(Debug, Default)]
struct Tables {
    by_id: HashMap<u64, (Key, FileHandle)>,
    by_key: HashMap<Key, u64>,
    order: VecDeque<u64>,
}

impl Tables {
    fn remove(&mut self, id: u64) {
        if let Some((key, _)) = self.by_id.remove(&id) {
            if self.by_key.get(&key) == Some(&id) {
                self.by_key.remove(&key);
            }
        }
    }
}

/// Those that were forgotten last.
#[derive(Debug, Default)]
pub struct Forgotten(Mutex<Tables>);

impl Forgotten {
    /// Remembers an inode by its number and its handle.
    pub fn remember(&self, id: u64, key: Key, handle: FileHandle) {
        let mut tables = self.0.lock();
        if tables.by_id.insert(id, (key, handle)).is_none() {
            tables.order.push_back(id);
        }
        tables.by_key.insert(key, id);
        // Numbers that were taken stay in the order until they come to its front.
        while tables.order.len() > MOST {
            if let Some(oldest) = tables.order.pop_front() {
                tables.remove(oldest);
            }
        }
    }

    /// What had this number.
    pub fn find(&self, id: u64) -> Option<(Key, FileHandle)> {
        self.0.lock().by_id.get(&id).cloned()
    }

    /// The number that this very inode had: it gets the same one again.
    pub fn take_id(&self, key: &Key, fd: BorrowedFd<'_>) -> Option<u64> {
        let (id, handle) = {
            let tables = self.0.lock();
            let id = *tables.by_key.get(key)?;
            (id, tables.by_id.get(&id)?.1.clone())
        };
        let same = FileHandle::of(fd).is_ok_and(|now| now == handle);
        self.0.lock().remove(id);
        same.then_some(id)
    }

    /// Forgets them for good.
    pub fn clear(&self) {
        let old = std::mem::take(&mut *self.0.lock());
        drop(old);
    }
}
