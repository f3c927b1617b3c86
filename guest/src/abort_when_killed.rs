//! A second process for a mount. It ends the FUSE connection if the mount's process is killed with SIGKILL while one of
//! its threads notifies the kernel of a changed name (INVAL_ENTRY).
//!
//! For that notification the kernel takes the directory's lock. The lock's holder may be a program that waits for a
//! reply of the mount. The killed process cannot end before its thread does. So its `/dev/fuse`, whose close would end
//! the connection, stays open, and both wait for ever.

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::prctl::{set_name, set_pdeathsig};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{getppid, Pid};
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tunnelfs_guest::mount::abort;

/// The name of the hidden command.
pub const COMMAND: &str = "abort-when-killed";
/// The signal that the kernel sends when the mount's main thread has ended.
const MAIN_THREAD_ENDED: Signal = Signal::SIGUSR1;
/// Milliseconds that the process may take to end after its main thread, before the connection is aborted.
const EXIT_GRACE_MS: u16 = 500;
/// Most attempts to abort the connection, until the process has ended.
const TRIES: usize = 20;

/// What it needs to know.
#[derive(clap::Args, Debug)]
pub struct Mounted {
    pid: i32,
    /// The kernel's number of the connection.
    connection: u32,
    point: PathBuf,
}

/// Starts the second process for a mount of this process. Must be called on the main thread, as its end sends the
/// signal.
///
/// # Errors
/// The system's.
pub fn start(connection: u32, point: &Path) -> io::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("tunnelfs-abort")
        .arg(COMMAND)
        .args([std::process::id().to_string(), connection.to_string()])
        .arg(point);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
    // SAFETY: only system calls, which a process between fork and exec may make.
    unsafe { command.pre_exec(prepare) };
    command.spawn().map(drop)
}

/// Prepares the second process, between fork and exec. Blocks all signals, which may go to a whole session or service:
/// it must end with the mount's process only. Closes the mount's descriptors on exec, as other processes may wait for
/// their end.
fn prepare() -> io::Result<()> {
    SigSet::all().thread_block()?;
    set_pdeathsig(MAIN_THREAD_ENDED)?;
    // SAFETY: a system call that takes numbers.
    match unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits until the mount's process has ended. Aborts the connection if its main thread has ended, but the process does
/// not.
///
/// # Errors
/// The system's.
pub fn run(mounted: &Mounted) -> io::Result<()> {
    set_name(c"tunnelfs-abort")?;
    let Some(process) = open_process(mounted.pid)? else { return Ok(()) };
    // Do not wait if the parent ended before `prepare` asked for the signal.
    if getppid() == Pid::from_raw(mounted.pid) {
        let ended = SigSet::from_iter([MAIN_THREAD_ENDED]);
        while ended.wait().is_err() {}
    }
    for _ in 0..TRIES {
        let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(EXIT_GRACE_MS)) != Ok(0) {
            break;
        }
        // The process is still there, so the connection's number is still its own.
        abort(&mounted.point, Some(mounted.connection));
    }
    Ok(())
}

/// Opens a pidfd; `None` if the process has ended.
fn open_process(pid: i32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: a system call that takes two numbers.
    match unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } {
        -1 => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            e => Err(e),
        },
        // SAFETY: the descriptor is new, and ours.
        fd => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd as i32) })),
    }
}
