//! `/dev/fuse`, and mounting a connection of it.

use super::mounts;
use crate::Error;
use nix::fcntl::{fcntl, open, FcntlArg, OFlag};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::stat::Mode;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

const DEVICE: &str = "/dev/fuse";
const NEEDS_ROOT: &str = "mounting needs root (or a user namespace of its own: `unshare -rm`)";
/// The type in /proc/mounts.
const TYPE: &str = "fuse.tunnelfs";
/// The kernel's switch for FUSE-over-io_uring.
const ENABLE_URING: &str = "/sys/module/fuse/parameters/enable_uring";

mod ioctl {
    // FUSE_DEV_IOC_CLONE.
    nix::ioctl_read!(
        #[doc = "Joins the connection of another descriptor."]
        fuse_dev_clone,
        229,
        0,
        u32
    );
}

/// What mount(8) users choose.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Other users may enter.
    pub allow_other: bool,
    /// The kernel checks modes, owners and ACLs.
    pub default_permissions: bool,
    /// Read-only, `nosuid` and the like, as mount(2) has them.
    pub flags: MsFlags,
    /// The name in the first column of /proc/mounts.
    pub source: String,
}

impl Default for MountOptions {
    fn default() -> Self {
        MountOptions {
            allow_other: true,
            default_permissions: true,
            flags: MsFlags::empty(),
            source: "tunnelfs".into(),
        }
    }
}

impl MountOptions {
    /// Takes over a word of mount(8)'s `-o`; `false` when it is none.
    pub fn word(&mut self, word: &str) -> bool {
        let (flag, on) = match word {
            "ro" => (MsFlags::MS_RDONLY, true),
            "rw" => (MsFlags::MS_RDONLY, false),
            "nosuid" => (MsFlags::MS_NOSUID, true),
            "suid" => (MsFlags::MS_NOSUID, false),
            "nodev" => (MsFlags::MS_NODEV, true),
            "dev" => (MsFlags::MS_NODEV, false),
            "noexec" => (MsFlags::MS_NOEXEC, true),
            "exec" => (MsFlags::MS_NOEXEC, false),
            "noatime" => (MsFlags::MS_NOATIME, true),
            "atime" => (MsFlags::MS_NOATIME, false),
            "nodiratime" => (MsFlags::MS_NODIRATIME, true),
            "relatime" => (MsFlags::MS_RELATIME, true),
            "sync" => (MsFlags::MS_SYNCHRONOUS, true),
            "async" => (MsFlags::MS_SYNCHRONOUS, false),
            "dirsync" => (MsFlags::MS_DIRSYNC, true),
            // For mount(8) and systemd; they say nothing to a file system.
            "" | "defaults" | "auto" | "noauto" | "nofail" | "_netdev" | "user" | "nouser" | "users" => {
                (MsFlags::empty(), true)
            }
            _ => return word.starts_with("x-") || word.starts_with("X-") || word.starts_with("comment"),
        };
        self.flags.set(flag, on);
        true
    }
}

/// Opens a new, unconnected FUSE device.
///
/// # Errors
/// [`Error::Setup`] says how to get the device.
pub fn open_device() -> Result<OwnedFd, Error> {
    open(DEVICE, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).map_err(|e| {
        let hint = match e {
            nix::Error::EACCES => NEEDS_ROOT,
            _ => "load the FUSE module (`modprobe fuse`) or give this container the device",
        };
        Error::Setup(format!("{DEVICE}: {e}; {hint}"))
    })
}

/// A second descriptor of the same connection, with a queue of requests under way of its own.
///
/// # Errors
/// The system's.
pub fn clone_device(connected: &OwnedFd, nonblocking: bool) -> Result<OwnedFd, Error> {
    let new = open_device()?;
    let mut number = connected.as_raw_fd() as u32;
    // SAFETY: the ioctl reads one u32, the descriptor's number.
    unsafe { ioctl::fuse_dev_clone(new.as_raw_fd(), &raw mut number) }.map_err(io::Error::from)?;
    if nonblocking {
        fcntl(new.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(io::Error::from)?;
    }
    Ok(new)
}

/// Mounts the device's connection on `point`.
///
/// # Errors
/// [`Error::Setup`] with what to do about it.
pub fn mount_on(device: &OwnedFd, point: &Path, options: &MountOptions) -> Result<(), Error> {
    let told = |e: String| Error::Setup(format!("cannot mount on {}: {e}", point.display()));
    check_point(point).map_err(told)?;
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    let mut data = format!("fd={},rootmode=40000,user_id={uid},group_id={gid}", device.as_raw_fd());
    for (wanted, word) in [(options.allow_other, ",allow_other"), (options.default_permissions, ",default_permissions")]
    {
        if wanted {
            data += word;
        }
    }
    mount(Some(options.source.as_str()), point, Some(TYPE), options.flags, Some(data.as_str())).map_err(|e| {
        let hint = match e {
            nix::Error::EPERM => NEEDS_ROOT,
            nix::Error::ENODEV => "the kernel has no FUSE: `modprobe fuse`",
            _ => "the kernel's log may say more (`dmesg`)",
        };
        told(format!("{e}; {hint}"))
    })
}

/// Gives what is mounted on `point` other flags.
///
/// # Errors
/// [`Error::Setup`], also when it is none of ours.
pub fn remount(point: &Path, flags: MsFlags) -> Result<(), Error> {
    let told = |e: String| Error::Setup(format!("cannot remount {}: {e}", point.display()));
    if mounts::on(point).is_none_or(|m| m.kind != TYPE) {
        return Err(told("nothing of TunnelFS's is mounted there".into()));
    }
    let none = None::<&str>;
    mount(none, point, none, flags | MsFlags::MS_REMOUNT, none).map_err(|e| told(e.to_string()))
}

fn check_point(point: &Path) -> Result<(), String> {
    let mounted = mounts::on(point).is_some_and(|m| m.kind == TYPE);
    match std::fs::metadata(point) {
        Err(e) if mounted => Err(format!("{e}: a dead mount is there, `umount` it first")),
        Ok(_) if mounted => Err("a TunnelFS directory is mounted there already, `umount` it first".into()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err("it does not exist; make the directory first".into()),
        Err(e) => Err(e.to_string()),
        Ok(meta) if !meta.is_dir() => Err("it is not a directory".into()),
        Ok(_) => Ok(()),
    }
}

/// Unmounts; a busy mount is detached and goes when its last user does.
///
/// # Errors
/// The system's; `EINVAL` when nothing is mounted there.
pub fn unmount(point: &Path) -> io::Result<()> {
    match umount2(point, MntFlags::empty()) {
        Err(nix::Error::EBUSY) => {
            tracing::warn!("{} is busy: detached, its last user ends it", point.display());
            detach(point)
        }
        other => other.map_err(io::Error::from),
    }
}

/// Takes the mount out of the tree whoever uses it.
///
/// # Errors
/// The system's.
pub fn detach(point: &Path) -> io::Result<()> {
    umount2(point, MntFlags::MNT_DETACH).map_err(io::Error::from)
}

/// Whether the kernel offers FUSE-over-io_uring.
pub fn uring_is_on() -> bool {
    std::fs::read_to_string(ENABLE_URING).is_ok_and(|on| on.trim() == "Y")
}

/// Fails all that is under way in the mount on `point`, and all that comes; it stays mounted.
///
/// # Errors
/// The system's.
pub fn abort(point: &Path) -> io::Result<()> {
    // A forced unmount ends the connection before it fails because somebody, here we, are inside.
    let _inside = open(point, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    match umount2(point, MntFlags::MNT_FORCE) {
        Err(nix::Error::EBUSY) => Ok(()),
        other => other.map_err(io::Error::from),
    }
}

/// How FUSE-over-io_uring stands on this kernel, when it is not offered: one line for people.
pub fn uring_hint() -> &'static str {
    match std::fs::read_to_string(ENABLE_URING) {
        Ok(on) if on.trim() == "Y" => "FUSE-over-io_uring is switched on but not offered",
        Ok(_) => "FUSE-over-io_uring is compiled in but switched off: `echo Y > /sys/module/fuse/parameters/enable_uring` as root, then mount again",
        Err(_) => "this kernel has no FUSE-over-io_uring (it came with 6.14): using /dev/fuse",
    }
}
