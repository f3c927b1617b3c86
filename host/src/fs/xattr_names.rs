//! The names of extended attributes on the host's side, which rules may change.

use super::credentials;
use super::sys::errno;
use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::io;
use virtiofsd::passthrough::xattrmap::{AppliedRule, XattrMap};

/// What a guest's `trusted` attributes are called here when this process may not set real ones.
const TRUSTED: &[u8] = b"user.tunnelfs.";
/// A program's capabilities, which go when it is changed.
const CAPABILITY: &CStr = c"security.capability";

/// The names of attributes.
#[derive(Debug)]
pub struct Xattrs {
    rules: Option<XattrMap>,
    /// `trusted` attributes are kept under [`TRUSTED`].
    moves_trusted: bool,
    /// What a program's capabilities are called here, if rules call them otherwise: the kernel does not know them then.
    pub(super) capability: Option<CString>,
}

impl Xattrs {
    /// By virtiofsd's rules (`host.xattrmap`), or as they are but for `trusted` ones that this process may not set.
    pub fn new(rules: Option<XattrMap>) -> Xattrs {
        let moves_trusted = rules.is_none() && !credentials::administers();
        let named = rules.as_ref().and_then(|rules| match rules.map_client_xattr(CAPABILITY) {
            Ok(AppliedRule::Pass(name)) if *name != *CAPABILITY => Some(name.into_owned()),
            _ => None,
        });
        Xattrs { rules, moves_trusted, capability: named }
    }

    /// Whether rules decide about names.
    pub fn renames(&self) -> bool {
        self.rules.is_some()
    }

    /// An attribute's name here.
    pub(super) fn to_host<'a>(&self, name: &'a CStr) -> io::Result<Cow<'a, CStr>> {
        if let Some(rules) = &self.rules {
            return match rules.map_client_xattr(name) {
                Ok(AppliedRule::Pass(name)) => Ok(name),
                Ok(AppliedRule::Unsupported) => Err(errno(libc::ENOTSUP)),
                Ok(AppliedRule::Deny) | Err(_) => Err(errno(libc::EPERM)),
            };
        }
        if self.moves_trusted {
            let bytes = name.to_bytes();
            if bytes.starts_with(TRUSTED) {
                return Err(errno(libc::EPERM));
            }
            if bytes.starts_with(b"trusted.") {
                let moved = CString::new([TRUSTED, bytes].concat()).map_err(|_| errno(libc::EINVAL))?;
                return Ok(Cow::Owned(moved));
            }
        }
        Ok(Cow::Borrowed(name))
    }

    /// A list of names for the guest.
    pub(super) fn to_guest(&self, names: Vec<u8>) -> io::Result<Vec<u8>> {
        if let Some(rules) = &self.rules {
            let names = rules.map_server_xattrlist(names).map_err(|_| errno(libc::EPERM))?;
            // One NUL is its empty list.
            return Ok(if names == [0] { Vec::new() } else { names });
        }
        if !self.moves_trusted {
            return Ok(names);
        }
        let each = names.split_inclusive(|&byte| byte == 0);
        Ok(each.flat_map(|name| name.strip_prefix(TRUSTED).unwrap_or(name)).copied().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trusted_attributes_move_out_of_the_users_reach() {
        let names = Xattrs { rules: None, moves_trusted: true, capability: None };
        assert_eq!(&*names.to_host(c"user.a").unwrap(), c"user.a");
        let moved = names.to_host(c"trusted.overlay.opaque").unwrap();
        assert_eq!(&*moved, c"user.tunnelfs.trusted.overlay.opaque");
        assert_eq!(names.to_host(&moved).unwrap_err().raw_os_error(), Some(libc::EPERM));
        let list = b"user.a\0user.tunnelfs.trusted.x\0".to_vec();
        assert_eq!(names.to_guest(list).unwrap(), b"user.a\0trusted.x\0");
        assert_eq!(names.to_guest(Vec::new()).unwrap(), b"");
    }

    #[test]
    fn rules_decide_about_names() {
        let rules = XattrMap::try_from(":prefix:all:trusted.:user.vm.::ok:all:::").unwrap();
        let names = Xattrs::new(Some(rules));
        assert_eq!(names.capability, None);
        let moved = XattrMap::try_from(":map::user.vm.:").unwrap();
        assert_eq!(Xattrs::new(Some(moved)).capability.as_deref(), Some(c"user.vm.security.capability"));
        assert_eq!(&*names.to_host(c"trusted.x").unwrap(), c"user.vm.trusted.x");
        assert_eq!(names.to_guest(b"user.vm.trusted.x\0".to_vec()).unwrap(), b"trusted.x\0");
        assert_eq!(names.to_guest(Vec::new()).unwrap(), b"");
    }
}
