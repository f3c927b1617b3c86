//! Operations that create something, which belongs to the caller then.

use super::cover::Watch;
use super::credentials::{kill_privileges, set_umask, Acting};
use super::file_system::*;
use super::handles::Handle;
use super::inodes::{Inode, Pin};
use super::listener::Happening;
use super::owners::{self, Owners, Ownership};
use super::passthrough::{decode_device, Passthrough};
use super::sys::{self, errno, FdName};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use tunnelfs_fuse_abi::changes::kind;
use tunnelfs_fuse_abi::flags::{self, init};
use tunnelfs_fuse_abi::*;

/// A directory in which something is created, and for whom.
struct Place<'a> {
    ctx: &'a Context,
    parent: Arc<Inode>,
    dir: Arc<Pin>,
    watch: Option<Arc<Watch>>,
    umask: u32,
    extensions: &'a Extensions,
    /// Major and minor number of the device that is created.
    device: (u32, u32),
}

impl Passthrough {
    fn place<'a>(&self, ctx: &'a Context, node: u64, umask: u32, extensions: &'a Extensions) -> io::Result<Place<'a>> {
        self.changes()?;
        let (parent, dir) = self.inodes.open(node)?;
        // Without DONT_MASK the guest's kernel has applied it.
        let umask = if self.agreed(init::DONT_MASK) { umask } else { 0 };
        let watch = self.coherence.watch(&parent, dir.as_fd());
        Ok(Place { ctx, parent, dir, watch, umask, extensions, device: (0, 0) })
    }

    /// Makes `create` act for the caller, with a mode as this machine's file gets it.
    fn as_caller<R>(
        &self,
        place: &Place<'_>,
        mode: u32,
        create: impl FnOnce(BorrowedFd<'_>, u32) -> io::Result<R>,
    ) -> io::Result<R> {
        set_umask(place.umask)?;
        let mode = if self.config.ids.owners == Owners::Attribute { owners::usable(mode) } else { mode };
        let _acting = Acting::for_caller(&self.config.ids.caller(place.ctx)?, &place.extensions.groups)?;
        create(place.dir.as_fd(), mode)
    }

    /// Completes what was created with `mode`: owner, bits and labels that creating could not give it.
    fn complete(&self, place: &Place<'_>, file: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
        let name = FdName::new(file);
        if self.config.ids.owners == Owners::Attribute {
            let parent = self.config.ids.of(&sys::stat(place.dir.as_fd())?, place.dir.as_fd())?;
            let inherits = parent.mode & libc::S_ISGID != 0;
            let is_dir = mode & libc::S_IFMT == libc::S_IFDIR;
            let mode = mode & !place.umask | if inherits && is_dir { libc::S_ISGID } else { 0 };
            let gid = if inherits { parent.gid } else { place.ctx.gid };
            owners::keep(name.as_c_str(), Ownership { uid: place.ctx.uid, gid, mode, device: place.device })?;
        } else if mode & libc::S_ISGID != 0 && mode & libc::S_IFMT != libc::S_IFDIR {
            // The guest's kernel has left the bit to the caller; this thread need not be in the group.
            let now = u32::from(sys::stat(file)?.stx_mode);
            if now & libc::S_ISGID == 0 {
                kill_privileges(false)?;
                sys::chmod_at(self.descriptors.as_fd(), name.as_c_str(), now & 0o7777 | libc::S_ISGID)?;
            }
        }
        for (label, value) in &place.extensions.labels {
            self.set_label(name.as_c_str(), label, value)?;
        }
        Ok(())
    }

    /// The entry of what was created under `name`; it is removed again if it cannot be completed.
    fn created(&self, place: &Place<'_>, name: &CStr, mode: u32) -> io::Result<EntryOut> {
        let fd = sys::open_at(place.dir.as_fd(), name, libc::O_PATH | libc::O_NOFOLLOW, 0)?;
        if let Err(e) = self.complete(place, fd.as_fd(), mode) {
            let flags = if mode & libc::S_IFMT == libc::S_IFDIR { libc::AT_REMOVEDIR } else { 0 };
            let _ = sys::unlink_at(place.dir.as_fd(), name, flags);
            return Err(e);
        }
        self.tell_created(place, name, mode);
        self.enter(fd, &place.parent, name, place.watch.as_ref()).map(|(_, entry)| entry)
    }

    fn tell_created(&self, place: &Place<'_>, name: &CStr, mode: u32) {
        self.coherence.tell(&Happening {
            kind: kind::CREATED,
            mode: mode & libc::S_IFMT,
            parent: Some(place.parent.key),
            name: name.to_bytes(),
            ..Happening::default()
        });
    }

    pub(super) fn symlink(
        &self,
        ctx: &Context,
        node: u64,
        name: &CStr,
        target: &CStr,
        extensions: &Extensions,
    ) -> io::Result<EntryOut> {
        let place = self.place(ctx, node, 0, extensions)?;
        self.as_caller(&place, 0, |dir, _| sys::symlink_at(target, dir, name))?;
        self.created(&place, name, libc::S_IFLNK | 0o777)
    }

    pub(super) fn mknod(
        &self,
        ctx: &Context,
        node: u64,
        name: &CStr,
        args: &MknodIn,
        extensions: &Extensions,
    ) -> io::Result<EntryOut> {
        let mut place = self.place(ctx, node, args.umask, extensions)?;
        let mode = if args.mode & libc::S_IFMT == 0 { args.mode | libc::S_IFREG } else { args.mode };
        let device = decode_device(args.rdev);
        if self.config.ids.owners == Owners::Attribute && owners::is_special(mode) {
            if matches!(mode & libc::S_IFMT, libc::S_IFCHR | libc::S_IFBLK) {
                place.device = (libc::major(device), libc::minor(device));
            }
            let file = libc::S_IFREG | mode & 0o777;
            self.as_caller(&place, file, |dir, mode| sys::mknod_at(dir, name, mode, 0))?;
        } else {
            self.as_caller(&place, mode, |dir, mode| sys::mknod_at(dir, name, mode, device))?;
        }
        self.created(&place, name, mode)
    }

    pub(super) fn mkdir(
        &self,
        ctx: &Context,
        node: u64,
        name: &CStr,
        args: &MkdirIn,
        extensions: &Extensions,
    ) -> io::Result<EntryOut> {
        let place = self.place(ctx, node, args.umask, extensions)?;
        let mode = libc::S_IFDIR | args.mode & 0o7777;
        self.as_caller(&place, mode, |dir, mode| sys::mkdir_at(dir, name, mode & 0o7777))?;
        self.created(&place, name, mode)
    }

    pub(super) fn create(
        &self,
        ctx: &Context,
        node: u64,
        name: &CStr,
        args: &CreateIn,
        extensions: &Extensions,
    ) -> io::Result<CreateOut> {
        let place = self.place(ctx, node, args.umask, extensions)?;
        let count = self.reserve()?;
        let flags = self.open_flags(args.flags) | args.flags as i32 & (libc::O_EXCL | libc::O_TRUNC);
        let mode = libc::S_IFREG | args.mode & 0o7777;
        if flags & libc::O_TRUNC != 0 {
            kill_privileges(args.open_flags & flags::OPEN_KILL_SUIDGID != 0)?;
        }
        let open = |flags: i32| {
            self.as_caller(&place, mode, |dir, mode| {
                sys::open_at(dir, name, flags | libc::O_CREAT | libc::O_NOFOLLOW, mode & 0o7777)
            })
        };
        // Only what is new gets an owner's attribute or a label.
        let (file, new) = if self.completes(extensions, mode) && flags & libc::O_EXCL == 0 {
            match open(flags | libc::O_EXCL) {
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => (open(flags)?, false),
                other => (other?, true),
            }
        } else {
            (open(flags)?, flags & libc::O_EXCL != 0 || mode & libc::S_ISGID != 0)
        };
        if new {
            if let Err(e) = self.complete(&place, file.as_fd(), mode) {
                let _ = sys::unlink_at(place.dir.as_fd(), name, 0);
                return Err(e);
            }
        }
        self.tell_created(&place, name, mode);
        let path = self.reopen(file.as_fd(), libc::O_PATH)?;
        let st = sys::stat(path.as_fd())?;
        self.opened(path, &st, &place, name, file, flags, count)
    }

    /// Whether creating alone does not do.
    fn completes(&self, extensions: &Extensions, mode: u32) -> bool {
        self.config.ids.owners == Owners::Attribute || !extensions.labels.is_empty() || mode & libc::S_ISGID != 0
    }

    #[allow(clippy::too_many_arguments)] // All that has been opened, and where.
    fn opened(
        &self,
        path: OwnedFd,
        st: &libc::statx,
        place: &Place<'_>,
        name: &CStr,
        file: OwnedFd,
        flags: i32,
        count: super::handles::Counted,
    ) -> io::Result<CreateOut> {
        // What was there already may be anything.
        if u32::from(st.stx_mode) & libc::S_IFMT != libc::S_IFREG {
            return Err(errno(libc::ESTALE));
        }
        let (inode, entry) = self.enter_with(path, st, &place.parent, name, place.watch.as_ref())?;
        let held = match entry.attr.mode & libc::S_IFMT {
            libc::S_IFREG => self.inodes.hold(&inode),
            // A regular file here alone, which stands for a special one.
            _ => Err(errno(libc::ESTALE)),
        };
        match held {
            Ok(held) => {
                let open_flags = self.file_cache() | self.close_flags(&inode, file.as_fd(), flags);
                let handle = Arc::new(Handle::new(file, held, flags, count));
                let fh = if self.skips_opening_now() {
                    self.keep_created(handle)?;
                    NO_HANDLE
                } else {
                    self.handles.add(handle)
                };
                Ok(CreateOut { entry, open: OpenOut { fh, open_flags, backing_id: 0 } })
            }
            Err(e) => {
                self.forget_entry(inode.id, 1, false);
                Err(e)
            }
        }
    }

    pub(super) fn tmpfile(
        &self,
        ctx: &Context,
        node: u64,
        args: &CreateIn,
        extensions: &Extensions,
    ) -> io::Result<CreateOut> {
        let place = self.place(ctx, node, args.umask, extensions)?;
        let count = self.reserve()?;
        let mut flags = self.open_flags(args.flags);
        if flags & libc::O_ACCMODE == libc::O_RDONLY {
            return Err(errno(libc::EINVAL));
        }
        flags |= args.flags as i32 & libc::O_EXCL;
        let mode = libc::S_IFREG | args.mode & 0o7777;
        let file =
            self.as_caller(&place, mode, |dir, mode| sys::open_at(dir, c".", flags | libc::O_TMPFILE, mode & 0o7777))?;
        self.complete(&place, file.as_fd(), mode)?;
        let path = self.reopen(file.as_fd(), libc::O_PATH)?;
        let st = sys::stat(file.as_fd())?;
        self.opened(path, &st, &place, c"", file, flags, count)
    }
}
