//! A directory of this machine, as a file system for one guest: what all operations share, and look-ups.
//! The others are in `attributes.rs`, `names.rs`, `create.rs`, `io.rs`, `dir.rs`, `xattr.rs` and `locks.rs`.

use super::by_number::ByNumber;
use super::changes::ChangeSink;
use super::coherence::{Budget, Coherence};
use super::cover::Watch;
use super::credentials;
use super::file_system::*;
use super::handles::{Handle, Handles};
use super::inodes::{Inode, Inodes};
use super::locks::Locks;
use super::numbers::Numbers;
use super::owners::Ids;
use super::sys::{self, device, errno, FdName};
use super::xattr_names::Xattrs;
use crate::zero_copy::ZeroCopyBuf;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_fuse_abi::flags::{self, init};
use tunnelfs_fuse_abi::*;
use tunnelfs_settings::{Cache, FileHandles, Negotiation};

/// How the directory is served.
pub struct Config {
    /// The directory.
    pub root: PathBuf,
    /// `/proc/self/fd`; `None`: by its path.
    pub descriptors: Option<File>,
    /// What the guest's kernel may cache.
    pub cache: Cache,
    /// How long names and attributes are good.
    pub timeout: Duration,
    /// How long a missing name is; zero: not at all.
    pub missing_timeout: Duration,
    /// Nothing can be changed.
    pub readonly: bool,
    /// The guest's kernel may cache writes.
    pub writeback: bool,
    /// READDIRPLUS.
    pub readdirplus: bool,
    /// Mount points are told to kernels that make mount points of them.
    pub announce_submounts: bool,
    /// Programs' O_DIRECT reaches the file.
    pub direct_io: bool,
    /// Shared mappings of files that are not cached.
    pub mmap: bool,
    /// Setuid and setgid bits are cleared here.
    pub killpriv: bool,
    /// Programs' O_NOATIME reaches the file.
    pub keep_noatime: bool,
    /// The guest asks to open each file and directory.
    pub ask_open: bool,
    /// POSIX ACLs.
    pub posix_acl: Negotiation,
    /// Locks hold on this machine too.
    pub shared_locks: bool,
    /// A file's time of change is another one after each write that follows a look at it ([`sys::has_exact_times`]).
    pub exact_times: bool,
    /// Whether inodes may be kept by file handles.
    pub handles: FileHandles,
    /// Extended attributes; `None`: none.
    pub xattrs: Option<Xattrs>,
    /// Owners.
    pub ids: Ids,
    /// Descriptors for inodes.
    pub inodes: usize,
    /// Descriptors for open files.
    pub files: usize,
    /// What `cache = "coherent"` may take; `None`: another mode.
    pub coherence: Option<Budget>,
}

/// What a guest's kernel says that can do without OPEN and OPENDIR.
const SKIPS_OPEN: u64 = init::NO_OPEN_SUPPORT | init::NO_OPENDIR_SUPPORT;

/// The file system.
pub struct Passthrough {
    pub(super) config: Config,
    pub(super) inodes: Arc<Inodes>,
    pub(super) coherence: Arc<Coherence>,
    pub(super) handles: Handles,
    pub(super) by_number: Arc<ByNumber>,
    pub(super) locks: Locks,
    pub(super) numbers: Numbers,
    /// `/proc/self/fd`, each serving thread's working directory.
    pub(super) descriptors: OwnedFd,
    /// Whether the share's own file system is local ([`sys::is_local`]).
    pub(super) is_local: bool,
    /// What was agreed on with the guest's kernel (`flags::init`).
    agreed: AtomicU64,
}

impl Passthrough {
    /// Opens the directory.
    ///
    /// # Errors
    /// What cannot be opened.
    pub fn new(mut config: Config) -> io::Result<Passthrough> {
        use std::os::unix::fs::OpenOptionsExt;
        let told = |path: &std::path::Path, e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        let path = |flags: i32, path: &std::path::Path| {
            File::options().read(true).custom_flags(flags).open(path).map_err(|e| told(path, e))
        };
        let root = path(libc::O_PATH | libc::O_DIRECTORY, &config.root)?;
        let descriptors = match config.descriptors.take() {
            Some(directory) => directory,
            None => path(libc::O_PATH | libc::O_DIRECTORY, std::path::Path::new("/proc/self/fd"))?,
        };
        let st = sys::stat(root.as_fd())?;
        let is_local = sys::is_local(root.as_fd());
        let handles = config.handles != FileHandles::Never && credentials::opens_by_handle();
        let inodes = Inodes::new(root.into(), config.inodes, handles)?;
        if config.handles == FileHandles::Mandatory && !inodes.has_handles() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "host.inode_file_handles = \"mandatory\": the shared directory has none, or this process lacks \
                 CAP_DAC_READ_SEARCH; \"prefer\" goes on without",
            ));
        }
        let (inodes, descriptors) = (Arc::new(inodes), OwnedFd::from(descriptors));
        let coherence = Coherence::new(
            inodes.clone(),
            descriptors.try_clone()?,
            (config.timeout, config.missing_timeout),
            config.coherence.take(),
        );
        Ok(Passthrough {
            by_number: Arc::new(ByNumber::new(inodes.clone(), config.files)),
            inodes,
            coherence: Arc::new(coherence),
            handles: Handles::new(config.files),
            locks: Locks::default(),
            numbers: Numbers::new(device(st.stx_dev_major, st.stx_dev_minor)),
            descriptors,
            is_local,
            agreed: AtomicU64::new(0),
            config,
        })
    }

    pub(super) fn agreed(&self, flag: u64) -> bool {
        self.agreed.load(Relaxed) & flag != 0
    }

    /// Refuses a change of a share that is read only.
    pub(super) fn changes(&self) -> io::Result<()> {
        if self.config.readonly {
            Err(errno(libc::EROFS))
        } else {
            Ok(())
        }
    }

    /// Opens once more, with other flags, what a descriptor has open.
    pub(super) fn reopen(&self, fd: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
        sys::open_at(self.descriptors.as_fd(), FdName::new(fd).as_c_str(), flags & !libc::O_NOFOLLOW, 0)
    }

    /// The open file of a request.
    pub(super) fn handle(&self, fh: u64, node: u64) -> io::Result<Arc<Handle>> {
        self.handles.get(fh, node)
    }

    /// The inode number that the guest sees.
    pub(super) fn number(&self, st: &libc::statx) -> u64 {
        if self.announces() {
            st.stx_ino
        } else {
            self.numbers.of(device(st.stx_dev_major, st.stx_dev_minor), st.stx_ino)
        }
    }

    /// Whether the guest's kernel makes a mount point, with a device number, of each mount below.
    pub(super) fn announces(&self) -> bool {
        self.config.announce_submounts && self.agreed(init::SUBMOUNTS)
    }

    /// Looks up what `fd` (O_PATH) has opened, under `name` in `parent`, for the guest to know. `watch`: how `parent`
    /// was watched before that.
    pub(super) fn enter(
        &self,
        fd: OwnedFd,
        parent: &Arc<Inode>,
        name: &CStr,
        watch: Option<&Arc<Watch>>,
    ) -> io::Result<(Arc<Inode>, EntryOut)> {
        let st = sys::stat(fd.as_fd())?;
        self.enter_with(fd, &st, parent, name, watch)
    }

    /// The same, with what it is.
    pub(super) fn enter_with(
        &self,
        fd: OwnedFd,
        st: &libc::statx,
        parent: &Arc<Inode>,
        name: &CStr,
        watch: Option<&Arc<Watch>>,
    ) -> io::Result<(Arc<Inode>, EntryOut)> {
        let mut attr = self.attr(st, fd.as_fd())?;
        let inode = self.inodes.enter(fd, st, parent, name)?;
        if self.coherence.found(&inode, st.stx_nlink, watch.cloned()) {
            // It is watched only now.
            attr = self.attr_again(&inode).inspect_err(|_| self.forget(inode.id, 1))?;
        }
        if self.announces() && st.stx_mnt_id != parent.key.mount {
            attr.flags |= flags::ATTR_SUBMOUNT;
        }
        let entry = self.entry(&inode, attr, watch);
        Ok((inode, entry))
    }

    fn attr_again(&self, inode: &Arc<Inode>) -> io::Result<Attr> {
        let pin = self.inodes.pin(inode)?;
        self.attr(&sys::stat(pin.as_fd())?, pin.as_fd())
    }

    fn entry(&self, inode: &Arc<Inode>, attr: Attr, watch: Option<&Arc<Watch>>) -> EntryOut {
        let timeout = self.coherence.entry(watch);
        let attr_timeout = self.attr_timeout(inode, attr.mode, attr.nlink);
        EntryOut {
            nodeid: inode.id,
            generation: 0,
            entry_valid: timeout.as_secs(),
            attr_valid: attr_timeout.as_secs(),
            entry_valid_nsec: timeout.subsec_nanos(),
            attr_valid_nsec: attr_timeout.subsec_nanos(),
            attr,
        }
    }

    /// Finds a name in a directory that is open, and watched like this.
    pub(super) fn find(
        &self,
        parent: &Arc<Inode>,
        dir: BorrowedFd<'_>,
        name: &CStr,
        watch: Option<&Arc<Watch>>,
    ) -> io::Result<EntryOut> {
        let fd = sys::open_at(dir, name, libc::O_PATH | libc::O_NOFOLLOW, 0)?;
        self.enter(fd, parent, name, watch).map(|(_, entry)| entry)
    }

    fn lookup(&self, node: u64, name: &CStr) -> io::Result<EntryOut> {
        match name.to_bytes() {
            b"." => return self.recall(node),
            b".." => return self.lookup_parent(node),
            _ => {}
        }
        let (parent, dir) = self.inodes.open(node)?;
        let watch = self.coherence.watch(&parent, dir.as_fd());
        match self.find(&parent, dir.as_fd(), name, watch.as_ref()) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
                let timeout = self.coherence.missing(watch.as_ref());
                if timeout.is_zero() {
                    return Err(e);
                }
                Ok(EntryOut {
                    entry_valid: timeout.as_secs(),
                    entry_valid_nsec: timeout.subsec_nanos(),
                    ..EntryOut::default()
                })
            }
            other => other,
        }
    }

    /// An inode that the guest has a file handle of.
    fn recall(&self, node: u64) -> io::Result<EntryOut> {
        let inode = self.inodes.recall(node)?;
        match self.attr_again(&inode) {
            Ok(attr) => Ok(self.entry(&inode, attr, None)),
            Err(e) => {
                self.forget(inode.id, 1);
                Err(e)
            }
        }
    }

    /// The parent of a directory that the guest has a file handle of, if it is in the share.
    fn lookup_parent(&self, node: u64) -> io::Result<EntryOut> {
        let (inode, dir) = self.inodes.open(node)?;
        if node == ROOT_ID {
            return self.recall(node);
        }
        if !inode.is_dir() {
            return Err(errno(libc::ENOTDIR));
        }
        let up = |from: BorrowedFd<'_>| sys::open_at(from, c"..", libc::O_PATH | libc::O_NOFOLLOW, 0);
        let parent = up(dir.as_fd())?;
        self.check_inside(parent.as_fd(), up)?;
        self.enter(parent, &inode, c"..", None).map(|(_, entry)| entry)
    }

    /// Whether the way up from a directory leads to the share's root: it may have been moved out of it.
    fn check_inside(
        &self,
        start: BorrowedFd<'_>,
        up: impl Fn(BorrowedFd<'_>) -> io::Result<OwnedFd>,
    ) -> io::Result<()> {
        /// Directories in directories, at most.
        const DEEPEST: usize = 4096;
        let mut at = start.try_clone_to_owned()?;
        for _ in 0..DEEPEST {
            let st = sys::stat(at.as_fd())?;
            if super::inodes::Key::of(&st) == self.inodes.root().key {
                return Ok(());
            }
            let next = up(at.as_fd())?;
            if sys::same_inode(&sys::stat(next.as_fd())?, &st) {
                break;
            }
            at = next;
        }
        Err(errno(libc::ESTALE))
    }

    fn forget(&self, node: u64, nlookup: u64) {
        self.forget_entry(node, nlookup, self.agreed(init::EXPORT_SUPPORT));
    }

    /// Forgets look-ups, of which the guest may not have heard; `remember`: it has.
    pub(super) fn forget_entry(&self, node: u64, nlookup: u64, remember: bool) {
        if let Some(inode) = self.inodes.forget(node, nlookup, remember) {
            self.forget_opened(node);
            self.coherence.forgotten(&inode);
        }
    }

    fn statfs(&self, node: u64) -> io::Result<Kstatfs> {
        let (_, pin) = self.inodes.open(node)?;
        let st = sys::stat_fs(pin.as_fd())?;
        Ok(Kstatfs {
            blocks: st.f_blocks,
            bfree: st.f_bfree,
            bavail: st.f_bavail,
            files: st.f_files,
            ffree: st.f_ffree,
            bsize: st.f_bsize as u32,
            namelen: st.f_namemax as u32,
            frsize: st.f_frsize as u32,
            ..Kstatfs::default()
        })
    }

    fn access(&self, ctx: &Context, node: u64, mask: u32) -> io::Result<()> {
        let (_, pin) = self.inodes.open(node)?;
        let st = sys::stat(pin.as_fd())?;
        let own = self.config.ids.of(&st, pin.as_fd())?;
        let special = !matches!(own.mode & libc::S_IFMT, libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK);
        if mask & libc::W_OK as u32 != 0 && !special {
            self.changes()?;
        }
        let allowed = match own.mode & 0o777 {
            // Root executes what anybody may.
            mode if ctx.uid == 0 => 6 | u32::from(mode & 0o111 != 0 || own.mode & libc::S_IFMT == libc::S_IFDIR),
            mode if ctx.uid == own.uid => mode >> 6,
            mode if ctx.gid == own.gid => mode >> 3 & 7,
            mode => mode & 7,
        };
        if mask & 7 & !allowed == 0 {
            Ok(())
        } else {
            Err(errno(libc::EACCES))
        }
    }

    fn init(&self, capable: u64) -> io::Result<u64> {
        let config = &self.config;
        self.destroy();
        let mut wanted = init::ASYNC_READ
            | init::PARALLEL_DIROPS
            | init::BIG_WRITES
            | init::AUTO_INVAL_DATA
            | init::ASYNC_DIO
            | init::DONT_MASK
            | init::HAS_IOCTL_DIR
            | init::CREATE_SUPP_GROUP
            | init::ALLOW_IDMAP
            | init::SUBMOUNTS;
        let mut ask = |flag: u64, asked: bool| wanted |= if asked { flag } else { 0 };
        ask(init::EXPORT_SUPPORT, self.inodes.has_handles());
        ask(init::NO_EXPORT_SUPPORT, !self.inodes.has_handles());
        ask(init::DO_READDIRPLUS | init::READDIRPLUS_AUTO, config.readdirplus);
        // A link's target never changes: another one is another inode.
        ask(init::CACHE_SYMLINKS, !matches!(config.cache, Cache::Never | Cache::Auto));
        ask(init::WRITEBACK_CACHE, config.writeback);
        ask(init::HANDLE_KILLPRIV_V2, config.killpriv);
        ask(init::DIRECT_IO_ALLOW_MMAP, config.mmap);
        ask(init::POSIX_LOCKS | init::FLOCK_LOCKS, config.shared_locks);
        ask(init::SECURITY_CTX, config.xattrs.as_ref().is_some_and(Xattrs::renames));
        let needs = init::POSIX_ACL | init::SETXATTR_EXT;
        match config.posix_acl {
            Negotiation::Never => {}
            Negotiation::Auto if capable & needs != needs => {}
            Negotiation::Always if capable & needs != needs => {
                tracing::error!("the guest's kernel has no POSIX ACLs, which host.posix_acl = \"always\" needs");
                return Err(errno(libc::EPROTO));
            }
            _ => ask(needs, true),
        }
        ask(init::SETXATTR_EXT, config.xattrs.is_some());
        ask(SKIPS_OPEN, self.may_skip_open(capable));
        self.agreed.store(capable & wanted, Relaxed);
        self.coherence.set_by_number(self.skips_open());
        Ok(wanted)
    }

    /// Whether all is right for a guest whose kernel does not ask to open files and directories. Its kernel then checks
    /// permissions alone, so this process must not have fewer rights than that thinks; and nobody but the time of change
    /// tells of new data that no lease covers, so the time must change with each write.
    fn may_skip_open(&self, capable: u64) -> bool {
        let config = &self.config;
        // Only with `default_permissions` does a kernel offer idmapped mounts: without it, this process must be asked.
        let kernel = SKIPS_OPEN | init::ALLOW_IDMAP;
        let others = config.cache == Cache::Coherent && config.exact_times;
        capable & kernel == kernel
            && (config.cache == Cache::Always || others)
            && self.is_local
            && credentials::opens_all()
            && !(config.ask_open
                || config.shared_locks
                || config.direct_io
                || config.readonly
                || config.keep_noatime
                || config.writeback)
    }

    /// Whether the guest's kernel may leave OPEN and OPENDIR out.
    pub(super) fn skips_open(&self) -> bool {
        self.agreed(SKIPS_OPEN)
    }

    /// Whether the guest's kernel is to be told so: from then on it does.
    pub(super) fn skips_opening_now(&self) -> bool {
        self.skips_open() && (self.config.cache == Cache::Always || self.coherence.listens())
    }

    fn destroy(&self) {
        self.by_number.clear();
        self.coherence.clear();
        self.locks.clear();
        self.handles.clear();
        self.inodes.clear();
        self.agreed.store(0, Relaxed);
    }
}

/// A device of Linux's `new_encode_dev`, for this machine's mknod(2).
pub(super) fn decode_device(device: u32) -> u64 {
    libc::makedev(device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xfff00)
}

/// Whether there is no room left.
fn is_full(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

macro_rules! delegate {
    ($($name:ident($ctx:ident $(, $arg:ident: $type:ty)*) -> $result:ty = $call:expr;)*) => {
        $(fn $name(&self, $ctx: &Context $(, $arg: $type)*) -> io::Result<$result> {
            let _ = $ctx;
            #[allow(unused_mut)] // Only some change what they have.
            let mut call = $call;
            match call(self) {
                Err(e) if is_full(&e) && self.inodes.reclaim(!self.skips_open()) => call(self),
                other => other,
            }
        })*
    };
}

type This = Passthrough;

impl FileSystem for Passthrough {
    fn prepare_thread(&self) {
        if let Err(e) = credentials::prepare(self.descriptors.as_fd()) {
            tracing::error!("a thread cannot serve: no working directory of its own: {e}");
        }
    }

    fn init(&self, capable: u64) -> io::Result<u64> {
        Passthrough::init(self, capable)
    }

    fn destroy(&self) {
        Passthrough::destroy(self);
    }

    fn interrupt(&self, unique: u64) {
        if self.config.shared_locks {
            self.locks.interrupt(unique);
        }
    }

    fn forget(&self, node: u64, nlookup: u64) {
        Passthrough::forget(self, node, nlookup);
    }

    fn changes(&self, sink: &mut ChangeSink<'_>) -> io::Result<()> {
        self.coherence.changes(sink)
    }

    fn dropped(&self, node: u64) {
        self.coherence.dropped(node);
    }

    delegate! {
        lookup(_ctx, node: u64, name: &CStr) -> EntryOut = |s: &This| s.lookup(node, name);
        getattr(_ctx, node: u64, fh: Option<u64>) -> AttrOut =
            |s: &This| s.stat_of(node, fh, |inode, st, fd| s.attr_out(inode, st, fd));
        statx(_ctx, node: u64, fh: Option<u64>, _flags: u32, _mask: u32) -> StatxOut =
            |s: &This| s.stat_of(node, fh, |inode, st, fd| s.statx_out(inode, st, fd));
        setattr(_ctx, node: u64, set: &SetattrIn) -> AttrOut = |s: &This| s.setattr(node, set);
        readlink(_ctx, node: u64) -> Vec<u8> = |s: &This| s.readlink(node);
        symlink(ctx, node: u64, name: &CStr, target: &CStr, extensions: &Extensions) -> EntryOut =
            |s: &This| s.symlink(ctx, node, name, target, extensions);
        mknod(ctx, node: u64, name: &CStr, args: &MknodIn, extensions: &Extensions) -> EntryOut =
            |s: &This| s.mknod(ctx, node, name, args, extensions);
        mkdir(ctx, node: u64, name: &CStr, args: &MkdirIn, extensions: &Extensions) -> EntryOut =
            |s: &This| s.mkdir(ctx, node, name, args, extensions);
        unlink(_ctx, node: u64, name: &CStr) -> () = |s: &This| s.unlink(node, name, 0);
        rmdir(_ctx, node: u64, name: &CStr) -> () = |s: &This| s.unlink(node, name, libc::AT_REMOVEDIR);
        rename(ctx, node: u64, name: &CStr, to: u64, new: &CStr, flags: u32) -> () =
            |s: &This| s.rename(ctx, node, name, to, new, flags);
        link(_ctx, old: u64, node: u64, name: &CStr) -> EntryOut = |s: &This| s.link(old, node, name);
        open(ctx, node: u64, args: &OpenIn) -> OpenOut = |s: &This| s.open(ctx, node, args);
        create(ctx, node: u64, name: &CStr, args: &CreateIn, extensions: &Extensions) -> CreateOut =
            |s: &This| s.create(ctx, node, name, args, extensions);
        tmpfile(ctx, node: u64, args: &CreateIn, extensions: &Extensions) -> CreateOut =
            |s: &This| s.tmpfile(ctx, node, args, extensions);
        read(_ctx, node: u64, args: &ReadIn, out: &ZeroCopyBuf<'_>) -> usize = |s: &This| s.read(node, args, out);
        write(_ctx, node: u64, args: &WriteIn, data: &ZeroCopyBuf<'_>) -> usize = |s: &This| s.write(node, args, data);
        flush(_ctx, node: u64, args: &FlushIn) -> () = |s: &This| s.flush(node, args);
        release(_ctx, node: u64, args: &ReleaseIn) -> () = |s: &This| s.release(node, args);
        fsync(_ctx, node: u64, fh: u64, data_only: bool) -> () = |s: &This| s.fsync(node, fh, data_only);
        opendir(_ctx, node: u64, _args: &OpenIn) -> OpenOut = |s: &This| s.opendir(node);
        readdir(_ctx, node: u64, args: &ReadIn, plus: bool, sink: &mut DirSink<'_>) -> () =
            |s: &This| s.readdir(node, args, plus, sink);
        releasedir(_ctx, node: u64, args: &ReleaseIn) -> () = |s: &This| s.release(node, args);
        fsyncdir(_ctx, node: u64, fh: u64, data_only: bool) -> () = |s: &This| s.fsync(node, fh, data_only);
        syncfs(_ctx, node: u64) -> () = |s: &This| s.syncfs(node);
        statfs(_ctx, node: u64) -> Kstatfs = |s: &This| s.statfs(node);
        setxattr(ctx, node: u64, name: &CStr, value: &[u8], flags: u32, extra: u32) -> () =
            |s: &This| s.setxattr(ctx, node, name, value, flags, extra);
        getxattr(_ctx, node: u64, name: &CStr, size: u32) -> XattrReply = |s: &This| s.getxattr(node, name, size);
        listxattr(_ctx, node: u64, size: u32) -> XattrReply = |s: &This| s.listxattr(node, size);
        removexattr(_ctx, node: u64, name: &CStr) -> () = |s: &This| s.removexattr(node, name);
        access(ctx, node: u64, mask: u32) -> () = |s: &This| s.access(ctx, node, mask);
        fallocate(ctx, node: u64, args: &FallocateIn) -> () = |s: &This| s.fallocate(ctx, node, args);
        lseek(_ctx, node: u64, args: &LseekIn) -> u64 = |s: &This| s.lseek(node, args);
        copy_file_range(ctx, node: u64, args: &CopyFileRangeIn) -> u64 = |s: &This| s.copy_file_range(ctx, node, args);
        getlk(_ctx, node: u64, args: &LkIn) -> FileLock = |s: &This| s.getlk(node, args);
        setlk(ctx, node: u64, args: &LkIn, wait: bool) -> () = |s: &This| s.setlk(ctx, node, args, wait);
        ioctl(_ctx, node: u64, args: &IoctlIn, data: &[u8]) -> Vec<u8> = |s: &This| s.ioctl(node, args, data);
    }
}
