//! Listings.

use super::cover::Watch;
use super::file_system::*;
use super::inodes::Inode;
use super::owners::Owners;
use super::passthrough::Passthrough;
use super::sys::{self, errno};
use std::cell::RefCell;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use tunnelfs_fuse_abi::flags::fopen;
use tunnelfs_fuse_abi::*;
use tunnelfs_settings::Cache;

/// Most bytes of entries that are read at a time.
const MOST: usize = 32 << 10;
/// Bytes of `struct linux_dirent64` before the name.
const HEADER: usize = 19;

thread_local! {
    static ENTRIES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Splits the first of getdents64's entries off; its type is `d_type`.
fn next_entry<'a>(bytes: &mut &'a [u8]) -> Option<DirEntry<'a>> {
    let word = |at: usize| bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_ne_bytes);
    let (ino, offset) = (word(0)?, word(8)?);
    let len = usize::from(u16::from_ne_bytes([*bytes.get(16)?, *bytes.get(17)?]));
    let kind = u32::from(*bytes.get(18)?);
    let name = CStr::from_bytes_until_nul(bytes.get(HEADER..len)?).ok()?;
    *bytes = &bytes[len..];
    Some(DirEntry { ino, offset, kind, name })
}

impl Passthrough {
    pub(super) fn opendir(&self, node: u64) -> io::Result<OpenOut> {
        if self.skips_opening_now() {
            return Err(errno(libc::ENOSYS));
        }
        let inode = self.inodes.get(node)?;
        let (handle, watch) = self.open_listing(&inode)?;
        let fh = self.handles.add(handle);
        let open_flags = match self.config.cache {
            Cache::Metadata | Cache::Always => fopen::KEEP_CACHE | fopen::CACHE_DIR,
            Cache::Coherent if self.coherence.lasts(watch.as_ref()) => fopen::KEEP_CACHE | fopen::CACHE_DIR,
            Cache::Never | Cache::Auto | Cache::Coherent => 0,
        };
        Ok(OpenOut { fh, open_flags, backing_id: 0 })
    }

    pub(super) fn readdir(&self, node: u64, args: &ReadIn, plus: bool, sink: &mut DirSink<'_>) -> io::Result<()> {
        let handle = self.listing(args.fh, node)?;
        let inode = &handle.held.inode;
        if !inode.is_dir() {
            return Err(errno(libc::ENOTDIR));
        }
        // Whoever has taken it is at work; another READDIR of the same handle looks for its place itself.
        let at = handle.position.lock().take();
        if at != Some(args.offset) {
            sys::seek(handle.as_fd(), args.offset as i64, libc::SEEK_SET)?;
        }
        let watch = if plus { self.coherence.watch(inode, handle.held.pin.as_fd()) } else { None };
        // An entry of READDIRPLUS is 128 bytes longer.
        let size = (args.size as usize / if plus { 4 } else { 1 }).clamp(1024, MOST);
        let end = ENTRIES.with_borrow_mut(|entries| {
            entries.resize(MOST, 0);
            let n = sys::read_dir(handle.as_fd(), &mut entries[..size])?;
            self.list((inode, watch.as_ref()), handle.as_fd(), &entries[..n], plus, sink)
                .map(|end| end.unwrap_or(args.offset))
        })?;
        *handle.position.lock() = end.1.then_some(end.0);
        self.listed(args.fh, node, handle, end.0 != args.offset);
        Ok(())
    }
}

impl Passthrough {
    /// Hands entries to `sink` until it takes no more; where the listing goes on, and whether the directory is there.
    fn list(
        &self,
        (inode, watch): (&Arc<Inode>, Option<&Arc<Watch>>),
        dir: BorrowedFd<'_>,
        mut entries: &[u8],
        plus: bool,
        sink: &mut DirSink<'_>,
    ) -> io::Result<Listed> {
        let mut listed = Listed { end: None, all: true };
        while let Some(mut entry) = next_entry(&mut entries) {
            let own = entry.name == c".";
            let up = entry.name == c"..";
            if up && inode.id == ROOT_ID {
                entry.ino = inode.key.ino;
            }
            if !self.announces() {
                entry.ino = self.numbers.of(inode.key.device, entry.ino);
            }
            // `None` when the name has gone since, or cannot be looked up: the guest asks for it if need be.
            let known = if plus && !own && !up { self.find(inode, dir, entry.name, watch).ok() } else { None };
            entry.kind = self.kind_of(&entry, known.as_ref());
            let fits = sink(&entry, known.as_ref());
            if let (Some(known), Ok(false) | Err(_)) = (&known, &fits) {
                self.forget_entry(known.nodeid, 1, false);
            }
            if !fits? {
                listed.all = false;
                break;
            }
            listed.end = Some(entry.offset);
        }
        Ok(listed)
    }

    /// `DT_...` of an entry: a regular file here may stand for a special one.
    fn kind_of(&self, entry: &DirEntry<'_>, known: Option<&EntryOut>) -> u32 {
        if self.config.ids.owners != Owners::Attribute || entry.kind != u32::from(libc::DT_REG) {
            return entry.kind;
        }
        known.map_or(libc::DT_UNKNOWN.into(), |known| known.attr.mode >> 12 & 0xf)
    }
}

/// How far a listing has come.
struct Listed {
    /// Where it goes on; `None`: no entry fitted, or there is none.
    end: Option<u64>,
    /// Whether all entries that were read were taken, so that the directory stands at `end`.
    all: bool,
}

impl Listed {
    fn unwrap_or(self, start: u64) -> (u64, bool) {
        (self.end.unwrap_or(start), self.all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_split() {
        let mut bytes = Vec::new();
        for (ino, offset, name) in [(5u64, 1u64 << 63, "a"), (6, u64::MAX, "longer name")] {
            let len = (HEADER + name.len() + 1).next_multiple_of(8);
            bytes.extend([ino.to_ne_bytes(), offset.to_ne_bytes()].concat());
            bytes.extend((len as u16).to_ne_bytes());
            bytes.push(libc::DT_REG);
            bytes.extend(name.bytes());
            bytes.resize(bytes.len() + len - HEADER - name.len(), 0);
        }
        let mut left = &bytes[..];
        let first = next_entry(&mut left).unwrap();
        assert_eq!((first.ino, first.offset, first.name), (5, 1 << 63, c"a"));
        let second = next_entry(&mut left).unwrap();
        assert_eq!((second.ino, second.offset, second.name, second.kind), (6, u64::MAX, c"longer name", 8));
        assert!(next_entry(&mut left).is_none() && left.is_empty());
        assert!(next_entry(&mut &bytes[..20]).is_none());
    }
}
