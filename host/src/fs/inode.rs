//! One inode that a guest knows, and how it is found again.

use super::cover::Cover;
use super::sys::{device, FileHandle};
use parking_lot::RwLock;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::Arc;

/// What an inode is on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub device: u64,
    pub ino: u64,
    pub mount: u64,
}

impl Key {
    pub fn of(st: &libc::statx) -> Key {
        Key { device: device(st.stx_dev_major, st.stx_dev_minor), ino: st.stx_ino, mount: st.stx_mnt_id }
    }
}

/// When an inode was made, which tells it from a later one with its number: seconds and nanoseconds. `None`: the file
/// system does not say.
pub type Birth = Option<(i64, u32)>;

/// Returns an inode's time of birth.
pub fn birth(st: &libc::statx) -> Birth {
    (st.stx_mask & libc::STATX_BTIME != 0).then_some((st.stx_btime.tv_sec, st.stx_btime.tv_nsec))
}

/// A descriptor that keeps an inode in reach, counted as long as anybody uses it: O_PATH, or a regular file that is
/// open for reading.
#[derive(Debug)]
pub struct Pin {
    fd: OwnedFd,
    reads: bool,
    count: Arc<AtomicUsize>,
}

impl Pin {
    pub(super) fn new(fd: OwnedFd, count: &Arc<AtomicUsize>) -> Arc<Pin> {
        Pin::with(fd, false, count)
    }

    /// Of a file that is open for reading.
    pub(super) fn reading(fd: OwnedFd, count: &Arc<AtomicUsize>) -> Arc<Pin> {
        Pin::with(fd, true, count)
    }

    fn with(fd: OwnedFd, reads: bool, count: &Arc<AtomicUsize>) -> Arc<Pin> {
        count.fetch_add(1, Relaxed);
        Arc::new(Pin { fd, reads, count: count.clone() })
    }

    /// Whether the file can be read by it.
    pub fn reads(&self) -> bool {
        self.reads
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Relaxed);
    }
}

impl AsFd for Pin {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// How an inode is found again.
#[derive(Debug)]
pub(super) enum Place {
    Pinned(Arc<Pin>),
    Handle(FileHandle),
}

/// One inode that a guest knows.
#[derive(Debug)]
pub struct Inode {
    pub id: u64,
    pub key: Key,
    pub birth: Birth,
    /// S_IFMT bits.
    pub kind: u32,
    /// What the guest has to forget; it is 0 only under its shard's lock, by who removes the inode.
    pub(super) lookups: AtomicU64,
    /// Open files, and others who need the descriptor to stay.
    pub(super) opens: AtomicU32,
    pub(super) used: AtomicBool,
    pub(super) place: RwLock<Place>,
    /// Which marks watch it.
    pub cover: Cover,
}

impl Inode {
    /// Whether the inode is a regular file.
    pub fn is_file(&self) -> bool {
        self.kind == libc::S_IFREG
    }

    /// Whether the inode is a directory.
    pub fn is_dir(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    pub(super) fn pinned(&self) -> Option<Arc<Pin>> {
        match &*self.place.read() {
            Place::Pinned(pin) => Some(pin.clone()),
            Place::Handle(_) => None,
        }
    }

    pub(super) fn handle(&self) -> Option<FileHandle> {
        match &*self.place.read() {
            Place::Pinned(_) => None,
            Place::Handle(handle) => Some(handle.clone()),
        }
    }

    /// The handle that the inode is kept by, or its descriptor.
    pub fn found_by(&self) -> Result<FileHandle, Arc<Pin>> {
        match &*self.place.read() {
            Place::Pinned(pin) => Err(pin.clone()),
            Place::Handle(handle) => Ok(handle.clone()),
        }
    }

    /// Puts a handle in the place of the descriptor, unless somebody has the inode open; returns whether it did.
    pub(super) fn keep_by_handle(&self, handle: FileHandle) -> bool {
        let mut place = self.place.write();
        let idle = self.opens.load(Acquire) == 0;
        if idle {
            *place = Place::Handle(handle);
        }
        idle
    }

    pub(super) fn is_handle(&self) -> bool {
        matches!(&*self.place.read(), Place::Handle(_))
    }
}

/// Keeps an inode's descriptor, as long as it lives.
#[derive(Debug)]
pub struct Held {
    pub inode: Arc<Inode>,
    pub pin: Arc<Pin>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.inode.opens.fetch_sub(1, AcqRel);
    }
}
