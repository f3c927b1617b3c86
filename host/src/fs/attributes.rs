//! Operations on attributes.

use super::credentials::kill_privileges;
use super::handles::Handle;
use super::inodes::{Inode, Pin};
use super::owners::{self, Owners, Ownership};
use super::passthrough::Passthrough;
use super::sys::{self, errno, FdName};
use super::unopened::READ_AFTER;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_fuse_abi::changes::kind;
use tunnelfs_fuse_abi::flags::fattr;
use tunnelfs_fuse_abi::*;

impl Passthrough {
    /// Attributes for the guest, of a file that a descriptor has open.
    pub(super) fn attr(&self, st: &libc::statx, fd: BorrowedFd<'_>) -> io::Result<Attr> {
        let Ownership { uid, gid, mode, device } = self.config.ids.of(st, fd)?;
        let seconds = |time: &libc::statx_timestamp| time.tv_sec as u64;
        Ok(Attr {
            ino: self.number(st),
            size: st.stx_size,
            blocks: st.stx_blocks,
            atime: seconds(&st.stx_atime),
            mtime: seconds(&st.stx_mtime),
            ctime: seconds(&st.stx_ctime),
            atimensec: st.stx_atime.tv_nsec,
            mtimensec: st.stx_mtime.tv_nsec,
            ctimensec: st.stx_ctime.tv_nsec,
            mode,
            nlink: st.stx_nlink,
            uid,
            gid,
            rdev: encode_device(device.0, device.1),
            blksize: st.stx_blksize,
            flags: 0,
        })
    }

    pub(super) fn attr_out(&self, inode: &Arc<Inode>, st: &libc::statx, fd: BorrowedFd<'_>) -> io::Result<AttrOut> {
        let attr = self.attr(st, fd)?;
        let timeout = self.attr_timeout(inode, attr.mode, attr.nlink);
        Ok(AttrOut { attr_valid: timeout.as_secs(), attr_valid_nsec: timeout.subsec_nanos(), dummy: 0, attr })
    }

    /// How long attributes are good. A program's setuid and setgid bits go with any write, of which the guest's kernel
    /// learns nothing: it has to ask.
    pub(super) fn attr_timeout(&self, inode: &Arc<Inode>, mode: u32, links: u32) -> Duration {
        let is_program = mode & libc::S_IFMT == libc::S_IFREG && mode & (libc::S_ISUID | libc::S_ISGID) != 0;
        if is_program {
            Duration::ZERO
        } else {
            self.coherence.attributes(inode, links)
        }
    }

    /// What a GETATTR or STATX asks for.
    pub(super) fn stat_of<R>(
        &self,
        node: u64,
        fh: Option<u64>,
        reply: impl FnOnce(&Arc<Inode>, &libc::statx, BorrowedFd<'_>) -> io::Result<R>,
    ) -> io::Result<R> {
        match fh.filter(|&fh| !self.is_by_number(fh)) {
            Some(fh) => {
                let handle = self.handle(fh, node)?;
                reply(&handle.held.inode, &sys::stat(handle.as_fd())?, handle.as_fd())
            }
            None => {
                let (inode, pin) = self.inodes.open(node)?;
                self.close_writer(node, READ_AFTER);
                if inode.is_dir() {
                    self.coherence.watch(&inode, pin.as_fd());
                }
                reply(&inode, &sys::stat(pin.as_fd())?, pin.as_fd())
            }
        }
    }

    pub(super) fn statx_out(&self, inode: &Arc<Inode>, st: &libc::statx, fd: BorrowedFd<'_>) -> io::Result<StatxOut> {
        let Ownership { uid, gid, mode, device } = self.config.ids.of(st, fd)?;
        let timeout = self.attr_timeout(inode, mode, st.stx_nlink);
        let time = |t: &libc::statx_timestamp| SxTime { tv_sec: t.tv_sec, tv_nsec: t.tv_nsec, reserved: 0 };
        let stat = Statx {
            mask: st.stx_mask & (libc::STATX_BASIC_STATS | libc::STATX_BTIME),
            blksize: st.stx_blksize,
            attributes: st.stx_attributes,
            nlink: st.stx_nlink,
            uid,
            gid,
            mode: mode as u16,
            ino: self.number(st),
            size: st.stx_size,
            blocks: st.stx_blocks,
            attributes_mask: st.stx_attributes_mask,
            atime: time(&st.stx_atime),
            btime: time(&st.stx_btime),
            ctime: time(&st.stx_ctime),
            mtime: time(&st.stx_mtime),
            rdev_major: device.0,
            rdev_minor: device.1,
            dev_major: st.stx_dev_major,
            dev_minor: st.stx_dev_minor,
            ..Statx::default()
        };
        Ok(StatxOut {
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            stat,
            ..StatxOut::default()
        })
    }

    pub(super) fn setattr(&self, node: u64, set: &SetattrIn) -> io::Result<AttrOut> {
        self.changes()?;
        // chmod and utimes come last: a program that has been written can be executed here then.
        self.close_writer(node, Duration::ZERO);
        let by_handle = set.valid & fattr::FH != 0 && !self.is_by_number(set.fh);
        let handle = if by_handle { Some(self.handle(set.fh, node)?) } else { None };
        let (inode, pin) = self.inodes.open(node)?;
        // A request for nothing is a chown(2) to -1 and -1: it clears setuid and setgid bits, and is a change of state.
        let nothing = set.valid & !fattr::FH == 0;
        if nothing || set.valid & (fattr::UID | fattr::GID) != 0 {
            self.set_owner(&pin, set)?;
        }
        if set.valid & fattr::SIZE != 0 {
            self.set_size(&inode, &pin, handle.as_deref(), set)?;
        } else if set.valid & fattr::KILL_SUIDGID != 0 && set.valid & fattr::MODE == 0 {
            self.clear_bits(pin.as_fd())?;
        }
        if set.valid & fattr::MODE != 0 {
            self.set_mode(&pin, set.mode)?;
        }
        if set.valid & (fattr::ATIME | fattr::MTIME) != 0 {
            self.set_times(&pin, set)?;
        }
        let kind = if set.valid & fattr::SIZE != 0 { kind::MODIFIED } else { kind::ATTRIBUTES };
        self.coherence.tell_of(kind, inode.key);
        self.attr_out(&inode, &sys::stat(pin.as_fd())?, pin.as_fd())
    }

    fn set_owner(&self, pin: &Pin, set: &SetattrIn) -> io::Result<()> {
        let wanted = |flag: u32, id: u32| if set.valid & flag != 0 { id } else { owners::KEEP };
        let (uid, gid) = (wanted(fattr::UID, set.uid), wanted(fattr::GID, set.gid));
        self.drop_capabilities(pin.as_fd())?;
        let ids = &self.config.ids;
        match ids.owners {
            Owners::Real => sys::chown(pin.as_fd(), ids.uid(uid)?, ids.gid(gid)?),
            Owners::Mapped { uid: own_uid, gid: own_gid } => {
                let stays = |id, own| id == owners::KEEP || id == own;
                if stays(uid, own_uid) && stays(gid, own_gid) {
                    Ok(())
                } else {
                    Err(errno(libc::EPERM))
                }
            }
            Owners::Attribute => self.change_kept(pin.as_fd(), |kept| {
                let keep = |id, old| if id == owners::KEEP { old } else { id };
                // As chown(2) does with a program.
                let mode = if kept.mode & libc::S_IFMT == libc::S_IFDIR { kept.mode } else { without_bits(kept.mode) };
                Ownership { uid: keep(uid, kept.uid), gid: keep(gid, kept.gid), mode, ..kept }
            }),
        }
    }

    /// Changes what a file's attribute says of its owner and mode.
    pub(super) fn change_kept(&self, fd: BorrowedFd<'_>, change: impl Fn(Ownership) -> Ownership) -> io::Result<()> {
        let name = FdName::new(fd);
        let kept = self.config.ids.of(&sys::stat(fd)?, fd)?;
        let new = change(kept);
        if new == kept {
            return Ok(());
        }
        owners::keep(name.as_c_str(), new)
    }

    fn set_mode(&self, pin: &Pin, mode: u32) -> io::Result<()> {
        let name = FdName::new(pin.as_fd());
        // The guest's kernel has taken away what the caller may not set.
        kill_privileges(false)?;
        if self.config.ids.owners == Owners::Attribute {
            self.change_kept(pin.as_fd(), |kept| Ownership { mode: kept.mode & libc::S_IFMT | mode & 0o7777, ..kept })?;
            let kind = u32::from(sys::stat(pin.as_fd())?.stx_mode) & libc::S_IFMT;
            let mode = owners::usable(kind | mode & 0o7777) & 0o7777;
            return sys::chmod_at(self.descriptors.as_fd(), name.as_c_str(), mode);
        }
        sys::chmod_at(self.descriptors.as_fd(), name.as_c_str(), mode & 0o7777)
    }

    fn set_size(&self, inode: &Inode, pin: &Pin, handle: Option<&Handle>, set: &SetattrIn) -> io::Result<()> {
        if !inode.is_file() {
            return Err(errno(if inode.is_dir() { libc::EISDIR } else { libc::EINVAL }));
        }
        self.drop_capabilities(pin.as_fd())?;
        let size = i64::try_from(set.size).map_err(|_| errno(libc::EFBIG))?;
        let opened;
        let file = match handle.filter(|handle| handle.writes()) {
            Some(handle) => handle.as_fd(),
            None => {
                self.coherence.will_write(inode.id);
                opened = self.reopen(pin.as_fd(), libc::O_WRONLY)?;
                opened.as_fd()
            }
        };
        if set.valid & fattr::KILL_SUIDGID == 0 {
            kill_privileges(false)?;
            return sys::truncate(file, size);
        }
        // Without group execution the bit is none of a program's: it stays, though this thread is not in the group.
        let marks = |st: &libc::statx| u32::from(st.stx_mode) & (libc::S_ISGID | libc::S_IXGRP) == libc::S_ISGID;
        let stays = marks(&sys::stat(file)?);
        kill_privileges(!stays)?;
        sys::truncate(file, size)?;
        if stays || self.config.ids.owners == Owners::Attribute {
            self.clear_bits(file)?;
        }
        Ok(())
    }

    /// Clears the setuid and setgid bits of a program that somebody has changed.
    pub(super) fn clear_bits(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        if self.config.ids.owners == Owners::Attribute {
            return self.change_kept(fd, |kept| Ownership { mode: without_bits(kept.mode), ..kept });
        }
        let mode = u32::from(sys::stat(fd)?.stx_mode);
        if mode & libc::S_IFMT != libc::S_IFREG || without_bits(mode) == mode {
            return Ok(());
        }
        kill_privileges(false)?;
        sys::chmod_at(self.descriptors.as_fd(), FdName::new(fd).as_c_str(), without_bits(mode) & 0o7777)
    }

    fn set_times(&self, pin: &Pin, set: &SetattrIn) -> io::Result<()> {
        let time = |flag: u32, now: u32, seconds: u64, nanos: u32| libc::timespec {
            tv_sec: seconds as i64,
            tv_nsec: match set.valid & (flag | now) {
                both if both == flag | now => libc::UTIME_NOW,
                some if some & flag != 0 => i64::from(nanos),
                _ => libc::UTIME_OMIT,
            },
        };
        let times = [
            time(fattr::ATIME, fattr::ATIME_NOW, set.atime, set.atimensec),
            time(fattr::MTIME, fattr::MTIME_NOW, set.mtime, set.mtimensec),
        ];
        sys::set_times_at(self.descriptors.as_fd(), FdName::new(pin.as_fd()).as_c_str(), &times)
    }
}

/// A mode after somebody without privilege has changed the program.
pub(super) fn without_bits(mode: u32) -> u32 {
    let group = if mode & libc::S_IXGRP != 0 { libc::S_ISGID } else { 0 };
    mode & !(libc::S_ISUID | group)
}

/// Linux's `new_encode_dev`.
fn encode_device(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}
