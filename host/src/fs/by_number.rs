//! Files and directories that the guest uses without having asked to open them: its requests have their inode's number
//! and no handle.
//!
//! A guest's kernel that has been answered ENOSYS to OPEN and OPENDIR does not ask again (`no_open` and `no_opendir` of
//! linux/fs/fuse). A file is then read by its inode's own descriptor. One that is written is opened here, and closed
//! when it has not been written for a while, as nobody tells of the guest's close(2). A directory is open while it is
//! listed.

use super::coherence::Coherence;
use super::handles::{Counted, Handle};
use super::inodes::{Inode, Inodes, Pin};
use super::listener::Happening;
use super::passthrough::Passthrough;
use super::sys::{self, errno};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::changes::kind;
use tunnelfs_fuse_abi::NO_HANDLE;

/// How long a file stays open for writing after the last write.
const IDLE: Duration = Duration::from_millis(20);
/// How long nobody has written to a file that is closed since somebody reads it.
pub(super) const READ_AFTER: Duration = Duration::from_millis(5);
/// How long there is a thread that closes files after the last one was open.
const CLOSER_RESTS: Duration = Duration::from_secs(1);
/// Directories that are kept open between two parts of their listings.
const LISTINGS: usize = 64;

/// What a request reads or changes.
#[derive(Debug)]
pub enum Opened {
    /// By its handle, or a file that is open for writing.
    Handle(Arc<Handle>),
    /// By the inode's own descriptor, which can be read by.
    Inode(Arc<Pin>),
}

impl AsFd for Opened {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Opened::Handle(handle) => handle.as_fd(),
            Opened::Inode(pin) => pin.as_fd(),
        }
    }
}

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
    writers: Mutex<HashMap<u64, Writer>>,
    /// Whether a thread closes them.
    has_closer: Mutex<bool>,
    /// Files of which the disk has not taken what was written, until they are written again.
    failed: Mutex<HashSet<u64>>,
    listings: Mutex<Listings>,
}

impl ByNumber {
    /// Nothing yet.
    pub fn new(inodes: Arc<Inodes>) -> ByNumber {
        ByNumber {
            inodes,
            writers: Mutex::default(),
            has_closer: Mutex::new(false),
            failed: Mutex::default(),
            listings: Mutex::default(),
        }
    }

    /// Closes what nobody uses any more.
    fn close(&self, handle: Arc<Handle>) {
        let inode = handle.held.inode.clone();
        drop(handle);
        self.inodes.released(&inode);
    }

    /// Closes a file that was open for writing.
    fn close_writers(&self, coherence: &Coherence, writers: impl IntoIterator<Item = Arc<Handle>>) {
        for handle in writers {
            let Inode { id, key, .. } = *handle.held.inode;
            self.close(handle);
            coherence.count_writer(id, -1);
            coherence.tell(&Happening { kind: kind::CLOSED, node: Some(key), ..Happening::default() });
        }
    }

    fn writer(&self, node: u64) -> Option<Arc<Handle>> {
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

    fn take_listing(&self, node: u64) -> Option<Arc<Handle>> {
        self.listings.lock().open.remove(&node).map(|(_, handle)| handle)
    }

    fn keep_listing(&self, node: u64, handle: Arc<Handle>) {
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
    fn synced(&self, node: u64, result: io::Result<()>) -> io::Result<()> {
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
    fn written(&self, node: u64) {
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

impl Passthrough {
    /// Whether a request is one without a handle.
    pub(super) fn is_by_number(&self, fh: u64) -> bool {
        matches!(fh, 0 | NO_HANDLE) && self.skips_open()
    }

    /// What a request reads.
    pub(super) fn readable(&self, fh: u64, node: u64) -> io::Result<Opened> {
        if !self.is_by_number(fh) {
            return self.handle(fh, node).map(Opened::Handle);
        }
        let inode = self.file(node)?;
        self.close_writer(node, READ_AFTER);
        let pin = self.inodes.read_by(&inode, |pin| self.reopen(pin, libc::O_RDONLY))?;
        self.coherence.reads(&inode, &pin);
        Ok(Opened::Inode(pin))
    }

    /// What a request writes.
    pub(super) fn writable(&self, fh: u64, node: u64) -> io::Result<Arc<Handle>> {
        if !self.is_by_number(fh) {
            return self.handle(fh, node);
        }
        self.by_number.written(node);
        match self.by_number.writer(node) {
            Some(handle) => Ok(handle),
            None => self.open_writer(node),
        }
    }

    /// Syncs a file or a directory.
    pub(super) fn sync(
        &self,
        fh: u64,
        node: u64,
        sync: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        let done = sync(self.any(fh, node)?.as_fd());
        if self.is_by_number(fh) {
            self.by_number.synced(node, done)
        } else {
            done
        }
    }

    /// What a request syncs, or asks for its layout: nothing is read.
    pub(super) fn any(&self, fh: u64, node: u64) -> io::Result<Opened> {
        if !self.is_by_number(fh) {
            return self.handle(fh, node).map(Opened::Handle);
        }
        if let Some(writer) = self.by_number.writer(node) {
            return Ok(Opened::Handle(writer));
        }
        let inode = self.inodes.get(node)?;
        if inode.is_dir() {
            return self.open_listing(&inode).map(Opened::Handle);
        }
        let inode = self.file(node)?;
        self.inodes.read_by(&inode, |pin| self.reopen(pin, libc::O_RDONLY)).map(Opened::Inode)
    }

    /// The inode of a regular file: nothing else may be opened by its number.
    fn file(&self, node: u64) -> io::Result<Arc<Inode>> {
        self.inodes.get(node).and_then(|inode| if inode.is_file() { Ok(inode) } else { Err(errno(libc::EBADF)) })
    }

    fn open_writer(&self, node: u64) -> io::Result<Arc<Handle>> {
        let inode = self.file(node)?;
        self.coherence.will_write(node);
        let count = self.reserve()?;
        let held = self.inodes.hold(&inode)?;
        let open = |flags: i32| self.reopen(held.pin.as_fd(), flags).map(|file| (file, flags));
        let (file, flags) = match open(libc::O_RDWR) {
            // It is append-only.
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => open(libc::O_RDWR | libc::O_APPEND)?,
            other => other?,
        };
        self.keep_writer(Arc::new(Handle::new(file, held, flags, count)))
    }

    /// Keeps what CREATE has opened: the kernel does not tell when it is closed.
    pub(super) fn keep_created(&self, handle: Arc<Handle>) -> io::Result<()> {
        if handle.writes() {
            self.coherence.will_write(handle.held.inode.id);
            self.keep_writer(handle)?;
        }
        Ok(())
    }

    /// Keeps a file that is open for writing, unless another thread has been faster; the one that is kept.
    fn keep_writer(&self, handle: Arc<Handle>) -> io::Result<Arc<Handle>> {
        let node = handle.held.inode.id;
        let mut writers = self.by_number.writers.lock();
        let used = Instant::now();
        let kept = writers.entry(node).or_insert_with(|| Writer { handle: handle.clone(), used }).handle.clone();
        drop(writers);
        if Arc::ptr_eq(&kept, &handle) {
            self.coherence.count_writer(node, 1);
        }
        let mut has_closer = self.by_number.has_closer.lock();
        if !*has_closer {
            let (files, coherence) = (Arc::downgrade(&self.by_number), Arc::downgrade(&self.coherence));
            tunnelfs_program::thread::spawn("close", move || close_idle(&files, &coherence))?;
            *has_closer = true;
        }
        Ok(kept)
    }

    /// Closes a file that is open for writing and that nobody has written for so long: while it is open there is no lease
    /// for those that read it.
    pub(super) fn close_writer(&self, node: u64, idle: Duration) {
        let writer = self.by_number.take_idle_writer(node, idle);
        self.by_number.close_writers(&self.coherence, writer);
    }

    /// One of the descriptors for open files; of the writers that are not in use some are closed for it.
    pub(super) fn reserve(&self) -> io::Result<Counted> {
        self.handles.reserve().or_else(|_| {
            self.by_number.close_writers(&self.coherence, self.by_number.take_idle(Duration::ZERO));
            let listings = std::mem::take(&mut *self.by_number.listings.lock());
            drop(listings);
            self.handles.reserve()
        })
    }

    /// A directory to list: nobody else lists it by this open file until [`listed`](Passthrough::listed).
    pub(super) fn listing(&self, fh: u64, node: u64) -> io::Result<Arc<Handle>> {
        if !self.is_by_number(fh) {
            return self.handle(fh, node);
        }
        match self.by_number.take_listing(node) {
            Some(handle) => Ok(handle),
            None => self.open_listing(&self.inodes.get(node)?),
        }
    }

    /// After a part of a listing: keeps the directory open if the listing goes on. Not one of another mount, which then
    /// could not be unmounted.
    pub(super) fn listed(&self, fh: u64, node: u64, handle: Arc<Handle>, goes_on: bool) {
        if !self.is_by_number(fh) {
            return;
        }
        if goes_on && self.inodes.is_of_share(&handle.held.inode) {
            self.by_number.keep_listing(node, handle);
        } else {
            self.by_number.close(handle);
        }
    }

    /// Opens a directory.
    pub(super) fn open_listing(&self, inode: &Arc<Inode>) -> io::Result<Arc<Handle>> {
        if !inode.is_dir() {
            return Err(errno(libc::ENOTDIR));
        }
        let count = self.reserve()?;
        let held = self.inodes.hold(inode)?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        // Half of what `reopen` costs, but it needs the right to search.
        let pin = held.pin.as_fd();
        self.coherence.watch(inode, pin);
        let dir = sys::open_at(pin, c".", flags, 0).or_else(|_| self.reopen(pin, flags))?;
        Ok(Arc::new(Handle::new(dir, held, flags, count)))
    }

    /// The guest has forgotten an inode.
    pub(super) fn forget_opened(&self, node: u64) {
        if self.skips_open() {
            drop(self.by_number.take_listing(node));
            self.by_number.written(node);
            // What it had opened before it knew: its kernel sends no RELEASE then.
            self.handles.forget(node);
            self.close_writer(node, Duration::ZERO);
        }
    }
}
