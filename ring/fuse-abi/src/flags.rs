//! Flags of requests and replies, each group under its prefix in `linux/fuse.h`.

macro_rules! bits {
    ($(#[$doc:meta])* $module:ident: $type:ty { $($name:ident = $bit:literal, $text:literal;)* }) => {
        $(#[$doc])*
        pub mod $module {
            $(#[doc = $text] pub const $name: $type = 1 << $bit;)*
        }
    };
}

bits! {
    /// INIT's `flags` (low word) and `flags2` (high word).
    init: u64 {
        ASYNC_READ = 0, "Several READs of one file at a time.";
        POSIX_LOCKS = 1, "The server has record locks.";
        FILE_OPS = 2, "(unused)";
        ATOMIC_O_TRUNC = 3, "OPEN truncates.";
        EXPORT_SUPPORT = 4, "The server answers LOOKUP of `.` and `..`.";
        BIG_WRITES = 5, "WRITEs of more than a page.";
        DONT_MASK = 6, "The server applies the umask.";
        SPLICE_WRITE = 7, "The kernel can splice to the device.";
        SPLICE_MOVE = 8, "The kernel can move spliced pages.";
        SPLICE_READ = 9, "The kernel can splice from the device.";
        FLOCK_LOCKS = 10, "The server has flock(2)'s locks.";
        HAS_IOCTL_DIR = 11, "IOCTL on directories.";
        AUTO_INVAL_DATA = 12, "Cached data goes when mtime or size has changed.";
        DO_READDIRPLUS = 13, "The server has READDIRPLUS.";
        READDIRPLUS_AUTO = 14, "The kernel chooses between READDIR and READDIRPLUS.";
        ASYNC_DIO = 15, "Direct I/O may be asynchronous.";
        WRITEBACK_CACHE = 16, "The kernel caches writes.";
        NO_OPEN_SUPPORT = 17, "ENOSYS for OPEN means that none is needed.";
        PARALLEL_DIROPS = 18, "Several LOOKUPs and READDIRs of a directory at a time.";
        HANDLE_KILLPRIV = 19, "The server clears setuid and setgid bits (first version).";
        POSIX_ACL = 20, "POSIX ACLs.";
        ABORT_ERROR = 21, "Reading the device after an abort gives ECONNABORTED.";
        MAX_PAGES = 22, "`max_pages` counts.";
        CACHE_SYMLINKS = 23, "The kernel caches links' targets.";
        NO_OPENDIR_SUPPORT = 24, "ENOSYS for OPENDIR means that none is needed.";
        EXPLICIT_INVAL_DATA = 25, "Cached data goes only when it is told to.";
        MAP_ALIGNMENT = 26, "`map_alignment` counts (DAX).";
        SUBMOUNTS = 27, "The kernel makes mount points of inodes with `ATTR_SUBMOUNT`.";
        HANDLE_KILLPRIV_V2 = 28, "The server clears setuid and setgid bits where it is told to.";
        SETXATTR_EXT = 29, "SETXATTR has its long form.";
        INIT_EXT = 30, "`flags2` counts.";
        SECURITY_CTX = 32, "Requests that create something carry a security context.";
        HAS_INODE_DAX = 33, "DAX for single inodes.";
        CREATE_SUPP_GROUP = 34, "Requests that create something carry a supplementary group.";
        HAS_EXPIRE_ONLY = 35, "NOTIFY_INVAL_ENTRY can let entries expire.";
        DIRECT_IO_ALLOW_MMAP = 36, "Shared mappings of files under direct I/O.";
        PASSTHROUGH = 37, "The kernel does the I/O of files that are handed to it.";
        NO_EXPORT_SUPPORT = 38, "No file handles.";
        HAS_RESEND = 39, "NOTIFY_RESEND.";
        ALLOW_IDMAP = 40, "Mounts with mapped ids.";
        OVER_IO_URING = 41, "Requests over io_uring.";
        REQUEST_TIMEOUT = 42, "`request_timeout` counts.";
    }
}

bits! {
    /// `fuse_open_out.open_flags`.
    fopen: u32 {
        DIRECT_IO = 0, "No page cache.";
        KEEP_CACHE = 1, "Cached data stays.";
        NONSEEKABLE = 2, "The file has no position.";
        CACHE_DIR = 3, "The listing may be cached.";
        STREAM = 4, "The file has no position at all.";
        NOFLUSH = 5, "No FLUSH, unless data is to be written back.";
        PARALLEL_DIRECT_WRITES = 6, "Several direct WRITEs at a time.";
        PASSTHROUGH = 7, "The kernel does the I/O.";
    }
}

bits! {
    /// `fuse_setattr_in.valid`.
    fattr: u32 {
        MODE = 0, "Set `mode`.";
        UID = 1, "Set `uid`.";
        GID = 2, "Set `gid`.";
        SIZE = 3, "Set `size`.";
        ATIME = 4, "Set `atime`.";
        MTIME = 5, "Set `mtime`.";
        FH = 6, "`fh` is an open file.";
        ATIME_NOW = 7, "Set the access time to now.";
        MTIME_NOW = 8, "Set the modification time to now.";
        LOCKOWNER = 9, "`lock_owner` counts.";
        CTIME = 10, "Set `ctime`.";
        KILL_SUIDGID = 11, "Clear setuid and setgid bits.";
    }
}

bits! {
    /// `fuse_write_in.write_flags`.
    write: u32 {
        CACHE = 0, "Data from the page cache, written by whoever.";
        LOCKOWNER = 1, "`lock_owner` counts.";
        KILL_SUIDGID = 2, "Clear setuid and setgid bits.";
    }
}

bits! {
    /// `fuse_release_in.release_flags`.
    release: u32 {
        FLUSH = 0, "A FLUSH comes with it.";
        FLOCK_UNLOCK = 1, "The file's flock(2) lock goes.";
    }
}

bits! {
    /// `fuse_ioctl_in.flags`.
    ioctl: u32 {
        COMPAT = 0, "A 32-bit caller.";
        UNRESTRICTED = 1, "Not limited to well-formed commands.";
        RETRY = 2, "Again with other buffers.";
        BITS_32 = 3, "32 bits.";
        DIR = 4, "A directory.";
        COMPAT_X32 = 5, "An x32 caller.";
    }
}

/// `fuse_getattr_in.getattr_flags`: `fh` is an open file.
pub const GETATTR_FH: u32 = 1 << 0;
/// `fuse_lk_in.lk_flags`: a lock of flock(2).
pub const LK_FLOCK: u32 = 1 << 0;
/// `fuse_read_in.read_flags`: `lock_owner` counts.
pub const READ_LOCKOWNER: u32 = 1 << 1;
/// `fuse_fsync_in.fsync_flags`: data only.
pub const FSYNC_FDATASYNC: u32 = 1 << 0;
/// `fuse_attr.flags`: the root of another file system.
pub const ATTR_SUBMOUNT: u32 = 1 << 0;
/// `fuse_attr.flags`: DAX.
pub const ATTR_DAX: u32 = 1 << 1;
/// `fuse_open_in.open_flags`: clear setuid and setgid bits.
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// `fuse_setxattr_in.setxattr_flags`: clear the setgid bit with `system.posix_acl_access`.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
/// `fuse_ext_header.type` of supplementary groups; lower numbers are counts of security contexts.
pub const EXT_GROUPS: u32 = 32;
/// `FUSE_MAX_NR_SECCTX`: most security contexts of a request.
pub const MAX_NR_SECCTX: u32 = 31;
