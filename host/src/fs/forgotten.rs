//! Inodes that the guest has forgotten, and may ask for again by their numbers: a file handle in the guest
//! (name_to_handle_at, NFS) holds such a number, and is opened by a LOOKUP of `.` in it.

use super::inode::{Birth, Inode, Key};
use super::sys::FileHandle;
use foldhash::HashMap;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

/// Inodes remembered at a time, which bounds the memory.
const MOST: usize = 1 << 16;

#[derive(Debug)]
struct Entry {
    key: Key,
    birth: Birth,
    handle: FileHandle,
    /// When it was forgotten, of all.
    turn: u64,
}

#[derive(Debug, Default)]
struct Tables {
    by_id: HashMap<u64, Entry>,
    by_key: HashMap<Key, u64>,
    /// Turns and numbers; those of inodes that were found again, or forgotten again, are of the past.
    order: VecDeque<(u64, u64)>,
    turn: u64,
}

impl Tables {
    fn remove(&mut self, id: u64) {
        if let Some(entry) = self.by_id.remove(&id) {
            if self.by_key.get(&entry.key) == Some(&id) {
                self.by_key.remove(&entry.key);
            }
        }
    }
}

/// Those that were forgotten last.
#[derive(Debug, Default)]
pub struct Forgotten(Mutex<Tables>);

impl Forgotten {
    /// Remembers an inode by its number and its handle.
    pub fn remember(&self, inode: &Inode, handle: FileHandle) {
        let (id, key, birth) = (inode.id, inode.key, inode.birth);
        let mut tables = self.0.lock();
        tables.turn += 1;
        let turn = tables.turn;
        tables.by_id.insert(id, Entry { key, birth, handle, turn });
        tables.by_key.insert(key, id);
        tables.order.push_back((turn, id));
        while tables.order.len() > MOST {
            if let Some((turn, id)) = tables.order.pop_front() {
                if tables.by_id.get(&id).is_some_and(|entry| entry.turn == turn) {
                    tables.remove(id);
                }
            }
        }
    }

    /// What had this number.
    pub fn find(&self, id: u64) -> Option<(Key, FileHandle)> {
        self.0.lock().by_id.get(&id).map(|entry| (entry.key, entry.handle.clone()))
    }

    /// The number that this very inode had: it gets the same one again. Asks for its handle only where the time of birth
    /// does not tell.
    pub fn take_id(&self, key: &Key, birth: Birth, fd: BorrowedFd<'_>) -> Option<u64> {
        let (id, known_birth, handle) = {
            let tables = self.0.lock();
            let id = *tables.by_key.get(key)?;
            let entry = tables.by_id.get(&id)?;
            (id, entry.birth, birth.is_none().then(|| entry.handle.clone()))
        };
        let same = match handle {
            Some(handle) => FileHandle::of(fd).is_ok_and(|now| now == handle),
            None => birth == known_birth,
        };
        self.0.lock().remove(id);
        same.then_some(id)
    }

    /// Forgets them for good.
    pub fn clear(&self) {
        let old = std::mem::take(&mut *self.0.lock());
        drop(old);
    }
}
