//! What is open here for a guest that does not ask to open files (`unopened.rs`): files that it writes, until it has not
//! written for a while, as nobody tells of its close(2), and directories that it lists.

use super::coherence::Coherence;
use super::handles::Handle;
use super::inodes::{Inode, Inodes};
use super::sys::errno;
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::changes::kind;

/// How long a file stays open for writing after the last write.
const IDLE: Duration = Duration::from_millis(20);
/// How long there is a thread that closes files after the last one was open.
const CLOSER_RESTS: Duration = Duration::from_secs(1);
/// Directories that are kept open between two parts of their listings.
const LISTINGS: usize = 64;

#[derive(Debug)]
struct Writer {
    handle: Arc<Handle>,
    used: Instant,
}

impl Writer {
    /// Whether nobody has used it for so long, nor does just now: it is given out under the table's lock alone.
    fn is_idle(&self, now: Instant, idle: Duration) -> bool {
        now.saturating_duration_since(self.used) >= idle && Arc::strong_count(&self.handle) == 1
    }
}

/// Directories whose listings may go on.
#[derive(Debug, Default)]
struct Listings {
    /// By inode, each with the turn at which it was used last.
    open: HashMap<u64, (u64, Arc<Handle>)>,
    turn: u64,
}

/// What is open for requests without a handle.
#[derive(Debug)]
pub struct ByNumber {
    inodes: Arc<Inodes>,
    /// Files that may be open for writing though nobody writes to them just now.
    most: usize,
    writers: Mutex<HashMap<u64, Writer>>,
    /// Whether a thread closes them.
    has_closer: Mutex<bool>,
    /// Files of which the disk has not taken what was written, until they are written again.
    failed: Mutex<HashSet<u64>>,
    listings: Mutex<Listings>,
}

impl ByNumber {
    /// Nothing yet; `files`: how many the guest may have open in all.
    pub fn new(inodes: Arc<Inodes>, files: usize) -> ByNumber {
        ByNumber {
            inodes,
            // Each has a descriptor of its own, and its inode keeps one.
            most: files / 8,
            writers: Mutex::default(),
            has_closer: Mutex::new(false),
            failed: Mutex::default(),
            listings: Mutex::default(),
        }
    }

    /// Closes a file that was open for writing.
    fn close_writers(&self, coherence: &Coherence, writers: impl IntoIterator<Item = Arc<Handle>>) {
        for handle in writers {
            let Inode { id, key, .. } = *handle.held.inode;
            handle.close(&self.inodes);
            coherence.count_writer(id, -1);
            coherence.tell_of(kind::CLOSED, key);
        }
    }

    /// Keeps a file that is open for writing, unless another thread has been faster; the one that is kept.
    ///
    /// # Errors
    /// The system has no thread left that could close it.
    pub fn keep_writer(self: &Arc<Self>, handle: Arc<Handle>, coherence: &Arc<Coherence>) -> io::Result<Arc<Handle>> {
        let node = handle.held.inode.id;
        let mut writers = self.writers.lock();
        let used = Instant::now();
        let kept = writers.entry(node).or_insert_with(|| Writer { handle: handle.clone(), used }).handle.clone();
        let too_many = writers.len() > self.most;
        drop(writers);
        if Arc::ptr_eq(&kept, &handle) {
            coherence.count_writer(node, 1);
        }
        if too_many {
            self.close_writers(coherence, self.take_idle(Duration::ZERO));
        }
        let mut has_closer = self.has_closer.lock();
        if !*has_closer {
            let (files, coherence) = (Arc::downgrade(self), Arc::downgrade(coherence));
            tunnelfs_program::thread::spawn("close", move || close_idle(&files, &coherence))?;
            *has_closer = true;
        }
        Ok(kept)
    }

    /// Closes a file that is open for writing and that nobody has written for so long.
    pub fn close_writer(&self, node: u64, idle: Duration, coherence: &Coherence) {
        self.close_writers(coherence, self.take_idle_writer(node, idle));
    }

    /// Closes all that nobody uses just now.
    pub fn close_unused(&self, coherence: &Coherence) {
        self.close_writers(coherence, self.take_idle(Duration::ZERO));
        let listings = std::mem::take(&mut *self.listings.lock());
        drop(listings);
    }

    /// The file that is open for writing, if it is.
    pub fn writer(&self, node: u64) -> Option<Arc<Handle>> {
        let mut writers = self.writers.lock();
        let writer = writers.get_mut(&node)?;
        writer.used = Instant::now();
        Some(writer.handle.clone())
    }

    /// Takes the writers that nobody has used for so long, nor does just now.
    fn take_idle(&self, idle: Duration) -> Vec<Arc<Handle>> {
        let now = Instant::now();
        let mut writers = self.writers.lock();
        let nodes: Vec<u64> =
            writers.iter().filter(|(_, writer)| writer.is_idle(now, idle)).map(|(&node, _)| node).collect();
        nodes.iter().filter_map(|node| writers.remove(node)).map(|writer| writer.handle).collect()
    }

    /// The same of one file.
    fn take_idle_writer(&self, node: u64, idle: Duration) -> Option<Arc<Handle>> {
        let mut writers = self.writers.lock();
        let is_idle = writers.get(&node)?.is_idle(Instant::now(), idle);
        if is_idle {
            writers.remove(&node).map(|writer| writer.handle)
        } else {
            None
        }
    }

    /// Takes a directory that is kept: nobody else lists by it meanwhile.
    pub fn take_listing(&self, node: u64) -> Option<Arc<Handle>> {
        self.listings.lock().open.remove(&node).map(|(_, handle)| handle)
    }

    /// Keeps a directory whose listing goes on, in the place of the one that was kept for longest if there are many.
    pub fn keep_listing(&self, node: u64, handle: Arc<Handle>) {
        let mut listings = self.listings.lock();
        let Listings { turn, open } = &mut *listings;
        *turn += 1;
        let before = open.insert(node, (*turn, handle));
        let surplus = if open.len() > LISTINGS { open.iter().min_by_key(|(_, (turn, _))| *turn) } else { None };
        let oldest = surplus.map(|(&node, _)| node).and_then(|node| open.remove(&node));
        drop(listings);
        drop((before, oldest));
    }

    /// After a sync. Natively each who has the file open is told of a disk's error once. Who that is nobody knows here, so
    /// all are told until the file is written again: more often, and not less.
    pub fn synced(&self, node: u64, result: io::Result<()>) -> io::Result<()> {
        let mut failed = self.failed.lock();
        match result {
            Ok(()) if failed.contains(&node) => Err(errno(libc::EIO)),
            Err(e) if e.raw_os_error() == Some(libc::EIO) => {
                failed.insert(node);
                Err(e)
            }
            other => other,
        }
    }

    /// Before a write, and when the file is forgotten.
    pub fn written(&self, node: u64) {
        let mut failed = self.failed.lock();
        if !failed.is_empty() {
            failed.remove(&node);
        }
    }

    /// Closes all.
    pub fn clear(&self) {
        self.failed.lock().clear();
        let writers = std::mem::take(&mut *self.writers.lock());
        let listings = std::mem::take(&mut *self.listings.lock());
        drop((writers, listings));
    }
}

/// Closes what has not been written for a while, until nothing has been open for long or the file system has gone.
fn close_idle(files: &Weak<ByNumber>, coherence: &Weak<Coherence>) {
    let mut last_open = Instant::now();
    loop {
        std::thread::sleep(IDLE / 2);
        let (Some(files), Some(coherence)) = (files.upgrade(), coherence.upgrade()) else { return };
        let now = Instant::now();
        files.close_writers(&coherence, files.take_idle(IDLE));
        let mut has_closer = files.has_closer.lock();
        if !files.writers.lock().is_empty() {
            last_open = now;
        } else if now.saturating_duration_since(last_open) >= CLOSER_RESTS {
            *has_closer = false;
            return;
        }
    }
}
