//! The host's UNIX socket: made, and removed again, without harm to anybody else's file.
//!
//! Only a socket that nobody answers on is removed before a new one is bound. A lock file beside it
//! (`<socket>.lock`, there only for as long as this takes) keeps two hosts that start at once apart.

use nix::sys::socket::{connect, getsockopt, socket, sockopt, AddressFamily, SockFlag, SockType, UnixAddr};
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::{Duration, Instant};
use virtiofsd::oslib::ScopedUmask;

/// Only the owner may connect: whoever can is a guest.
const SOCKET_UMASK: libc::mode_t = 0o177;
/// How long another host that starts may hold the lock file. It needs a few system calls.
const LOCK_LIMIT: Duration = Duration::from_secs(5);
/// Tries of the signal handler to get the lock, [`LOCK_PAUSE`] apart. Without the lock the file stays.
const LOCK_TRIES: u32 = 10;
/// Pause between two tries to get the lock.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Directory and names of a bound socket, for system calls in signal handlers.
struct Place {
    dir: OwnedFd,
    name: CString,
    lock: CString,
    /// Device and inode of the socket file.
    file: (libc::dev_t, libc::ino_t),
    /// The process that removes the file: a sandbox makes others, which end before it.
    owner: libc::pid_t,
}

/// The bound socket's file. It is removed with this, if it is still the same file.
pub struct SocketFile(Option<Place>);

/// The file that [`end_process`] removes.
static AT_EXIT: AtomicPtr<Place> = AtomicPtr::new(std::ptr::null_mut());

/// Binds a listening socket at `path`. With `replace`, one that another process listens on loses its name.
///
/// # Errors
/// What is at `path` is no socket, somebody answers on it, or the system refuses.
pub fn bind(path: &Path, replace: bool) -> io::Result<(UnixListener, SocketFile)> {
    let context = |e: io::Error| io::Error::new(e.kind(), format!("cannot listen on {}: {e}", path.display()));
    let name = path.file_name().ok_or_else(|| context(invalid("the path has no file name")))?;
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let dir = open_dir(dir).map_err(context)?;
    let mut lock = name.to_owned();
    lock.push(".lock");
    let owner = nix::unistd::getpid().as_raw();
    let mut place = Place { dir, name: c_string(name)?, lock: c_string(&lock)?, file: (0, 0), owner };
    let (listener, file) = bind_locked(path, &place, replace).map_err(context)?;
    place.file = file;
    Ok((listener, SocketFile(Some(place))))
}

/// The listening socket, and its file's device and inode.
fn bind_locked(path: &Path, place: &Place, replace: bool) -> io::Result<(UnixListener, (libc::dev_t, libc::ino_t))> {
    let _lock = Lock::wait(place)?;
    make_room(path, place, replace)?;
    let listener = {
        let _umask = ScopedUmask::new(SOCKET_UMASK);
        UnixListener::bind(path)?
    };
    let st = place.stat(&place.name)?;
    Ok((listener, (st.st_dev, st.st_ino)))
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text.to_owned())
}

fn c_string(name: &OsStr) -> io::Result<CString> {
    CString::new(name.as_bytes()).map_err(|_| invalid("the socket's path contains a NUL byte"))
}

fn open_dir(dir: &Path) -> io::Result<OwnedFd> {
    use nix::fcntl::{open, OFlag};
    Ok(open(dir, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())?)
}

/// Removes a dead socket at `path`. Anything else there is an error.
fn make_room(path: &Path, place: &Place, replace: bool) -> io::Result<()> {
    let st = match place.stat(&place.name) {
        Ok(st) => st,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    let kind = match st.st_mode & libc::S_IFMT {
        libc::S_IFSOCK => return unlink_socket(path, place, replace),
        libc::S_IFREG => "a regular file",
        libc::S_IFDIR => "a directory",
        libc::S_IFLNK => "a symbolic link",
        _ => "no socket",
    };
    Err(io::Error::new(
        io::ErrorKind::AlreadyExists,
        format!("it is {kind}, which is never replaced; remove it, or give another --socket-path"),
    ))
}

fn unlink_socket(path: &Path, place: &Place, replace: bool) -> io::Result<()> {
    if !replace {
        if let Some(owner) = who_answers(path)? {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!(
                    "{owner} listens there; stop it, give another --socket-path, or take the path over with --replace"
                ),
            ));
        }
    }
    place.unlink(&place.name)
}

/// Names the process that listens on a socket. `None` when there is none.
fn who_answers(path: &Path) -> io::Result<Option<String>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(probe.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) => {}
        Err(nix::Error::ECONNREFUSED) => return Ok(None),
        // The backlog is full, or it is no stream: somebody has it.
        Err(e @ (nix::Error::EAGAIN | nix::Error::EPROTOTYPE | nix::Error::EACCES)) => {
            return Ok(Some(format!("another process ({e})")))
        }
        Err(e) => return Err(e.into()),
    }
    let peer = getsockopt(&probe, sockopt::PeerCredentials)?;
    let name = std::fs::read_to_string(format!("/proc/{}/comm", peer.pid())).unwrap_or_default();
    Ok(Some(format!("process {} ({}, user {})", peer.pid(), name.trim(), peer.uid())))
}

impl Place {
    /// As lstat(2). Safe in a signal handler.
    fn stat(&self, name: &CString) -> io::Result<libc::stat> {
        // SAFETY: all-zero bytes are a valid `stat`.
        let mut st = unsafe { std::mem::zeroed::<libc::stat>() };
        // SAFETY: an open directory, a string and room for the answer.
        let n = unsafe { libc::fstatat(self.dir.as_raw_fd(), name.as_ptr(), &raw mut st, libc::AT_SYMLINK_NOFOLLOW) };
        if n < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(st)
        }
    }

    /// As unlink(2). Safe in a signal handler.
    fn unlink(&self, name: &CString) -> io::Result<()> {
        // SAFETY: an open directory and a string.
        let n = unsafe { libc::unlinkat(self.dir.as_raw_fd(), name.as_ptr(), 0) };
        if n < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Removes the socket file, if nobody has put another in its place. Safe in a signal handler.
    fn remove(&self) {
        for _ in 0..LOCK_TRIES {
            if let Ok(Some(_lock)) = Lock::try_new(self) {
                if self.stat(&self.name).is_ok_and(|st| (st.st_dev, st.st_ino) == self.file) {
                    let _ = self.unlink(&self.name);
                }
                return;
            }
            let pause = libc::timespec { tv_sec: 0, tv_nsec: LOCK_PAUSE.as_nanos() as _ };
            // SAFETY: a valid time.
            unsafe { libc::nanosleep(&raw const pause, std::ptr::null_mut()) };
        }
    }
}

/// The lock file, locked. It is removed before it is unlocked.
struct Lock<'a>(&'a Place, RawFd);

impl<'a> Lock<'a> {
    fn wait(place: &'a Place) -> io::Result<Self> {
        let start = Instant::now();
        while start.elapsed() < LOCK_LIMIT {
            if let Some(lock) = Lock::try_new(place)? {
                return Ok(lock);
            }
            std::thread::sleep(LOCK_PAUSE);
        }
        let name = place.lock.to_string_lossy();
        Err(io::Error::new(io::ErrorKind::TimedOut, format!("another process holds the lock file {name} beside it")))
    }

    /// `None` when another process has it. Safe in a signal handler.
    fn try_new(place: &'a Place) -> io::Result<Option<Self>> {
        let flags = libc::O_CREAT | libc::O_RDWR | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        // SAFETY: an open directory and a string.
        let fd = unsafe { libc::openat(place.dir.as_raw_fd(), place.lock.as_ptr(), flags, 0o600) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: all-zero bytes are a valid `stat`.
        let mut st = unsafe { std::mem::zeroed::<libc::stat>() };
        // SAFETY: our descriptor, and room for the answer.
        let locked =
            unsafe { libc::flock(fd, libc::LOCK_EX | libc::LOCK_NB) == 0 && libc::fstat(fd, &raw mut st) == 0 };
        // The last owner may have removed the file after it was opened here.
        let same = |there: libc::stat| (there.st_dev, there.st_ino) == (st.st_dev, st.st_ino);
        if locked && place.stat(&place.lock).is_ok_and(same) {
            return Ok(Some(Lock(place, fd)));
        }
        // SAFETY: our descriptor, closed once.
        unsafe { libc::close(fd) };
        Ok(None)
    }
}

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        let _ = self.0.unlink(&self.0.lock);
        // SAFETY: our descriptor, closed once.
        unsafe { libc::close(self.1) };
    }
}

impl SocketFile {
    /// Leaves the removal to [`end_process`], which a signal handler or atexit(3) may call.
    pub fn remove_at_exit(mut self) {
        if let Some(place) = self.0.take() {
            AT_EXIT.store(Box::into_raw(Box::new(place)), Ordering::Release);
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Some(place) = self.0.take() {
            place.remove();
        }
    }
}

/// In a sandboxed process: gives up the descriptor by which the file could be removed. Another process removes it.
pub fn disown() {
    let place = AT_EXIT.swap(std::ptr::null_mut(), Ordering::AcqRel);
    if !place.is_null() {
        // SAFETY: from `Box::into_raw` in `remove_at_exit`, and nobody else has it any more.
        drop(unsafe { Box::from_raw(place) });
    }
}

/// Removes the socket file that was left to it. Safe in a signal handler.
pub extern "C" fn remove_now() {
    let place = AT_EXIT.swap(std::ptr::null_mut(), Ordering::AcqRel);
    if !place.is_null() {
        // SAFETY: from `Box::into_raw`, never freed from here on: freeing is not safe in a signal handler.
        let place = unsafe { &*place };
        // SAFETY: a system call without arguments.
        if unsafe { libc::getpid() } == place.owner {
            place.remove();
        }
    }
}

/// Ends the process by a signal, and removes its socket file.
extern "C" fn end_process(_: libc::c_int) {
    remove_now();
    // SAFETY: may be called in a signal handler.
    unsafe { libc::_exit(0) }
}

/// What signals do to a host of its own: SIGTERM and SIGINT end it and remove its socket, SIGUSR1 does nothing.
/// A handler is needed for the first process of a PID namespace, which ends by no other signal.
pub fn handle_signals() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: the handler makes only calls that are safe in one.
        unsafe { libc::signal(signal, end_process as extern "C" fn(_) as usize) };
    }
    // SAFETY: ignores a signal.
    unsafe { libc::signal(libc::SIGUSR1, libc::SIG_IGN) };
    // SAFETY: a function without arguments that may be called at exit.
    unsafe { libc::atexit(remove_now) };
}

/// Forks a process that outlives the caller's sandbox, to remove the socket file. The caller goes on in the child.
///
/// # Errors
/// The system has no process left.
pub fn fork_remover(listener: RawFd) -> io::Result<()> {
    let parent = nix::unistd::getpid();
    // SAFETY: the process has a single thread, as `serve_confined` demands.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM)?;
            if nix::unistd::getppid() != parent {
                std::process::exit(0);
            }
            disown();
            Ok(())
        }
        nix::unistd::ForkResult::Parent { child } => {
            // SAFETY: this process does not return to whoever owns it.
            drop(unsafe { OwnedFd::from_raw_fd(listener) });
            let code = loop {
                match nix::sys::wait::waitpid(child, None) {
                    Err(nix::Error::EINTR) => {}
                    Ok(nix::sys::wait::WaitStatus::Exited(_, code)) => break code,
                    _ => break 1,
                }
            };
            std::process::exit(code);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn scratch() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        (dir, path)
    }

    #[test]
    fn anything_but_a_socket_is_left_alone() {
        let (dir, path) = scratch();
        let other = dir.path().join("other");
        fs::write(&other, "kept").unwrap();
        for replace in [false, true] {
            fs::write(&path, "kept").unwrap();
            assert!(bind(&path, replace).is_err_and(|e| e.to_string().contains("a regular file")));
            assert_eq!(fs::read(&path).unwrap(), b"kept");
            fs::remove_file(&path).unwrap();
            for target in ["other", "nowhere"] {
                std::os::unix::fs::symlink(target, &path).unwrap();
                assert!(bind(&path, replace).is_err_and(|e| e.to_string().contains("a symbolic link")));
                assert_eq!(fs::read_link(&path).unwrap(), Path::new(target));
                fs::remove_file(&path).unwrap();
            }
            fs::create_dir(&path).unwrap();
            assert!(bind(&path, replace).is_err_and(|e| e.to_string().contains("a directory")));
            fs::remove_dir(&path).unwrap();
        }
        assert_eq!(fs::read(&other).unwrap(), b"kept");
    }

    #[test]
    fn a_socket_in_use_is_refused_and_replaced_on_demand() {
        let (_dir, path) = scratch();
        let (first, first_file) = bind(&path, false).unwrap();
        let refused = bind(&path, false).err().unwrap().to_string();
        assert!(
            refused.contains(&format!("process {}", std::process::id())) && refused.contains("--replace"),
            "{refused}"
        );
        let (second, second_file) = bind(&path, true).unwrap();
        drop(first_file);
        assert!(path.exists(), "the first host has removed the second one's socket");
        drop((first, second, second_file));
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_socket_is_replaced() {
        let (dir, path) = scratch();
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (_listener, file) = bind(&path, false).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the lock file has stayed");
        drop(file);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn of_hosts_that_start_at_once_one_has_the_socket() {
        let (_dir, path) = scratch();
        for _ in 0..20 {
            drop(UnixListener::bind(&path).unwrap());
            let bound: Vec<_> = std::thread::scope(|scope| {
                let starts: Vec<_> = (0..4).map(|_| scope.spawn(|| bind(&path, false))).collect();
                starts.into_iter().filter_map(|start| start.join().unwrap().ok()).collect()
            });
            assert_eq!(bound.len(), 1);
            std::os::unix::net::UnixStream::connect(&path).unwrap();
        }
    }
}
