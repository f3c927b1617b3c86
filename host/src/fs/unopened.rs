//! Files and directories that the guest uses without having asked to open them: its requests have their inode's number
//! and no handle.
//!
//! A guest's kernel that has been answered ENOSYS to OPEN and OPENDIR does not ask again (`no_open` and `no_opendir` of
//! linux/fs/fuse). A file is then read by its inode's own descriptor; what is written or listed is opened and kept for a
//! while (`by_number.rs`).

use super::cover::Watch;
use super::handles::{Counted, Handle};
use super::inodes::{Inode, Pin};
use super::passthrough::Passthrough;
use super::sys::{self, errno};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_fuse_abi::NO_HANDLE;

/// How long nobody has written to a file that is closed since somebody reads it.
pub(super) const READ_AFTER: Duration = Duration::from_millis(5);
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
        let pin = self.read_by(&inode)?;
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
            return self.open_listing(&inode).map(|(handle, _)| Opened::Handle(handle));
        }
        self.read_by(&regular(inode)?).map(Opened::Inode)
    }

    fn file(&self, node: u64) -> io::Result<Arc<Inode>> {
        regular(self.inodes.get(node)?)
    }

    /// A descriptor that a file can be read by.
    fn read_by(&self, inode: &Arc<Inode>) -> io::Result<Arc<Pin>> {
        self.inodes.read_by(inode, |pin| self.reopen(pin, libc::O_RDONLY))
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
        self.by_number.keep_writer(Arc::new(Handle::new(file, held, flags, count)), &self.coherence)
    }

    /// Keeps what CREATE has opened: the kernel does not tell when it is closed.
    pub(super) fn keep_created(&self, handle: Arc<Handle>) -> io::Result<()> {
        if handle.writes() {
            self.coherence.will_write(handle.held.inode.id);
            self.by_number.keep_writer(handle, &self.coherence)?;
        }
        Ok(())
    }

    /// Closes a file that is open for writing and that nobody has written for so long: readers get no lease while it is
    /// open.
    pub(super) fn close_writer(&self, node: u64, idle: Duration) {
        if self.skips_open() {
            self.by_number.close_writer(node, idle, &self.coherence);
        }
    }

    /// One of the descriptors for open files; of the writers that are not in use some are closed for it.
    pub(super) fn reserve(&self) -> io::Result<Counted> {
        self.handles.reserve().or_else(|_| {
            self.by_number.close_unused(&self.coherence);
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
            None => self.open_listing(&self.inodes.get(node)?).map(|(handle, _)| handle),
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
            handle.close(&self.inodes);
        }
    }

    /// Opens a directory; and how it was watched before that.
    pub(super) fn open_listing(&self, inode: &Arc<Inode>) -> io::Result<(Arc<Handle>, Option<Arc<Watch>>)> {
        if !inode.is_dir() {
            return Err(errno(libc::ENOTDIR));
        }
        let count = self.reserve()?;
        let held = self.inodes.hold(inode)?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        // Half of what `reopen` costs, but it needs the right to search.
        let pin = held.pin.as_fd();
        let watch = self.coherence.watch(inode, pin);
        let dir = sys::open_at(pin, c".", flags, 0).or_else(|_| self.reopen(pin, flags))?;
        Ok((Arc::new(Handle::new(dir, held, flags, count)), watch))
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

/// Nothing but a regular file may be opened by its number.
fn regular(inode: Arc<Inode>) -> io::Result<Arc<Inode>> {
    if inode.is_file() {
        Ok(inode)
    } else {
        Err(errno(libc::EBADF))
    }
}
