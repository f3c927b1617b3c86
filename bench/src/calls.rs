//! What an operation costs in the host's file server, beside the bare system calls that it needs: both in one process,
//! in turn, without a transport.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::hint::black_box;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::zerocopy::{FromBytes, Immutable, IntoBytes};
use tunnelfs_fuse_abi::*;
use tunnelfs_host::fs::Passthrough;
use tunnelfs_host::fs_builder;
use tunnelfs_host::guest_buf::GuestBuf;
use tunnelfs_host::handler::{Handler, Outcome, Reply};
use tunnelfs_host::Server;
use tunnelfs_settings::Host;

/// Turns of each side, of which the median counts; and how long one lasts.
const TURNS: usize = 15;
/// Bytes of the buffer behind a request, and of READ and WRITE.
const BUFFER: usize = 64 << 10;
const BLOCK: usize = 4096;
/// Entries of the directory that is listed.
const ENTRIES: usize = 100;

/// One operation's row.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was done.
    pub name: &'static str,
    /// The bare calls, nanoseconds.
    pub bare: f64,
    /// The file server, nanoseconds.
    pub served: f64,
}

/// A server that is called as a function.
struct Served {
    server: Server<Passthrough>,
    buffer: Vec<u8>,
    /// The request's first bytes, as a transport has copied them.
    head: Vec<u8>,
    unique: u64,
}

impl Served {
    fn new(dir: &Path) -> io::Result<Served> {
        let host = Host { shared_dir: dir.into(), xattr: true, ..Host::default() };
        let server = Server::new(fs_builder::open(&host)?);
        let mut served = Served { server, buffer: vec![0; BUFFER], head: Vec::new(), unique: 0 };
        let init = InitInCompat { major: MAJOR, minor: MINOR, max_readahead: 1 << 20, flags: !0 };
        let ext = InitInExt { flags2: !flags::init::SUBMOUNTS as u32, ..InitInExt::default() };
        served.ask(Opcode::Init, ROOT_ID, &[init.as_bytes(), ext.as_bytes()].concat(), 0)?;
        Ok(served)
    }

    /// Bytes of the reply's structure; `payload`: bytes of WRITE data.
    fn ask(&mut self, opcode: Opcode, node: u64, body: &[u8], payload: usize) -> io::Result<Reply> {
        self.unique += 1;
        let len = (size_of::<InHeader>() + body.len() + payload) as u32;
        let header = InHeader { len, opcode: opcode as u32, unique: self.unique, nodeid: node, ..InHeader::default() };
        self.head.clear();
        self.head.extend_from_slice(header.as_bytes());
        self.head.extend_from_slice(body);
        let part = |len| [libc::iovec { iov_base: self.buffer.as_ptr().cast_mut().cast(), iov_len: len }];
        let (input, output) = (part(payload), part(BUFFER));
        // SAFETY: both lie in this object's buffer, which nobody looks at meanwhile.
        let (input, output) = unsafe { (GuestBuf::new(&input), GuestBuf::new(&output)) };
        match self.server.handle(&self.head, input, output, None) {
            Outcome::Reply(reply) if reply.error == 0 => Ok(reply),
            Outcome::Reply(reply) => Err(io::Error::from_raw_os_error(-reply.error)),
            _ => Ok(Reply::ok()),
        }
    }

    fn get<T: FromBytes>(&mut self, opcode: Opcode, node: u64, body: &[u8]) -> io::Result<T> {
        let reply = self.ask(opcode, node, body, 0)?;
        T::read_from_prefix(reply.body()).map(|(value, _)| value).map_err(|_| io::Error::other("a short reply"))
    }

    fn lookup(&mut self, node: u64, name: &CStr) -> io::Result<u64> {
        Ok(self.get::<EntryOut>(Opcode::Lookup, node, name.to_bytes_with_nul())?.nodeid)
    }

    fn forget(&mut self, node: u64) -> io::Result<()> {
        self.ask(Opcode::Forget, node, ForgetIn { nlookup: 1 }.as_bytes(), 0).map(|_| ())
    }
}

/// A structure and what follows it.
fn with<T: IntoBytes + Immutable>(value: &T, rest: &CStr) -> Vec<u8> {
    [value.as_bytes(), rest.to_bytes_with_nul()].concat()
}

fn check(result: impl Into<i64>) -> io::Result<i64> {
    let result = result.into();
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn open_at(dir: RawFd, name: &CStr, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: a descriptor of the caller's and a C string; the result is owned here.
    unsafe { Ok(OwnedFd::from_raw_fd(check(libc::openat(dir, name.as_ptr(), flags | libc::O_CLOEXEC, 0o644))? as i32)) }
}

fn stat(fd: RawFd) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid `statx`, and there is room for one.
    unsafe {
        let mut st = std::mem::zeroed::<libc::statx>();
        let mask = libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID;
        check(libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, mask, &raw mut st))?;
        black_box(st.stx_ino);
    }
    Ok(())
}

/// The bare calls of a LOOKUP; the descriptor stays open.
fn look_up(dir: RawFd, name: &CStr) -> io::Result<OwnedFd> {
    let fd = open_at(dir, name, libc::O_PATH | libc::O_NOFOLLOW)?;
    stat(fd.as_raw_fd())?;
    Ok(fd)
}

/// Two sides of one operation, by turns.
fn measure(
    rows: &mut Vec<Row>,
    name: &'static str,
    turn: Duration,
    mut bare: impl FnMut() -> io::Result<()>,
    mut served: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..TURNS {
        for (side, times) in times.iter_mut().enumerate() {
            let (begin, mut count) = (Instant::now(), 0u32);
            while begin.elapsed() < turn {
                for _ in 0..16 {
                    if side == 0 { bare() } else { served() }
                        .map_err(|e| io::Error::new(e.kind(), format!("{name}: {e}")))?;
                }
                count += 16;
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

/// Measures the operations of a mount in a new directory, on a thread of its own.
///
/// # Errors
/// The file system's.
pub fn run(dir: &Path, turn: Duration) -> io::Result<Vec<Row>> {
    std::thread::scope(|scope| scope.spawn(|| rows(dir, turn)).join()).map_err(|_| io::Error::other("a panic"))?
}

#[allow(clippy::too_many_lines)] // A table.
fn rows(dir: &Path, turn: Duration) -> io::Result<Vec<Row>> {
    fs::write(dir.join("file"), vec![7; 1 << 20])?;
    fs::create_dir(dir.join("list"))?;
    for entry in 0..ENTRIES {
        fs::write(dir.join("list").join(format!("entry-{entry:03}")), "")?;
    }
    std::os::unix::fs::symlink("target", dir.join("link"))?;
    let mut s = Served::new(dir)?;
    let (root, list) = (File::open(dir)?, File::open(dir.join("list"))?);
    let (root, list) = (root.as_raw_fd(), list.as_raw_fd());
    let path = look_up(root, c"file")?;
    let path = path.as_raw_fd();
    let file = open_at(root, c"file", libc::O_RDWR)?;
    let file = file.as_raw_fd();
    let proc_path = CString::new(format!("/proc/self/fd/{path}"))?;
    let link = look_up(root, c"link")?;
    let node = s.lookup(ROOT_ID, c"file")?;
    let listed = s.lookup(ROOT_ID, c"list")?;
    let linked = s.lookup(ROOT_ID, c"link")?;
    let read_write = OpenIn { flags: libc::O_RDWR as u32, open_flags: 0 };
    let fh = s.get::<OpenOut>(Opcode::Open, node, read_write.as_bytes())?.fh;
    let dir_fh = s.get::<OpenOut>(Opcode::Opendir, listed, OpenIn::default().as_bytes())?.fh;
    let mut buffer = vec![7u8; BUFFER];
    let mut out = Vec::new();
    let rows = &mut out;

    let known = c"file".to_bytes_with_nul();
    measure(
        rows,
        "LOOKUP, known",
        turn,
        || look_up(root, c"file").map(drop),
        || s.ask(Opcode::Lookup, ROOT_ID, known, 0).map(drop),
    )?;
    measure(
        rows,
        "LOOKUP, FORGET",
        turn,
        || look_up(list, c"entry-000").map(drop),
        || {
            let node = s.lookup(listed, c"entry-000")?;
            s.forget(node)
        },
    )?;
    let missing = c"missing".to_bytes_with_nul();
    measure(
        rows,
        "LOOKUP, missing",
        turn,
        || look_up(root, c"missing").map(drop).or(Ok(())),
        || s.ask(Opcode::Lookup, ROOT_ID, missing, 0).map(drop).or(Ok(())),
    )?;
    let get = GetattrIn::default();
    measure(rows, "GETATTR", turn, || stat(path), || s.ask(Opcode::Getattr, node, get.as_bytes(), 0).map(drop))?;
    measure(
        rows,
        "STATX",
        turn,
        || stat(path),
        || s.ask(Opcode::Statx, node, StatxIn::default().as_bytes(), 0).map(drop),
    )?;
    let mode = SetattrIn { valid: flags::fattr::MODE, mode: 0o644, ..SetattrIn::default() };
    let chmod = || {
        // SAFETY: a C string.
        check(unsafe { libc::chmod(proc_path.as_ptr(), 0o644) })?;
        stat(path)
    };
    measure(rows, "SETATTR, mode", turn, chmod, || s.ask(Opcode::Setattr, node, mode.as_bytes(), 0).map(drop))?;
    let reopen = || open_at(libc::AT_FDCWD, &proc_path, libc::O_RDWR).map(drop);
    measure(rows, "OPEN, RELEASE", turn, reopen, || {
        let fh = s.get::<OpenOut>(Opcode::Open, node, read_write.as_bytes())?.fh;
        s.ask(Opcode::Release, node, ReleaseIn { fh, ..ReleaseIn::default() }.as_bytes(), 0).map(drop)
    })?;
    let read = ReadIn { fh, size: BLOCK as u32, ..ReadIn::default() };
    let to = buffer.as_mut_ptr();
    // SAFETY: the buffer is larger.
    let pread = || check(unsafe { libc::pread(file, to.cast(), BLOCK, 0) } as i64).map(drop);
    measure(rows, "READ, 4 KiB", turn, pread, || s.ask(Opcode::Read, node, read.as_bytes(), 0).map(drop))?;
    let write = WriteIn { fh, size: BLOCK as u32, ..WriteIn::default() };
    // SAFETY: the buffer is larger.
    let pwrite = || check(unsafe { libc::pwrite(file, to.cast(), BLOCK, 0) } as i64).map(drop);
    measure(rows, "WRITE, 4 KiB", turn, pwrite, || s.ask(Opcode::Write, node, write.as_bytes(), BLOCK).map(drop))?;
    let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o644, ..CreateIn::default() };
    let bare_create = || {
        let new = open_at(root, c"new", libc::O_RDWR | libc::O_CREAT)?;
        let pin = look_up(root, c"new")?;
        // SAFETY: a C string.
        check(unsafe { libc::unlinkat(root, c"new".as_ptr(), 0) })?;
        drop((new, pin));
        Ok(())
    };
    measure(rows, "CREATE, UNLINK, RELEASE, FORGET", turn, bare_create, || {
        let made = s.get::<CreateOut>(Opcode::Create, ROOT_ID, &with(&create, c"new"))?;
        let (node, fh) = (made.entry.nodeid, made.open.fh);
        s.ask(Opcode::Unlink, ROOT_ID, c"new".to_bytes_with_nul(), 0)?;
        s.ask(Opcode::Release, node, ReleaseIn { fh, ..ReleaseIn::default() }.as_bytes(), 0)?;
        s.forget(node)
    })?;
    let bare_mkdir = || {
        // SAFETY: C strings.
        check(unsafe { libc::mkdirat(root, c"dir".as_ptr(), 0o755) })?;
        let pin = look_up(root, c"dir")?;
        // SAFETY: as above.
        check(unsafe { libc::unlinkat(root, c"dir".as_ptr(), libc::AT_REMOVEDIR) })?;
        drop(pin);
        Ok(())
    };
    let mkdir = MkdirIn { mode: 0o755, umask: 0 };
    measure(rows, "MKDIR, RMDIR, FORGET", turn, bare_mkdir, || {
        let node = s.get::<EntryOut>(Opcode::Mkdir, ROOT_ID, &with(&mkdir, c"dir"))?.nodeid;
        s.ask(Opcode::Rmdir, ROOT_ID, c"dir".to_bytes_with_nul(), 0)?;
        s.forget(node)
    })?;
    fs::write(dir.join("a"), "")?;
    let rename = |from: &CStr, to: &CStr| {
        // SAFETY: C strings.
        check(unsafe { libc::syscall(libc::SYS_renameat2, root, from.as_ptr(), root, to.as_ptr(), 0) }).map(drop)
    };
    let names = |from: &CStr, to: &CStr| {
        with(&RenameIn { newdir: ROOT_ID }, from)
            .into_iter()
            .chain(to.to_bytes_with_nul().iter().copied())
            .collect::<Vec<u8>>()
    };
    let (there, back) = (names(c"a", c"b"), names(c"b", c"a"));
    measure(
        rows,
        "RENAME, twice",
        turn,
        || rename(c"a", c"b").and_then(|()| rename(c"b", c"a")),
        || {
            s.ask(Opcode::Rename, ROOT_ID, &there, 0)?;
            s.ask(Opcode::Rename, ROOT_ID, &back, 0).map(drop)
        },
    )?;
    let read_link = || {
        // SAFETY: the buffer is larger.
        check(unsafe { libc::readlinkat(link.as_raw_fd(), c"".as_ptr(), to.cast(), 4096) } as i64).map(drop)
    };
    measure(rows, "READLINK", turn, read_link, || s.ask(Opcode::Readlink, linked, &[], 0).map(drop))?;
    let entries = |to: *mut u8| {
        // SAFETY: the buffer is as large.
        check(unsafe {
            libc::lseek(list, 0, libc::SEEK_SET);
            libc::syscall(libc::SYS_getdents64, list, to, 32 << 10)
        })
        .map(drop)
    };
    let all = ReadIn { fh: dir_fh, size: BUFFER as u32, ..ReadIn::default() };
    measure(
        rows,
        "READDIR, 100 entries",
        turn,
        || entries(to),
        || s.ask(Opcode::Readdir, listed, all.as_bytes(), 0).map(drop),
    )?;
    let names: Vec<CString> = (0..ENTRIES).filter_map(|n| CString::new(format!("entry-{n:03}")).ok()).collect();
    let look_up_all = || {
        entries(to)?;
        names.iter().try_for_each(|name| look_up(list, name).map(drop))
    };
    measure(rows, "READDIRPLUS, 100 entries", turn, look_up_all, || {
        s.ask(Opcode::Readdirplus, listed, all.as_bytes(), 0).map(drop)
    })?;
    let stat_fs = || {
        // SAFETY: all-zero bytes are a valid `statfs`, and there is room for one.
        check(unsafe { libc::fstatfs(path, &mut std::mem::zeroed()) }).map(drop)
    };
    measure(rows, "STATFS", turn, stat_fs, || s.ask(Opcode::Statfs, node, &[], 0).map(drop))?;
    // SAFETY: C strings.
    unsafe { libc::setxattr(proc_path.as_ptr(), c"user.a".as_ptr(), c"value".as_ptr().cast(), 5, 0) };
    let get = with(&GetxattrIn { size: 100, padding: 0 }, c"user.a");
    let get_xattr = || {
        // SAFETY: C strings, and a buffer that is larger.
        check(unsafe { libc::getxattr(proc_path.as_ptr(), c"user.a".as_ptr(), to.cast(), 100) } as i64)
            .map(drop)
            .or(Ok(()))
    };
    measure(rows, "GETXATTR", turn, get_xattr, || s.ask(Opcode::Getxattr, node, &get, 0).map(drop).or(Ok(())))?;
    let allocate = FallocateIn { fh, length: 1 << 20, ..FallocateIn::default() };
    // SAFETY: a descriptor.
    let bare_allocate = || check(unsafe { libc::fallocate(file, 0, 0, 1 << 20) }).map(drop);
    measure(rows, "FALLOCATE", turn, bare_allocate, || {
        s.ask(Opcode::Fallocate, node, allocate.as_bytes(), 0).map(drop)
    })?;
    let hole = LseekIn { fh, whence: libc::SEEK_HOLE as u32, ..LseekIn::default() };
    // SAFETY: a descriptor.
    let bare_seek = || check(unsafe { libc::lseek(file, 0, libc::SEEK_HOLE) }).map(drop);
    measure(rows, "LSEEK", turn, bare_seek, || s.ask(Opcode::Lseek, node, hole.as_bytes(), 0).map(drop))?;
    Ok(out)
}

/// The rows as a Markdown table.
pub fn table(title: &str, rows: &[Row]) -> String {
    let mut text = format!("| {title} | bare calls, us | direct call, us | ratio |\n|---|--:|--:|--:|\n");
    for Row { name, bare, served } in rows {
        text += &format!("| {name} | {:.2} | {:.2} | {:.2} |\n", bare / 1e3, served / 1e3, served / bare);
    }
    text
}
