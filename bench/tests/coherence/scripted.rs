//! A host in this process whose file system tells of changes as it is told to, and lets the guest's kernel keep all for a
//! day: what the guest does with changes, whatever watches the share.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::CStr;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::changes::kind;
use tunnelfs_fuse_abi::*;
use tunnelfs_host::fs::*;
use tunnelfs_host::fs_builder::FsBuilder;
use tunnelfs_host::sandbox::SharedDir;
use tunnelfs_host::{Daemon, Guests, Server};
use tunnelfs_settings::{Cache, Settings, TransportKind};

/// FOPEN_KEEP_CACHE.
const KEEP_CACHE: u32 = 1 << 1;
/// How long a writer waits for the guest to drop data.
const DROP_LIMIT: Duration = Duration::from_secs(10);

/// What the guest is told, and what it knows.
#[derive(Default)]
struct State {
    waiting: VecDeque<Change>,
    /// Nodes by inode number.
    nodes: HashMap<u64, u64>,
    /// Files that are being written, and those that were since their last OPEN.
    written: HashMap<u64, bool>,
    /// Files that the guest has dropped.
    dropped: HashSet<u64>,
    closed: bool,
}

/// The script's side.
#[derive(Default)]
pub struct Script {
    state: Mutex<State>,
    news: Condvar,
    /// Nothing is told: a real host watches.
    silent: bool,
    /// CREATEs wait while this is set.
    pub hold_creates: AtomicBool,
    /// CREATEs that have waited.
    pub held_creates: AtomicU32,
}

impl Script {
    /// Tells nobody of anything.
    pub fn silent() -> Script {
        Script { silent: true, ..Script::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest's number for an inode of the share; 0: it knows none.
    fn node(&self, path: &Path) -> u64 {
        let ino = std::fs::symlink_metadata(path).map_or(0, |meta| meta.ino());
        self.state().nodes.get(&ino).copied().unwrap_or(0)
    }

    fn push(&self, change: Change) {
        if self.silent {
            return;
        }
        self.state().waiting.push_back(change);
        self.news.notify_all();
    }

    /// A record about a name; `path` is in a directory that the guest may know.
    pub fn name(&self, kind: u32, path: &Path, node: u64) {
        let (parent, name) = split(path);
        self.push(Change { kind, parent: self.node(parent), node, name, ..Change::default() });
    }

    /// A record about an inode.
    pub fn inode(&self, kind: u32, path: &Path) {
        match self.node(path) {
            0 => {}
            node => self.push(Change { kind, node, ..Change::default() }),
        }
    }

    /// Does `rename`, and tells of it.
    pub fn rename(&self, from: &Path, to: &Path, rename: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let node = self.node(from);
        rename()?;
        let ((parent, name), (to_parent, to_name)) = (split(from), split(to));
        let (parent, to_parent) = (self.node(parent), self.node(to_parent));
        self.push(Change { kind: kind::RENAMED, parent, node, to_parent, name, to_name, mode: 0 });
        Ok(())
    }

    /// Does `remove`, and tells of it.
    pub fn remove(&self, path: &Path, remove: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let node = self.node(path);
        remove()?;
        self.name(kind::DELETED, path, node);
        Ok(())
    }

    /// Does `write` to a file when the guest has dropped its data, and tells of it: what a lease does.
    pub fn write(&self, path: &Path, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let node = self.node(path);
        if node == 0 || self.silent {
            return write();
        }
        {
            let mut state = self.state();
            state.written.insert(node, true);
            state.dropped.remove(&node);
            state.waiting.push_back(Change { kind: kind::DROP_DATA, node, ..Change::default() });
            self.news.notify_all();
            let until = Instant::now() + DROP_LIMIT;
            while !state.dropped.contains(&node) {
                let left = until.saturating_duration_since(Instant::now());
                assert!(!left.is_zero(), "the guest does not drop the data of a file");
                state = self.news.wait_timeout(state, left).unwrap().0;
            }
        }
        let done = write();
        self.state().written.insert(node, false);
        self.push(Change { kind: kind::MODIFIED, node, ..Change::default() });
        done
    }

    /// As if changes had been lost.
    pub fn overflow(&self) {
        let mut state = self.state();
        state.waiting.clear();
        state.waiting.push_back(Change { kind: kind::OVERFLOW, ..Change::default() });
        self.news.notify_all();
    }

    /// The attributes of a file that is being written, or was since its last OPEN, are asked for each time.
    fn limit(&self, node: u64, limit: &mut u64) {
        if self.state().written.contains_key(&node) {
            *limit = 0;
        }
    }

    fn learn(&self, entry: &mut EntryOut) {
        self.limit(entry.nodeid, &mut entry.attr_valid);
        if entry.nodeid != 0 {
            self.state().nodes.insert(entry.attr.ino, entry.nodeid);
        }
    }
}

fn split(path: &Path) -> (&Path, Vec<u8>) {
    use std::os::unix::ffi::OsStrExt;
    (path.parent().unwrap(), path.file_name().unwrap().as_bytes().to_vec())
}

/// The host's own file system, which keeps all for a day, and the script.
struct Scripted {
    inner: Passthrough,
    script: Arc<Script>,
}

macro_rules! pass_on {
    ($(fn $name:ident($($arg:ident: $type:ty),*) -> $result:ty;)*) => {
        $(fn $name(&self, ctx: &Context $(, $arg: $type)*) -> io::Result<$result> {
            FileSystem::$name(&self.inner, ctx $(, $arg)*)
        })*
    };
}

macro_rules! learn_of {
    ($(fn $name:ident($($arg:ident: $type:ty),*);)*) => {
        $(fn $name(&self, ctx: &Context $(, $arg: $type)*) -> io::Result<EntryOut> {
            let mut entry = FileSystem::$name(&self.inner, ctx $(, $arg)*)?;
            self.script.learn(&mut entry);
            Ok(entry)
        })*
    };
}

impl FileSystem for Scripted {
    fn prepare_thread(&self) {
        self.inner.prepare_thread();
    }

    fn init(&self, capable: u64) -> io::Result<u64> {
        self.inner.init(capable)
    }

    fn destroy(&self) {
        self.script.state().closed = true;
        self.script.news.notify_all();
        self.inner.destroy();
    }

    fn interrupt(&self, unique: u64) {
        self.inner.interrupt(unique);
    }

    fn forget(&self, node: u64, nlookup: u64) {
        self.inner.forget(node, nlookup);
    }

    fn changes(&self, sink: &mut ChangeSink<'_>) -> io::Result<()> {
        let script = &self.script;
        let mut state = script.state();
        while state.waiting.is_empty() {
            if state.closed {
                return Err(io::Error::from_raw_os_error(libc::EINTR));
            }
            // The signal that ends a late request does not end this wait.
            state = script.news.wait_timeout(state, Duration::from_millis(20)).unwrap().0;
            if Arc::strong_count(script) == 1 {
                return Err(io::Error::from_raw_os_error(libc::EINTR));
            }
        }
        while state.waiting.front().is_some_and(&mut *sink) {
            state.waiting.pop_front();
        }
        Ok(())
    }

    fn dropped(&self, node: u64) {
        self.script.state().dropped.insert(node);
        self.script.news.notify_all();
    }

    fn create(
        &self,
        ctx: &Context,
        node: u64,
        name: &CStr,
        args: &CreateIn,
        ext: &Extensions,
    ) -> io::Result<CreateOut> {
        while self.script.hold_creates.load(Ordering::SeqCst) {
            self.script.held_creates.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut created = FileSystem::create(&self.inner, ctx, node, name, args, ext)?;
        self.script.learn(&mut created.entry);
        Ok(created)
    }

    fn open(&self, ctx: &Context, node: u64, args: &OpenIn) -> io::Result<OpenOut> {
        let mut opened = FileSystem::open(&self.inner, ctx, node, args)?;
        let mut state = self.script.state();
        // What was read meanwhile may be of any time.
        if let Some(&still) = state.written.get(&node) {
            opened.open_flags &= !KEEP_CACHE;
            if !still {
                state.written.remove(&node);
            }
        }
        drop(state);
        Ok(opened)
    }

    fn readdir(&self, ctx: &Context, node: u64, args: &ReadIn, plus: bool, sink: &mut DirSink<'_>) -> io::Result<()> {
        FileSystem::readdir(&self.inner, ctx, node, args, plus, &mut |entry, known| {
            let mut known = known.copied();
            known.iter_mut().for_each(|known| self.script.learn(known));
            sink(entry, known.as_ref())
        })
    }

    fn getattr(&self, ctx: &Context, node: u64, fh: Option<u64>) -> io::Result<AttrOut> {
        let mut attributes = FileSystem::getattr(&self.inner, ctx, node, fh)?;
        self.script.limit(node, &mut attributes.attr_valid);
        Ok(attributes)
    }

    fn setattr(&self, ctx: &Context, node: u64, set: &SetattrIn) -> io::Result<AttrOut> {
        let mut attributes = FileSystem::setattr(&self.inner, ctx, node, set)?;
        self.script.limit(node, &mut attributes.attr_valid);
        Ok(attributes)
    }

    fn statx(&self, ctx: &Context, node: u64, fh: Option<u64>, flags: u32, mask: u32) -> io::Result<StatxOut> {
        let mut attributes = FileSystem::statx(&self.inner, ctx, node, fh, flags, mask)?;
        self.script.limit(node, &mut attributes.attr_valid);
        Ok(attributes)
    }

    learn_of! {
        fn lookup(node: u64, name: &CStr);
        fn symlink(node: u64, name: &CStr, target: &CStr, extensions: &Extensions);
        fn mknod(node: u64, name: &CStr, args: &MknodIn, extensions: &Extensions);
        fn mkdir(node: u64, name: &CStr, args: &MkdirIn, extensions: &Extensions);
        fn link(old: u64, node: u64, name: &CStr);
    }

    pass_on! {
        fn readlink(node: u64) -> Vec<u8>;
        fn unlink(node: u64, name: &CStr) -> ();
        fn rmdir(node: u64, name: &CStr) -> ();
        fn rename(node: u64, name: &CStr, to: u64, new: &CStr, flags: u32) -> ();
        fn read(node: u64, args: &ReadIn, out: &ZeroCopyBuf<'_>) -> usize;
        fn write(node: u64, args: &WriteIn, data: &ZeroCopyBuf<'_>) -> usize;
        fn flush(node: u64, args: &FlushIn) -> ();
        fn release(node: u64, args: &ReleaseIn) -> ();
        fn fsync(node: u64, fh: u64, data_only: bool) -> ();
        fn opendir(node: u64, args: &OpenIn) -> OpenOut;
        fn releasedir(node: u64, args: &ReleaseIn) -> ();
        fn statfs(node: u64) -> Kstatfs;
        fn getxattr(node: u64, name: &CStr, size: u32) -> XattrReply;
        fn access(node: u64, mask: u32) -> ();
        fn lseek(node: u64, args: &LseekIn) -> u64;
    }
}

/// Serves `share` on `socket` until the process ends; what tells the guest of changes.
pub fn serve(share: &Path, socket: &Path, transport: TransportKind) -> Arc<Script> {
    let script = Arc::new(Script::default());
    let mut settings = Settings::default();
    settings.transport.kind = transport;
    settings.transport.socket_path = socket.into();
    settings.transport.queues = 2;
    settings.host.shared_dir = share.into();
    settings.host.cache = Cache::Always;
    let dir = SharedDir::unconfined(&settings.host).unwrap();
    let builder = FsBuilder::new(&settings.host, dir).unwrap();
    let daemon = Daemon::bind(&settings).unwrap();
    let its = script.clone();
    std::thread::spawn(move || {
        let open = move || Ok(Server::new(Scripted { inner: builder.build(2)?, script: its.clone() }));
        daemon.run(open, Guests::Forever)
    });
    let ino = std::fs::metadata(share).unwrap().ino();
    script.state().nodes.insert(ino, ROOT_ID);
    script
}
