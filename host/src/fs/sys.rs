//! System calls of a file server, as safe functions over descriptors.

use nix::sys::statfs::{fstatfs, FsType, BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Most bytes of a file handle (`MAX_HANDLE_SZ` of linux/fs.h).
const MAX_HANDLE: usize = 128;
/// `STATX_MNT_ID_UNIQUE` of linux/stat.h (Linux 6.8): a mount's number that is never used again.
const STATX_MNT_ID_UNIQUE: u32 = 0x4000;
/// What every `stat` asks for.
const STAT_MASK: u32 = libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID | STATX_MNT_ID_UNIQUE;

/// An error by its number.
pub fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// What a system call returned, or its error.
pub fn check<T: Copy + PartialEq + From<i8>>(result: T) -> io::Result<T> {
    if result == T::from(-1) {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// `openat`.
pub fn open_at(dir: BorrowedFd<'_>, name: &CStr, flags: i32, mode: u32) -> io::Result<OwnedFd> {
    // SAFETY: a borrowed descriptor and a C string.
    let fd = check(unsafe { libc::openat(dir.as_raw_fd(), name.as_ptr(), flags | libc::O_CLOEXEC, mode) })?;
    // SAFETY: it has just been opened, for this owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `statx` of an open file.
pub fn stat(fd: BorrowedFd<'_>) -> io::Result<libc::statx> {
    stat_at(fd, c"")
}

/// `statx` of a name in a directory: of a link itself.
pub fn stat_at(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<libc::statx> {
    // SAFETY: all-zero bytes are a valid `statx`.
    let mut st = unsafe { std::mem::zeroed::<libc::statx>() };
    let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW | libc::AT_STATX_SYNC_AS_STAT;
    // SAFETY: a borrowed descriptor, a C string, and room for the answer.
    check(unsafe { libc::statx(dir.as_raw_fd(), name.as_ptr(), flags, STAT_MASK, &raw mut st) })?;
    Ok(st)
}

/// Whether the file system is one of this machine's alone, which lies over no other: all changes of it are made here and
/// reported, and its code has nothing to do, and so no error to report, when a file is closed.
pub fn is_local(file: BorrowedFd<'_>) -> bool {
    fstatfs(file).is_ok_and(|st| is_local_kind(st.filesystem_type()))
}

/// The same by the file system's number: tmpfs, ext4, XFS and Btrfs are local.
pub fn is_local_kind(kind: FsType) -> bool {
    [TMPFS_MAGIC, EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC].contains(&kind)
}

/// Whether this kernel (6.13 and later) gives a file on a local file system another time of change with each write that
/// follows a stat(2) of it, however soon.
pub fn has_exact_times() -> bool {
    let Ok(name) = nix::sys::utsname::uname() else { return false };
    let mut numbers =
        name.release().to_str().unwrap_or_default().split(['.', '-']).map_while(|n| n.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(13))
}

/// A device's number, as one word.
pub fn device(major: u32, minor: u32) -> u64 {
    u64::from(major) << 32 | u64::from(minor)
}

/// A file's name that outlives its descriptor (`struct file_handle`).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FileHandle {
    kind: i32,
    bytes: Box<[u8]>,
}

#[repr(C)]
struct RawHandle {
    len: u32,
    kind: i32,
    bytes: [u8; MAX_HANDLE],
}

impl FileHandle {
    /// The handle of an open file; fails where its file system has none.
    pub fn of(fd: BorrowedFd<'_>) -> io::Result<FileHandle> {
        let mut raw = RawHandle { len: MAX_HANDLE as u32, kind: 0, bytes: [0; MAX_HANDLE] };
        let mut mount = 0i32;
        // SAFETY: a borrowed descriptor, an empty path, a handle with its length, and room for the mount's number.
        check(unsafe {
            let (fd, flags) = (fd.as_raw_fd(), libc::AT_EMPTY_PATH);
            libc::syscall(libc::SYS_name_to_handle_at, fd, c"".as_ptr(), &raw mut raw, &raw mut mount, flags)
        })?;
        let len = (raw.len as usize).min(MAX_HANDLE);
        Ok(FileHandle { kind: raw.kind, bytes: raw.bytes[..len].into() })
    }

    /// Its kind and its bytes.
    pub fn parts(&self) -> (i32, &[u8]) {
        (self.kind, &self.bytes)
    }

    /// Opens the file, on the mount of `mount` (which is no O_PATH descriptor).
    pub fn open(&self, mount: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
        let mut raw = RawHandle { len: self.bytes.len() as u32, kind: self.kind, bytes: [0; MAX_HANDLE] };
        raw.bytes[..self.bytes.len()].copy_from_slice(&self.bytes);
        // SAFETY: a borrowed descriptor and a handle with its length.
        let fd = check(unsafe {
            let flags = flags | libc::O_CLOEXEC;
            libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), &raw mut raw, flags)
        });
        // ext4 says ENOMEM while it makes a new inode with the number of the one that is gone (iget_locked finds it, but
        // not ready). A kernel that really has no memory is as good as one that has lost the file.
        let fd = fd.map_err(|e| if e.raw_os_error() == Some(libc::ENOMEM) { errno(libc::ESTALE) } else { e })?;
        // SAFETY: it has just been opened, for this owner.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }
}

/// A decimal number as a C string: a descriptor's name in `/proc/self/fd`.
pub struct FdName([u8; 12]);

impl FdName {
    pub fn new(fd: BorrowedFd<'_>) -> FdName {
        let (mut bytes, mut left, mut at) = ([0; 12], fd.as_raw_fd().unsigned_abs(), 11);
        loop {
            at -= 1;
            bytes[at] = b'0' + (left % 10) as u8;
            left /= 10;
            if left == 0 {
                break;
            }
        }
        bytes.rotate_left(at);
        FdName(bytes)
    }

    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or(c"")
    }
}

/// Whether two open files are one inode.
pub fn same_inode(a: &libc::statx, b: &libc::statx) -> bool {
    (a.stx_ino, a.stx_dev_major, a.stx_dev_minor) == (b.stx_ino, b.stx_dev_major, b.stx_dev_minor)
}

macro_rules! calls {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) = $call:expr;)*) => {
        $($(#[$doc])* pub fn $name($($arg: $type),*) -> io::Result<()> {
            // SAFETY: borrowed descriptors, C strings and slices with their lengths.
            check(unsafe { $call }).map(|_| ())
        })*
    };
}

calls! {
    fn mkdir_at(dir: BorrowedFd<'_>, name: &CStr, mode: u32) = libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode);
    fn mknod_at(dir: BorrowedFd<'_>, name: &CStr, mode: u32, device: u64) =
        libc::mknodat(dir.as_raw_fd(), name.as_ptr(), mode, device);
    fn symlink_at(target: &CStr, dir: BorrowedFd<'_>, name: &CStr) =
        libc::symlinkat(target.as_ptr(), dir.as_raw_fd(), name.as_ptr());
    fn unlink_at(dir: BorrowedFd<'_>, name: &CStr, flags: i32) = libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags);
    fn rename_at(from: BorrowedFd<'_>, old: &CStr, to: BorrowedFd<'_>, new: &CStr, flags: u32) = libc::syscall(
        libc::SYS_renameat2, from.as_raw_fd(), old.as_ptr(), to.as_raw_fd(), new.as_ptr(), flags
    );
    fn link_at(from: BorrowedFd<'_>, old: &CStr, to: BorrowedFd<'_>, new: &CStr, flags: i32) =
        libc::linkat(from.as_raw_fd(), old.as_ptr(), to.as_raw_fd(), new.as_ptr(), flags);
    /// Of the open file itself, also of a link.
    fn chown(fd: BorrowedFd<'_>, uid: u32, gid: u32) = libc::fchownat(
        fd.as_raw_fd(), c"".as_ptr(), uid, gid, libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW
    );
    fn chmod_at(dir: BorrowedFd<'_>, name: &CStr, mode: u32) =
        libc::fchmodat(dir.as_raw_fd(), name.as_ptr(), mode, 0);
    fn set_times_at(dir: BorrowedFd<'_>, name: &CStr, times: &[libc::timespec; 2]) =
        libc::utimensat(dir.as_raw_fd(), name.as_ptr(), times.as_ptr(), 0);
    fn truncate(fd: BorrowedFd<'_>, size: i64) = libc::ftruncate(fd.as_raw_fd(), size);
    fn sync(fd: BorrowedFd<'_>) = libc::fsync(fd.as_raw_fd());
    fn sync_data(fd: BorrowedFd<'_>) = libc::fdatasync(fd.as_raw_fd());
    fn sync_fs(fd: BorrowedFd<'_>) = libc::syncfs(fd.as_raw_fd());
    fn allocate(fd: BorrowedFd<'_>, mode: i32, offset: i64, length: i64) =
        libc::fallocate(fd.as_raw_fd(), mode, offset, length);
    fn flock(fd: BorrowedFd<'_>, operation: i32) = libc::flock(fd.as_raw_fd(), operation);
    fn change_directory(fd: BorrowedFd<'_>) = libc::fchdir(fd.as_raw_fd());
    fn set_xattr(path: &CStr, name: &CStr, value: &[u8], flags: i32) =
        libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags);
    fn remove_xattr(path: &CStr, name: &CStr) = libc::removexattr(path.as_ptr(), name.as_ptr());
    fn lock(fd: BorrowedFd<'_>, command: i32, lock: &mut libc::flock) =
        libc::fcntl(fd.as_raw_fd(), command, std::ptr::from_mut(lock));
    fn ioctl(fd: BorrowedFd<'_>, command: u32, data: &mut [u8]) =
        libc::ioctl(fd.as_raw_fd(), command.into(), data.as_mut_ptr());
}

/// `getxattr`: bytes of the value, which is cut off only by an error.
pub fn get_xattr(path: &CStr, name: &CStr, value: &mut [u8]) -> io::Result<usize> {
    // SAFETY: C strings, and a slice with its length.
    let n = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    check(n).map(|n| n as usize)
}

/// `listxattr`, likewise.
pub fn list_xattr(path: &CStr, names: &mut [u8]) -> io::Result<usize> {
    // SAFETY: a C string, and a slice with its length.
    check(unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) }).map(|n| n as usize)
}

/// `lseek`.
pub fn seek(fd: BorrowedFd<'_>, offset: i64, whence: i32) -> io::Result<i64> {
    // SAFETY: a borrowed descriptor.
    let at = unsafe { libc::lseek(fd.as_raw_fd(), offset, whence) };
    // A directory's position may be any number, and an error is told by errno.
    if at < 0 && at == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(at)
}

/// `getdents64`: bytes of entries.
pub fn read_dir(fd: BorrowedFd<'_>, entries: &mut [u8]) -> io::Result<usize> {
    // SAFETY: a borrowed descriptor, and a slice with its length.
    let n = unsafe { libc::syscall(libc::SYS_getdents64, fd.as_raw_fd(), entries.as_mut_ptr(), entries.len()) };
    check(n).map(|n| n as usize)
}

/// `readlinkat` of the open link itself.
pub fn read_link(fd: BorrowedFd<'_>, target: &mut [u8]) -> io::Result<usize> {
    let (to, len) = (target.as_mut_ptr().cast(), target.len());
    // SAFETY: a borrowed descriptor, an empty path, and a slice with its length.
    check(unsafe { libc::readlinkat(fd.as_raw_fd(), c"".as_ptr(), to, len) }).map(|n| n as usize)
}

/// `fstatvfs`.
pub fn stat_fs(fd: BorrowedFd<'_>) -> io::Result<libc::statvfs64> {
    // SAFETY: all-zero bytes are a valid `statvfs64`.
    let mut st = unsafe { std::mem::zeroed::<libc::statvfs64>() };
    // SAFETY: a borrowed descriptor, and room for the answer.
    check(unsafe { libc::fstatvfs64(fd.as_raw_fd(), &raw mut st) })?;
    Ok(st)
}

/// `copy_file_range`: bytes copied.
pub fn copy_range(from: BorrowedFd<'_>, at: u64, to: BorrowedFd<'_>, to_at: u64, len: u64) -> io::Result<usize> {
    let offset = |at: u64| i64::try_from(at).map_err(|_| errno(libc::EINVAL));
    let (mut at, mut to_at) = (offset(at)?, offset(to_at)?);
    // The kernel takes at most MAX_RW_COUNT at a time.
    let len = len.min(i64::MAX as u64) as usize;
    // SAFETY: borrowed descriptors and two offsets.
    let n = unsafe { libc::copy_file_range(from.as_raw_fd(), &raw mut at, to.as_raw_fd(), &raw mut to_at, len, 0) };
    check(n).map(|n| n as usize)
}

/// Closes a duplicate of the descriptor: a network file system reports late errors of WRITEs then.
pub fn close_duplicate(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: a borrowed descriptor; the duplicate is closed once.
    unsafe {
        let copy = check(libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0))?;
        check(libc::close(copy)).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn descriptors_have_their_numbers_as_names() {
        for number in [0, 7, 10, 4711, i32::MAX] {
            // SAFETY: never used as a descriptor.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            assert_eq!(FdName::new(fd).as_c_str().to_str().unwrap(), number.to_string());
        }
    }

    #[test]
    fn a_stat_names_the_mount() {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(dir.path().join("f")).unwrap();
        let st = stat(file.as_fd()).unwrap();
        assert!(st.stx_mnt_id != 0 && st.stx_size == 0);
        assert_eq!(FileHandle::of(file.as_fd()).unwrap(), FileHandle::of(file.as_fd()).unwrap());
    }
}
