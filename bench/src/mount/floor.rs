//! A file system that does nothing: what the kernel's FUSE costs by itself, which no server can be faster than.
//!
//! It has names, because a job creates them and looks at them, and no data: a READ says that the buffer is filled.

use parking_lot::Mutex;
use std::collections::btree_map::{BTreeMap, Entry};
use std::ffi::{CStr, CString};
use std::io;
use tunnelfs_fuse_abi::flags::fopen;
use tunnelfs_fuse_abi::*;
use tunnelfs_host::fs::{Context, DirEntry, DirSink, Extensions, FileSystem, ZeroCopyBuf};
use tunnelfs_settings::Cache;

/// Nodes of directories are odd, as the root's is.
const STEP: u64 = 2;

struct Names {
    /// By directory and name.
    nodes: BTreeMap<(u64, CString), u64>,
    last: u64,
}

/// The file system: each of its files has as many bytes.
pub struct Floor {
    names: Mutex<Names>,
    file_bytes: u64,
    /// What each OPEN answers, as the host does in this cache mode.
    open: OpenOut,
}

fn is_dir(node: u64) -> bool {
    node % STEP == ROOT_ID % STEP
}

impl Floor {
    /// With the directory `name`, in which there is the file `data`.
    ///
    /// # Errors
    /// `name` is none.
    pub fn new(name: &str, file_bytes: u64, cache: Cache) -> io::Result<Floor> {
        let names = Mutex::new(Names { nodes: BTreeMap::new(), last: ROOT_ID });
        let open_flags = if cache == Cache::Never { fopen::DIRECT_IO } else { 0 } | fopen::NOFLUSH;
        let floor = Floor { names, file_bytes, open: OpenOut { open_flags, ..OpenOut::default() } };
        let dir = floor.add(ROOT_ID, &CString::new(name)?, true)?;
        floor.add(dir.nodeid, c"data", false)?;
        Ok(floor)
    }

    fn attr(&self, node: u64) -> Attr {
        let (mode, size) =
            if is_dir(node) { (libc::S_IFDIR | 0o755, 0) } else { (libc::S_IFREG | 0o666, self.file_bytes) };
        Attr { ino: node, mode, size, nlink: 1, blksize: 4096, ..Attr::default() }
    }

    fn entry(&self, node: u64) -> EntryOut {
        EntryOut { nodeid: node, attr: self.attr(node), ..EntryOut::default() }
    }

    fn add(&self, dir: u64, name: &CStr, is_dir: bool) -> io::Result<EntryOut> {
        let Names { nodes, last } = &mut *self.names.lock();
        let Entry::Vacant(place) = nodes.entry((dir, name.into())) else {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        };
        *last += STEP;
        Ok(self.entry(*place.insert(*last + u64::from(!is_dir))))
    }

    fn remove(&self, dir: u64, name: &CStr) -> io::Result<()> {
        self.names.lock().nodes.remove(&(dir, name.into())).map(drop).ok_or_else(missing)
    }
}

fn missing() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

impl FileSystem for Floor {
    fn lookup(&self, _: &Context, node: u64, name: &CStr) -> io::Result<EntryOut> {
        let found = self.names.lock().nodes.get(&(node, name.into())).copied();
        found.map(|node| self.entry(node)).ok_or_else(missing)
    }

    fn getattr(&self, _: &Context, node: u64, _: Option<u64>) -> io::Result<AttrOut> {
        Ok(AttrOut { attr: self.attr(node), ..AttrOut::default() })
    }

    fn setattr(&self, ctx: &Context, node: u64, _: &SetattrIn) -> io::Result<AttrOut> {
        self.getattr(ctx, node, None)
    }

    fn mkdir(&self, _: &Context, node: u64, name: &CStr, _: &MkdirIn, _: &Extensions) -> io::Result<EntryOut> {
        self.add(node, name, true)
    }

    fn create(&self, _: &Context, node: u64, name: &CStr, _: &CreateIn, _: &Extensions) -> io::Result<CreateOut> {
        Ok(CreateOut { entry: self.add(node, name, false)?, open: self.open })
    }

    fn unlink(&self, _: &Context, node: u64, name: &CStr) -> io::Result<()> {
        self.remove(node, name)
    }

    fn rmdir(&self, _: &Context, node: u64, name: &CStr) -> io::Result<()> {
        self.remove(node, name)
    }

    fn open(&self, _: &Context, _: u64, _: &OpenIn) -> io::Result<OpenOut> {
        Ok(self.open)
    }

    fn read(&self, _: &Context, _: u64, args: &ReadIn, out: &ZeroCopyBuf<'_>) -> io::Result<usize> {
        let left = self.file_bytes.saturating_sub(args.offset);
        Ok(left.min(u64::from(args.size)).min(out.len() as u64) as usize)
    }

    fn write(&self, _: &Context, _: u64, args: &WriteIn, _: &ZeroCopyBuf<'_>) -> io::Result<usize> {
        Ok(args.size as usize)
    }

    fn release(&self, _: &Context, _: u64, _: &ReleaseIn) -> io::Result<()> {
        Ok(())
    }

    fn opendir(&self, _: &Context, _: u64, _: &OpenIn) -> io::Result<OpenOut> {
        Ok(OpenOut::default())
    }

    fn readdir(&self, _: &Context, node: u64, args: &ReadIn, _: bool, sink: &mut DirSink<'_>) -> io::Result<()> {
        let names = self.names.lock();
        let entries = names.nodes.range((node, CString::default())..).take_while(|((dir, _), _)| *dir == node);
        for (offset, ((_, name), &ino)) in (1..).zip(entries).skip(args.offset as usize) {
            let kind = self.attr(ino).mode >> 12;
            if !sink(&DirEntry { ino, offset, kind, name }, None)? {
                break;
            }
        }
        Ok(())
    }
}
