//! File systems below the shared directory.
//!
//! A descriptor keeps its file system mounted. So inodes of other mounts than the shared directory's are kept by their
//! handles, and their mount is reached by the name that it was found by: the machine's owner can unmount what the
//! guest has only looked at.

use super::inodes::{Inode, Key};
use super::sys::{self, errno, FileHandle};
use foldhash::HashMap;
use parking_lot::RwLock;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Where a mount is found.
#[derive(Debug)]
struct Mount {
    parent: Arc<Inode>,
    name: CString,
}

/// The mounts that inodes were found on.
#[derive(Debug)]
pub struct Mounts {
    root_id: u64,
    /// The shared directory, open for reading; `None` without handles.
    root: Option<OwnedFd>,
    /// Those whose inodes can be kept by handles; `None`: they cannot.
    others: RwLock<HashMap<u64, Option<Arc<Mount>>>>,
}

/// How a directory is opened that handles are opened on.
const DIRECTORY: i32 = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_NONBLOCK;

/// Whether handles of this very file lead back to it, and will do so later. Those of FUSE lead only to what its kernel
/// has in its cache, unless its server knows NFS export, and nobody tells whether it does.
fn leads_back(root: BorrowedFd<'_>, file: BorrowedFd<'_>) -> bool {
    let is_fuse =
        nix::sys::statfs::fstatfs(root).is_ok_and(|st| st.filesystem_type() == nix::sys::statfs::FUSE_SUPER_MAGIC);
    !is_fuse && FileHandle::of(file).and_then(|handle| handle.open(root, libc::O_PATH)).is_ok()
}

impl Mounts {
    /// With the shared directory's own mount alone.
    pub fn new(root: BorrowedFd<'_>, root_id: u64, handles: bool) -> io::Result<Mounts> {
        let root = if handles {
            sys::open_at(root, c".", DIRECTORY, 0).ok().filter(|dir| leads_back(dir.as_fd(), root))
        } else {
            None
        };
        Ok(Mounts { root_id, root, others: RwLock::default() })
    }

    /// Whether inodes of this mount can be kept by their handles.
    pub fn has_handles(&self, mount: u64) -> bool {
        self.root.is_some() && (mount == self.root_id || matches!(self.others.read().get(&mount), Some(Some(_))))
    }

    /// The handle that an inode of another mount is kept by; `None` when it needs a descriptor.
    pub fn handle_for(&self, mount: u64, file: BorrowedFd<'_>) -> Option<FileHandle> {
        if mount == self.root_id || !self.has_handles(mount) {
            return None;
        }
        FileHandle::of(file).ok()
    }

    /// A look-up has crossed to a mount.
    pub fn found(&self, mount: u64, parent: Arc<Inode>, dir: BorrowedFd<'_>, name: &CStr, file: BorrowedFd<'_>) {
        // Back up through `..`, or a mount that is known at this place.
        if mount == self.root_id
            || self.root.is_none()
            || name.to_bytes().starts_with(b".") && name.to_bytes().len() < 3
        {
            return;
        }
        if let Some(Some(known)) = self.others.read().get(&mount) {
            if known.parent.id == parent.id && *known.name == *name {
                return;
            }
        }
        // Only a directory is opened: opening another file may do something.
        let reachable = sys::open_at(dir, name, DIRECTORY, 0).is_ok_and(|root| {
            sys::stat(root.as_fd()).is_ok_and(|st| st.stx_mnt_id == mount) && leads_back(root.as_fd(), file)
        });
        let new = reachable.then(|| Arc::new(Mount { parent, name: name.into() }));
        let old = self.others.write().insert(mount, new);
        drop(old);
    }

    /// Opens (O_PATH) what a handle names on a mount.
    ///
    /// # Errors
    /// `ESTALE` when the file is no more, or its mount.
    pub fn open(&self, mount: u64, handle: &FileHandle) -> io::Result<OwnedFd> {
        if mount == self.root_id {
            let root = self.root.as_ref().ok_or_else(|| errno(libc::ESTALE))?;
            return handle.open(root.as_fd(), libc::O_PATH);
        }
        let root = self.root_of(mount, 0)?;
        handle.open(root.as_fd(), libc::O_PATH)
    }

    /// The root of a mount, which is found through the mounts above it.
    fn root_of(&self, mount: u64, depth: usize) -> io::Result<OwnedFd> {
        /// Mounts on mounts, at most.
        const DEEPEST: usize = 40;
        let stale = || errno(libc::ESTALE);
        let known = self.others.read().get(&mount).cloned().flatten();
        let place = known.filter(|_| depth < DEEPEST).ok_or_else(stale)?;
        let dir: Box<dyn AsFd> = match place.parent.found_by() {
            Err(pin) => Box::new(pin),
            Ok(handle) if place.parent.key.mount == self.root_id => Box::new(self.open(self.root_id, &handle)?),
            Ok(handle) => {
                let above = self.root_of(place.parent.key.mount, depth + 1)?;
                Box::new(handle.open(above.as_fd(), libc::O_PATH)?)
            }
        };
        let root = sys::open_at(dir.as_fd(), &place.name, DIRECTORY, 0).map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP) => stale(),
            // Interrupted, or the system has no more descriptors.
            _ => e,
        })?;
        let st = sys::stat(root.as_fd())?;
        if Key::of(&st).mount == mount {
            Ok(root)
        } else {
            Err(stale())
        }
    }

    /// Forgets all but the shared directory's.
    pub fn clear(&self) {
        let old = std::mem::take(&mut *self.others.write());
        drop(old);
    }
}
