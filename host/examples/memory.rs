//! A file system in memory, served to guests on a socket.
//!
//! ```text
//! cargo run -p tunnelfs-host --example memory -- /run/memory.sock
//! tunnelfs-guest mount --socket-path /run/memory.sock /mnt
//! ```

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};
use tunnelfs_fuse_abi::flags::fattr;
use tunnelfs_fuse_abi::*;
use tunnelfs_host::fs::{Context, DirEntry, DirSink, Extensions, FileSystem, ZeroCopyBuf};
use tunnelfs_host::{Daemon, Guests, Server};

/// Most bytes of a file.
const MAX_FILE: u64 = 1 << 30;

/// A file has bytes, a directory has entries.
#[derive(Default)]
struct Node {
    attr: Attr,
    bytes: Vec<u8>,
    entries: BTreeMap<CString, u64>,
    /// Look-ups that the guest has not forgotten: an open file without a name stays for as long.
    lookups: u64,
}

struct Nodes {
    nodes: BTreeMap<u64, Node>,
    last: u64,
}

/// Each guest has one of its own, which goes with it.
struct Memory(Mutex<Nodes>);

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Nodes {
    fn node(&mut self, id: u64) -> io::Result<&mut Node> {
        self.nodes.get_mut(&id).ok_or_else(|| errno(libc::ESTALE))
    }

    fn look_up(&mut self, dir: u64, name: &CStr) -> io::Result<EntryOut> {
        let id = *self.node(dir)?.entries.get(name).ok_or_else(|| errno(libc::ENOENT))?;
        let node = self.node(id)?;
        node.lookups += 1;
        Ok(EntryOut { nodeid: id, entry_valid: 1, attr_valid: 1, attr: node.attr, ..EntryOut::default() })
    }

    fn add(&mut self, ctx: &Context, dir: u64, name: &CStr, mode: u32) -> io::Result<EntryOut> {
        if self.node(dir)?.entries.contains_key(name) {
            return Err(errno(libc::EEXIST));
        }
        self.last += 1;
        let id = self.last;
        let attr = Attr { ino: id, mode, nlink: 1, uid: ctx.uid, gid: ctx.gid, ..Attr::default() };
        self.nodes.insert(id, Node { attr, ..Node::default() });
        self.node(dir)?.entries.insert(name.into(), id);
        self.touch(dir).and_then(|()| self.touch(id))?;
        self.look_up(dir, name)
    }

    /// Takes a name away, and the node if nobody knows it any more.
    fn remove(&mut self, dir: u64, name: &CStr) -> io::Result<()> {
        let id = *self.node(dir)?.entries.get(name).ok_or_else(|| errno(libc::ENOENT))?;
        if !self.node(id)?.entries.is_empty() {
            return Err(errno(libc::ENOTEMPTY));
        }
        self.node(dir)?.entries.remove(name);
        self.node(id)?.attr.nlink = 0;
        self.forget(id, 0);
        self.touch(dir)
    }

    fn forget(&mut self, id: u64, lookups: u64) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.lookups = node.lookups.saturating_sub(lookups);
        if node.lookups == 0 && node.attr.nlink == 0 {
            self.nodes.remove(&id);
        }
    }

    /// The node has changed.
    fn touch(&mut self, id: u64) -> io::Result<()> {
        let node = self.node(id)?;
        node.attr.size = node.bytes.len() as u64;
        (node.attr.mtime, node.attr.ctime) = (now(), now());
        Ok(())
    }
}

impl Memory {
    fn new() -> Memory {
        let attr = Attr { ino: ROOT_ID, mode: libc::S_IFDIR | 0o755, nlink: 2, ..Attr::default() };
        let root = Node { attr, ..Node::default() };
        Memory(Mutex::new(Nodes { nodes: BTreeMap::from([(ROOT_ID, root)]), last: ROOT_ID }))
    }
}

/// The guest's kernel has checked what a node is and who may use it.
impl FileSystem for Memory {
    fn lookup(&self, _: &Context, node: u64, name: &CStr) -> io::Result<EntryOut> {
        self.0.lock().look_up(node, name)
    }

    fn forget(&self, node: u64, nlookup: u64) {
        self.0.lock().forget(node, nlookup);
    }

    fn getattr(&self, _: &Context, node: u64, _: Option<u64>) -> io::Result<AttrOut> {
        Ok(AttrOut { attr_valid: 1, attr: self.0.lock().node(node)?.attr, ..AttrOut::default() })
    }

    fn setattr(&self, _: &Context, node: u64, set: &SetattrIn) -> io::Result<AttrOut> {
        let (mut nodes, has) = (self.0.lock(), |flag| set.valid & flag != 0);
        if has(fattr::SIZE) {
            nodes.node(node)?.bytes.resize(set.size.min(MAX_FILE) as usize, 0);
            nodes.touch(node)?;
        }
        let attr = &mut nodes.node(node)?.attr;
        attr.mode = if has(fattr::MODE) { attr.mode & libc::S_IFMT | set.mode & 0o7777 } else { attr.mode };
        attr.uid = if has(fattr::UID) { set.uid } else { attr.uid };
        attr.gid = if has(fattr::GID) { set.gid } else { attr.gid };
        attr.mtime = if has(fattr::MTIME) && !has(fattr::MTIME_NOW) { set.mtime } else { now() };
        Ok(AttrOut { attr_valid: 1, attr: *attr, ..AttrOut::default() })
    }

    fn mkdir(&self, ctx: &Context, node: u64, name: &CStr, args: &MkdirIn, _: &Extensions) -> io::Result<EntryOut> {
        self.0.lock().add(ctx, node, name, libc::S_IFDIR | args.mode & 0o7777)
    }

    fn create(&self, ctx: &Context, node: u64, name: &CStr, args: &CreateIn, _: &Extensions) -> io::Result<CreateOut> {
        let entry = self.0.lock().add(ctx, node, name, libc::S_IFREG | args.mode & 0o7777)?;
        Ok(CreateOut { entry, open: OpenOut::default() })
    }

    fn unlink(&self, _: &Context, node: u64, name: &CStr) -> io::Result<()> {
        self.0.lock().remove(node, name)
    }

    fn rmdir(&self, _: &Context, node: u64, name: &CStr) -> io::Result<()> {
        self.0.lock().remove(node, name)
    }

    fn open(&self, _: &Context, node: u64, _: &OpenIn) -> io::Result<OpenOut> {
        self.0.lock().node(node).map(|_| OpenOut::default())
    }

    fn read(&self, _: &Context, node: u64, args: &ReadIn, out: &ZeroCopyBuf<'_>) -> io::Result<usize> {
        let mut nodes = self.0.lock();
        let rest = nodes.node(node)?.bytes.get(args.offset as usize..).unwrap_or_default();
        let n = rest.len().min(args.size as usize).min(out.len());
        out.write_bytes(0, &rest[..n]).map(|()| n)
    }

    fn write(&self, _: &Context, node: u64, args: &WriteIn, data: &ZeroCopyBuf<'_>) -> io::Result<usize> {
        let (mut nodes, n) = (self.0.lock(), data.len().min(args.size as usize));
        let end = args.offset.checked_add(n as u64).filter(|&end| end <= MAX_FILE);
        let (end, bytes) = (end.ok_or_else(|| errno(libc::EFBIG))? as usize, &mut nodes.node(node)?.bytes);
        bytes.resize(bytes.len().max(end), 0);
        data.read_bytes(0, &mut bytes[end - n..end])?;
        nodes.touch(node).map(|()| n)
    }

    fn opendir(&self, _: &Context, _: u64, _: &OpenIn) -> io::Result<OpenOut> {
        Ok(OpenOut::default())
    }

    /// An entry's place in the listing is its node's number: that stays when others come and go.
    fn readdir(&self, _: &Context, node: u64, args: &ReadIn, _: bool, sink: &mut DirSink<'_>) -> io::Result<()> {
        let mut nodes = self.0.lock();
        let mut entries: Vec<_> = nodes.node(node)?.entries.iter().map(|(name, &id)| (id, name.clone())).collect();
        entries.sort();
        for (id, name) in entries.iter().filter(|(id, _)| *id > args.offset) {
            let kind = nodes.node(*id)?.attr.mode >> 12;
            if !sink(&DirEntry { ino: *id, offset: *id, kind, name }, None)? {
                break;
            }
        }
        Ok(())
    }
}

fn main() -> io::Result<()> {
    let mut settings = tunnelfs_settings::Settings::default();
    settings.transport.socket_path = std::env::args_os().nth(1).expect("usage: memory SOCKET").into();
    Daemon::bind(&settings)?.run(|| Ok(Server::new(Memory::new())), Guests::Forever)
}
