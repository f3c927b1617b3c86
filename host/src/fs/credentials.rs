//! Whom a thread acts for.
//!
//! The guest's kernel has already checked permissions when a request comes. So a thread keeps its capabilities, and
//! becomes the caller (file-system user, group and supplementary groups, all of the thread alone) only for calls that
//! create something, so that it belongs to whom it should, quotas and setgid directories included.
//!
//! One capability comes and goes: CAP_FSETID, without which the kernel itself clears setuid and setgid bits and file
//! capabilities on writes. It changes only when a request wants the other state than the one before it.

use super::file_system::Context;
use super::sys::{change_directory, check, errno};
use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Numbers of capabilities, and `_LINUX_CAPABILITY_VERSION_3` (linux/capability.h).
const SETGID: u32 = 6;
const SETUID: u32 = 7;
const FSETID: u32 = 4;
const DAC_OVERRIDE: u32 = 1;
const DAC_READ_SEARCH: u32 = 2;
const SYS_ADMIN: u32 = 21;
const VERSION: u32 = 0x2008_0522;
/// `SECBIT_NO_SETUID_FIXUP` (linux/securebits.h): another user id leaves capabilities alone.
const NO_SETUID_FIXUP: libc::c_int = 1 << 2;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct`, twice.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Capabilities {
    /// effective, permitted, inheritable of the first 32; then of the others.
    words: [u32; 6],
}

impl Capabilities {
    fn get() -> io::Result<Self> {
        let (mut header, mut own) = (Header { version: VERSION, pid: 0 }, Capabilities::default());
        // SAFETY: a header, and room for two structures.
        check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, &raw mut own) })?;
        Ok(own)
    }

    fn set(&self) -> io::Result<()> {
        let mut header = Header { version: VERSION, pid: 0 };
        // SAFETY: a header, and two structures.
        check(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, std::ptr::from_ref(self)) }).map(|_| ())
    }

    fn has(&self, capability: u32) -> bool {
        self.words[0] & (1 << capability) != 0
    }

    /// Whether it may be made effective.
    fn permits(&self, capability: u32) -> bool {
        self.words[1] & (1 << capability) != 0
    }
}

/// What a serving thread is.
struct Thread {
    /// The descriptor that is its working directory.
    directory: i32,
    uid: u32,
    gid: u32,
    umask: u32,
    capabilities: Capabilities,
    /// Its capabilities must be set again after it has become somebody else.
    fixed_up: bool,
}

impl Thread {
    /// After it has become somebody else.
    fn keep_capabilities(&self) -> io::Result<()> {
        if self.fixed_up {
            self.capabilities.set()
        } else {
            Ok(())
        }
    }

    /// Becomes itself again.
    fn come_back(&self, groups: bool) -> io::Result<()> {
        set_ids(self.uid, self.gid)?;
        if groups {
            set_groups(&[])?;
        }
        // Becoming root has raised what had been lowered.
        self.keep_capabilities()
    }
}

thread_local! {
    static THREAD: RefCell<Option<Thread>> = const { RefCell::new(None) };
}

/// Has this thread, and those that it starts, keep their capabilities when they act for somebody. Before a process
/// drops what that needs (CAP_SETPCAP).
pub fn keep_capabilities() -> bool {
    // SAFETY: numbers only.
    unsafe {
        let bits = libc::prctl(libc::PR_GET_SECUREBITS);
        if bits >= 0 && bits & NO_SETUID_FIXUP != 0 {
            return true;
        }
        bits >= 0 && libc::prctl(libc::PR_SET_SECUREBITS, bits | NO_SETUID_FIXUP, 0, 0, 0) == 0
    }
}

/// Makes the calling thread one that serves: with a working directory (`/proc/self/fd`, where an open file's extended
/// attributes are reached by its number) and a umask of its own. Cheap when it is one already.
pub fn prepare(directory: BorrowedFd<'_>) -> io::Result<()> {
    THREAD.with_borrow_mut(|thread| {
        let own = match thread {
            Some(own) if own.directory == directory.as_raw_fd() => return Ok(()),
            Some(own) => own,
            None => thread.insert(settle()?),
        };
        change_directory(directory)?;
        own.directory = directory.as_raw_fd();
        Ok(())
    })
}

fn settle() -> io::Result<Thread> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
    let fixed_up = !keep_capabilities();
    // SAFETY: no arguments; the umask is this thread's own now.
    let (uid, gid) = unsafe {
        libc::umask(0);
        (libc::geteuid(), libc::getegid())
    };
    Ok(Thread { directory: -1, uid, gid, umask: 0, capabilities: Capabilities::get()?, fixed_up })
}

fn with<R>(each: impl FnOnce(&mut Thread) -> io::Result<R>) -> io::Result<R> {
    THREAD.with_borrow_mut(|thread| match thread {
        Some(own) => each(own),
        None => each(thread.insert(settle()?)),
    })
}

/// Whether this thread may open files by handle.
pub fn opens_by_handle() -> bool {
    Capabilities::get().is_ok_and(|own| own.has(DAC_READ_SEARCH))
}

/// Whether this thread may open whatever the guest's kernel allows: opening by handle is a right of the machine's own root,
/// not of one of a user namespace.
pub fn opens_all() -> bool {
    Capabilities::get().is_ok_and(|own| own.has(DAC_OVERRIDE) && own.has(DAC_READ_SEARCH))
}

/// Whether this thread has CAP_SYS_ADMIN, which `trusted` attributes need.
pub fn administers() -> bool {
    Capabilities::get().is_ok_and(|own| own.has(SYS_ADMIN))
}

/// Whether this thread can create files for others.
#[cfg(test)]
pub fn acts_for_others() -> bool {
    Capabilities::get().is_ok_and(|own| own.has(SETUID) && own.has(SETGID))
}

/// From now on the kernel clears setuid and setgid bits on this thread's writes, or leaves them alone.
pub fn kill_privileges(kill: bool) -> io::Result<()> {
    with(|own| {
        if own.capabilities.has(FSETID) != kill || !own.capabilities.permits(FSETID) {
            return Ok(());
        }
        let mut wanted = own.capabilities;
        wanted.words[0] ^= 1 << FSETID;
        wanted.set()?;
        own.capabilities = wanted;
        Ok(())
    })
}

/// What the kernel masks new files' modes with, where no default ACL does it.
pub fn set_umask(umask: u32) -> io::Result<()> {
    with(|own| {
        let umask = umask & 0o777;
        if own.umask != umask {
            // SAFETY: a number; the umask is this thread's own.
            unsafe { libc::umask(umask) };
            own.umask = umask;
        }
        Ok(())
    })
}

/// A thread that acts for a caller, until it is dropped.
#[derive(Debug)]
pub struct Acting {
    /// Whether there is somebody to become again.
    back: bool,
    groups: bool,
}

impl Acting {
    /// Acts for the caller of a request, who is (on this machine) `ctx`.
    ///
    /// # Errors
    /// `EPERM` when the thread may not.
    pub fn for_caller(ctx: &Context, groups: &[u32]) -> io::Result<Acting> {
        with(|own| {
            // Idmapped mounts tell the caller of what creates something alone.
            let unknown = ctx.uid == u32::MAX;
            // A guest's root is this process, whoever that is.
            let uid = if ctx.uid == 0 { own.uid } else { ctx.uid };
            let gid = if ctx.gid == 0 { own.gid } else { ctx.gid };
            if unknown || (own.uid, own.gid) == (uid, gid) && groups.is_empty() {
                return Ok(Acting { back: false, groups: false });
            }
            if !(own.capabilities.has(SETUID) && own.capabilities.has(SETGID)) {
                // Without root, nobody else.
                return if uid == own.uid {
                    Ok(Acting { back: false, groups: false })
                } else {
                    Err(errno(libc::EPERM))
                };
            }
            // Some user namespaces have no supplementary groups: a setgid bit may get lost there, no more.
            let grouped = !groups.is_empty() && set_groups(groups).is_ok();
            let begun = set_ids(uid, gid).and_then(|()| own.keep_capabilities());
            if let Err(e) = begun {
                own.come_back(grouped)?;
                return Err(e);
            }
            Ok(Acting { back: true, groups: grouped })
        })
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        if !self.back {
            return;
        }
        if let Err(e) = with(|own| own.come_back(self.groups)) {
            tracing::error!("a thread cannot become itself again after acting for a guest's user: {e}");
        }
    }
}

/// glibc's functions would change all threads.
fn set_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: a slice with its length.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) }).map(|_| ())
}

fn set_ids(uid: u32, gid: u32) -> io::Result<()> {
    const ASK: u32 = u32::MAX;
    // SAFETY: numbers only; each call returns the id before it, and -1 changes nothing.
    let ids = unsafe {
        libc::syscall(libc::SYS_setfsgid, gid);
        libc::syscall(libc::SYS_setfsuid, uid);
        (libc::syscall(libc::SYS_setfsuid, ASK) as u32, libc::syscall(libc::SYS_setfsgid, ASK) as u32)
    };
    if ids == (uid, gid) {
        Ok(())
    } else {
        Err(errno(libc::EPERM))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    fn on_a_thread(f: impl FnOnce() + Send) {
        std::thread::scope(|s| s.spawn(f).join().unwrap());
    }

    #[test]
    fn a_thread_creates_for_a_caller_whatever_the_mode_says() {
        if !acts_for_others() {
            return println!("skipped: needs root");
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o500)).unwrap();
        on_a_thread(|| {
            set_umask(0).unwrap();
            let ctx = Context { uid: 1234, gid: 2345, ..Context::default() };
            let acting = Acting::for_caller(&ctx, &[77]).unwrap();
            fs::write(dir.path().join("f"), "x").unwrap();
            drop(acting);
            fs::write(dir.path().join("own"), "x").unwrap();
        });
        let of = |name| fs::metadata(dir.path().join(name)).map(|m| (m.uid(), m.gid())).unwrap();
        assert_eq!((of("f"), of("own")), ((1234, 2345), (0, 0)));
    }

    #[test]
    fn writes_clear_setuid_bits_only_where_they_should() {
        if !acts_for_others() {
            return println!("skipped: needs root");
        }
        let dir = tempfile::tempdir().unwrap();
        on_a_thread(|| {
            for (kill, left) in [(true, 0o755), (false, 0o4755), (true, 0o755)] {
                let path = dir.path().join("program");
                fs::write(&path, "x").unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).unwrap();
                kill_privileges(kill).unwrap();
                fs::OpenOptions::new()
                    .append(true)
                    .open(&path)
                    .map(|mut f| io::Write::write(&mut f, b"y"))
                    .unwrap()
                    .unwrap();
                assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, left, "{kill}");
            }
            kill_privileges(true).unwrap();
            let acting = Acting::for_caller(&Context { uid: 99, gid: 99, ..Context::default() }, &[]).unwrap();
            drop(acting);
            assert!(!Capabilities::get().unwrap().has(FSETID), "raised by coming back");
        });
    }
}
