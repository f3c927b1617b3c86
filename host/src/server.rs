//! FUSE requests to calls on a virtiofsd file system: one line per opcode.

use crate::extensions;
pub use crate::helper::Helper;
use crate::in_place::InPlace;
use crate::patience::Patience;
use crate::request::{einval, take_name, take_text, Request};
use crate::shared::Shared;
use parking_lot::Mutex;
use std::io;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tunnelfs_ring::{OP_COPIED, OP_NOOP};
use virtiofsd::filesystem::{
    DirEntry, DirectoryIterator, Entry, Extensions, FileSystem, GetxattrReply, ListxattrReply,
};
use virtiofsd::fuse::*;
use vm_memory::ByteValued;

/// Bytes that the largest fixed-size reply needs (CREATE: an entry and an open file).
pub const MAX_FIXED_REPLY: usize = 160;

/// What a request came to.
pub struct Reply {
    /// 0 or a negative errno.
    pub error: i32,
    fixed: [u8; MAX_FIXED_REPLY],
    fixed_len: usize,
    /// Reply bytes that already lie in the guest's buffer.
    pub in_place: usize,
}

impl Reply {
    fn ok() -> Self {
        Reply { error: 0, fixed: [0; MAX_FIXED_REPLY], fixed_len: 0, in_place: 0 }
    }

    fn with<T: ByteValued>(value: T) -> Self {
        let mut reply = Reply::ok();
        reply.append(value);
        reply
    }

    fn append<T: ByteValued>(&mut self, value: T) {
        let end = self.fixed_len + size_of::<T>();
        self.fixed[self.fixed_len..end].copy_from_slice(value.as_slice());
        self.fixed_len = end;
    }

    fn in_place(bytes: usize) -> Self {
        Reply { in_place: bytes, ..Reply::ok() }
    }

    /// A negative answer.
    pub fn error(e: &io::Error) -> Self {
        Reply { error: -e.raw_os_error().unwrap_or(libc::EIO), ..Reply::ok() }
    }

    /// The reply's structure, private bytes that are still to be delivered.
    pub fn fixed(&self) -> &[u8] {
        &self.fixed[..self.fixed_len]
    }
}

/// How a request came out of [`Server::handle`].
pub enum Outcome {
    /// Deliver this.
    Reply(Reply),
    /// The operation has no reply (FORGET).
    NoReply,
    /// It would block: call again on a pool thread, as [`Caller::Patient`].
    WouldBlock,
}

/// Who has a request served.
#[derive(Clone, Copy)]
pub enum Caller<'a> {
    /// A queue's own thread, which must not be held up; with a second one for large READs.
    Queue(Option<&'a Helper>),
    /// A thread that may be held up.
    Patient,
}

impl Caller<'_> {
    /// Whether it may be held up. All may: another thread takes the queue of a request that is late.
    pub fn may_block(self) -> bool {
        true
    }
}

thread_local! {
    /// The file system changes directory for extended attributes and sets the
    /// umask for ACLs: each thread that serves has its own, since its first request.
    static OWN_DIRECTORY: () = nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)
        .unwrap_or_else(|e| tracing::warn!("threads share their working directory: {e}"));
}

/// The request server over one file system, shared by all queues.
pub struct Server<F> {
    fs: F,
    /// Whether files may be opened with O_DIRECT.
    direct_io: bool,
    options: AtomicU64,
    /// INIT and DESTROY come one at a time: two at once would register the root twice.
    life: Mutex<()>,
    patience: Patience,
    /// Payload bytes that any transport of this server has copied.
    pub copied: AtomicU64,
}

impl<F: FileSystem + Sync> Server<F> {
    /// A server over `fs`.
    pub fn new(fs: F, direct_io: bool) -> Self {
        let (options, copied) = (AtomicU64::new(0), AtomicU64::new(0));
        Server { fs, direct_io, options, life: Mutex::new(()), patience: Patience::new(), copied }
    }

    /// Forgets all that a guest had open; called when one has gone.
    pub fn reset(&self) {
        let _alone = self.life.lock();
        self.fs.destroy();
        self.options.store(0, Ordering::Relaxed);
    }

    /// Serves one request: `head` is a private copy of its first bytes,
    /// `payload` the rest, `out` where reply data may go.
    pub fn handle(&self, head: &[u8], payload: Shared<'_>, out: Shared<'_>, caller: Caller<'_>) -> Outcome {
        OWN_DIRECTORY.with(|()| ());
        let mut request = match Request::new(head, payload) {
            Ok(request) => request,
            Err(e) => return Outcome::Reply(Reply::error(&e)),
        };
        // A bug below must cost the guest this request, not the host a thread.
        match catch_unwind(AssertUnwindSafe(|| self.dispatch(&mut request, out, caller))) {
            Ok(Ok(Some(reply))) => Outcome::Reply(reply),
            Ok(Ok(None)) => Outcome::NoReply,
            Ok(Err(e)) if e.kind() == io::ErrorKind::WouldBlock && !caller.may_block() => Outcome::WouldBlock,
            Ok(Err(e)) => Outcome::Reply(Reply::error(&e)),
            Err(_) => Outcome::Reply(Reply::error(&io::Error::from_raw_os_error(libc::EIO))),
        }
    }

    fn dispatch(&self, r: &mut Request<'_>, out: Shared<'_>, caller: Caller<'_>) -> io::Result<Option<Reply>> {
        let number = r.header.opcode;
        match number {
            OP_NOOP => return Ok(Some(Reply::ok())),
            OP_COPIED => return Ok(Some(Reply::with(self.copied.load(Ordering::Relaxed)))),
            _ => {}
        }
        let opcode = Opcode::try_from(number).map_err(|_| io::Error::from_raw_os_error(libc::ENOSYS))?;
        if !caller.may_block() && sleeps(opcode) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let reply = match opcode {
            Opcode::Lookup => self.lookup(r),
            Opcode::Forget => return self.forget(r).map(|()| None),
            Opcode::BatchForget => return self.batch_forget(r).map(|()| None),
            Opcode::Interrupt => return Ok(None),
            Opcode::Getattr => self.getattr(r),
            Opcode::Setattr => self.setattr(r),
            Opcode::Readlink => self.readlink(r, out),
            Opcode::Symlink => self.symlink(r),
            Opcode::Mknod => self.mknod(r),
            Opcode::Mkdir => self.mkdir(r),
            Opcode::Unlink => self.unlink(r),
            Opcode::Rmdir => self.rmdir(r),
            Opcode::Rename => self.rename(r),
            Opcode::Rename2 => self.rename2(r),
            Opcode::Link => self.link(r),
            Opcode::Open => self.open(r),
            Opcode::Create => self.create(r),
            Opcode::Read => self.read(r, out, caller),
            Opcode::Write => self.write(r, caller),
            Opcode::Statfs => {
                self.fs.statfs(r.context(), r.header.nodeid.into()).map(|st| Reply::with(Kstatfs::from(st)))
            }
            Opcode::Release => self.release(r),
            Opcode::Fsync => self.fsync(r),
            Opcode::Fsyncdir => self.fsyncdir(r),
            Opcode::Syncfs => self.fs.syncfs(r.context(), r.header.nodeid.into()).map(done),
            Opcode::Setxattr => self.setxattr(r),
            Opcode::Getxattr => self.getxattr(r, out),
            Opcode::Listxattr => self.listxattr(r, out),
            Opcode::Removexattr => self.removexattr(r),
            Opcode::Flush => self.flush(r),
            Opcode::Init => self.init(r),
            Opcode::Destroy => {
                self.reset();
                Ok(Reply::ok())
            }
            Opcode::Opendir => self.opendir(r),
            Opcode::Readdir => self.readdir(r, out, false),
            Opcode::Readdirplus => self.readdir(r, out, true),
            Opcode::Releasedir => self.releasedir(r),
            Opcode::Access => self.access(r),
            Opcode::Fallocate => self.fallocate(r),
            Opcode::Lseek => self.lseek(r),
            Opcode::CopyFileRange => self.copy_file_range(r),
            _ => Err(io::Error::from_raw_os_error(libc::ENOSYS)),
        };
        reply.map(Some)
    }

    fn option(&self, wanted: FsOptions) -> bool {
        FsOptions::from_bits_truncate(self.options.load(Ordering::Relaxed)).contains(wanted)
    }

    /// What follows the names of a request that creates something.
    fn extensions(&self, bytes: &[u8]) -> io::Result<Extensions> {
        if self.option(FsOptions::CREATE_SUPP_GROUP) {
            extensions::decode(bytes)
        } else {
            Ok(Extensions::default())
        }
    }

    fn lookup(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let name = r.rest()?;
        self.fs.lookup(r.context(), r.header.nodeid.into(), take_name(&mut &name[..])?).map(entry)
    }

    fn forget(&self, r: &mut Request<'_>) -> io::Result<()> {
        let ForgetIn { nlookup } = r.object()?;
        self.fs.forget(r.context(), r.header.nodeid.into(), nlookup);
        Ok(())
    }

    fn batch_forget(&self, r: &mut Request<'_>) -> io::Result<()> {
        let BatchForgetIn { count, .. } = r.object()?;
        // Ends with the request's bytes, whatever the count says.
        for _ in 0..count {
            let one: ForgetOne = r.object()?;
            self.fs.forget(r.context(), one.nodeid.into(), one.nlookup);
        }
        Ok(())
    }

    fn getattr(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let GetattrIn { flags, fh, .. } = r.object()?;
        let handle = (flags & GETATTR_FH != 0).then(|| fh.into());
        self.fs.getattr(r.context(), r.header.nodeid.into(), handle).map(attributes)
    }

    fn setattr(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let attr: SetattrIn = r.object()?;
        let handle = (attr.valid & FATTR_FH != 0).then(|| attr.fh.into());
        let valid = SetattrValid::from_bits_truncate(attr.valid);
        self.fs.setattr(r.context(), r.header.nodeid.into(), attr, handle, valid).map(attributes)
    }

    fn readlink(&self, r: &mut Request<'_>, out: Shared<'_>) -> io::Result<Reply> {
        bytes(out, &self.fs.readlink(r.context(), r.header.nodeid.into())?)
    }

    fn symlink(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let rest = r.rest()?;
        let mut names = &rest[..];
        let (name, target) = (take_name(&mut names)?, take_text(&mut names)?);
        self.fs.symlink(r.context(), target, r.header.nodeid.into(), name, self.extensions(names)?).map(entry)
    }

    fn mknod(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let MknodIn { mode, rdev, umask, .. } = r.object()?;
        let rest = r.rest()?;
        let mut rest = &rest[..];
        let name = take_name(&mut rest)?;
        let parent = r.header.nodeid.into();
        self.fs.mknod(r.context(), parent, name, mode, rdev, umask, self.extensions(rest)?).map(entry)
    }

    fn mkdir(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let MkdirIn { mode, umask } = r.object()?;
        let rest = r.rest()?;
        let mut rest = &rest[..];
        let name = take_name(&mut rest)?;
        self.fs.mkdir(r.context(), r.header.nodeid.into(), name, mode, umask, self.extensions(rest)?).map(entry)
    }

    fn unlink(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let name = r.rest()?;
        self.fs.unlink(r.context(), r.header.nodeid.into(), take_name(&mut &name[..])?).map(done)
    }

    fn rmdir(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let name = r.rest()?;
        self.fs.rmdir(r.context(), r.header.nodeid.into(), take_name(&mut &name[..])?).map(done)
    }

    fn rename(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let RenameIn { newdir } = r.object()?;
        self.rename_to(r, newdir, 0)
    }

    fn rename2(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let Rename2In { newdir, flags, .. } = r.object()?;
        self.rename_to(r, newdir, flags & (libc::RENAME_EXCHANGE | libc::RENAME_NOREPLACE | libc::RENAME_WHITEOUT))
    }

    fn rename_to(&self, r: &mut Request<'_>, newdir: u64, flags: u32) -> io::Result<Reply> {
        let rest = r.rest()?;
        let mut names = &rest[..];
        let (old, new) = (take_name(&mut names)?, take_name(&mut names)?);
        self.fs.rename(r.context(), r.header.nodeid.into(), old, newdir.into(), new, flags).map(done)
    }

    fn link(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let LinkIn { oldnodeid } = r.object()?;
        let name = r.rest()?;
        let name = take_name(&mut &name[..])?;
        self.fs.link(r.context(), oldnodeid.into(), r.header.nodeid.into(), name).map(entry)
    }

    fn open(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let OpenIn { flags, open_flags, .. } = r.object()?;
        let kill_priv = open_flags & OPEN_KILL_SUIDGID != 0;
        self.fs.open(r.context(), r.header.nodeid.into(), kill_priv, flags).map(opened)
    }

    fn create(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let CreateIn { mut flags, mode, umask, open_flags, .. } = r.object()?;
        // PassthroughFs sees to it when it opens, not when it creates.
        if !self.direct_io {
            flags &= !(libc::O_DIRECT as u32);
        }
        let rest = r.rest()?;
        let mut rest = &rest[..];
        let name = take_name(&mut rest)?;
        let kill_priv = open_flags & OPEN_KILL_SUIDGID != 0;
        let parent = r.header.nodeid.into();
        let (made, handle, opts) =
            self.fs.create(r.context(), parent, name, mode, kill_priv, flags, umask, self.extensions(rest)?)?;
        let mut reply = entry(made);
        reply.append(open_out(handle, opts));
        Ok(reply)
    }

    fn read(&self, r: &mut Request<'_>, out: Shared<'_>, caller: Caller<'_>) -> io::Result<Reply> {
        let ReadIn { fh, offset, size, read_flags, lock_owner, flags, .. } = r.object()?;
        let owner = (read_flags & READ_LOCKOWNER != 0).then_some(lock_owner);
        let patience = &self.patience;
        let into = InPlace { shared: out, offset: 0, len: out.len(), handle: fh, caller, patience };
        self.fs
            .read(r.context(), r.header.nodeid.into(), fh.into(), into, size, offset, owner, flags)
            .map(Reply::in_place)
    }

    fn write(&self, r: &mut Request<'_>, caller: Caller<'_>) -> io::Result<Reply> {
        let WriteIn { fh, offset, size, write_flags, lock_owner, flags, .. } = r.object()?;
        let (shared, start, len) = r.data()?;
        if size as usize > len {
            return Err(einval());
        }
        let owner = (write_flags & WRITE_LOCKOWNER != 0).then_some(lock_owner);
        let patience = &self.patience;
        let from = InPlace { shared, offset: start, len, handle: fh, caller, patience };
        let (cached, kill_priv) = (write_flags & WRITE_CACHE != 0, write_flags & WRITE_KILL_PRIV != 0);
        let (ctx, inode) = (r.context(), r.header.nodeid.into());
        let n = self.fs.write(ctx, inode, fh.into(), from, size, offset, owner, cached, kill_priv, flags)?;
        Ok(Reply::with(WriteOut { size: n as u32, ..Default::default() }))
    }

    fn release(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let ReleaseIn { fh, flags, release_flags, lock_owner } = r.object()?;
        let (flush, unlock) = (release_flags & RELEASE_FLUSH != 0, release_flags & RELEASE_FLOCK_UNLOCK != 0);
        let owner = (flush || unlock).then_some(lock_owner);
        self.fs.release(r.context(), r.header.nodeid.into(), flags, fh.into(), flush, unlock, owner).map(done)
    }

    fn fsync(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let FsyncIn { fh, fsync_flags, .. } = r.object()?;
        self.fs.fsync(r.context(), r.header.nodeid.into(), fsync_flags & 1 != 0, fh.into()).map(done)
    }

    fn fsyncdir(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let FsyncIn { fh, fsync_flags, .. } = r.object()?;
        self.fs.fsyncdir(r.context(), r.header.nodeid.into(), fsync_flags & 1 != 0, fh.into()).map(done)
    }

    fn flush(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let FlushIn { fh, lock_owner, .. } = r.object()?;
        self.fs.flush(r.context(), r.header.nodeid.into(), fh.into(), lock_owner).map(done)
    }

    fn setxattr(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let SetxattrInCompat { size, flags } = r.object()?;
        let mut extra = 0;
        if self.option(FsOptions::SETXATTR_EXT) {
            let [setxattr_flags, _padding] = r.object::<[u32; 2]>()?;
            extra = setxattr_flags;
        }
        let rest = r.rest()?;
        let mut value = &rest[..];
        let name = take_text(&mut value)?;
        if value.len() != size as usize {
            return Err(einval());
        }
        let extra = SetxattrFlags::from_bits_truncate(extra);
        self.fs.setxattr(r.context(), r.header.nodeid.into(), name, value, flags, extra).map(done)
    }

    fn getxattr(&self, r: &mut Request<'_>, out: Shared<'_>) -> io::Result<Reply> {
        let GetxattrIn { size, .. } = r.object()?;
        let name = r.rest()?;
        let size = size.min(reply_room(out));
        match self.fs.getxattr(r.context(), r.header.nodeid.into(), take_text(&mut &name[..])?, size)? {
            GetxattrReply::Value(value) => bytes(out, &value),
            GetxattrReply::Count(size) => Ok(Reply::with(GetxattrOut { size, ..Default::default() })),
        }
    }

    fn listxattr(&self, r: &mut Request<'_>, out: Shared<'_>) -> io::Result<Reply> {
        let GetxattrIn { size, .. } = r.object()?;
        match self.fs.listxattr(r.context(), r.header.nodeid.into(), size.min(reply_room(out)))? {
            ListxattrReply::Names(names) => bytes(out, &names),
            ListxattrReply::Count(size) => Ok(Reply::with(GetxattrOut { size, ..Default::default() })),
        }
    }

    fn removexattr(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let name = r.rest()?;
        self.fs.removexattr(r.context(), r.header.nodeid.into(), take_text(&mut &name[..])?).map(done)
    }

    fn init(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let InitInCompat { major, minor, max_readahead, flags } = r.object()?;
        if major < KERNEL_VERSION || (major == KERNEL_VERSION && minor < MIN_KERNEL_MINOR_VERSION) {
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        if major > KERNEL_VERSION {
            return Ok(Reply::with(InitOut {
                major: KERNEL_VERSION,
                minor: KERNEL_MINOR_VERSION,
                ..Default::default()
            }));
        }
        let extended = FsOptions::from_bits_truncate(flags.into()).contains(FsOptions::INIT_EXT);
        let flags2 = if extended { r.object::<InitInExt>()?.flags2 } else { 0 };
        let capable = FsOptions::from_bits_truncate(u64::from(flags2) << 32 | u64::from(flags));
        let ours = FsOptions::ASYNC_READ
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::BIG_WRITES
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::ASYNC_DIO
            | FsOptions::MAX_PAGES
            | FsOptions::SUBMOUNTS
            | FsOptions::INIT_EXT
            | FsOptions::CREATE_SUPP_GROUP;
        // ATOMIC_O_TRUNC is not among them: by it guests' kernels have a running program's file
        // truncated before they find out that it must not be (ETXTBSY).
        // Not decoded here: do not accept what would bring it.
        let never = FsOptions::SECURITY_CTX;
        let _alone = self.life.lock();
        let enabled = (capable & (self.fs.init(capable)? | ours) & !never).bits();
        self.options.store(enabled, Ordering::Relaxed);
        Ok(Reply::with(InitOut {
            major: KERNEL_VERSION,
            minor: KERNEL_MINOR_VERSION,
            max_readahead,
            flags: enabled as u32,
            flags2: (enabled >> 32) as u32,
            max_background: u16::MAX,
            congestion_threshold: u16::MAX / 4 * 3,
            max_write: MAX_WRITE,
            max_pages: (MAX_WRITE / 4096) as u16,
            time_gran: 1,
            ..Default::default()
        }))
    }

    fn opendir(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let OpenIn { flags, .. } = r.object()?;
        self.fs.opendir(r.context(), r.header.nodeid.into(), flags).map(opened)
    }

    fn readdir(&self, r: &mut Request<'_>, out: Shared<'_>, plus: bool) -> io::Result<Reply> {
        let ReadIn { fh, offset, size, .. } = r.object()?;
        let size = size.min(reply_room(out));
        let room = size as usize;
        let mut entries = self.fs.readdir(r.context(), r.header.nodeid.into(), fh.into(), size, offset)?;
        let mut used = 0;
        while let Some(dirent) = entries.next() {
            let known = plus.then(|| self.look_up_entry(r, &dirent)).transpose();
            let added = known.and_then(|known| {
                let inode = known.as_ref().map_or(0, |e| e.inode);
                let added = add_dirent(out, used, room, &dirent, known);
                if inode != 0 && !matches!(added, Ok(1..)) {
                    self.fs.forget(r.context(), inode.into(), 1);
                }
                added
            });
            match added {
                Ok(0) => break,
                Ok(n) => used += n,
                Err(e) if used == 0 => return Err(e),
                Err(_) => break,
            }
        }
        Ok(Reply::in_place(used))
    }

    fn look_up_entry(&self, r: &Request<'_>, dirent: &DirEntry<'_>) -> io::Result<Entry> {
        if matches!(dirent.name.to_bytes(), b"." | b"..") {
            let attr = Attr { ino: dirent.ino, mode: dirent.type_ << 12, ..Default::default() };
            let zero = Duration::ZERO;
            return Ok(Entry { inode: 0, generation: 0, attr, attr_timeout: zero, entry_timeout: zero });
        }
        self.fs.lookup(r.context(), r.header.nodeid.into(), dirent.name)
    }

    fn releasedir(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let ReleaseIn { fh, flags, .. } = r.object()?;
        self.fs.releasedir(r.context(), r.header.nodeid.into(), flags, fh.into()).map(done)
    }

    fn access(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let AccessIn { mask, .. } = r.object()?;
        self.fs.access(r.context(), r.header.nodeid.into(), mask).map(done)
    }

    fn fallocate(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let FallocateIn { fh, offset, length, mode, .. } = r.object()?;
        self.fs.fallocate(r.context(), r.header.nodeid.into(), fh.into(), mode, offset, length).map(done)
    }

    fn lseek(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let LseekIn { fh, offset, whence, .. } = r.object()?;
        let found = self.fs.lseek(r.context(), r.header.nodeid.into(), fh.into(), offset, whence)?;
        Ok(Reply::with(LseekOut { offset: found }))
    }

    fn copy_file_range(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let CopyfilerangeIn { fh_in, off_in, nodeid_out, fh_out, off_out, len, flags, .. } = r.object()?;
        let (ctx, from, to) = (r.context(), r.header.nodeid.into(), nodeid_out.into());
        let n = self.fs.copyfilerange(
            ctx,
            from,
            fh_in.into(),
            off_in,
            to,
            fh_out.into(),
            off_out,
            len.min(MAX_COPY),
            flags,
        )?;
        Ok(Reply::with(WriteOut { size: n as u32, ..Default::default() }))
    }
}

/// Bytes of the largest WRITE that INIT offers; the guest takes as much of it as its slots and its kernel carry.
const MAX_WRITE: u32 = tunnelfs_ring::MAX_SLOT_SIZE;

/// Most bytes of one COPY_FILE_RANGE: its reply has 32 bits for them. Whole pages, as the kernel has it for one write(2).
const MAX_COPY: u64 = 0x7fff_f000;

/// Operations that sleep on a device by their nature.
fn sleeps(opcode: Opcode) -> bool {
    use Opcode::*;
    matches!(opcode, Fsync | Fsyncdir | Syncfs | Fallocate | CopyFileRange)
}

fn done((): ()) -> Reply {
    Reply::ok()
}

fn entry(entry: Entry) -> Reply {
    Reply::with(EntryOut::from(entry))
}

fn attributes((attr, timeout): (Attr, Duration)) -> Reply {
    Reply::with(AttrOut { attr_valid: timeout.as_secs(), attr_valid_nsec: timeout.subsec_nanos(), dummy: 0, attr })
}

fn open_out<H: Into<u64>>(handle: Option<H>, opts: OpenOptions) -> OpenOut {
    OpenOut { fh: handle.map_or(0, Into::into), open_flags: opts.bits(), ..Default::default() }
}

fn opened<H: Into<u64>>((handle, opts): (Option<H>, OpenOptions)) -> Reply {
    Reply::with(open_out(handle, opts))
}

/// Bytes of the reply's buffers that the file system may be asked to fill: it makes a private buffer as large.
fn reply_room(out: Shared<'_>) -> u32 {
    out.len().min(MAX_WRITE as usize) as u32
}

fn bytes(out: Shared<'_>, data: &[u8]) -> io::Result<Reply> {
    out.write(0, data).map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))?;
    Ok(Reply::in_place(data.len()))
}

/// Writes one directory entry at `used`; 0 when there is no room for it.
fn add_dirent(out: Shared<'_>, used: usize, room: usize, d: &DirEntry<'_>, known: Option<Entry>) -> io::Result<usize> {
    let name = d.name.to_bytes();
    let mut bytes = Vec::with_capacity(size_of::<EntryOut>() + size_of::<Dirent>() + name.len() + 8);
    if let Some(known) = known {
        bytes.extend_from_slice(EntryOut::from(known).as_slice());
    }
    let dirent = Dirent { ino: d.ino, off: d.offset, namelen: name.len() as u32, type_: d.type_ };
    bytes.extend_from_slice(dirent.as_slice());
    bytes.extend_from_slice(name);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    if used + bytes.len() > room {
        return Ok(0);
    }
    out.write(used, &bytes)?;
    Ok(bytes.len())
}
