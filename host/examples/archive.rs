//! A tar archive as a read-only file system, by the `tar` crate: the host does not know the format.
//!
//! ```text
//! cargo run -p tunnelfs-host --example archive -- FILE.tar /run/archive.sock
//! tunnelfs-guest mount --socket-path /run/archive.sock /mnt
//! ```

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};
use std::sync::Arc;
use tar::EntryType;
use tunnelfs_fuse_abi::*;
use tunnelfs_host::fs::{Context, DirEntry, DirSink, FileSystem, ZeroCopyBuf};
use tunnelfs_host::{Daemon, Guests, Server};

/// How long the guest may keep what it knows, seconds: an archive does not change.
const FOR_EVER: u64 = 86_400;

#[derive(Default)]
struct Node {
    attr: Attr,
    /// Where a file's data lies in the archive.
    data: u64,
    target: Vec<u8>,
    entries: BTreeMap<CString, u64>,
}

/// All nodes are known from the beginning; nothing is ever forgotten.
struct Archive {
    file: File,
    nodes: Vec<Node>,
}

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl Archive {
    /// Reads the archive's headers once.
    fn open(path: &Path) -> io::Result<Archive> {
        let dir = Attr { mode: libc::S_IFDIR | 0o755, nlink: 2, blksize: 4096, ..Attr::default() };
        let root = Node { attr: Attr { ino: ROOT_ID, ..dir }, ..Node::default() };
        // Number 0 is nobody's.
        let mut archive = Archive { file: File::open(path)?, nodes: vec![Node::default(), root] };
        for entry in tar::Archive::new(archive.file.try_clone()?).entries()? {
            let (entry, mut id) = (entry?, ROOT_ID);
            let path = entry.path_bytes();
            for part in Path::new(OsStr::from_bytes(&path)).components() {
                // Whatever a path says, it stays inside.
                let Component::Normal(name) = part else { continue };
                id = archive.child(id, CString::new(name.as_bytes())?, dir);
            }
            let header = entry.header();
            let kind = match header.entry_type() {
                EntryType::Symlink => libc::S_IFLNK,
                EntryType::Directory => libc::S_IFDIR,
                // Hard links, sparse files and devices are shown as empty files.
                _ => libc::S_IFREG,
            };
            let has_data = matches!(header.entry_type(), EntryType::Regular | EntryType::Continuous);
            let size = if has_data { entry.size() } else { 0 };
            let node = &mut archive.nodes[id as usize];
            let mtime = header.mtime()?;
            node.attr = Attr {
                ino: id,
                size,
                blocks: size.div_ceil(512),
                mode: kind | header.mode()? & 0o7777,
                uid: header.uid()? as u32,
                gid: header.gid()? as u32,
                mtime,
                ctime: mtime,
                atime: mtime,
                nlink: 1,
                blksize: 4096,
                ..Attr::default()
            };
            node.data = entry.raw_file_position();
            node.target = entry.link_name_bytes().map_or_else(Vec::new, |target| target.into_owned());
        }
        Ok(archive)
    }

    /// The entry of a directory with this name, which is made if there is none.
    fn child(&mut self, dir: u64, name: CString, attr: Attr) -> u64 {
        let next = self.nodes.len() as u64;
        let id = *self.nodes[dir as usize].entries.entry(name).or_insert(next);
        if id == next {
            self.nodes.push(Node { attr: Attr { ino: id, ..attr }, ..Node::default() });
        }
        id
    }

    fn node(&self, id: u64) -> io::Result<&Node> {
        self.nodes.get(id as usize).filter(|_| id != 0).ok_or_else(|| errno(libc::ESTALE))
    }
}

/// One archive for all guests.
struct Shared(Arc<Archive>);

impl FileSystem for Shared {
    fn lookup(&self, _: &Context, node: u64, name: &CStr) -> io::Result<EntryOut> {
        let id = *self.0.node(node)?.entries.get(name).ok_or_else(|| errno(libc::ENOENT))?;
        let attr = self.0.node(id)?.attr;
        Ok(EntryOut { nodeid: id, entry_valid: FOR_EVER, attr_valid: FOR_EVER, attr, ..EntryOut::default() })
    }

    fn getattr(&self, _: &Context, node: u64, _: Option<u64>) -> io::Result<AttrOut> {
        Ok(AttrOut { attr_valid: FOR_EVER, attr: self.0.node(node)?.attr, ..AttrOut::default() })
    }

    fn readlink(&self, _: &Context, node: u64) -> io::Result<Vec<u8>> {
        Ok(self.0.node(node)?.target.clone())
    }

    fn open(&self, _: &Context, node: u64, args: &OpenIn) -> io::Result<OpenOut> {
        self.0.node(node)?;
        match args.flags as i32 & libc::O_ACCMODE {
            libc::O_RDONLY => Ok(OpenOut { open_flags: flags::fopen::KEEP_CACHE, ..OpenOut::default() }),
            _ => Err(errno(libc::EROFS)),
        }
    }

    /// The kernel reads the archive into the guest's buffer.
    fn read(&self, _: &Context, node: u64, args: &ReadIn, out: &ZeroCopyBuf<'_>) -> io::Result<usize> {
        let node = self.0.node(node)?;
        let count = node.attr.size.saturating_sub(args.offset).min(args.size.into());
        out.read_from(self.0.file.as_fd(), count as usize, node.data + args.offset)
    }

    fn opendir(&self, _: &Context, node: u64, _: &OpenIn) -> io::Result<OpenOut> {
        self.0.node(node).map(|_| OpenOut { open_flags: flags::fopen::CACHE_DIR, ..OpenOut::default() })
    }

    fn readdir(&self, _: &Context, node: u64, args: &ReadIn, _: bool, sink: &mut DirSink<'_>) -> io::Result<()> {
        for (at, (name, &id)) in self.0.node(node)?.entries.iter().enumerate().skip(args.offset as usize) {
            let kind = (self.0.node(id)?.attr.mode & libc::S_IFMT) >> 12;
            if !sink(&DirEntry { ino: id, offset: at as u64 + 1, kind, name }, None)? {
                break;
            }
        }
        Ok(())
    }
}

fn main() -> io::Result<()> {
    let mut args = std::env::args_os().skip(1);
    let (Some(file), Some(socket)) = (args.next(), args.next()) else {
        return Err(io::Error::other("usage: archive FILE.tar SOCKET"));
    };
    let mut settings = tunnelfs_settings::Settings::default();
    settings.transport.socket_path = socket.into();
    let archive = Arc::new(Archive::open(file.as_ref())?);
    Daemon::bind(&settings)?.run(move || Ok(Server::new(Shared(archive.clone()))), Guests::Forever)
}
