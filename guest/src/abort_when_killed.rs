//! A process beside a mount's, for one case that the mount cannot help itself in: somebody kills it with SIGKILL while
//! one of its threads tells the kernel of a changed name.
//!
//! The kernel takes a name out of its cache with the directory's lock, which a program may hold that waits for an answer
//! of the mount. The killed process cannot end before that thread does, nor does its `/dev/fuse` close, which would end
//! the connection: both would wait for ever. So this process ends the connection.

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

/// The name of the command, which is not for people.
pub const COMMAND: &str = "abort-when-killed";
/// Comes when the mount's main thread has ended.
const MAIN_THREAD_ENDED: Signal = Signal::SIGUSR1;
/// How long a process may take to end after its main thread.
const MAY_TAKE: u16 = 500;
/// How often the connection is ended, at most, until the process is gone.
const TRIES: usize = 20;

/// What it needs to know.
#[derive(clap::Args, Debug)]
pub struct Mounted {
    pid: i32,
    /// The kernel's number of the connection.
    connection: u32,
    point: PathBuf,
}

/// Starts it for a mount of this process. Call it on the main thread.
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

/// It ends with the mount's process, not by signals: a whole session or service may be told to end. It keeps no file of
/// the mount's: somebody may wait for the end of one.
fn prepare() -> io::Result<()> {
    SigSet::all().thread_block()?;
    set_pdeathsig(MAIN_THREAD_ENDED)?;
    // SAFETY: a system call that takes numbers.
    match unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits until the mount's process has ended; ends its connection if it cannot.
///
/// # Errors
/// The system's.
pub fn run(mounted: &Mounted) -> io::Result<()> {
    set_name(c"tunnelfs-abort")?;
    let Some(process) = open_process(mounted.pid)? else { return Ok(()) };
    // It may have ended before its end was to be told.
    if getppid() == Pid::from_raw(mounted.pid) {
        let ended = SigSet::from_iter([MAIN_THREAD_ENDED]);
        while ended.wait().is_err() {}
    }
    for _ in 0..TRIES {
        let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(MAY_TAKE)) != Ok(0) {
            break;
        }
        // Still there, so the number still is that of its connection.
        abort(&mounted.point, Some(mounted.connection));
    }
    Ok(())
}

/// `None`: it has ended.
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
