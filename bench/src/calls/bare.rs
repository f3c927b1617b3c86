//! The bare system calls of an operation.

use std::ffi::CStr;
use std::hint::black_box;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// The result of a system call.
pub(super) fn check(result: impl Into<i64>) -> io::Result<i64> {
    let result = result.into();
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

pub(super) fn open_at(dir: RawFd, name: &CStr, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: a descriptor of the caller's and a C string; the result is owned here.
    unsafe { Ok(OwnedFd::from_raw_fd(check(libc::openat(dir, name.as_ptr(), flags | libc::O_CLOEXEC, 0o644))? as i32)) }
}

pub(super) fn stat(fd: RawFd) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid `statx`, and there is room for one.
    unsafe {
        let mut st = std::mem::zeroed::<libc::statx>();
        let mask = libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID;
        check(libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, mask, &raw mut st))?;
        black_box(st.stx_ino);
    }
    Ok(())
}

/// The bare calls of a LOOKUP; the descriptor stays open.
pub(super) fn look_up(dir: RawFd, name: &CStr) -> io::Result<OwnedFd> {
    let fd = open_at(dir, name, libc::O_PATH | libc::O_NOFOLLOW)?;
    stat(fd.as_raw_fd())?;
    Ok(fd)
}

pub(super) fn name_to_handle(fd: RawFd) -> io::Result<()> {
    let mut handle = [0u32; 2 + 128 / 4];
    handle[0] = 128;
    let mut mount = 0i32;
    // SAFETY: an empty C string, a handle with its length, and room for the mount's number.
    check(unsafe {
        let (path, flags) = (c"".as_ptr(), libc::AT_EMPTY_PATH);
        libc::syscall(libc::SYS_name_to_handle_at, fd, path, handle.as_mut_ptr(), &raw mut mount, flags)
    })
    .map(drop)
}

/// Removes a name.
pub(super) fn unlink(dir: RawFd, name: &CStr, flags: i32) -> io::Result<()> {
    // SAFETY: a descriptor of the caller's and a C string.
    check(unsafe { libc::unlinkat(dir, name.as_ptr(), flags) }).map(drop)
}

/// Renames within a directory.
pub(super) fn rename(dir: RawFd, from: &CStr, to: &CStr) -> io::Result<()> {
    // SAFETY: a descriptor of the caller's and C strings.
    check(unsafe { libc::syscall(libc::SYS_renameat2, dir, from.as_ptr(), dir, to.as_ptr(), 0) }).map(drop)
}
