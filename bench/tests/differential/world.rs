//! One side: a directory, open files, and what operations on them answer.

use crate::common::sys::{self, acl, c, get_xattr, list_xattr, remove_xattr, set_xattr, Answer};
use crate::ops::{Name, Op, Slot, User, NAMES, TARGETS};
use crate::rig::as_user;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{utimensat, UtimensatFlags};
use nix::sys::time::TimeSpec;
use nix::unistd::{fchownat, AccessFlags, Gid, Uid};
use std::collections::BTreeMap;
use std::fs::{self, File, Metadata, Permissions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Users, their groups, and further groups.
const USERS: [(u32, u32, &[u32]); 3] = [(0, 0, &[]), (1000, 1000, &[3000]), (2000, 2000, &[])];

const KEYS: [&str; 4] = ["user.a", "user.b", "trusted.a", "nonsense"];
/// Nothing of this time has been set by a program.
const OLD: i64 = 1_000_000_000;

/// What an operation says.
pub type Outcome = Answer<String>;

pub struct World {
    dir: PathBuf,
    open: [Option<File>; 3],
}

pub fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn told<T>(result: io::Result<T>) -> Answer<T> {
    result.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))
}

fn nothing<T>(_: T) -> String {
    String::new()
}

fn digest(bytes: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    format!("{} bytes, {:x}", bytes.len(), hasher.finish())
}

/// A time that a program has set, or that it is none.
fn time(seconds: i64, nanoseconds: i64) -> String {
    match seconds {
        OLD..=3_000_000_000 => "now".into(),
        _ => format!("{seconds}.{nanoseconds}"),
    }
}

/// The mode, without setuid and setgid bits of files: FALLOCATE and COPY_FILE_RANGE do not tell whether their caller
/// may keep them, and the host clears them for root too. `answers::credentials` looks at each case.
fn compared_mode(meta: &fs::Metadata) -> u32 {
    if meta.is_file() {
        meta.mode() & !0o6000
    } else {
        meta.mode()
    }
}

/// What two sides must have in common: not device and inode numbers, not sizes and link counts of directories, which
/// are the file system's own business, nor the times of accesses.
pub fn attributes(meta: &Metadata) -> String {
    let kind = meta.file_type();
    let (links, len) = if kind.is_dir() { (0, 0) } else { (meta.nlink(), meta.len()) };
    let device = if kind.is_char_device() || kind.is_block_device() { meta.rdev() } else { 0 };
    let modified = time(meta.mtime(), meta.mtime_nsec());
    format!(
        "{:o} {}:{}, {links} links, {len} bytes, device {device:x}, {modified}",
        compared_mode(meta),
        meta.uid(),
        meta.gid()
    )
}

const NO_ID: u32 = u32::MAX;
const LISTS: [&[(u16, u16, u32)]; 4] = [
    &[(1, 7, NO_ID), (4, 5, NO_ID), (0x20, 4, NO_ID)],
    &[(1, 7, NO_ID), (2, 6, 1000), (4, 0, NO_ID), (0x10, 7, NO_ID), (0x20, 0, NO_ID)],
    &[(1, 6, NO_ID), (4, 4, NO_ID), (8, 7, 3000), (0x10, 5, NO_ID), (0x20, 1, NO_ID)],
    // No list: the entries of the owner and others are missing.
    &[(2, 6, 1000)],
];

impl World {
    pub fn new(dir: &Path) -> World {
        World { dir: dir.into(), open: [None, None, None] }
    }

    /// With some directories and files, two of them open: else most operations would find nothing.
    pub fn begun(dir: &Path) -> World {
        let mut world = World::new(dir);
        for name in ["d", "e", "e/d"] {
            fs::create_dir_all(dir.join(name)).unwrap();
            set_mode(&dir.join(name), 0o777);
        }
        for (slot, name) in ["a", "d/a", "e/a"].iter().enumerate() {
            let path = dir.join(name);
            fs::write(&path, [slot as u8; 10_000]).unwrap();
            set_mode(&path, 0o666);
            if slot < 2 {
                world.open[slot] = Some(File::options().read(true).write(true).open(&path).unwrap());
            }
        }
        world
    }

    fn path(&self, name: Name) -> PathBuf {
        // Without a slash at the end.
        if name.0 == 0 {
            self.dir.clone()
        } else {
            self.dir.join(NAMES[name.0])
        }
    }

    fn file(&self, slot: Slot) -> Answer<&File> {
        self.open[slot].as_ref().ok_or(Errno::EBADF)
    }

    pub fn apply(&mut self, op: &Op) -> Outcome {
        match *op {
            Op::Open { user, slot, name, flags, mode } => {
                // As programs do that do not wait for the other end of a pipe.
                let (path, flags) = (c(&self.path(name)), flags | libc::O_NONBLOCK | libc::O_CLOEXEC);
                // SAFETY: a NUL-ended string; a new descriptor.
                let opened = by(user, || Errno::result(unsafe { libc::open(path.as_ptr(), flags, mode) }));
                self.open[slot] = None;
                // SAFETY: a new descriptor.
                self.open[slot] = Some(unsafe { File::from_raw_fd(opened?) });
                Ok(String::new())
            }
            Op::Tmpfile { user, slot, name, mode } => {
                let path = self.path(name);
                let opened = by(user, || sys::tmpfile(&path, mode));
                self.open[slot] = None;
                self.open[slot] = Some(opened?.into());
                Ok(String::new())
            }
            Op::Close { slot } => self.open[slot].take().map(nothing).ok_or(Errno::EBADF),
            _ => self.on_open_file(op).or_else(|| self.on_name(op)).unwrap_or_else(|| self.on_attributes(op)),
        }
    }

    fn on_open_file(&self, op: &Op) -> Option<Outcome> {
        let with = |slot: Slot, work: &dyn Fn(&File) -> Outcome| self.file(slot).and_then(work);
        Some(match *op {
            Op::Read { slot, at, len } => with(slot, &|file| {
                let mut bytes = vec![0; len];
                let n = told(file.read_at(&mut bytes, at as u64))?;
                Ok(digest(&bytes[..n]))
            }),
            Op::Write { user, slot, at, len, fill } => with(slot, &|file| {
                let written = by(user, || told(file.write_at(&vec![fill; len], at as u64)))?;
                Ok(format!("{written}"))
            }),
            Op::Seek { slot, at, whence } => with(slot, &|file| {
                // Places in directories are the file system's own business.
                if file.metadata().is_ok_and(|m| m.is_dir()) {
                    return Ok(String::new());
                }
                sys::seek(file, at, whence).map(|n| format!("{n}"))
            }),
            Op::TruncateOpen { user, slot, len } => {
                with(slot, &|file| by(user, || nix::unistd::ftruncate(file, len)).map(nothing))
            }
            Op::Fallocate { user, slot, mode, at, len } => {
                with(slot, &|file| by(user, || sys::fallocate(file, mode, at, len)).map(nothing))
            }
            Op::CopyRange { user, from, to, at, target, len } => with(from, &|source| {
                let to = self.file(to)?;
                by(user, || sys::copy_range(source, at, to, target, len)).map(|n| format!("{n}"))
            }),
            Op::Sync { slot } => with(slot, &|file| nix::unistd::fsync(file).map(nothing)),
            Op::StatOpen { slot } => with(slot, &|file| told(file.metadata()).map(|m| attributes(&m))),
            Op::LinkOpen { user, slot, name } => {
                let path = self.path(name);
                with(slot, &|file| by(user, || sys::link_open(file, &path)).map(nothing))
            }
            Op::RangeLock { slot, kind, at, len } => with(slot, &|file| range_lock(file, kind, at, len).map(nothing)),
            Op::FileLock { slot, kind } => with(slot, &|file| {
                // SAFETY: no memory is touched.
                Errno::result(unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) }).map(nothing)
            }),
            Op::InodeFlags { user, slot, flags } => with(slot, &|file| {
                // nodump and noatime: what ordinary files may have.
                let own = 0x40 | 0x80;
                let before = sys::inode_flags(file)?;
                by(user, || sys::set_inode_flags(file, before & !own | flags))?;
                Ok(format!("{:x}", sys::inode_flags(file)? & own))
            }),
            _ => return None,
        })
    }

    fn on_name(&self, op: &Op) -> Option<Outcome> {
        let path = |name| self.path(name);
        Some(match *op {
            Op::WriteFile { user, name, len, fill } => {
                let path = path(name);
                let write = || {
                    open_quickly(&path, libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC)?
                        .write_all_at(&vec![fill; len], 0)
                };
                by(user, || told(write())).map(nothing)
            }
            Op::ReadFile { user, name } => {
                let path = path(name);
                by(user, || told(read_quickly(&path))).map(|bytes| digest(&bytes))
            }
            Op::Truncate { user, name, len } => by(user, || nix::unistd::truncate(&path(name), len)).map(nothing),
            Op::MakeDir { user, name, mode } => {
                let path = path(name);
                by(user, || told(fs::DirBuilder::new().mode(mode).create(&path))).map(nothing)
            }
            Op::RemoveDir { user, name } => by(user, || told(fs::remove_dir(path(name)))).map(nothing),
            Op::Unlink { user, name } => by(user, || told(fs::remove_file(path(name)))).map(nothing),
            Op::Rename { user, from, to, flags } => {
                by(user, || sys::rename(&path(from), &path(to), flags)).map(nothing)
            }
            Op::Link { user, from, to } => by(user, || told(fs::hard_link(path(from), path(to)))).map(nothing),
            Op::Symlink { user, name, target } => {
                by(user, || told(std::os::unix::fs::symlink(TARGETS[target], path(name)))).map(nothing)
            }
            Op::ReadLink { user, name } => by(user, || told(fs::read_link(path(name)))).map(|t| format!("{t:?}")),
            Op::MakeNode { user, name, mode } => by(user, || sys::mknod(&path(name), mode, 0x0103)).map(nothing),
            Op::Stat { user, name } => {
                by(user, || told(fs::symlink_metadata(path(name)))).map(|meta| attributes(&meta))
            }
            Op::Access { user, name, mode } => {
                let mode = AccessFlags::from_bits_truncate(mode);
                by(user, || nix::unistd::access(&path(name), mode)).map(nothing)
            }
            Op::List { user, name } => by(user, || told(list(&path(name)))).map(|names| format!("{names:?}")),
            _ => return None,
        })
    }

    fn on_attributes(&self, op: &Op) -> Outcome {
        let path = |name| self.path(name);
        match *op {
            Op::SetMode { user, name, mode } => {
                by(user, || told(fs::set_permissions(path(name), Permissions::from_mode(mode)))).map(nothing)
            }
            Op::SetOwner { user, name, uid, gid, follow } => {
                let flags = if follow { AtFlags::empty() } else { AtFlags::AT_SYMLINK_NOFOLLOW };
                let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
                by(user, || fchownat(nix::fcntl::AT_FDCWD, &path(name), uid, gid, flags)).map(nothing)
            }
            Op::SetTimes { user, name, times } => {
                let [a, m] = times.map(|t| match t {
                    -1 => TimeSpec::UTIME_OMIT,
                    -2 => TimeSpec::UTIME_NOW,
                    t => TimeSpec::new(t, 1000),
                });
                let follow = UtimensatFlags::NoFollowSymlink;
                by(user, || utimensat(nix::fcntl::AT_FDCWD, &path(name), &a, &m, follow)).map(nothing)
            }
            Op::SetXattr { user, name, key, len, flags } => {
                by(user, || set_xattr(&path(name), KEYS[key], &vec![b'x'; len], flags)).map(nothing)
            }
            Op::GetXattr { user, name, key } => by(user, || get_xattr(&path(name), KEYS[key])).map(|v| digest(&v)),
            Op::RemoveXattr { user, name, key } => by(user, || remove_xattr(&path(name), KEYS[key])).map(nothing),
            Op::ListXattr { user, name } => by(user, || list_xattr(&path(name))).map(|names| format!("{names:?}")),
            Op::SetAcl { user, name, default, list } => {
                let which = if default { "system.posix_acl_default" } else { "system.posix_acl_access" };
                by(user, || set_xattr(&path(name), which, &acl(LISTS[list]), 0)).map(nothing)
            }
            _ => unreachable!("the others are done elsewhere"),
        }
    }

    /// All that there is now, with nothing open any more.
    pub fn finish(self) -> BTreeMap<String, String> {
        let World { dir, open } = self;
        drop(open);
        let (mut all, mut files) = (BTreeMap::new(), BTreeMap::new());
        walk(&dir, "", &mut all, &mut files);
        all
    }
}

/// Does it as one of [`USERS`].
fn by<T: Send>(user: User, work: impl FnOnce() -> T + Send) -> T {
    match USERS[user] {
        (0, ..) => work(),
        (uid, gid, groups) => as_user(uid, gid, groups, work),
    }
}

fn open_quickly(path: &Path, flags: i32) -> io::Result<File> {
    let path = c(path);
    // SAFETY: a NUL-ended string; a new descriptor.
    let fd = unsafe { libc::open(path.as_ptr(), flags | libc::O_NONBLOCK | libc::O_CLOEXEC, 0o666) };
    // SAFETY: a new descriptor.
    Ok(unsafe { File::from_raw_fd(Errno::result(fd)?) })
}

/// No more than there is in the beginning: the largest files have their bytes far away.
fn read_quickly(path: &Path) -> io::Result<Vec<u8>> {
    let file = open_quickly(path, libc::O_RDONLY)?;
    // A device would never end.
    if !file.metadata()?.is_file() {
        return Err(Errno::EINVAL.into());
    }
    content(&file)
}

/// The beginning and the end.
fn content(file: &File) -> io::Result<Vec<u8>> {
    const MOST: usize = 400_000;
    let mut bytes = vec![0; MOST];
    let mut have = 0;
    loop {
        match file.read_at(&mut bytes[have..], have as u64)? {
            0 => break,
            n => have += n,
        }
    }
    bytes.truncate(have);
    let mut tail = vec![0; MOST];
    if let Some(at) = file.metadata()?.len().checked_sub(MOST as u64) {
        let n = file.read_at(&mut tail, at)?;
        bytes.extend_from_slice(&tail[..n]);
    }
    Ok(bytes)
}

fn list(path: &Path) -> io::Result<Vec<(std::ffi::OsString, String)>> {
    let entry =
        |e: io::Result<fs::DirEntry>| e.and_then(|e| Ok((e.file_name(), format!("{:?}", kind(&e.file_type()?)))));
    let mut names = fs::read_dir(path)?.map(entry).collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

fn kind(kind: &fs::FileType) -> [bool; 5] {
    [kind.is_dir(), kind.is_file(), kind.is_symlink(), kind.is_fifo(), kind.is_char_device()]
}

fn range_lock(file: &File, kind: i32, at: i64, len: i64) -> Answer<()> {
    // SAFETY: a plain structure, for which zeros are as good as any.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_whence, lock.l_start, lock.l_len) = (kind as i16, libc::SEEK_SET as i16, at, len);
    // SAFETY: the structure lives as long as the call.
    Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) }).map(drop)
}

/// Attributes, content and all, by name; `files` tells which names are of one file.
fn walk(dir: &Path, below: &str, all: &mut BTreeMap<String, String>, files: &mut BTreeMap<(u64, u64), String>) {
    let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    entries.sort();
    for entry in entries {
        let (path, name) = (dir.join(&entry), format!("{below}/{}", entry.to_string_lossy()));
        let meta = match fs::symlink_metadata(&path) {
            Ok(meta) => meta,
            Err(e) => {
                all.insert(name, format!("listed, but: {e}"));
                continue;
            }
        };
        let mut told = attributes(&meta);
        for key in list_xattr(&path).unwrap_or_default() {
            let value = get_xattr(&path, &key).map(|v| digest(&v));
            told += &format!(", {key} {value:?}");
        }
        if !meta.is_dir() {
            let first = files.entry((meta.dev(), meta.ino())).or_insert_with(|| name.clone());
            told += &format!(", the file of {first}");
        }
        if meta.is_file() {
            told += &format!(", {:?}", read_quickly(&path).map(|bytes| digest(&bytes)).map_err(|e| e.to_string()));
        } else if meta.is_symlink() {
            told += &format!(", to {:?}", fs::read_link(&path).ok());
        }
        all.insert(name.clone(), told);
        if meta.is_dir() {
            walk(&path, &name, all, files);
        }
    }
}
