//! `/dev/fuse`, mount(2) and umount(2).

use super::mountinfo;
use crate::error::Error;
use nix::fcntl::{fcntl, open, FcntlArg, OFlag};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::stat::Mode;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

const DEVICE: &str = "/dev/fuse";
const NEEDS_ROOT: &str = "mounting needs root (or a user namespace of its own: `unshare -rm`)";
/// The file system type in /proc/mounts.
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

/// Options of mount(8) and mount(2).
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Whether other users have access.
    pub allow_other: bool,
    /// Whether the kernel checks modes, owners and ACLs.
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

/// mount(8)'s options, each with the flags that it sets and clears. Later options override earlier ones.
const MOUNT_OPTIONS: &[(&str, MsFlags, MsFlags)] = {
    const NONE: MsFlags = MsFlags::empty();
    const NOT_ATIME: MsFlags = MsFlags::MS_STRICTATIME.union(MsFlags::MS_RELATIME);
    const NOT_STRICT: MsFlags = MsFlags::MS_NOATIME.union(MsFlags::MS_RELATIME);
    const NOT_RELATIVE: MsFlags = MsFlags::MS_NOATIME.union(MsFlags::MS_STRICTATIME);
    /// mount(8): an option that lets other users mount implies these.
    const OWNERS: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
    const USERS: MsFlags = OWNERS.union(MsFlags::MS_NOEXEC);
    &[
        ("ro", MsFlags::MS_RDONLY, NONE),
        ("rw", NONE, MsFlags::MS_RDONLY),
        ("nosuid", MsFlags::MS_NOSUID, NONE),
        ("suid", NONE, MsFlags::MS_NOSUID),
        ("nodev", MsFlags::MS_NODEV, NONE),
        ("dev", NONE, MsFlags::MS_NODEV),
        ("noexec", MsFlags::MS_NOEXEC, NONE),
        ("exec", NONE, MsFlags::MS_NOEXEC),
        ("sync", MsFlags::MS_SYNCHRONOUS, NONE),
        ("async", NONE, MsFlags::MS_SYNCHRONOUS),
        ("dirsync", MsFlags::MS_DIRSYNC, NONE),
        ("noatime", MsFlags::MS_NOATIME, NOT_ATIME),
        ("atime", NONE, MsFlags::MS_NOATIME),
        ("nodiratime", MsFlags::MS_NODIRATIME, NONE),
        ("diratime", NONE, MsFlags::MS_NODIRATIME),
        ("relatime", MsFlags::MS_RELATIME, NOT_RELATIVE),
        ("norelatime", NONE, MsFlags::MS_RELATIME),
        ("strictatime", MsFlags::MS_STRICTATIME, NOT_STRICT),
        ("nostrictatime", NONE, MsFlags::MS_STRICTATIME),
        ("lazytime", MsFlags::MS_LAZYTIME, NONE),
        ("nolazytime", NONE, MsFlags::MS_LAZYTIME),
        ("iversion", MsFlags::MS_I_VERSION, NONE),
        ("noiversion", NONE, MsFlags::MS_I_VERSION),
        ("silent", MsFlags::MS_SILENT, NONE),
        ("loud", NONE, MsFlags::MS_SILENT),
        ("nosymfollow", NOSYMFOLLOW, NONE),
        ("symfollow", NONE, NOSYMFOLLOW),
        // Kernels since 5.15 have no mandatory locks and ignore these; FUSE would refuse the mount.
        ("mand", NONE, NONE),
        ("nomand", NONE, NONE),
        ("owner", OWNERS, NONE),
        ("group", OWNERS, NONE),
        ("user", USERS, NONE),
        ("users", USERS, NONE),
        // For mount(8) and systemd; without effect on a file system.
        ("", NONE, NONE),
        ("defaults", NONE, NONE),
        ("auto", NONE, NONE),
        ("noauto", NONE, NONE),
        ("nofail", NONE, NONE),
        ("_netdev", NONE, NONE),
        ("noowner", NONE, NONE),
        ("nogroup", NONE, NONE),
        ("nouser", NONE, NONE),
        ("nousers", NONE, NONE),
    ]
};

/// MS_NOSYMFOLLOW of `linux/mount.h` (5.10 and later).
const NOSYMFOLLOW: MsFlags = MsFlags::from_bits_retain(256);

/// Prefixes of options that are only for mount(8), systemd and similar programs.
const IGNORED_PREFIXES: &[&str] = &["x-", "X-", "comment=", "user=", "uhelper=", "helper="];

impl MountOptions {
    /// Applies one option of mount(8)'s `-o`. Returns `true` if it is one, `false` if it is unknown.
    pub fn mount_option(&mut self, word: &str) -> bool {
        let Some((_, set, cleared)) = MOUNT_OPTIONS.iter().find(|(name, ..)| *name == word) else {
            return word == "comment" || IGNORED_PREFIXES.iter().any(|start| word.starts_with(start));
        };
        self.flags.remove(*cleared);
        self.flags.insert(*set);
        true
    }
}

/// Opens a new, unconnected FUSE device.
///
/// # Errors
/// [`Error::Setup`], which says how to get the device.
pub fn open_device() -> Result<OwnedFd, Error> {
    open(DEVICE, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).map_err(|e| {
        let hint = match e {
            nix::Error::EACCES => NEEDS_ROOT,
            _ => "load the FUSE module (`modprobe fuse`) or give this container the device",
        };
        Error::Setup(format!("{DEVICE}: {e}; {hint}"))
    })
}

/// Opens another descriptor of the same connection. Requests that are read from it must be answered on it.
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
/// [`Error::Setup`], which says what to do.
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

/// Changes the flags of the mount on `point`.
///
/// # Errors
/// [`Error::Setup`], also if it is not a TunnelFS mount.
pub fn remount(point: &Path, flags: MsFlags) -> Result<(), Error> {
    let told = |e: String| Error::Setup(format!("cannot remount {}: {e}", point.display()));
    if mountinfo::topmost(point).is_none_or(|m| m.kind != TYPE) {
        return Err(told("nothing of TunnelFS's is mounted there".into()));
    }
    let none = None::<&str>;
    mount(none, point, none, flags | MsFlags::MS_REMOUNT, none).map_err(|e| told(e.to_string()))
}

fn check_point(point: &Path) -> Result<(), String> {
    let mounted = mountinfo::topmost(point).is_some_and(|m| m.kind == TYPE);
    match std::fs::metadata(point) {
        Err(e) if mounted => Err(format!("{e}: a dead mount is there, `umount` it first")),
        Ok(_) if mounted => Err("a TunnelFS directory is mounted there already, `umount` it first".into()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err("it does not exist; make the directory first".into()),
        Err(e) => Err(e.to_string()),
        Ok(meta) if !meta.is_dir() => Err("it is not a directory".into()),
        Ok(_) => Ok(()),
    }
}

/// Unmounts. A busy mount is detached, and ends with its last user.
///
/// # Errors
/// The system's; `EINVAL` if nothing is mounted there.
pub fn unmount(point: &Path) -> io::Result<()> {
    match umount2(point, MntFlags::empty()) {
        Err(nix::Error::EBUSY) => {
            tracing::warn!("{} is busy: detached, its last user ends it", point.display());
            detach(point)
        }
        other => other.map_err(io::Error::from),
    }
}

/// Detaches the mount from the tree, even if it is busy.
///
/// # Errors
/// The system's.
pub fn detach(point: &Path) -> io::Result<()> {
    umount2(point, MntFlags::MNT_DETACH).map_err(io::Error::from)
}

/// Returns `true` if FUSE-over-io_uring is on in this kernel, `false` if it is off or not supported.
pub fn uring_enabled() -> bool {
    std::fs::read_to_string(ENABLE_URING).is_ok_and(|on| on.trim() == "Y")
}

/// Aborts the connection of the mount on `point`: all pending and later requests fail. It stays mounted.
///
/// # Errors
/// The system's.
pub fn abort(point: &Path) -> io::Result<()> {
    // A forced unmount aborts the connection, and then fails with EBUSY because of this descriptor.
    let _inside = open(point, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    match umount2(point, MntFlags::MNT_FORCE) {
        Err(nix::Error::EBUSY) => Ok(()),
        other => other.map_err(io::Error::from),
    }
}

/// Says in one line why the kernel does not offer FUSE-over-io_uring, and what to do.
pub fn uring_hint() -> &'static str {
    match std::fs::read_to_string(ENABLE_URING) {
        Ok(on) if on.trim() == "Y" => "FUSE-over-io_uring is switched on but not offered",
        Ok(_) => "FUSE-over-io_uring is compiled in but switched off: `echo Y > /sys/module/fuse/parameters/enable_uring` as root, then mount again",
        Err(_) => "this kernel has no FUSE-over-io_uring (it came with 6.14): using /dev/fuse",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The flags that words come to.
    fn flags(words: &str) -> Option<MsFlags> {
        let mut options = MountOptions::default();
        words.split(',').all(|word| options.mount_option(word)).then_some(options.flags)
    }

    #[test]
    fn words_set_what_mount_says() {
        let trusted_little = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        for (words, wanted) in [
            ("ro,nosuid", MsFlags::MS_RDONLY | MsFlags::MS_NOSUID),
            ("ro,rw", MsFlags::empty()),
            ("strictatime", MsFlags::MS_STRICTATIME),
            ("strictatime,nostrictatime", MsFlags::empty()),
            ("strictatime,noatime", MsFlags::MS_NOATIME),
            ("noatime,relatime", MsFlags::MS_RELATIME),
            ("noatime,strictatime,lazytime", MsFlags::MS_STRICTATIME | MsFlags::MS_LAZYTIME),
            ("relatime,norelatime,lazytime,nolazytime", MsFlags::empty()),
            ("nodiratime,diratime", MsFlags::empty()),
            ("iversion", MsFlags::MS_I_VERSION),
            ("mand,nomand,iversion,noiversion,silent,loud", MsFlags::empty()),
            ("silent,nosymfollow", MsFlags::MS_SILENT | NOSYMFOLLOW),
            ("nosymfollow,symfollow", MsFlags::empty()),
            ("owner,nogroup", trusted_little),
            ("group", trusted_little),
            ("user", trusted_little | MsFlags::MS_NOEXEC),
            ("users,exec", trusted_little),
            ("user=somebody,comment=x,x-systemd.automount,X-mount.mkdir,defaults,_netdev,nofail", MsFlags::empty()),
        ] {
            assert_eq!(flags(words), Some(wanted), "{words}");
        }
    }

    #[test]
    fn other_words_are_none_of_mounts() {
        for word in ["noatim", "norw", "strict", "commentary", "users=x", "ro=1"] {
            assert_eq!(flags(word), None, "{word}");
        }
    }
}
