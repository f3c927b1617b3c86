//! Operations on names: removing, renaming, linking, reading a link.

use super::credentials::Acting;
use super::file_system::Context;
use super::inodes::Held;
use super::passthrough::Passthrough;
use super::sys::{self, errno, FdName};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use tunnelfs_fuse_abi::EntryOut;

/// PATH_MAX of linux/limits.h, which a link's target is shorter than.
const LONGEST_TARGET: usize = 4096;

impl Passthrough {
    pub(super) fn readlink(&self, node: u64) -> io::Result<Vec<u8>> {
        let (inode, pin) = self.inodes.open(node)?;
        if inode.kind != libc::S_IFLNK {
            return Err(errno(libc::EINVAL));
        }
        let mut target = vec![0; LONGEST_TARGET];
        let n = sys::read_link(pin.as_fd(), &mut target)?;
        target.truncate(n);
        Ok(target)
    }

    pub(super) fn unlink(&self, node: u64, name: &CStr, flags: i32) -> io::Result<()> {
        self.changes()?;
        let (_, dir) = self.inodes.open(node)?;
        let _stays = self.keep_open(dir.as_fd(), name);
        sys::unlink_at(dir.as_fd(), name, flags)?;
        self.inodes.removed();
        Ok(())
    }

    /// Has the inode that is about to lose a name keep a descriptor, if the guest knows it by its handle alone: the
    /// handle of one without names leads nowhere.
    fn keep_open(&self, dir: BorrowedFd<'_>, name: &CStr) -> Option<Held> {
        if !self.inodes.has_cooled() {
            return None;
        }
        let fd = sys::open_at(dir, name, libc::O_PATH | libc::O_NOFOLLOW, 0).ok()?;
        let inode = self.inodes.find(&sys::stat(fd.as_fd()).ok()?)?;
        self.inodes.hold(&inode).ok()
    }

    pub(super) fn rename(
        &self,
        ctx: &Context,
        node: u64,
        name: &CStr,
        to: u64,
        new: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.changes()?;
        let ((_, from), (_, to)) = (self.inodes.open(node)?, self.inodes.open(to)?);
        let _stays = self.keep_open(to.as_fd(), new);
        // A whiteout is a new file, of the caller's.
        let whiteout = flags & libc::RENAME_WHITEOUT != 0;
        let _acting = if whiteout { Some(Acting::for_caller(&self.config.ids.caller(ctx)?, &[])?) } else { None };
        sys::rename_at(from.as_fd(), name, to.as_fd(), new, flags)?;
        self.inodes.removed();
        Ok(())
    }

    pub(super) fn link(&self, old: u64, node: u64, name: &CStr) -> io::Result<EntryOut> {
        self.changes()?;
        let (_, file) = self.inodes.open(old)?;
        let (parent, dir) = self.inodes.open(node)?;
        let proc = self.descriptors.as_fd();
        sys::link_at(proc, FdName::new(file.as_fd()).as_c_str(), dir.as_fd(), name, libc::AT_SYMLINK_FOLLOW)?;
        // Not by the new name, which another process may have given to another file by now.
        let fd = self.reopen(file.as_fd(), libc::O_PATH)?;
        self.enter(fd, &parent, name).map(|(_, entry)| entry)
    }
}
