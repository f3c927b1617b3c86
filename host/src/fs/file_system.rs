//! What a file system that is served to a guest implements.

use super::changes::ChangeSink;
use crate::zero_copy::ZeroCopyBuf;
use std::ffi::{CStr, CString};
use std::io;
use tunnelfs_fuse_abi::*;

/// Who makes a request, as the guest has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The thread, in the guest.
    pub pid: u32,
    /// The request's number, by which it may be interrupted.
    pub unique: u64,
}

/// What comes with requests that create something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// Supplementary groups of the caller that matter.
    pub groups: Vec<u32>,
    /// Extended attributes that a security module in the guest gives the new file.
    pub labels: Vec<(CString, Vec<u8>)>,
}

/// An entry of a directory, as a file system lists it.
#[derive(Clone, Copy, Debug)]
pub struct DirEntry<'a> {
    /// Its inode number, as `Attr::ino`.
    pub ino: u64,
    /// Where the listing goes on behind it.
    pub offset: u64,
    /// `DT_...` of dirent.h.
    pub kind: u32,
    /// Its name.
    pub name: &'a CStr,
}

/// Takes entries of a directory; `Ok(false)`: this one does not fit any more.
pub type DirSink<'a> = dyn FnMut(&DirEntry<'_>, Option<&EntryOut>) -> io::Result<bool> + 'a;

/// An attribute's value, a list of their names, or how long it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum XattrReply {
    /// The bytes.
    Bytes(Vec<u8>),
    /// How many there are: what is answered to a `size` of 0.
    Size(u32),
}

fn missing<T>() -> io::Result<T> {
    Err(io::Error::from_raw_os_error(libc::ENOSYS))
}

macro_rules! operations {
    ($($(#[$doc:meta])* fn $name:ident(&self $(, $arg:ident: $type:ty)*) -> $result:ty;)*) => {
        $($(#[$doc])*
        ///
        /// # Errors
        /// An errno for the guest's program.
        #[allow(unused_variables)]
        fn $name(&self, ctx: &Context $(, $arg: $type)*) -> io::Result<$result> {
            missing()
        })*
    };
}

/// A file system. Each operation that it does not have answers `ENOSYS`. Operations come from several threads at a time.
///
/// `node` is a number that a look-up gave out, or [`ROOT_ID`]; `fh` one of an OPEN, CREATE or OPENDIR.
pub trait FileSystem: Send + Sync + 'static {
    /// Called by each thread before an operation; must be cheap.
    fn prepare_thread(&self) {}

    /// A guest begins: `capable` is what its kernel knows (`flags::init`); the flags that this file system wants of it.
    ///
    /// # Errors
    /// An errno, when the guest lacks what must be.
    fn init(&self, capable: u64) -> io::Result<u64> {
        let _ = capable;
        Ok(0)
    }

    /// The guest has gone, or a new one begins: forgets all that the last one had.
    fn destroy(&self) {}

    /// A request is to be given up, if it waits. May come before it.
    fn interrupt(&self, unique: u64) {
        let _ = unique;
    }

    /// Forgets that `node` was looked up `nlookup` times.
    fn forget(&self, node: u64, nlookup: u64) {
        let _ = (node, nlookup);
    }

    /// Waits until something has changed that the guest knows of, then gives it to `sink`, oldest first, until that
    /// refuses one: it comes again in the next call. At most one thread is in this call.
    ///
    /// # Errors
    /// `ENOSYS`: the file system has no change events. `EINTR`: interrupted, or the guest has gone.
    fn changes(&self, sink: &mut ChangeSink<'_>) -> io::Result<()> {
        let _ = sink;
        missing()
    }

    /// The guest has dropped the cached data of `node`, as [`kind::DROP_DATA`](tunnelfs_fuse_abi::changes::kind) asked.
    fn dropped(&self, node: u64) {
        let _ = node;
    }

    operations! {
        /// Finds a name in a directory. `.` and `..` come for file handles: `.` also with a node that was forgotten.
        fn lookup(&self, node: u64, name: &CStr) -> EntryOut;
        /// Attributes.
        fn getattr(&self, node: u64, fh: Option<u64>) -> AttrOut;
        /// Attributes, with the time of birth.
        fn statx(&self, node: u64, fh: Option<u64>, flags: u32, mask: u32) -> StatxOut;
        /// Changes attributes: those that `set.valid` names (`flags::fattr`).
        fn setattr(&self, node: u64, set: &SetattrIn) -> AttrOut;
        /// A link's target.
        fn readlink(&self, node: u64) -> Vec<u8>;
        /// Creates a link.
        fn symlink(&self, node: u64, name: &CStr, target: &CStr, extensions: &Extensions) -> EntryOut;
        /// Creates a special or an ordinary file. `args.rdev` is as Linux's `new_encode_dev` has it.
        fn mknod(&self, node: u64, name: &CStr, args: &MknodIn, extensions: &Extensions) -> EntryOut;
        /// Creates a directory.
        fn mkdir(&self, node: u64, name: &CStr, args: &MkdirIn, extensions: &Extensions) -> EntryOut;
        /// Removes a name that is no directory's.
        fn unlink(&self, node: u64, name: &CStr) -> ();
        /// Removes a directory.
        fn rmdir(&self, node: u64, name: &CStr) -> ();
        /// Renames; `flags` as renameat2(2) has them.
        fn rename(&self, node: u64, name: &CStr, to: u64, new: &CStr, flags: u32) -> ();
        /// Gives a file another name.
        fn link(&self, old: u64, node: u64, name: &CStr) -> EntryOut;
        /// Opens a file.
        fn open(&self, node: u64, args: &OpenIn) -> OpenOut;
        /// Creates and opens a file.
        fn create(&self, node: u64, name: &CStr, args: &CreateIn, extensions: &Extensions) -> CreateOut;
        /// Creates and opens a file without a name.
        fn tmpfile(&self, node: u64, args: &CreateIn, extensions: &Extensions) -> CreateOut;
        /// Reads into the guest's buffer: the bytes read. An error half way is an error: fewer bytes are the end of the file.
        fn read(&self, node: u64, args: &ReadIn, out: &ZeroCopyBuf<'_>) -> usize;
        /// Writes from the guest's buffer: the bytes written.
        fn write(&self, node: u64, args: &WriteIn, data: &ZeroCopyBuf<'_>) -> usize;
        /// A file was closed by one of those who had it; `owner`'s record locks go.
        fn flush(&self, node: u64, args: &FlushIn) -> ();
        /// A file was closed by the last one.
        fn release(&self, node: u64, args: &ReleaseIn) -> ();
        /// Makes a file durable.
        fn fsync(&self, node: u64, fh: u64, data_only: bool) -> ();
        /// Opens a directory.
        fn opendir(&self, node: u64, args: &OpenIn) -> OpenOut;
        /// Lists a directory from `args.offset` on; `plus`: each entry is looked up too, if `sink` takes it.
        fn readdir(&self, node: u64, args: &ReadIn, plus: bool, sink: &mut DirSink<'_>) -> ();
        /// Closes a directory.
        fn releasedir(&self, node: u64, args: &ReleaseIn) -> ();
        /// Makes a directory durable.
        fn fsyncdir(&self, node: u64, fh: u64, data_only: bool) -> ();
        /// Makes the whole file system durable.
        fn syncfs(&self, node: u64) -> ();
        /// Numbers of the whole file system.
        fn statfs(&self, node: u64) -> Kstatfs;
        /// Sets an extended attribute; `extra`: `SETXATTR_ACL_KILL_SGID`.
        fn setxattr(&self, node: u64, name: &CStr, value: &[u8], flags: u32, extra: u32) -> ();
        /// An extended attribute of at most `size` bytes.
        fn getxattr(&self, node: u64, name: &CStr, size: u32) -> XattrReply;
        /// The names of extended attributes, each with its NUL.
        fn listxattr(&self, node: u64, size: u32) -> XattrReply;
        /// Removes an extended attribute.
        fn removexattr(&self, node: u64, name: &CStr) -> ();
        /// Whether the caller may (access(2)).
        fn access(&self, node: u64, mask: u32) -> ();
        /// Allocates or frees space (fallocate(2)).
        fn fallocate(&self, node: u64, args: &FallocateIn) -> ();
        /// Finds data or holes (lseek(2)).
        fn lseek(&self, node: u64, args: &LseekIn) -> u64;
        /// Copies between files: the bytes copied.
        fn copy_file_range(&self, node: u64, args: &CopyFileRangeIn) -> u64;
        /// The lock in the way of another one.
        fn getlk(&self, node: u64, args: &LkIn) -> FileLock;
        /// Sets a lock; `wait`: as soon as that can be done.
        fn setlk(&self, node: u64, args: &LkIn, wait: bool) -> ();
        /// A well-formed ioctl: `data` goes in, what it returns comes out.
        fn ioctl(&self, node: u64, args: &IoctlIn, data: &[u8]) -> Vec<u8>;
        /// Where a block of a file lies.
        fn bmap(&self, node: u64, args: &BmapIn) -> u64;
        /// Whether a file is ready.
        fn poll(&self, node: u64, args: &PollIn) -> PollOut;
    }
}
