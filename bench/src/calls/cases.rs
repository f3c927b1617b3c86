//! The operations that a mount sends, and the bare calls of each.

use super::bare::{check, look_up, name_to_handle, open_at, rename, stat, unlink};
use super::row::Row;
use super::served::{with, Served, BUFFER};
use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::zerocopy::IntoBytes;
use tunnelfs_fuse_abi::*;

/// Turns of each side, of which the median counts.
const TURNS: usize = 15;
/// Operations between two reads of the clock.
const BATCH: u32 = 16;
/// Bytes of READ, WRITE and COPY_FILE_RANGE.
const BLOCK: usize = 4096;
/// Entries of the directory that is listed.
const ENTRIES: usize = 100;

/// Measures the operations of a mount in a new directory, on a thread of its own.
///
/// # Errors
/// The file system's.
pub fn run(dir: &Path, turn: Duration) -> io::Result<Vec<Row>> {
    let rows = || {
        let mut cases = Cases::new(dir, turn)?;
        cases.look_ups()?;
        cases.attributes()?;
        cases.data()?;
        cases.names()?;
        cases.lists()?;
        cases.others()?;
        Ok(cases.rows)
    };
    std::thread::scope(|scope| scope.spawn(rows).join()).map_err(|_| io::Error::other("a panic"))?
}

/// Two sides of one operation, by turns.
fn measure(
    rows: &mut Vec<Row>,
    turn: Duration,
    name: &'static str,
    mut bare: impl FnMut() -> io::Result<()>,
    mut served: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..TURNS {
        for (side, times) in times.iter_mut().enumerate() {
            let (begin, mut count) = (Instant::now(), 0u32);
            while begin.elapsed() < turn {
                for _ in 0..BATCH {
                    if side == 0 { bare() } else { served() }
                        .map_err(|e| io::Error::new(e.kind(), format!("{name}: {e}")))?;
                }
                count += BATCH;
            }
            times.push(begin.elapsed().as_nanos() as f64 / f64::from(count));
        }
    }
    let [bare, served] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    });
    rows.push(Row { name, bare, served });
    Ok(())
}

/// What both sides work on: a directory with a file, a link and a directory of [`ENTRIES`] files.
struct Cases {
    rows: Vec<Row>,
    turn: Duration,
    server: Served,
    root: OwnedFd,
    list: OwnedFd,
    file: OwnedFd,
    /// O_PATH descriptors.
    path: OwnedFd,
    link: OwnedFd,
    /// `path` in `/proc/self/fd`.
    proc_path: CString,
    buffer: Vec<u8>,
    node: u64,
    listed: u64,
    linked: u64,
    fh: u64,
    dir_fh: u64,
}

impl Cases {
    fn new(dir: &Path, turn: Duration) -> io::Result<Cases> {
        fs::write(dir.join("file"), vec![7; 1 << 20])?;
        fs::write(dir.join("a"), "")?;
        fs::create_dir(dir.join("list"))?;
        for entry in 0..ENTRIES {
            fs::write(dir.join("list").join(format!("entry-{entry:03}")), "")?;
        }
        std::os::unix::fs::symlink("target", dir.join("link"))?;
        let mut server = Served::new(dir)?;
        let (root, list) = (OwnedFd::from(File::open(dir)?), OwnedFd::from(File::open(dir.join("list"))?));
        let (path, link) = (look_up(root.as_raw_fd(), c"file")?, look_up(root.as_raw_fd(), c"link")?);
        let (node, listed) = (server.lookup(ROOT_ID, c"file")?, server.lookup(ROOT_ID, c"list")?);
        let linked = server.lookup(ROOT_ID, c"link")?;
        let read_write = OpenIn { flags: libc::O_RDWR as u32, open_flags: 0 };
        let fh = server.get::<OpenOut>(Opcode::Open, node, read_write.as_bytes())?.fh;
        let dir_fh = server.get::<OpenOut>(Opcode::Opendir, listed, OpenIn::default().as_bytes())?.fh;
        Ok(Cases {
            rows: Vec::new(),
            turn,
            server,
            file: open_at(root.as_raw_fd(), c"file", libc::O_RDWR)?,
            proc_path: CString::new(format!("/proc/self/fd/{}", path.as_raw_fd()))?,
            root,
            list,
            path,
            link,
            buffer: vec![7; BUFFER],
            node,
            listed,
            linked,
            fh,
            dir_fh,
        })
    }

    /// Adds the row of an operation. The second side gets the server.
    fn add(
        &mut self,
        name: &'static str,
        bare: impl FnMut() -> io::Result<()>,
        mut served: impl FnMut(&mut Served) -> io::Result<()>,
    ) -> io::Result<()> {
        let server = &mut self.server;
        measure(&mut self.rows, self.turn, name, bare, || served(server))
    }

    /// Adds the row of an operation that is one request.
    fn add_request(
        &mut self,
        name: &'static str,
        (opcode, node, payload): (Opcode, u64, usize),
        body: &[u8],
        bare: impl FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        self.add(name, bare, |s| s.ask(opcode, node, body, payload).map(drop))
    }

    fn look_ups(&mut self) -> io::Result<()> {
        let (root, list, listed) = (self.root.as_raw_fd(), self.list.as_raw_fd(), self.listed);
        let known = c"file".to_bytes_with_nul();
        let bare = || look_up(root, c"file").map(drop);
        self.add_request("LOOKUP, known", (Opcode::Lookup, ROOT_ID, 0), known, bare)?;
        let bare = || {
            // The host keeps a file handle of what the guest forgets: handles in the guest must outlive a FORGET.
            let pin = look_up(list, c"entry-000")?;
            name_to_handle(pin.as_raw_fd())
        };
        self.add("LOOKUP, FORGET", bare, |s| {
            let node = s.lookup(listed, c"entry-000")?;
            s.forget(node)
        })?;
        let missing = c"missing".to_bytes_with_nul();
        self.add(
            "LOOKUP, missing",
            || look_up(root, c"missing").map(drop).or(Ok(())),
            |s| s.ask(Opcode::Lookup, ROOT_ID, missing, 0).map(drop).or(Ok(())),
        )
    }

    fn attributes(&mut self) -> io::Result<()> {
        let (path, proc_path, node) = (self.path.as_raw_fd(), self.proc_path.clone(), self.node);
        let to = self.buffer.as_mut_ptr();
        let get = GetattrIn::default();
        self.add_request("GETATTR", (Opcode::Getattr, node, 0), get.as_bytes(), || stat(path))?;
        let get = StatxIn::default();
        self.add_request("STATX", (Opcode::Statx, node, 0), get.as_bytes(), || stat(path))?;
        let mode = SetattrIn { valid: flags::fattr::MODE, mode: 0o644, ..SetattrIn::default() };
        self.add_request("SETATTR, mode", (Opcode::Setattr, node, 0), mode.as_bytes(), || {
            // SAFETY: a C string.
            check(unsafe { libc::chmod(proc_path.as_ptr(), 0o644) })?;
            stat(path)
        })?;
        let value = b"value";
        let sizes = SetxattrInCompat { size: 5, flags: 0 };
        let set = [sizes.as_bytes(), &with(&SetxattrInExt::default(), c"user.a"), value].concat();
        self.add_request("SETXATTR", (Opcode::Setxattr, node, 0), &set, || {
            let name = c"user.a".as_ptr();
            // SAFETY: C strings and a value of 5 bytes.
            check(unsafe { libc::setxattr(proc_path.as_ptr(), name, value.as_ptr().cast(), 5, 0) }).map(drop)
        })?;
        let get = with(&GetxattrIn { size: 100, padding: 0 }, c"user.a");
        self.add_request("GETXATTR", (Opcode::Getxattr, node, 0), &get, || {
            // SAFETY: C strings, and a buffer that is larger.
            check(unsafe { libc::getxattr(proc_path.as_ptr(), c"user.a".as_ptr(), to.cast(), 100) } as i64).map(drop)
        })?;
        let list = GetxattrIn { size: 1000, padding: 0 };
        self.add_request("LISTXATTR", (Opcode::Listxattr, node, 0), list.as_bytes(), || {
            // SAFETY: a C string, and a buffer that is larger.
            check(unsafe { libc::listxattr(proc_path.as_ptr(), to.cast(), 1000) } as i64).map(drop)
        })?;
        self.add_request("STATFS", (Opcode::Statfs, node, 0), &[], || {
            // SAFETY: all-zero bytes are a valid `statfs`, and there is room for one.
            check(unsafe { libc::fstatfs(path, &mut std::mem::zeroed()) }).map(drop)
        })
    }

    fn data(&mut self) -> io::Result<()> {
        let (file, node, fh) = (self.file.as_raw_fd(), self.node, self.fh);
        let (proc_path, to) = (self.proc_path.clone(), self.buffer.as_mut_ptr());
        let read_write = OpenIn { flags: libc::O_RDWR as u32, open_flags: 0 };
        self.add(
            "OPEN, RELEASE",
            || open_at(libc::AT_FDCWD, &proc_path, libc::O_RDWR).map(drop),
            |s| {
                let fh = s.get::<OpenOut>(Opcode::Open, node, read_write.as_bytes())?.fh;
                s.release(node, fh)
            },
        )?;
        let read = ReadIn { fh, size: BLOCK as u32, ..ReadIn::default() };
        self.add_request("READ, 4 KiB", (Opcode::Read, node, 0), read.as_bytes(), || {
            // SAFETY: the buffer is larger.
            check(unsafe { libc::pread(file, to.cast(), BLOCK, 0) } as i64).map(drop)
        })?;
        let write = WriteIn { fh, size: BLOCK as u32, ..WriteIn::default() };
        self.add_request("WRITE, 4 KiB", (Opcode::Write, node, BLOCK), write.as_bytes(), || {
            // SAFETY: the buffer is larger.
            check(unsafe { libc::pwrite(file, to.cast(), BLOCK, 0) } as i64).map(drop)
        })?;
        let copy = CopyFileRangeIn {
            fh_in: fh,
            nodeid_out: node,
            fh_out: fh,
            off_out: 1 << 19,
            len: BLOCK as u64,
            ..CopyFileRangeIn::default()
        };
        self.add_request("COPY_FILE_RANGE, 4 KiB", (Opcode::CopyFileRange, node, 0), copy.as_bytes(), || {
            let (mut from, mut to) = (0, 1 << 19);
            // SAFETY: descriptors, and two positions.
            check(unsafe { libc::copy_file_range(file, &mut from, file, &mut to, BLOCK, 0) } as i64).map(drop)
        })?;
        let allocate = FallocateIn { fh, length: 1 << 20, ..FallocateIn::default() };
        self.add_request("FALLOCATE", (Opcode::Fallocate, node, 0), allocate.as_bytes(), || {
            // SAFETY: a descriptor.
            check(unsafe { libc::fallocate(file, 0, 0, 1 << 20) }).map(drop)
        })?;
        let hole = LseekIn { fh, whence: libc::SEEK_HOLE as u32, ..LseekIn::default() };
        self.add_request("LSEEK", (Opcode::Lseek, node, 0), hole.as_bytes(), || {
            // SAFETY: a descriptor.
            check(unsafe { libc::lseek(file, 0, libc::SEEK_HOLE) }).map(drop)
        })
    }

    fn names(&mut self) -> io::Result<()> {
        let (root, path) = (self.root.as_raw_fd(), self.path.as_raw_fd());
        let node = self.node;
        let new = c"new".to_bytes_with_nul();
        let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o644, ..CreateIn::default() };
        let bare = || {
            let file = open_at(root, c"new", libc::O_RDWR | libc::O_CREAT)?;
            let pin = look_up(root, c"new")?;
            unlink(root, c"new", 0)?;
            drop((file, pin));
            Ok(())
        };
        self.add("CREATE, UNLINK, RELEASE, FORGET", bare, |s| {
            let made = s.get::<CreateOut>(Opcode::Create, ROOT_ID, &with(&create, c"new"))?;
            s.ask(Opcode::Unlink, ROOT_ID, new, 0)?;
            s.release(made.entry.nodeid, made.open.fh)?;
            s.forget(made.entry.nodeid)
        })?;
        let bare = || {
            // SAFETY: a C string.
            check(unsafe { libc::mkdirat(root, c"new".as_ptr(), 0o755) })?;
            let pin = look_up(root, c"new")?;
            unlink(root, c"new", libc::AT_REMOVEDIR)?;
            drop(pin);
            Ok(())
        };
        let mkdir = MkdirIn { mode: 0o755, umask: 0 };
        self.add("MKDIR, RMDIR, FORGET", bare, |s| {
            let node = s.get::<EntryOut>(Opcode::Mkdir, ROOT_ID, &with(&mkdir, c"new"))?.nodeid;
            s.ask(Opcode::Rmdir, ROOT_ID, new, 0)?;
            s.forget(node)
        })?;
        let bare = || {
            // SAFETY: C strings.
            check(unsafe { libc::symlinkat(c"target".as_ptr(), root, c"new".as_ptr()) })?;
            let pin = look_up(root, c"new")?;
            unlink(root, c"new", 0)?;
            drop(pin);
            Ok(())
        };
        let symlink = [new, c"target".to_bytes_with_nul()].concat();
        self.add("SYMLINK, UNLINK, FORGET", bare, |s| {
            let node = s.get::<EntryOut>(Opcode::Symlink, ROOT_ID, &symlink)?.nodeid;
            s.ask(Opcode::Unlink, ROOT_ID, new, 0)?;
            s.forget(node)
        })?;
        let proc_path = self.proc_path.clone();
        let bare = || {
            let (from, follow) = (proc_path.as_ptr(), libc::AT_SYMLINK_FOLLOW);
            // SAFETY: C strings.
            check(unsafe { libc::linkat(libc::AT_FDCWD, from, root, c"new".as_ptr(), follow) })?;
            stat(path)?;
            unlink(root, c"new", 0)
        };
        let link = with(&LinkIn { oldnodeid: node }, c"new");
        self.add("LINK, UNLINK", bare, |s| {
            s.ask(Opcode::Link, ROOT_ID, &link, 0)?;
            s.ask(Opcode::Unlink, ROOT_ID, new, 0).map(drop)
        })?;
        let names = |from: &CStr, to: &CStr| {
            [with(&RenameIn { newdir: ROOT_ID }, from).as_slice(), to.to_bytes_with_nul()].concat()
        };
        let (there, back) = (names(c"a", c"b"), names(c"b", c"a"));
        let bare = || rename(root, c"a", c"b").and_then(|()| rename(root, c"b", c"a"));
        self.add("RENAME, twice", bare, |s| {
            s.ask(Opcode::Rename, ROOT_ID, &there, 0)?;
            s.ask(Opcode::Rename, ROOT_ID, &back, 0).map(drop)
        })
    }

    fn lists(&mut self) -> io::Result<()> {
        let (list, listed, fh) = (self.list.as_raw_fd(), self.listed, self.dir_fh);
        let to = self.buffer.as_mut_ptr();
        let bare = || open_at(list, c".", libc::O_RDONLY | libc::O_DIRECTORY).map(drop);
        self.add("OPENDIR, RELEASEDIR", bare, |s| {
            let fh = s.get::<OpenOut>(Opcode::Opendir, listed, OpenIn::default().as_bytes())?.fh;
            s.ask(Opcode::Releasedir, listed, ReleaseIn { fh, ..ReleaseIn::default() }.as_bytes(), 0).map(drop)
        })?;
        let entries = || {
            // SAFETY: the buffer is as large.
            check(unsafe {
                libc::lseek(list, 0, libc::SEEK_SET);
                libc::syscall(libc::SYS_getdents64, list, to, 32 << 10)
            })
            .map(drop)
        };
        let all = ReadIn { fh, size: BUFFER as u32, ..ReadIn::default() };
        self.add_request("READDIR, 100 entries", (Opcode::Readdir, listed, 0), all.as_bytes(), entries)?;
        let names: Vec<CString> = (0..ENTRIES).filter_map(|n| CString::new(format!("entry-{n:03}")).ok()).collect();
        self.add_request("READDIRPLUS, 100 entries", (Opcode::Readdirplus, listed, 0), all.as_bytes(), || {
            entries()?;
            names.iter().try_for_each(|name| look_up(list, name).map(drop))
        })
    }

    fn others(&mut self) -> io::Result<()> {
        let (link, linked, to) = (self.link.as_raw_fd(), self.linked, self.buffer.as_mut_ptr());
        self.add_request("READLINK", (Opcode::Readlink, linked, 0), &[], || {
            // SAFETY: the buffer is larger.
            check(unsafe { libc::readlinkat(link, c"".as_ptr(), to.cast(), BLOCK) } as i64).map(drop)
        })?;
        let (file, node, fh) = (self.file.as_raw_fd(), self.node, self.fh);
        let flush = FlushIn { fh, ..FlushIn::default() };
        self.add_request("FLUSH", (Opcode::Flush, node, 0), flush.as_bytes(), || {
            // SAFETY: a descriptor, and its copy, which is closed at once.
            unsafe { libc::close(check(libc::fcntl(file, libc::F_DUPFD_CLOEXEC, 0))? as RawFd) };
            Ok(())
        })?;
        let sync = FsyncIn { fh, ..FsyncIn::default() };
        self.add_request("FSYNC, nothing to write", (Opcode::Fsync, node, 0), sync.as_bytes(), || {
            // SAFETY: a descriptor.
            check(unsafe { libc::fsync(file) }).map(drop)
        })
    }
}
