//! A host to attack, what it must not touch, and what must hold after each attack.

use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::unistd::Pid;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tunnelfs_bench::resources::Resources;
use tunnelfs_bench::session::sibling;

use crate::guest::{op, request, Answer, Hostile};
use crate::stream::Stream;

/// How long anything may take. Long: others may keep the machine busy.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// By how much the host's memory may grow over one attack, KiB: allocators keep some.
const GROWTH: usize = 32 << 10;
const WORDS: &[u8] = b"what every guest may read";
const SECRET: &[u8] = b"what no guest may read";

/// Polls until `done` has a value.
pub fn soon<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A host in a process of its own, on a directory beside others.
pub struct Target {
    scratch: tempfile::TempDir,
    host: Child,
    before: Resources,
    outside: Vec<String>,
    /// Whether messages are streamed.
    streamed: bool,
}

impl Target {
    /// Starts a host with further options; without a sandbox, in which only its checks keep a guest inside.
    pub fn new(options: &[&str]) -> Target {
        Target::inside("none", options)
    }

    /// Files in memory: no disk decides how long anything takes.
    pub fn in_memory(options: &[&str]) -> Target {
        // `.ci/mutants` names a folder of its own, in which it unmounts what a test that it kills leaves.
        let folder = std::env::var_os("TUNNELFS_TEST_SHM").unwrap_or_else(|| "/dev/shm".into());
        Target::on(tempfile::tempdir_in(folder).unwrap(), "none", options)
    }

    /// Starts a host in a sandbox.
    pub fn inside(sandbox: &str, options: &[&str]) -> Target {
        Target::on(tempfile::tempdir().unwrap(), sandbox, options)
    }

    fn on(scratch: tempfile::TempDir, sandbox: &str, options: &[&str]) -> Target {
        for dir in ["share", "share/sub", "outside", "outside/dir"] {
            fs::create_dir(scratch.path().join(dir)).unwrap();
        }
        fs::write(scratch.path().join("share/words"), WORDS).unwrap();
        for file in ["secret", "outside/secret", "outside/dir/secret"] {
            fs::write(scratch.path().join(file), SECRET).unwrap();
        }
        let socket = scratch.path().join("socket");
        let mut command = Command::new(sibling("tunnelfs-host").unwrap());
        command.arg("--socket-path").arg(&socket).arg("--shared-dir").arg(scratch.path().join("share"));
        command.args(["--num-request-queues", "2", "--sandbox", sandbox]).args(options).stdin(Stdio::null());
        // What it has to say about its guests fills screens.
        command.env("RUST_LOG", "error").stderr(Stdio::null());
        let host = command.spawn().unwrap();
        let streamed = options.contains(&"socket");
        let mut target = Target { scratch, host, before: Resources::default(), outside: Vec::new(), streamed };
        soon("the host listens", || std::os::unix::net::UnixStream::connect(&socket).ok());
        target.honest_guest();
        // Allocators and thread pools warm up.
        target.honest_guest();
        target.before = Resources::at_rest(target.worker());
        target.outside = target.outside_now();
        target
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("socket")
    }

    /// A new connection, set up as a driver would.
    pub fn guest(&self) -> Hostile {
        Hostile::connect(&self.socket())
    }

    /// What must hold after `attack`, whose connections are closed.
    pub fn check(&mut self, attack: &str) {
        assert!(self.host.try_wait().unwrap().is_none(), "{attack}: the host has died");
        self.honest_guest();
        assert_eq!(self.outside_now(), self.outside, "{attack}: the host has touched what it does not share");
        let start = Instant::now();
        loop {
            let (now, before) = (Resources::of(self.worker()), self.before);
            if now.descriptors <= before.descriptors
                && now.threads <= before.threads
                && now.resident_kib <= before.resident_kib + GROWTH
            {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{attack}: the host holds {now:?}, and held {before:?} before");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The next guest reads. (The last one may have renamed the file, as it is allowed to.)
    fn honest_guest(&self) {
        let words = self.path("share/words");
        let _ = fs::remove_dir_all(&words).or_else(|_| fs::remove_file(&words));
        fs::write(words, WORDS).unwrap();
        if self.streamed {
            // Of another guest's connections, some may still be about to end.
            return soon("the next guest", || {
                let mut stream = Stream::connect(&self.socket());
                read_words(|message| stream.call(message))
            });
        }
        let mut guest = self.guest();
        assert_eq!(guest.call(0, &request(op::INIT, 0, &op::init_body())).unwrap().error, 0);
        let mut ring = guest.ring(1);
        read_words(|message| ring.call(&guest, message)).expect("the next guest is answered");
    }

    /// The process that serves: in a sandbox a child of the one that was started.
    fn worker(&self) -> Pid {
        Pid::from_raw(youngest(self.host.id()) as i32)
    }

    /// Everything beside the shared directory, with contents and times.
    fn outside_now(&self) -> Vec<String> {
        let mut seen = Vec::new();
        for name in ["", "secret", "outside"] {
            note(&self.path(name), !name.is_empty(), &mut seen);
        }
        seen
    }
}

fn youngest(pid: u32) -> u32 {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().next().map_or(pid, |child| youngest(child.parse().unwrap()))
}

/// Opens and reads what every guest may; `None` where it is not answered.
fn read_words(mut call: impl FnMut(&[u8]) -> Option<Answer>) -> Option<()> {
    assert_eq!(call(&request(op::INIT, 0, &op::init_body()))?.error, 0);
    let node = call(&request(op::LOOKUP, 1, b"words\0"))?.word(0);
    let handle = call(&request(op::OPEN, node, &op::words(&[0, 0])))?.word(0);
    let reply = call(&request(op::READ, node, &op::read_body(handle, 0, 4096)))?;
    assert_eq!((reply.error, &reply.payload[..]), (0, WORDS), "the next guest");
    Some(())
}

fn note(path: &Path, deep: bool, seen: &mut Vec<String>) {
    let meta = fs::symlink_metadata(path).unwrap();
    let (times, ids) = ((meta.mtime_nsec(), meta.ctime_nsec()), (meta.mode(), meta.uid(), meta.nlink()));
    let content = if meta.is_file() { fs::read(path).unwrap() } else { Vec::new() };
    seen.push(format!("{} {times:?} {ids:?} {content:?}", path.display()));
    if deep && meta.is_dir() {
        let mut entries: Vec<_> = fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect();
        entries.sort();
        entries.iter().for_each(|entry| note(entry, true, seen));
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.host.kill();
        let _ = self.host.wait();
    }
}

/// Whether `bytes` hold what is outside.
pub fn has_secret(bytes: &[u8]) -> bool {
    bytes.windows(SECRET.len()).any(|w| w == SECRET)
}

/// Unsealed memory, as long as it is wanted.
pub fn memory_file(bytes: usize) -> fs::File {
    let fd = memfd_create(c"hostile", MFdFlags::MFD_CLOEXEC).unwrap();
    let file = fs::File::from(fd);
    file.set_len(bytes as u64).unwrap();
    file
}

/// Numbers from a seed (xorshift), the same on each run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.next() as usize % list.len()]
    }
}
