//! System calls that the standard library does not have, with their error numbers.

use nix::errno::Errno;
use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

pub type Answer<T> = Result<T, Errno>;

pub fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_encoded_bytes()).unwrap()
}

/// A system call's number, or its error.
pub fn told(n: i64) -> Answer<i64> {
    Errno::result(n)
}

pub fn set_xattr(path: &Path, name: &str, value: &[u8], flags: i32) -> Answer<()> {
    let (path, name) = (c(path), CString::new(name).unwrap());
    // SAFETY: NUL-ended strings, and a value of the length that is told.
    let n = unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) };
    Errno::result(n).map(drop)
}

pub fn get_xattr(path: &Path, name: &str) -> Answer<Vec<u8>> {
    let (path, name) = (c(path), CString::new(name).unwrap());
    let mut value = vec![0; 65_536];
    // SAFETY: NUL-ended strings, and as much room as is told.
    let n = unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(Errno::result(n)? as usize);
    Ok(value)
}

pub fn remove_xattr(path: &Path, name: &str) -> Answer<()> {
    let (path, name) = (c(path), CString::new(name).unwrap());
    // SAFETY: NUL-ended strings.
    Errno::result(unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) }).map(drop)
}

/// Names in order.
pub fn list_xattr(path: &Path) -> Answer<Vec<String>> {
    let path = c(path);
    let mut names = vec![0u8; 65_536];
    // SAFETY: a NUL-ended string, and as much room as is told.
    let n = unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(Errno::result(n)? as usize);
    let names = names.split(|&b| b == 0).filter(|n| !n.is_empty());
    let mut names: Vec<_> = names.map(|n| String::from_utf8_lossy(n).into_owned()).collect();
    names.sort();
    Ok(names)
}

/// `struct posix_acl_xattr_header` and entries (linux/posix_acl_xattr.h): tag, permissions, id.
pub fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// All that statx(2) knows.
pub fn statx(path: &Path) -> Answer<libc::statx> {
    let path = c(path);
    // SAFETY: a plain structure, for which zeros are as good as any.
    let mut out: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: a NUL-ended string and room for the structure.
    let n = unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, libc::STATX_ALL, &raw mut out) };
    Errno::result(n).map(|_| out)
}

/// `struct file_handle`, with room for the largest.
#[repr(C)]
pub struct Handle {
    bytes: u32,
    kind: i32,
    data: [u8; 128],
}

pub fn name_to_handle(path: &Path) -> Answer<Handle> {
    let path = c(path);
    let (mut handle, mut mount) = (Handle { bytes: 128, kind: 0, data: [0; 128] }, 0i32);
    // SAFETY: a NUL-ended string, and a handle with as much room as it says.
    let n = unsafe {
        libc::syscall(libc::SYS_name_to_handle_at, libc::AT_FDCWD, path.as_ptr(), &raw mut handle, &raw mut mount, 0)
    };
    told(n).map(|_| handle)
}

/// Opens it on the file system that `of` lies on.
pub fn open_handle(of: &impl AsRawFd, handle: &Handle, flags: i32) -> Answer<OwnedFd> {
    // SAFETY: a handle as the kernel has made it.
    let n = unsafe { libc::syscall(libc::SYS_open_by_handle_at, of.as_raw_fd(), &raw const *handle, flags) };
    // SAFETY: a new descriptor.
    told(n).map(|fd| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

pub fn fallocate(file: &impl AsRawFd, mode: i32, at: i64, len: i64) -> Answer<()> {
    // SAFETY: no memory is touched.
    Errno::result(unsafe { libc::fallocate(file.as_raw_fd(), mode, at, len) }).map(drop)
}

pub fn copy_range(from: &impl AsRawFd, at: i64, to: &impl AsRawFd, target: i64, len: usize) -> Answer<usize> {
    let (mut at, mut target) = (at, target);
    // SAFETY: two offsets that live as long as the call.
    let n = unsafe { libc::copy_file_range(from.as_raw_fd(), &raw mut at, to.as_raw_fd(), &raw mut target, len, 0) };
    Errno::result(n).map(|n| n as usize)
}

pub fn seek(file: &impl AsRawFd, at: i64, whence: i32) -> Answer<i64> {
    // SAFETY: no memory is touched.
    Errno::result(unsafe { libc::lseek(file.as_raw_fd(), at, whence) })
}

pub fn rename(from: &Path, to: &Path, flags: u32) -> Answer<()> {
    let (from, to, at) = (c(from), c(to), libc::AT_FDCWD);
    // SAFETY: NUL-ended strings.
    told(unsafe { libc::syscall(libc::SYS_renameat2, at, from.as_ptr(), at, to.as_ptr(), flags) }).map(drop)
}

pub fn mknod(path: &Path, mode: u32, device: u64) -> Answer<()> {
    let path = c(path);
    // SAFETY: a NUL-ended string.
    Errno::result(unsafe { libc::mknod(path.as_ptr(), mode, device) }).map(drop)
}

/// A new file without a name in `dir`.
pub fn tmpfile(dir: &Path, mode: u32) -> Answer<OwnedFd> {
    let dir = c(dir);
    // SAFETY: a NUL-ended string.
    let n = unsafe { libc::open(dir.as_ptr(), libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC, mode) };
    // SAFETY: a new descriptor.
    Errno::result(n).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives an open file a name.
pub fn link_open(file: &impl AsRawFd, to: &Path) -> Answer<()> {
    let from = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    let (to, at) = (c(to), libc::AT_FDCWD);
    // SAFETY: NUL-ended strings.
    let n = unsafe { libc::linkat(at, from.as_ptr(), at, to.as_ptr(), libc::AT_SYMLINK_FOLLOW) };
    Errno::result(n).map(drop)
}

/// FS_IOC_GETFLAGS: chattr(1)'s flags.
pub fn inode_flags(file: &impl AsRawFd) -> Answer<i32> {
    let mut flags = 0i64;
    // SAFETY: room for what the ioctl writes.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS, &raw mut flags) }).map(|_| flags as i32)
}

/// FS_IOC_SETFLAGS.
pub fn set_inode_flags(file: &impl AsRawFd, flags: i32) -> Answer<()> {
    let flags = i64::from(flags);
    // SAFETY: it reads an int.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_SETFLAGS, &raw const flags) }).map(drop)
}
