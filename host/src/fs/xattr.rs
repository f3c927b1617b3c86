//! Extended attributes, under names that rules may change.
//!
//! An attribute is reached by its file's number in `/proc/self/fd`, the working directory of each serving thread.

use super::credentials::{kill_privileges, Acting};
use super::file_system::{Context, XattrReply};
use super::inodes::{Inode, Pin};
use super::owners::OVERRIDE;
use super::passthrough::Passthrough;
use super::sys::{self, errno, FdName};
use std::borrow::Cow;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use tunnelfs_fuse_abi::changes::kind;
use tunnelfs_fuse_abi::flags::{init, SETXATTR_ACL_KILL_SGID};

/// Bytes of the largest value or list (XATTR_SIZE_MAX, XATTR_LIST_MAX of linux/limits.h).
const MOST: usize = 64 << 10;
/// Bytes of names that a file commonly has at the most.
const FEW: usize = 1024;

impl Passthrough {
    /// A program was changed: its capabilities go, as the kernel has it, where it does not see them.
    pub(super) fn drop_capabilities(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let Some(name) = self.config.xattrs.as_ref().and_then(|names| names.capability.as_ref()) else { return Ok(()) };
        match sys::remove_xattr(FdName::new(fd).as_c_str(), name) {
            Err(e) if !matches!(e.raw_os_error(), Some(libc::ENODATA | libc::ENOTSUP | libc::EPERM)) => Err(e),
            _ => Ok(()),
        }
    }

    /// The rules, and the attribute's name here.
    fn xattr<'a>(&self, name: &'a CStr) -> io::Result<Cow<'a, CStr>> {
        let rules = self.config.xattrs.as_ref().ok_or_else(|| errno(libc::ENOSYS))?;
        let bytes = name.to_bytes();
        if bytes.is_empty() {
            return Err(errno(libc::ERANGE));
        }
        if bytes.starts_with(b"system.posix_acl_") && !self.agreed(init::POSIX_ACL) {
            return Err(errno(libc::ENOTSUP));
        }
        let name = rules.to_host(name)?;
        if *name == *OVERRIDE && self.config.ids.owners == super::Owners::Attribute {
            return Err(errno(libc::EPERM));
        }
        Ok(name)
    }

    pub(super) fn setxattr(
        &self,
        ctx: &Context,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra: u32,
    ) -> io::Result<()> {
        self.changes()?;
        let name = self.xattr(name)?;
        let (inode, pin) = self.inodes.open(node)?;
        let path = FdName::new(pin.as_fd());
        if extra & SETXATTR_ACL_KILL_SGID == 0 {
            kill_privileges(false)?;
            sys::set_xattr(path.as_c_str(), &name, value, flags as i32)?;
            self.tell_attributes(&inode);
            return Ok(());
        }
        // Somebody outside of the file's group sets an ACL: the kernel clears the bit for such a one.
        kill_privileges(true)?;
        let _acting = Acting::for_caller(&self.config.ids.caller(ctx)?, &[])?;
        sys::set_xattr(path.as_c_str(), &name, value, flags as i32)?;
        self.tell_attributes(&inode);
        Ok(())
    }

    /// An attribute that the guest's security module gives a new file.
    pub(super) fn set_label(&self, path: &CStr, name: &CStr, value: &[u8]) -> io::Result<()> {
        sys::set_xattr(path, &self.xattr(name)?, value, 0)
    }

    pub(super) fn getxattr(&self, node: u64, name: &CStr, size: u32) -> io::Result<XattrReply> {
        // What nobody may have is not there.
        let name = self.xattr(name).map_err(|e| match e.raw_os_error() {
            Some(libc::EPERM) => errno(libc::ENODATA),
            _ => e,
        })?;
        let (_, pin) = self.inodes.open(node)?;
        reply(size, |bytes| sys::get_xattr(FdName::new(pin.as_fd()).as_c_str(), &name, bytes))
    }

    pub(super) fn listxattr(&self, node: u64, size: u32) -> io::Result<XattrReply> {
        let rules = self.config.xattrs.as_ref().ok_or_else(|| errno(libc::ENOSYS))?;
        let (_, pin) = self.inodes.open(node)?;
        let names = rules.to_guest(self.own_names(&pin)?)?;
        match size as usize {
            0 => Ok(XattrReply::Size(names.len() as u32)),
            size if size < names.len() => Err(errno(libc::ERANGE)),
            _ => Ok(XattrReply::Bytes(names)),
        }
    }

    fn own_names(&self, pin: &Pin) -> io::Result<Vec<u8>> {
        let path = FdName::new(pin.as_fd());
        let mut names = vec![0; FEW];
        let n = match sys::list_xattr(path.as_c_str(), &mut names) {
            Err(e) if e.raw_os_error() == Some(libc::ERANGE) => {
                names.resize(MOST, 0);
                sys::list_xattr(path.as_c_str(), &mut names)?
            }
            other => other?,
        };
        names.truncate(n);
        if self.config.ids.owners == super::Owners::Attribute || !self.agreed(init::POSIX_ACL) {
            let hidden = |name: &[u8]| {
                let acl = name.starts_with(b"system.posix_acl_") && !self.agreed(init::POSIX_ACL);
                acl || name == OVERRIDE.to_bytes_with_nul() && self.config.ids.owners == super::Owners::Attribute
            };
            names = names.split_inclusive(|&byte| byte == 0).filter(|name| !hidden(name)).flatten().copied().collect();
        }
        Ok(names)
    }

    pub(super) fn removexattr(&self, node: u64, name: &CStr) -> io::Result<()> {
        self.changes()?;
        let name = self.xattr(name)?;
        let (inode, pin) = self.inodes.open(node)?;
        sys::remove_xattr(FdName::new(pin.as_fd()).as_c_str(), &name)?;
        self.tell_attributes(&inode);
        Ok(())
    }

    fn tell_attributes(&self, inode: &Inode) {
        self.coherence.tell_of(kind::ATTRIBUTES, inode.key);
    }
}

fn reply(size: u32, read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<XattrReply> {
    if size == 0 {
        return read(&mut []).map(|n| XattrReply::Size(n as u32));
    }
    let mut bytes = vec![0; (size as usize).min(MOST)];
    let n = read(&mut bytes)?;
    bytes.truncate(n);
    Ok(XattrReply::Bytes(bytes))
}
