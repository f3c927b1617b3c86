//! `/dev/fuse`, and mounting a connection of it.

use crate::Error;
use nix::fcntl::{fcntl, open, FcntlArg, OFlag};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::stat::Mode;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

const DEVICE: &str = "/dev/fuse";

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
#[derive(Clone, Debug, Default)]
pub struct MountOptions {
    /// Other users may enter.
    pub allow_other: bool,
    /// The kernel checks modes, owners and ACLs.
    pub default_permissions: bool,
    /// Mount read-only.
    pub read_only: bool,
    /// `nosuid`, `nodev`, `noexec`, `noatime`, as mount(2) has them.
    pub flags: Vec<String>,
    /// The name in the first column of /proc/mounts.
    pub source: String,
}

/// Opens a new, unconnected FUSE device.
///
/// # Errors
/// [`Error::Setup`] says how to get the device.
pub fn open_device() -> Result<OwnedFd, Error> {
    open(DEVICE, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).map_err(|e| {
        Error::Setup(format!("{DEVICE}: {e}; load the FUSE module (`modprobe fuse`) or give this container the device"))
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
    if !point.is_dir() {
        return Err(told("it is not a directory; make it first".into()));
    }
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    let mut data = format!("fd={},rootmode=40000,user_id={uid},group_id={gid}", device.as_raw_fd());
    for (wanted, word) in [(options.allow_other, ",allow_other"), (options.default_permissions, ",default_permissions")]
    {
        if wanted {
            data += word;
        }
    }
    let flags = mount_flags(options).map_err(told)?;
    mount(Some(options.source.as_str()), point, Some("fuse.tunnelfs"), flags, Some(data.as_str())).map_err(|e| {
        let hint = match e {
            nix::Error::EPERM => "; mounting needs root (or a user namespace of its own: `unshare -rm`)",
            nix::Error::EBUSY => "; something is mounted there already",
            nix::Error::ENODEV => "; the kernel has no FUSE: `modprobe fuse`",
            _ => "",
        };
        told(format!("{e}{hint}"))
    })
}

fn mount_flags(options: &MountOptions) -> Result<MsFlags, String> {
    let mut flags = if options.read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    for word in &options.flags {
        flags |= match word.as_str() {
            "nosuid" => MsFlags::MS_NOSUID,
            "nodev" => MsFlags::MS_NODEV,
            "noexec" => MsFlags::MS_NOEXEC,
            "noatime" => MsFlags::MS_NOATIME,
            "nodiratime" => MsFlags::MS_NODIRATIME,
            "relatime" => MsFlags::MS_RELATIME,
            "sync" => MsFlags::MS_SYNCHRONOUS,
            "dirsync" => MsFlags::MS_DIRSYNC,
            other => return Err(format!("`{other}` is not a mount option")),
        };
    }
    Ok(flags)
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

/// How FUSE-over-io_uring stands on this kernel, when it is not offered: one line for people.
pub fn uring_hint() -> &'static str {
    match std::fs::read_to_string("/sys/module/fuse/parameters/enable_uring") {
        Ok(on) if on.trim() == "Y" => "FUSE-over-io_uring is switched on but not offered",
        Ok(_) => "FUSE-over-io_uring is compiled in but switched off: `echo Y > /sys/module/fuse/parameters/enable_uring` as root, then mount again",
        Err(_) => "this kernel has no FUSE-over-io_uring (it came with 6.14): using /dev/fuse",
    }
}
