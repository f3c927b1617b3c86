//! FUSE requests to calls on a file system: one line per opcode.

use crate::copy_helper::CopyHelper;
use crate::extensions;
use crate::fs::{Change, DirEntry, Extensions, FileSystem, XattrReply, ZeroCopyBuf};
use crate::guest_buf::{einval, wait_apart, GuestBuf};
use crate::handler::{Handler, Outcome, Reply};
use crate::request::{parse_cstr, parse_name, Request};
use parking_lot::Mutex;
use std::io;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering};
use tunnelfs_fuse_abi::changes::{push_record, ChangeRecord, OP_CHANGES, OP_DROPPED};
use tunnelfs_fuse_abi::control::{OP_COPIED, OP_NOOP};
use tunnelfs_fuse_abi::flags::{self, init};
use tunnelfs_fuse_abi::*;
use zerocopy::IntoBytes;

/// The first minor version whose messages have today's form.
const MIN_MINOR: u32 = 31;
/// Bytes of a listing that there is room for at once.
const MOST_ENTRIES: usize = 64 << 10;
/// Bytes of the largest WRITE that INIT offers; the guest takes as much of it as its slots and its kernel carry.
const MAX_WRITE: u32 = tunnelfs_ring::MAX_SLOT_SIZE;

/// The request server over one file system, shared by all queues of one guest.
pub struct Server<F> {
    fs: F,
    options: AtomicU64,
    /// INIT and DESTROY come one at a time.
    init_lock: Mutex<()>,
    /// One request at a time waits for changes.
    one_waits: Mutex<()>,
    /// Payload bytes that any transport of this server has copied.
    pub copied: AtomicU64,
}

impl<F: FileSystem> Handler for Server<F> {
    fn handle(&self, head: &[u8], payload: GuestBuf<'_>, out: GuestBuf<'_>, helper: Option<&CopyHelper>) -> Outcome {
        self.fs.prepare_thread();
        let mut request = match Request::new(head, payload) {
            Ok(request) => request,
            Err(e) => return Outcome::Reply(Reply::error(&e)),
        };
        // A bug below must cost the guest this request, not the host a thread.
        match catch_unwind(AssertUnwindSafe(|| self.dispatch(&mut request, out, helper))) {
            Ok(Ok(Some(reply))) => Outcome::Reply(reply),
            Ok(Ok(None)) => Outcome::NoReply,
            Ok(Err(e)) => Outcome::Reply(Reply::error(&e)),
            Err(_) => Outcome::Reply(Reply::error(&io::Error::from_raw_os_error(libc::EIO))),
        }
    }

    fn reset(&self) {
        let _alone = self.init_lock.lock();
        self.fs.destroy();
        self.options.store(0, Ordering::Relaxed);
    }

    fn count_copied(&self, bytes: u64) {
        self.copied.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl<F: FileSystem> Server<F> {
    /// A server over `fs`.
    pub fn new(fs: F) -> Self {
        let (options, copied) = (AtomicU64::new(0), AtomicU64::new(0));
        Server { fs, options, init_lock: Mutex::new(()), one_waits: Mutex::new(()), copied }
    }

    fn dispatch(
        &self,
        r: &mut Request<'_>,
        out: GuestBuf<'_>,
        helper: Option<&CopyHelper>,
    ) -> io::Result<Option<Reply>> {
        let number = r.header.opcode;
        match number {
            OP_NOOP => return Ok(Some(Reply::ok())),
            OP_CHANGES => return self.changes(out).map(Some),
            OP_DROPPED => return self.dropped(r).map(Some),
            OP_COPIED => return Ok(Some(Reply::with(&self.copied.load(Ordering::Relaxed)))),
            _ => {}
        }
        let opcode = Opcode::new(number).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSYS))?;
        let (fs, ctx, node) = (&self.fs, &r.context(), r.header.nodeid);
        let reply = match opcode {
            Opcode::Lookup => self.lookup(r),
            Opcode::Forget => return self.forget(r).map(|()| None),
            Opcode::BatchForget => return self.batch_forget(r).map(|()| None),
            Opcode::Interrupt => return self.interrupt(r).map(|()| None),
            Opcode::Getattr => self.getattr(r),
            Opcode::Statx => self.statx(r, out),
            Opcode::Setattr => fs.setattr(ctx, node, &r.read_obj()?).map(|a| Reply::with(&a)),
            Opcode::Readlink => bytes(out, &fs.readlink(ctx, node)?),
            Opcode::Symlink => self.symlink(r),
            Opcode::Mknod => self.mknod(r),
            Opcode::Mkdir => self.mkdir(r),
            Opcode::Unlink => fs.unlink(ctx, node, parse_name(&mut &r.read_rest()?[..])?).map(done),
            Opcode::Rmdir => fs.rmdir(ctx, node, parse_name(&mut &r.read_rest()?[..])?).map(done),
            Opcode::Rename => self.rename(r),
            Opcode::Rename2 => self.rename2(r),
            Opcode::Link => self.link(r),
            Opcode::Open => fs.open(ctx, node, &r.read_obj()?).map(|o| Reply::with(&o)),
            Opcode::Create => self.create(r),
            Opcode::Tmpfile => self.tmpfile(r),
            Opcode::Read => self.read(r, out, helper),
            Opcode::Write => self.write(r),
            Opcode::Statfs => fs.statfs(ctx, node).map(|st| Reply::with(&st)),
            Opcode::Flush => fs.flush(ctx, node, &r.read_obj()?).map(done),
            Opcode::Release => fs.release(ctx, node, &r.read_obj()?).map(done),
            Opcode::Fsync => self.fsync(r),
            Opcode::Fsyncdir => self.fsyncdir(r),
            Opcode::Syncfs => fs.syncfs(ctx, node).map(done),
            Opcode::Setxattr => self.setxattr(r),
            Opcode::Getxattr => self.getxattr(r, out),
            Opcode::Listxattr => self.listxattr(r, out),
            Opcode::Removexattr => fs.removexattr(ctx, node, parse_cstr(&mut &r.read_rest()?[..])?).map(done),
            Opcode::Init => self.init(r),
            Opcode::Destroy => {
                self.reset();
                Ok(Reply::ok())
            }
            Opcode::Opendir => fs.opendir(ctx, node, &r.read_obj()?).map(|o| Reply::with(&o)),
            Opcode::Readdir => self.readdir(r, out, false),
            Opcode::Readdirplus => self.readdir(r, out, true),
            Opcode::Releasedir => fs.releasedir(ctx, node, &r.read_obj()?).map(done),
            Opcode::Access => fs.access(ctx, node, r.read_obj::<AccessIn>()?.mask).map(done),
            Opcode::Fallocate => fs.fallocate(ctx, node, &r.read_obj()?).map(done),
            Opcode::Lseek => fs.lseek(ctx, node, &r.read_obj()?).map(|offset| Reply::with(&LseekOut { offset })),
            Opcode::CopyFileRange => self.copy_file_range(r),
            Opcode::CopyFileRange64 => self.copy_file_range_64(r),
            Opcode::Getlk => fs.getlk(ctx, node, &r.read_obj()?).map(|lk| Reply::with(&LkOut { lk })),
            Opcode::Setlk => fs.setlk(ctx, node, &r.read_obj()?, false).map(done),
            Opcode::Setlkw => fs.setlk(ctx, node, &r.read_obj()?, true).map(done),
            Opcode::Ioctl => self.ioctl(r, out),
            Opcode::Bmap => fs.bmap(ctx, node, &r.read_obj()?).map(|block| Reply::with(&BmapOut { block })),
            Opcode::Poll => fs.poll(ctx, node, &r.read_obj()?).map(|p| Reply::with(&p)),
            Opcode::NotifyReply | Opcode::SetupMapping | Opcode::RemoveMapping => {
                Err(io::Error::from_raw_os_error(libc::ENOSYS))
            }
        };
        reply.map(Some)
    }

    /// Waits for changes, and lists them. The caller's thread is one of its own.
    fn changes(&self, out: GuestBuf<'_>) -> io::Result<Reply> {
        let _alone = self.one_waits.try_lock().ok_or_else(|| io::Error::from_raw_os_error(libc::EBUSY))?;
        let room = out.len().min(MOST_ENTRIES);
        let mut records = Vec::new();
        wait_apart(|| {
            self.fs.changes(&mut |c| {
                let Change { kind, mode, parent, node, to_parent, .. } = *c;
                let record = ChangeRecord { kind, mode, parent, node, to_parent, ..ChangeRecord::default() };
                push_record(&mut records, room, record, &c.name, &c.to_name)
            })
        })??;
        bytes(out, &records)
    }

    fn dropped(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        for node in r.read_rest()?.chunks_exact(8) {
            self.fs.dropped(u64::from_ne_bytes(node.try_into().expect("eight bytes")));
        }
        Ok(Reply::ok())
    }

    fn option(&self, wanted: u64) -> bool {
        self.options.load(Ordering::Relaxed) & wanted != 0
    }

    /// What follows the names of a request that creates something.
    fn extensions(&self, bytes: &[u8]) -> io::Result<Extensions> {
        if self.option(init::CREATE_SUPP_GROUP | init::SECURITY_CTX) {
            extensions::decode(bytes)
        } else {
            Ok(Extensions::default())
        }
    }

    fn lookup(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let name = r.read_rest()?;
        let name = match parse_cstr(&mut &name[..])?.to_bytes() {
            b"." if self.option(init::EXPORT_SUPPORT) => c".",
            b".." if self.option(init::EXPORT_SUPPORT) => c"..",
            _ => parse_name(&mut &name[..])?,
        };
        self.fs.lookup(&r.context(), r.header.nodeid, name).map(|e| Reply::with(&e))
    }

    fn forget(&self, r: &mut Request<'_>) -> io::Result<()> {
        let ForgetIn { nlookup } = r.read_obj()?;
        self.fs.forget(r.header.nodeid, nlookup);
        Ok(())
    }

    fn batch_forget(&self, r: &mut Request<'_>) -> io::Result<()> {
        let BatchForgetIn { count, .. } = r.read_obj()?;
        // Ends with the request's bytes, whatever the count says.
        for _ in 0..count {
            let one: ForgetOne = r.read_obj()?;
            self.fs.forget(one.nodeid, one.nlookup);
        }
        Ok(())
    }

    fn interrupt(&self, r: &mut Request<'_>) -> io::Result<()> {
        self.fs.interrupt(r.read_obj::<InterruptIn>()?.unique);
        Ok(())
    }

    fn getattr(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let GetattrIn { getattr_flags, fh, .. } = r.read_obj()?;
        let fh = (getattr_flags & flags::GETATTR_FH != 0).then_some(fh);
        self.fs.getattr(&r.context(), r.header.nodeid, fh).map(|a| Reply::with(&a))
    }

    fn statx(&self, r: &mut Request<'_>, out: GuestBuf<'_>) -> io::Result<Reply> {
        let StatxIn { getattr_flags, fh, sx_flags, sx_mask, .. } = r.read_obj()?;
        let fh = (getattr_flags & flags::GETATTR_FH != 0).then_some(fh);
        bytes(out, self.fs.statx(&r.context(), r.header.nodeid, fh, sx_flags, sx_mask)?.as_bytes())
    }

    fn symlink(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let rest = r.read_rest()?;
        let mut rest = &rest[..];
        let (name, target) = (parse_name(&mut rest)?, parse_cstr(&mut rest)?);
        let extensions = self.extensions(rest)?;
        self.fs.symlink(&r.context(), r.header.nodeid, name, target, &extensions).map(|e| Reply::with(&e))
    }

    fn mknod(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let args: MknodIn = r.read_obj()?;
        let rest = r.read_rest()?;
        let mut rest = &rest[..];
        let (name, extensions) = (parse_name(&mut rest)?, self.extensions(rest)?);
        self.fs.mknod(&r.context(), r.header.nodeid, name, &args, &extensions).map(|e| Reply::with(&e))
    }

    fn mkdir(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let args: MkdirIn = r.read_obj()?;
        let rest = r.read_rest()?;
        let mut rest = &rest[..];
        let (name, extensions) = (parse_name(&mut rest)?, self.extensions(rest)?);
        self.fs.mkdir(&r.context(), r.header.nodeid, name, &args, &extensions).map(|e| Reply::with(&e))
    }

    fn rename(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let RenameIn { newdir } = r.read_obj()?;
        self.rename_to(r, newdir, 0)
    }

    fn rename2(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let Rename2In { newdir, flags, .. } = r.read_obj()?;
        self.rename_to(r, newdir, flags & (libc::RENAME_EXCHANGE | libc::RENAME_NOREPLACE | libc::RENAME_WHITEOUT))
    }

    fn rename_to(&self, r: &mut Request<'_>, newdir: u64, flags: u32) -> io::Result<Reply> {
        let rest = r.read_rest()?;
        let mut names = &rest[..];
        let (old, new) = (parse_name(&mut names)?, parse_name(&mut names)?);
        self.fs.rename(&r.context(), r.header.nodeid, old, newdir, new, flags).map(done)
    }

    fn link(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let LinkIn { oldnodeid } = r.read_obj()?;
        let name = r.read_rest()?;
        let name = parse_name(&mut &name[..])?;
        self.fs.link(&r.context(), oldnodeid, r.header.nodeid, name).map(|e| Reply::with(&e))
    }

    fn create(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let args: CreateIn = r.read_obj()?;
        let rest = r.read_rest()?;
        let mut rest = &rest[..];
        let (name, extensions) = (parse_name(&mut rest)?, self.extensions(rest)?);
        self.fs.create(&r.context(), r.header.nodeid, name, &args, &extensions).map(|c| Reply::with(&c))
    }

    fn tmpfile(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let args: CreateIn = r.read_obj()?;
        let rest = r.read_rest()?;
        let mut rest = &rest[..];
        // Linux's name for a file without one, `/`: not used.
        parse_cstr(&mut rest)?;
        let extensions = self.extensions(rest)?;
        self.fs.tmpfile(&r.context(), r.header.nodeid, &args, &extensions).map(|c| Reply::with(&c))
    }

    fn read(&self, r: &mut Request<'_>, out: GuestBuf<'_>, helper: Option<&CopyHelper>) -> io::Result<Reply> {
        let args: ReadIn = r.read_obj()?;
        let into = ZeroCopyBuf::new(out, 0, out.len(), helper);
        self.fs.read(&r.context(), r.header.nodeid, &args, &into).map(Reply::with_payload)
    }

    fn write(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let args: WriteIn = r.read_obj()?;
        let (shared, start, len) = r.payload()?;
        if args.size as usize > len {
            return Err(einval());
        }
        let from = ZeroCopyBuf::new(shared, start, len, None);
        let n = self.fs.write(&r.context(), r.header.nodeid, &args, &from)?;
        Ok(Reply::with(&WriteOut { size: n as u32, padding: 0 }))
    }

    fn fsync(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let FsyncIn { fh, fsync_flags, .. } = r.read_obj()?;
        let data_only = fsync_flags & flags::FSYNC_FDATASYNC != 0;
        self.fs.fsync(&r.context(), r.header.nodeid, fh, data_only).map(done)
    }

    fn fsyncdir(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let FsyncIn { fh, fsync_flags, .. } = r.read_obj()?;
        let data_only = fsync_flags & flags::FSYNC_FDATASYNC != 0;
        self.fs.fsyncdir(&r.context(), r.header.nodeid, fh, data_only).map(done)
    }

    fn setxattr(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let SetxattrInCompat { size, flags } = r.read_obj()?;
        let mut extra = 0;
        if self.option(init::SETXATTR_EXT) {
            extra = r.read_obj::<SetxattrInExt>()?.setxattr_flags;
        }
        let rest = r.read_rest()?;
        let mut value = &rest[..];
        let name = parse_cstr(&mut value)?;
        if value.len() != size as usize {
            return Err(einval());
        }
        self.fs.setxattr(&r.context(), r.header.nodeid, name, value, flags, extra).map(done)
    }

    fn getxattr(&self, r: &mut Request<'_>, out: GuestBuf<'_>) -> io::Result<Reply> {
        let GetxattrIn { size, .. } = r.read_obj()?;
        let name = r.read_rest()?;
        let (name, size) = (parse_cstr(&mut &name[..])?, size.min(reply_capacity(out)));
        xattr(out, &self.fs.getxattr(&r.context(), r.header.nodeid, name, size)?)
    }

    fn listxattr(&self, r: &mut Request<'_>, out: GuestBuf<'_>) -> io::Result<Reply> {
        let GetxattrIn { size, .. } = r.read_obj()?;
        xattr(out, &self.fs.listxattr(&r.context(), r.header.nodeid, size.min(reply_capacity(out)))?)
    }

    fn init(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let InitInCompat { major, minor, max_readahead, flags } = r.read_obj()?;
        if major < MAJOR || (major == MAJOR && minor < MIN_MINOR) {
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        if major > MAJOR {
            return Ok(Reply::with(&InitOut { major: MAJOR, minor: MINOR, ..Default::default() }));
        }
        let extended = u64::from(flags) & init::INIT_EXT != 0;
        let flags2 = if extended { r.read_obj::<InitInExt>()?.flags2 } else { 0 };
        let capable = u64::from(flags2) << 32 | u64::from(flags);
        // ATOMIC_O_TRUNC is not among them: by it guests' kernels have a running program's file
        // truncated before they find out that it must not be (ETXTBSY).
        let ours = init::BIG_WRITES | init::MAX_PAGES | init::INIT_EXT;
        let _alone = self.init_lock.lock();
        let enabled = capable & (self.fs.init(capable)? | ours);
        self.options.store(enabled, Ordering::Relaxed);
        Ok(Reply::with(&InitOut {
            major: MAJOR,
            minor: MINOR,
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

    fn readdir(&self, r: &mut Request<'_>, out: GuestBuf<'_>, plus: bool) -> io::Result<Reply> {
        let args: ReadIn = r.read_obj()?;
        let room = args.size.min(reply_capacity(out)) as usize;
        let mut entries = Vec::with_capacity(room.min(MOST_ENTRIES));
        let listed = self.fs.readdir(&r.context(), r.header.nodeid, &args, plus, &mut |entry, known| {
            Ok(add_dirent(&mut entries, room, entry, plus, known))
        });
        match listed {
            // What was taken has been looked up: the guest must know of it.
            Err(e) if entries.is_empty() => Err(e),
            _ => bytes(out, &entries),
        }
    }

    fn copy_file_range(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let args: CopyFileRangeIn = r.read_obj()?;
        // The reply has 32 bits.
        let args = CopyFileRangeIn { len: args.len.min(u64::from(u32::MAX) & !4095), ..args };
        let n = self.fs.copy_file_range(&r.context(), r.header.nodeid, &args)?;
        Ok(Reply::with(&WriteOut { size: n as u32, padding: 0 }))
    }

    fn copy_file_range_64(&self, r: &mut Request<'_>) -> io::Result<Reply> {
        let bytes_copied = self.fs.copy_file_range(&r.context(), r.header.nodeid, &r.read_obj()?)?;
        Ok(Reply::with(&CopyFileRangeOut { bytes_copied }))
    }

    fn ioctl(&self, r: &mut Request<'_>, out: GuestBuf<'_>) -> io::Result<Reply> {
        let args: IoctlIn = r.read_obj()?;
        if args.flags & flags::ioctl::UNRESTRICTED != 0 {
            return Err(io::Error::from_raw_os_error(libc::ENOTTY));
        }
        let data = r.read_rest()?;
        if data.len() < args.in_size as usize {
            return Err(einval());
        }
        let mut result = self.fs.ioctl(&r.context(), r.header.nodeid, &args, &data[..args.in_size as usize])?;
        result.truncate(args.out_size as usize);
        bytes(out, &[IoctlOut::default().as_bytes(), &result].concat())
    }
}

fn done((): ()) -> Reply {
    Reply::ok()
}

/// Bytes of the reply's buffers that the file system may be asked to fill: it makes a private buffer as large.
fn reply_capacity(out: GuestBuf<'_>) -> u32 {
    out.len().min(MAX_WRITE as usize) as u32
}

fn bytes(out: GuestBuf<'_>, data: &[u8]) -> io::Result<Reply> {
    out.write(0, data).map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))?;
    Ok(Reply::with_payload(data.len()))
}

fn xattr(out: GuestBuf<'_>, reply: &XattrReply) -> io::Result<Reply> {
    match reply {
        XattrReply::Bytes(value) => bytes(out, value),
        XattrReply::Size(size) => Ok(Reply::with(&GetxattrOut { size: *size, padding: 0 })),
    }
}

/// Appends one directory entry, if there is room for it.
fn add_dirent(entries: &mut Vec<u8>, room: usize, entry: &DirEntry<'_>, plus: bool, known: Option<&EntryOut>) -> bool {
    let name = entry.name.to_bytes();
    let fixed = size_of::<Dirent>() + if plus { size_of::<EntryOut>() } else { 0 };
    if entries.len() + (fixed + name.len()).next_multiple_of(REC_ALIGN) > room {
        return false;
    }
    if plus {
        // Node 0: not looked up.
        let attr = Attr { ino: entry.ino, mode: entry.kind << 12, ..Attr::default() };
        let unknown = EntryOut { attr, ..EntryOut::default() };
        entries.extend_from_slice(known.unwrap_or(&unknown).as_bytes());
    }
    let dirent = Dirent { ino: entry.ino, off: entry.offset, namelen: name.len() as u32, kind: entry.kind };
    entries.extend_from_slice(dirent.as_bytes());
    entries.extend_from_slice(name);
    entries.resize(entries.len().next_multiple_of(REC_ALIGN), 0);
    true
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
