//! Operations on open files.

use super::credentials::kill_privileges;
use super::file_system::*;
use super::handles::{Counted, Handle};
use super::inodes::Inode;
use super::owners::Owners;
use super::passthrough::Passthrough;
use super::sys::{self, errno};
use crate::zero_copy::ZeroCopyBuf;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_fuse_abi::changes::kind;
use tunnelfs_fuse_abi::flags::{self, fopen, init, release, write};
use tunnelfs_fuse_abi::*;
use tunnelfs_settings::Cache;

/// `RWF_NOAPPEND` of linux/fs.h (Linux 6.9): at the offset, though the file was opened for appending.
const RWF_NOAPPEND: i32 = 0x20;

/// The ioctls that are carried out (linux/fs.h).
pub const IOCTLS: [u32; 4] = [FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR];
/// `FS_IOC_GETFLAGS`: what lsattr shows.
const FS_IOC_GETFLAGS: u32 = 0x8008_6601;
/// `FS_IOC_SETFLAGS`: what chattr sets.
const FS_IOC_SETFLAGS: u32 = 0x4008_6602;
/// `FS_IOC_FSGETXATTR`.
const FS_IOC_FSGETXATTR: u32 = 0x801c_581f;
/// `FS_IOC_FSSETXATTR`.
const FS_IOC_FSSETXATTR: u32 = 0x401c_5820;

impl Passthrough {
    /// The flags to open a file with, of those that the guest's program gave.
    pub(super) fn open_flags(&self, flags: u32) -> i32 {
        let flags = flags as i32;
        let mut kept = flags & (libc::O_ACCMODE | libc::O_APPEND | libc::O_SYNC | libc::O_DSYNC);
        // A page that is written back need not be aligned, and any of the file's handles may be taken for it.
        if self.config.direct_io && !self.agreed(init::WRITEBACK_CACHE) {
            kept |= flags & libc::O_DIRECT;
        }
        if self.config.keep_noatime {
            kept |= flags & libc::O_NOATIME;
        }
        if self.agreed(init::WRITEBACK_CACHE) {
            // The kernel reads what it writes back a part of, and knows where the end is.
            kept &= !libc::O_APPEND;
            if kept & libc::O_ACCMODE == libc::O_WRONLY {
                kept = kept & !libc::O_ACCMODE | libc::O_RDWR;
            }
        }
        kept
    }

    /// What OPEN tells the kernel of a file's cache.
    pub(super) fn file_cache(&self) -> u32 {
        match self.config.cache {
            Cache::Never | Cache::Metadata => fopen::DIRECT_IO,
            Cache::Auto | Cache::Coherent => 0,
            Cache::Always => fopen::KEEP_CACHE,
        }
    }

    /// What OPEN tells the kernel of closing the file: no FLUSH where it would do nothing. A file system that may report
    /// an error when a writer closes is asked.
    pub(super) fn close_flags(&self, inode: &Inode, file: BorrowedFd<'_>, flags: i32) -> u32 {
        let waits = self.config.shared_locks || self.agreed(init::WRITEBACK_CACHE);
        let reads = flags & libc::O_ACCMODE == libc::O_RDONLY;
        let is_local = || if self.inodes.is_of_share(inode) { self.is_local } else { sys::is_local(file) };
        if !waits && (reads || is_local()) {
            fopen::NOFLUSH
        } else {
            0
        }
    }

    pub(super) fn open(&self, ctx: &Context, node: u64, args: &OpenIn) -> io::Result<OpenOut> {
        let _ = ctx;
        let inode = self.inodes.get(node)?;
        if !inode.is_file() {
            return Err(errno(if inode.is_dir() { libc::EISDIR } else { libc::ENXIO }));
        }
        if self.skips_opening_now() {
            return Err(errno(libc::ENOSYS));
        }
        let mut flags = self.open_flags(args.flags);
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY || args.flags as i32 & libc::O_TRUNC != 0;
        if writes {
            self.changes()?;
            self.coherence.will_write(node);
        }
        let count = self.reserve()?;
        let held = self.inodes.hold(&inode)?;
        let file = match self.reopen(held.pin.as_fd(), flags) {
            // A file that this process may only write.
            Err(e)
                if e.raw_os_error() == Some(libc::EACCES) && args.flags as i32 & libc::O_ACCMODE == libc::O_WRONLY =>
            {
                flags = flags & !libc::O_ACCMODE | libc::O_WRONLY;
                self.reopen(held.pin.as_fd(), flags)?
            }
            other => other?,
        };
        let mut open_flags = self.file_cache() | self.close_flags(&inode, file.as_fd(), flags);
        let handle = Arc::new(Handle::new(file, held, flags, count));
        let fh = self.handles.add(handle.clone());
        let may_keep = !writes && self.config.cache == Cache::Coherent;
        if may_keep && self.coherence.opened(&inode, &handle.held.pin, fh) {
            open_flags |= fopen::KEEP_CACHE;
        }
        Ok(OpenOut { fh, open_flags, backing_id: 0 })
    }

    pub(super) fn read(&self, node: u64, args: &ReadIn, out: &ZeroCopyBuf<'_>) -> io::Result<usize> {
        let file = self.readable(args.fh, node)?;
        out.read_from(file.as_fd(), args.size as usize, args.offset)
    }

    pub(super) fn write(&self, node: u64, args: &WriteIn, data: &ZeroCopyBuf<'_>) -> io::Result<usize> {
        self.changes()?;
        let handle = self.writable(args.fh, node)?;
        let kill = args.write_flags & write::KILL_SUIDGID != 0;
        let append = args.flags as i32 & libc::O_APPEND != 0 && args.write_flags & write::CACHE == 0;
        let how = match (append && !self.agreed(init::WRITEBACK_CACHE), handle.flags & libc::O_APPEND != 0) {
            (true, _) => libc::RWF_APPEND,
            (false, true) => RWF_NOAPPEND,
            (false, false) => 0,
        } | if self.is_by_number(args.fh) { sync_flags(args.flags as i32) } else { 0 };
        if self.skips_open() {
            self.coherence.writes(&handle.held.inode, &handle.held.pin, args.write_flags & write::CACHE != 0);
        }
        kill_privileges(kill)?;
        let write = |how| data.write_to(handle.as_fd(), args.size as usize, args.offset, how);
        let written = match write(how) {
            // An older kernel, which has no way to write elsewhere than at the end.
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) && how & RWF_NOAPPEND != 0 => {
                write(how & !RWF_NOAPPEND)?
            }
            other => other?,
        };
        self.written(&handle, kill)?;
        Ok(written)
    }

    /// After a change of a file: what attributes that the kernel does not know say of setuid bits and capabilities goes.
    fn written(&self, handle: &Handle, kill: bool) -> io::Result<()> {
        self.tell_changed(handle, kind::MODIFIED);
        self.drop_capabilities(handle.as_fd())?;
        if kill && self.config.ids.owners == Owners::Attribute {
            self.clear_bits(handle.as_fd())
        } else {
            Ok(())
        }
    }

    fn tell_changed(&self, handle: &Handle, kind: u32) {
        self.coherence.tell_of(kind, handle.held.inode.key);
    }

    /// Whether a change that comes without a word about it clears setuid bits: natively whoever has no CAP_FSETID does.
    fn kills(&self, ctx: &Context) -> bool {
        self.config.killpriv && ctx.uid != 0
    }

    pub(super) fn flush(&self, node: u64, args: &FlushIn) -> io::Result<()> {
        if self.is_by_number(args.fh) {
            return Err(errno(libc::ENOSYS));
        }
        let handle = self.handle(args.fh, node)?;
        self.coherence.closed(node, args.fh);
        if self.config.shared_locks {
            self.locks.close(node, args.lock_owner);
        }
        if handle.writes() {
            sys::close_duplicate(handle.as_fd())
        } else {
            Ok(())
        }
    }

    pub(super) fn release(&self, node: u64, args: &ReleaseIn) -> io::Result<()> {
        if self.is_by_number(args.fh) {
            self.close_writer(node, Duration::ZERO);
            return Ok(());
        }
        let handle = self.handles.remove(args.fh, node)?;
        self.coherence.closed(node, args.fh);
        if handle.writes() {
            self.tell_changed(&handle, kind::CLOSED);
        }
        if self.config.shared_locks && args.release_flags & release::FLUSH != 0 {
            self.locks.close(node, args.lock_owner);
        }
        handle.close(&self.inodes);
        Ok(())
    }

    pub(super) fn fsync(&self, node: u64, fh: u64, data_only: bool) -> io::Result<()> {
        self.sync(fh, node, |file| if data_only { sys::sync_data(file) } else { sys::sync(file) })
    }

    pub(super) fn syncfs(&self, node: u64) -> io::Result<()> {
        let (inode, pin) = self.inodes.open(node)?;
        if !inode.is_dir() {
            return Err(errno(libc::EINVAL));
        }
        let dir = self.reopen(pin.as_fd(), libc::O_RDONLY | libc::O_DIRECTORY)?;
        sys::sync_fs(dir.as_fd())
    }

    pub(super) fn fallocate(&self, ctx: &Context, node: u64, args: &FallocateIn) -> io::Result<()> {
        self.changes()?;
        let handle = self.writable(args.fh, node)?;
        let number = |n: u64| i64::try_from(n).map_err(|_| errno(libc::EFBIG));
        let kill = self.kills(ctx);
        kill_privileges(kill)?;
        sys::allocate(handle.as_fd(), args.mode as i32, number(args.offset)?, number(args.length)?)?;
        self.written(&handle, kill)
    }

    pub(super) fn lseek(&self, node: u64, args: &LseekIn) -> io::Result<u64> {
        // The guest's kernel does not write back what it has before it asks: without an answer it takes all for data.
        if self.agreed(init::WRITEBACK_CACHE) {
            return Err(errno(libc::ENOSYS));
        }
        // Others than these the kernel answers itself, and they would move a directory's position.
        if !matches!(args.whence as i32, libc::SEEK_DATA | libc::SEEK_HOLE) {
            return Err(errno(libc::EINVAL));
        }
        let file = self.any(args.fh, node)?;
        let offset = i64::try_from(args.offset).map_err(|_| errno(libc::ENXIO))?;
        sys::seek(file.as_fd(), offset, args.whence as i32).map(|at| at as u64)
    }

    pub(super) fn copy_file_range(&self, ctx: &Context, node: u64, args: &CopyFileRangeIn) -> io::Result<u64> {
        self.changes()?;
        if args.flags != 0 {
            return Err(errno(libc::EINVAL));
        }
        let (from, to) = (self.readable(args.fh_in, node)?, self.writable(args.fh_out, args.nodeid_out)?);
        let kill = self.kills(ctx);
        kill_privileges(kill)?;
        let n = sys::copy_range(from.as_fd(), args.off_in, to.as_fd(), args.off_out, args.len)?;
        self.written(&to, kill)?;
        Ok(n as u64)
    }

    /// A file of its own for an owner of locks.
    fn lock_file(&self, node: u64) -> io::Result<(OwnedFd, Option<Counted>)> {
        let count = self.reserve()?;
        let (inode, pin) = self.inodes.open(node)?;
        if !inode.is_file() {
            return Err(errno(libc::EBADF));
        }
        let mode = if self.config.readonly { libc::O_RDONLY } else { libc::O_RDWR };
        self.coherence.will_write(node);
        let readable = |e: &io::Error| matches!(e.raw_os_error(), Some(libc::EACCES | libc::EROFS | libc::ETXTBSY));
        let file = match self.reopen(pin.as_fd(), mode) {
            Err(e) if readable(&e) => self.reopen(pin.as_fd(), libc::O_RDONLY)?,
            other => other?,
        };
        Ok((file, Some(count)))
    }

    pub(super) fn getlk(&self, node: u64, args: &LkIn) -> io::Result<FileLock> {
        self.shares_locks()?;
        self.handle(args.fh, node)?;
        self.locks.test(node, args.owner, &args.lk, || self.lock_file(node))
    }

    pub(super) fn setlk(&self, ctx: &Context, node: u64, args: &LkIn, wait: bool) -> io::Result<()> {
        self.shares_locks()?;
        let handle = self.handle(args.fh, node)?;
        let wait = wait.then_some(ctx.unique);
        if args.lk_flags & flags::LK_FLOCK != 0 {
            self.locks.flock(handle.as_fd(), &args.lk, wait)
        } else {
            self.locks.set(node, args.owner, &args.lk, wait, || self.lock_file(node))
        }
    }

    fn shares_locks(&self) -> io::Result<()> {
        if self.config.shared_locks {
            Ok(())
        } else {
            Err(errno(libc::ENOSYS))
        }
    }

    pub(super) fn ioctl(&self, node: u64, args: &IoctlIn, data: &[u8]) -> io::Result<Vec<u8>> {
        if !IOCTLS.contains(&args.cmd) {
            return Err(errno(libc::ENOTTY));
        }
        let file = self.any(args.fh, node)?;
        // What the command's number says: bytes, and whether they go in or come out (asm-generic/ioctl.h).
        let (size, goes_in) = ((args.cmd >> 16 & 0x3fff) as usize, args.cmd >> 30 & 1 != 0);
        // Larger than any of them: the kernel checks nothing.
        let mut bytes = [0; 64];
        if goes_in {
            self.changes()?;
            let given = data.get(..size.min(data.len())).unwrap_or_default();
            bytes[..given.len()].copy_from_slice(given);
        }
        sys::ioctl(file.as_fd(), args.cmd, &mut bytes)?;
        if goes_in {
            if let Ok(inode) = self.inodes.get(node) {
                self.coherence.tell_of(kind::ATTRIBUTES, inode.key);
            }
        }
        Ok(if goes_in { Vec::new() } else { bytes[..size].to_vec() })
    }
}

/// How a write is synced whose file was opened with these flags.
fn sync_flags(flags: i32) -> i32 {
    if flags & libc::O_SYNC == libc::O_SYNC {
        libc::RWF_SYNC
    } else if flags & libc::O_DSYNC != 0 {
        libc::RWF_DSYNC
    } else {
        0
    }
}
