//! Operations on names: removing, renaming, linking, reading a link.

use super::cover::Watch;
use super::credentials::Acting;
use super::file_system::Context;
use super::inodes::{Held, Inode, Key};
use super::listener::Happening;
use super::passthrough::Passthrough;
use super::sys::{self, errno, FdName};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use tunnelfs_fuse_abi::changes::kind;
use tunnelfs_fuse_abi::EntryOut;

/// PATH_MAX of linux/limits.h, which a link's target is shorter than.
const LONGEST_TARGET: usize = 4096;

/// A name in a directory that is open.
type Entry<'a> = (&'a Inode, BorrowedFd<'a>, &'a CStr);

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
        let (parent, dir) = self.inodes.open(node)?;
        let _stays = self.keep_open(dir.as_fd(), name);
        let gone = if self.coherence.has_peers() { sys::stat_at(dir.as_fd(), name).ok() } else { None };
        sys::unlink_at(dir.as_fd(), name, flags)?;
        self.inodes.removed();
        self.coherence.tell(&Happening {
            kind: kind::DELETED,
            mode: gone.map_or(0, |st| u32::from(st.stx_mode) & libc::S_IFMT),
            parent: Some(parent.key),
            name: name.to_bytes(),
            node: gone.as_ref().map(Key::of),
            ..Happening::default()
        });
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
        let ((old_parent, from), (new_parent, to)) = (self.inodes.open(node)?, self.inodes.open(to)?);
        let watches = (self.coherence.watch(&old_parent, from.as_fd()), self.coherence.watch(&new_parent, to.as_fd()));
        let _stays = self.keep_open(to.as_fd(), new);
        // A whiteout is a new file, of the caller's.
        let whiteout = flags & libc::RENAME_WHITEOUT != 0;
        let _acting = if whiteout { Some(Acting::for_caller(&self.config.ids.caller(ctx)?, &[])?) } else { None };
        sys::rename_at(from.as_fd(), name, to.as_fd(), new, flags)?;
        self.inodes.removed();
        let (old, new) = ((&*old_parent, from.as_fd(), name), (&*new_parent, to.as_fd(), new));
        self.renamed(old, new, watches.1);
        if flags & libc::RENAME_EXCHANGE != 0 {
            self.renamed(new, old, watches.0);
        }
        Ok(())
    }

    /// After a rename: whoever has to know it is told where the entry is now. `watch`: how the new place was watched
    /// before.
    fn renamed(&self, (old_parent, _, name): Entry<'_>, (parent, dir, new): Entry<'_>, watch: Option<Arc<Watch>>) {
        if watch.is_none() && !self.coherence.has_peers() {
            return;
        }
        let Ok(st) = sys::stat_at(dir, new) else { return };
        if let Some(inode) = self.inodes.find(&st) {
            inode.cover.found_in(watch);
        }
        self.coherence.tell(&Happening {
            kind: kind::RENAMED,
            mode: u32::from(st.stx_mode) & libc::S_IFMT,
            parent: Some(old_parent.key),
            name: name.to_bytes(),
            node: Some(Key::of(&st)),
            to_parent: Some(parent.key),
            to_name: new.to_bytes(),
            ..Happening::default()
        });
    }

    pub(super) fn link(&self, old: u64, node: u64, name: &CStr) -> io::Result<EntryOut> {
        self.changes()?;
        let (inode, file) = self.inodes.open(old)?;
        let (parent, dir) = self.inodes.open(node)?;
        let watch = self.coherence.watch(&parent, dir.as_fd());
        let proc = self.descriptors.as_fd();
        sys::link_at(proc, FdName::new(file.as_fd()).as_c_str(), dir.as_fd(), name, libc::AT_SYMLINK_FOLLOW)?;
        self.coherence.tell(&Happening {
            kind: kind::CREATED,
            mode: inode.kind,
            links: 2,
            parent: Some(parent.key),
            name: name.to_bytes(),
            node: Some(inode.key),
            ..Happening::default()
        });
        // Not by the new name, which another process may have given to another file by now.
        let fd = self.reopen(file.as_fd(), libc::O_PATH)?;
        self.enter(fd, &parent, name, watch.as_ref()).map(|(_, entry)| entry)
    }
}
