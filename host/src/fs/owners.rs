//! Who owns a file: on this machine, for the guest, and without the right to say so.
//!
//! An ordinary user's host cannot give files away. It can keep what the guest said in an extended attribute that
//! podman, fuse-overlayfs and libkrun know too (`user.containers.override_stat`, `UID:GID:MODE[:TYPE]` with an octal
//! mode), or have the guest see its own files as somebody else's.
//!
//! Only regular files and directories can have the attribute. So a FIFO, socket or device node, which an ordinary user
//! may not make or not give away, is kept as an empty regular file whose attribute has its type.

use super::file_system::Context;
use super::sys::{self, errno, FdName};
use std::ffi::CStr;
use std::io;
use std::os::fd::BorrowedFd;
use virtiofsd::soft_idmap::{GuestGid, GuestUid, HostGid, HostUid, Id, IdMap};

/// The attribute.
pub const OVERRIDE: &CStr = c"user.containers.override_stat";
/// Most bytes of its value that are understood.
const LONGEST: usize = 64;
/// "Not this one" of chown(2).
pub const KEEP: u32 = u32::MAX;

/// How owners are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owners {
    /// As the file system has them.
    Real,
    /// In an extended attribute, with the mode.
    Attribute,
    /// This process's own files are the guest's user's, and stay so.
    Mapped {
        /// The guest's user.
        uid: u32,
        /// The guest's group.
        gid: u32,
    },
}

/// Owner, mode and type as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ownership {
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    /// A device's major and minor number.
    pub device: (u32, u32),
}

/// The ids of guest and machine.
pub struct Ids {
    /// How owners are kept.
    pub owners: Owners,
    /// This process.
    own: (u32, u32),
    uids: IdMap<GuestUid, HostUid>,
    gids: IdMap<GuestGid, HostGid>,
    mapped: bool,
}

impl Ids {
    /// `mapped`: whether the maps are not empty.
    pub fn new(owners: Owners, uids: IdMap<GuestUid, HostUid>, gids: IdMap<GuestGid, HostGid>, mapped: bool) -> Ids {
        let own = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        Ids { owners, own, uids, gids, mapped }
    }

    /// The machine's user for a guest's.
    ///
    /// # Errors
    /// When the map forbids it.
    pub fn uid(&self, guest: u32) -> io::Result<u32> {
        if !self.mapped || guest == KEEP {
            return Ok(guest);
        }
        self.uids.map_guest(guest.into()).map(Id::into_inner).map_err(|_| errno(libc::EOVERFLOW))
    }

    /// The machine's group for a guest's.
    ///
    /// # Errors
    /// When the map forbids it.
    pub fn gid(&self, guest: u32) -> io::Result<u32> {
        if !self.mapped || guest == KEEP {
            return Ok(guest);
        }
        self.gids.map_guest(guest.into()).map(Id::into_inner).map_err(|_| errno(libc::EOVERFLOW))
    }

    /// The caller as the machine knows it, who is to own what is created.
    ///
    /// # Errors
    /// When the map forbids it.
    pub fn caller(&self, ctx: &Context) -> io::Result<Context> {
        match self.owners {
            Owners::Real => Ok(Context { uid: self.uid(ctx.uid)?, gid: self.gid(ctx.gid)?, ..*ctx }),
            _ => Ok(Context { uid: self.own.0, gid: self.own.1, ..*ctx }),
        }
    }

    /// Whose an open file is and with which mode.
    ///
    /// # Errors
    /// When the map forbids its owner.
    pub fn of(&self, st: &libc::statx, fd: BorrowedFd<'_>) -> io::Result<Ownership> {
        let device = (st.stx_rdev_major, st.stx_rdev_minor);
        let real = Ownership { uid: st.stx_uid, gid: st.stx_gid, mode: st.stx_mode.into(), device };
        match self.owners {
            Owners::Real if !self.mapped => Ok(real),
            Owners::Real => {
                let uid = self.uids.map_host(real.uid.into()).map_err(|_| errno(libc::EOVERFLOW))?;
                let gid = self.gids.map_host(real.gid.into()).map_err(|_| errno(libc::EOVERFLOW))?;
                Ok(Ownership { uid: uid.into_inner(), gid: gid.into_inner(), ..real })
            }
            Owners::Mapped { uid, gid } => Ok(Ownership {
                uid: if real.uid == self.own.0 { uid } else { real.uid },
                gid: if real.gid == self.own.1 { gid } else { real.gid },
                ..real
            }),
            Owners::Attribute => Ok(read(FdName::new(fd).as_c_str()).map_or_else(
                || Ownership {
                    uid: if real.uid == self.own.0 { 0 } else { real.uid },
                    gid: if real.gid == self.own.1 { 0 } else { real.gid },
                    ..real
                },
                |kept| kept.of_type(real),
            )),
        }
    }
}

fn read(path: &CStr) -> Option<Ownership> {
    let mut value = [0; LONGEST];
    let n = sys::get_xattr(path, OVERRIDE, &mut value).ok()?;
    parse(&value[..n])
}

impl Ownership {
    /// What a file's attribute says, of a file that is `real` on this machine: only a regular file may stand for
    /// something else, and only for what cannot have an attribute of its own.
    fn of_type(self, real: Ownership) -> Ownership {
        if real.mode & libc::S_IFMT == libc::S_IFREG && is_special(self.mode) {
            return self;
        }
        Ownership { mode: real.mode & libc::S_IFMT | self.mode & 0o7777, device: real.device, ..self }
    }
}

/// Whether a file of this mode is a FIFO, a socket or a device.
pub fn is_special(mode: u32) -> bool {
    matches!(mode & libc::S_IFMT, libc::S_IFIFO | libc::S_IFSOCK | libc::S_IFCHR | libc::S_IFBLK)
}

fn parse(value: &[u8]) -> Option<Ownership> {
    let mut fields = std::str::from_utf8(value).ok()?.trim_end_matches('\0').split(':');
    let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let mode = u32::from_str_radix(fields.next()?, 8).ok()?;
    let (kind, device) = match fields.next() {
        Some(kind) => parse_type(kind)?,
        // libkrun has the type in the mode.
        None => (mode & libc::S_IFMT, (0, 0)),
    };
    Some(Ownership { uid, gid, mode: kind | mode & 0o7777, device })
}

/// S_IFMT bits and device of a type as podman writes it; of one that is not special only that it is not.
fn parse_type(text: &str) -> Option<(u32, (u32, u32))> {
    let mut parts = text.split('-');
    let kind = match parts.next()? {
        "pipe" => libc::S_IFIFO,
        "socket" => libc::S_IFSOCK,
        "block" => libc::S_IFBLK,
        "char" => libc::S_IFCHR,
        _ => return Some((0, (0, 0))),
    };
    if matches!(kind, libc::S_IFBLK | libc::S_IFCHR) {
        return Some((kind, (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?)));
    }
    Some((kind, (0, 0)))
}

/// An attribute's value: as libkrun has it, which others understand; with podman's type where the file's own does not
/// say it.
fn format(own: Ownership) -> String {
    let (major, minor) = own.device;
    let kind = match own.mode & libc::S_IFMT {
        libc::S_IFIFO => "pipe".to_string(),
        libc::S_IFSOCK => "socket".to_string(),
        libc::S_IFBLK => format!("block-{major}-{minor}"),
        libc::S_IFCHR => format!("char-{major}-{minor}"),
        _ => return format!("{}:{}:0{:o}", own.uid, own.gid, own.mode),
    };
    format!("{}:{}:{:04o}:{kind}", own.uid, own.gid, own.mode & 0o7777)
}

/// Keeps an owner, mode and type in a file's attribute. What has no attributes of users (a symbolic link, a special
/// file that this machine has) stays what it is, without an error.
///
/// # Errors
/// The file system's.
pub fn keep(path: &CStr, wanted: Ownership) -> io::Result<()> {
    match sys::set_xattr(path, OVERRIDE, format(wanted).as_bytes(), 0) {
        Err(e) if e.raw_os_error() == Some(libc::EPERM) && !has_user_attributes(wanted.mode) => Ok(()),
        other => other,
    }
}

fn has_user_attributes(mode: u32) -> bool {
    matches!(mode & libc::S_IFMT, libc::S_IFREG | libc::S_IFDIR)
}

/// The mode that a file of this machine gets beside the attribute: its owner, this process, must be able to use it.
pub fn usable(mode: u32) -> u32 {
    let own = if mode & libc::S_IFMT == libc::S_IFDIR { 0o700 } else { 0o600 };
    // Set-id bits would make it a program of this process's user.
    mode & !0o6000 | own
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_as_podman_writes_them() {
        let own = |uid, gid, mode| Some(Ownership { uid, gid, mode, device: (0, 0) });
        assert_eq!(parse(b"0:0:0100644"), own(0, 0, 0o100_644));
        assert_eq!(parse(b"999:5:0755:dir"), own(999, 5, 0o755));
        assert_eq!(parse(b"999:5:0644:file"), own(999, 5, 0o644));
        assert_eq!(parse(b"1:2:010600"), own(1, 2, libc::S_IFIFO | 0o600));
        for broken in
            [&b""[..], b"1:2", b"a:b:c", b"1:2:9", b"-1:0:0", b"\xff:0:0", b"1:2:3:char-1", b"1:2:3:block-a-1"]
        {
            assert_eq!(parse(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn types_are_kept_as_podman_writes_them() {
        for (kind, device, text) in [
            (libc::S_IFIFO, (0, 0), "999:5:4640:pipe"),
            (libc::S_IFSOCK, (0, 0), "999:5:4640:socket"),
            (libc::S_IFBLK, (8, 1), "999:5:4640:block-8-1"),
            (libc::S_IFCHR, (1, 3), "999:5:4640:char-1-3"),
        ] {
            let own = Ownership { uid: 999, gid: 5, mode: kind | 0o4640, device };
            assert_eq!(format(own), text);
            assert_eq!(parse(text.as_bytes()), Some(own));
            let real = |mode| Ownership { uid: 0, gid: 0, mode, device: (0, 0) };
            assert_eq!(own.of_type(real(libc::S_IFREG | 0o600)), own);
            let dir = own.of_type(real(libc::S_IFDIR | 0o700));
            assert_eq!((dir.mode, dir.device), (libc::S_IFDIR | 0o4640, (0, 0)), "a directory stays one");
        }
        let file = Ownership { uid: 1, gid: 2, mode: libc::S_IFREG | 0o644, device: (0, 0) };
        assert_eq!(format(file), "1:2:0100644");
    }

    #[test]
    fn files_stay_usable_for_this_process() {
        assert_eq!(usable(libc::S_IFREG | 0o4111), libc::S_IFREG | 0o711);
        assert_eq!(usable(libc::S_IFDIR | 0o055), libc::S_IFDIR | 0o755);
    }
}
