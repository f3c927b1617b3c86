//! Who owns a file: on this machine, for the guest, and without the right to say so.
//!
//! An ordinary user's host cannot give files away. It can keep what the guest said in an extended attribute that
//! podman, fuse-overlayfs and libkrun know too (`user.containers.override_stat`, `UID:GID:MODE` with an octal mode),
//! or have the guest see its own files as somebody else's.

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

/// Owner and mode as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ownership {
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
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
        let real = Ownership { uid: st.stx_uid, gid: st.stx_gid, mode: st.stx_mode.into() };
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
                // What kind of file it is says the file itself.
                |kept| Ownership { mode: real.mode & libc::S_IFMT | kept.mode & 0o7777, ..kept },
            )),
        }
    }
}

fn read(path: &CStr) -> Option<Ownership> {
    let mut value = [0; LONGEST];
    let n = sys::get_xattr(path, OVERRIDE, &mut value).ok()?;
    parse(&value[..n])
}

fn parse(value: &[u8]) -> Option<Ownership> {
    let mut fields = std::str::from_utf8(value).ok()?.trim_end_matches('\0').split(':');
    let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let mode = u32::from_str_radix(fields.next()?, 8).ok()?;
    Some(Ownership { uid, gid, mode })
}

/// Keeps an owner and mode in a file's attribute. Links and special files have no attributes of users: theirs stays
/// what it is, without an error.
///
/// # Errors
/// The file system's.
pub fn keep(path: &CStr, wanted: Ownership) -> io::Result<()> {
    let value = format!("{}:{}:0{:o}", wanted.uid, wanted.gid, wanted.mode);
    match sys::set_xattr(path, OVERRIDE, value.as_bytes(), 0) {
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
        let own = |uid, gid, mode| Some(Ownership { uid, gid, mode });
        assert_eq!(parse(b"0:0:0100644"), own(0, 0, 0o100_644));
        assert_eq!(parse(b"999:5:040755:dir"), own(999, 5, 0o40_755));
        for broken in [&b""[..], b"1:2", b"a:b:c", b"1:2:9", b"-1:0:0", b"\xff:0:0"] {
            assert_eq!(parse(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn files_stay_usable_for_this_process() {
        assert_eq!(usable(libc::S_IFREG | 0o4111), libc::S_IFREG | 0o711);
        assert_eq!(usable(libc::S_IFDIR | 0o055), libc::S_IFDIR | 0o755);
    }
}
