//! A host is killed, and another one takes its place: programs only wait.

use crate::rig::{is_listening, is_mounted, server, soon, Guest, Host, Peer, Scratch, FEATURES, PATIENCE, PROMPT};
use crate::{peer, unmount_what_is_left, within, work_until_it_fails, ALL};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use tunnelfs_bench::session::{sibling, virtiofsd};

/// A shell that starts hosts. This process must not while it has files open on the mount: a new process closes them
/// before anything else, and that waits for the host.
struct Starter {
    shell: Child,
    said: BufReader<ChildStdout>,
}

impl Starter {
    fn new() -> Starter {
        let mut shell = Command::new("sh").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(shell.stdout.take().unwrap());
        Starter { shell, said }
    }

    fn start(&mut self, command: &str) -> u32 {
        let shell = self.shell.stdin.as_mut().unwrap();
        writeln!(shell, "{command} </dev/null >&2 &\necho $!").unwrap();
        let mut pid = String::new();
        self.said.read_line(&mut pid).unwrap();
        pid.trim().parse().unwrap()
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

fn kill_now(pid: Pid) {
    kill(pid, Signal::SIGKILL).unwrap();
}

/// A mount whose hosts come and go.
pub struct Served {
    // In the order in which they go.
    pub guest: Guest,
    first: Option<Host>,
    /// The process of a later one.
    later: Option<u32>,
    starter: Starter,
    scratch: Scratch,
    peer: Peer,
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(host) = self.later.take() {
            kill_now(server(host));
        }
    }
}

impl Served {
    pub fn new(channel: &str, transport: &str, words: &str) -> Option<Served> {
        Some(Served::on(Scratch::for_channel(channel)?, channel, transport, words))
    }

    pub fn on(scratch: Scratch, channel: &str, transport: &str, words: &str) -> Served {
        Served::by(peer(transport), scratch, channel, transport, words)
    }

    fn by(peer: Peer, scratch: Scratch, channel: &str, transport: &str, words: &str) -> Served {
        let host = Host::start(&scratch, peer);
        let guest = Guest::mount(&scratch, &host, &format!("channel={channel},transport={transport}{words}"));
        Served { guest, first: Some(host), later: None, starter: Starter::new(), scratch, peer }
    }

    /// On the mount.
    pub fn path(&self, name: &str) -> PathBuf {
        self.guest.point.join(name)
    }

    /// In the shared directory itself.
    pub fn behind(&self, name: &str) -> PathBuf {
        self.scratch.path("share").join(name)
    }

    pub fn kill_host(&mut self) {
        match self.first.take() {
            Some(host) => kill_now(host.server()),
            None => kill_now(server(self.later.take().expect("there is one"))),
        }
        let socket = self.scratch.path("socket");
        soon("it is dead", || (!is_listening(&socket)).then_some(()));
    }

    pub fn next_host(&mut self) {
        self.next_host_with(FEATURES);
    }

    fn next_host_with(&mut self, options: &[&str]) {
        let (socket, share) = (self.scratch.path("socket"), self.scratch.path("share"));
        let (program, words) = match self.peer {
            Peer::Virtiofsd => (virtiofsd().unwrap(), "--sandbox none --log-level error --tag t"),
            Peer::Stream => (sibling("tunnelfs-host").unwrap(), "--num-request-queues 2 --transport socket"),
            Peer::Ours => (sibling("tunnelfs-host").unwrap(), "--num-request-queues 2"),
        };
        let command = format!(
            "{} --socket-path {} --shared-dir {} {words} {}",
            program.display(),
            socket.display(),
            share.display(),
            options.join(" ")
        );
        self.later = Some(self.starter.start(&command));
        soon("the host listens", || is_listening(&socket).then_some(()));
    }

    fn another_host(&mut self) {
        self.kill_host();
        self.next_host();
    }

    pub fn unmount(&mut self) {
        let point = &self.guest.point;
        // What another test starts has copies of our descriptors for a moment.
        soon("it is unmounted", || nix::mount::umount2(point, nix::mount::MntFlags::empty()).ok());
        let status = self.guest.ended();
        assert!(status.success(), "{status}: {}", self.guest.output());
    }
}

fn open(path: PathBuf) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

/// A read that the page cache does not answer.
fn read_direct(path: &Path) -> io::Result<Vec<u8>> {
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?;
    let mut page = Box::new(Page([0; 4096]));
    let n = file.read_at(&mut page.0, 0)?;
    Ok(page.0[..n].to_vec())
}

/// `cat` that waits for a line before it reads the file, in a directory of the mount.
fn cat_in(dir: &Path) -> Child {
    let mut command = Command::new("sh");
    command.args(["-c", "read go; cat f; ls"]).current_dir(dir).stdin(Stdio::piped()).stdout(Stdio::piped());
    command.spawn().unwrap()
}

#[test]
fn names_files_and_directories_go_on() {
    for (channel, transport) in ALL {
        let Some(mut served) = Served::new(channel, transport, "") else { continue };
        let what = format!("{channel}, {transport}");
        fs::create_dir_all(served.path("a/b")).unwrap();
        fs::write(served.path("a/b/f"), "inside").unwrap();
        let files = ["stays", "gone", "renamed", "moved"].map(|name| open(served.path(name)));
        let [stays, gone, renamed, moved] = &files;
        files.iter().for_each(|file| file.write_all_at(b"before", 0).unwrap());
        fs::hard_link(served.path("stays"), served.path("link")).unwrap();
        fs::rename(served.path("renamed"), served.path("a/new name")).unwrap();
        fs::remove_file(served.path("gone")).unwrap();
        (0..600).for_each(|i| drop(File::create(served.behind("a/b").join(format!("entry{i}"))).unwrap()));
        let mut stream = fs::read_dir(served.path("a/b")).unwrap();
        let mut seen: Vec<_> = stream.by_ref().take(50).map(|entry| entry.unwrap().file_name()).collect();
        let mut cat = cat_in(&served.path("a/b"));

        served.kill_host();
        fs::rename(served.behind("moved"), served.behind("elsewhere")).unwrap();
        served.next_host();

        assert_eq!(fs::read(served.path("a/b/f")).unwrap(), b"inside", "{what}");
        stays.write_all_at(b"after", 100_000).unwrap();
        stays.sync_all().unwrap();
        assert_eq!(fs::read(served.behind("stays")).unwrap()[100_000..], *b"after");
        assert!(fs::read(served.path("link")).unwrap().ends_with(b"after"), "{what}: one file of two names");
        renamed.write_all_at(b"AFTER!", 0).unwrap();
        assert_eq!(fs::read(served.behind("a/new name")).unwrap(), b"AFTER!");
        for (file, name) in [(gone, "deleted"), (moved, "renamed behind us")] {
            assert_eq!(errno(file.write_at(b"x", 0)), Some(libc::ESTALE), "{what}: {name}");
            assert_eq!(errno(file.sync_all()), Some(libc::ESTALE), "{what}: {name}");
        }
        assert_eq!(fs::read(served.path("elsewhere")).unwrap(), b"before");
        seen.extend(stream.map(|entry| entry.unwrap().file_name()));
        seen.sort();
        let len = seen.len();
        seen.dedup();
        assert_eq!((seen.len(), len), (601, 601), "{what}: each entry once");
        cat.stdin.take().unwrap().write_all(b"go\n").unwrap();
        let output = cat.wait_with_output().unwrap();
        assert!(output.stdout.starts_with(b"inside") && output.status.success(), "{what}: {output:?}");
        drop(files);
        fs::write(served.path("new"), "new").unwrap();
        served.another_host();
        assert_eq!(fs::read(served.path("new")).unwrap(), b"new");
        fs::remove_dir_all(served.path("a")).unwrap();
        served.unmount();
    }
}

/// Writes, syncs and reads; any error and any wrong byte is one too many.
fn work(path: &Path, seed: usize, until: &AtomicBool) {
    let file = open(path.to_owned());
    for n in seed.. {
        let (at, data) = ((n % 7) as u64 * 300_000, vec![n as u8; 200_000]);
        file.write_all_at(&data, at).unwrap();
        if n % 3 == 0 {
            file.sync_all().unwrap();
        }
        let mut back = vec![0; data.len()];
        file.read_exact_at(&mut back, at).unwrap();
        assert!(back == data, "wrong bytes in {}", path.display());
        let other = path.with_extension(format!("{}", n % 2));
        fs::write(&other, &data[..5000]).unwrap();
        assert!(read_direct(&other).unwrap() == data[..4096]);
        if until.load(Ordering::Acquire) {
            return;
        }
    }
}

#[test]
fn what_is_under_way_is_repeated() {
    for (channel, transport) in ALL {
        let Some(mut served) = Served::new(channel, transport, "") else { continue };
        let paths: Vec<_> = (0..3).map(|i| served.path(&format!("file{i}"))).collect();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for (i, path) in paths.iter().enumerate() {
                let done = &done;
                scope.spawn(move || work(path, i, done));
            }
            for round in 0..3 {
                std::thread::sleep(Duration::from_millis(150 + 40 * round));
                served.kill_host();
                std::thread::sleep(Duration::from_millis(60 * round));
                served.next_host();
            }
            std::thread::sleep(Duration::from_millis(200));
            done.store(true, Ordering::Release);
        });
        served.unmount();
    }
}

/// The guest keeps all that the next host must know: one that knows nothing of this will do.
#[test]
fn stock_hosts_take_over_too() {
    if virtiofsd().is_none() {
        return crate::skip::lacking("virtiofsd is not installed (`make deps`)");
    }
    for channel in ["uring", "fuse"] {
        let Some(scratch) = Scratch::for_channel(channel) else { continue };
        let mut served = Served::by(Peer::Virtiofsd, scratch, channel, "ring", "");
        let done = AtomicBool::new(false);
        let path = served.path("file");
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| work(&path, 1, &done));
            for _ in 0..3 {
                std::thread::sleep(Duration::from_millis(150));
                served.another_host();
            }
            std::thread::sleep(Duration::from_millis(100));
            done.store(true, Ordering::Release);
            worker.join().unwrap();
        });
        served.unmount();
    }
}

/// What cannot be repeated has happened, or not, or is an error: never twice, never lost when it was said to be done.
#[test]
fn what_happens_happens_once() {
    for (channel, transport) in [("uring", "ring"), ("fuse", "virtqueue"), ("fuse", "socket")] {
        let Some(mut served) = Served::new(channel, transport, "") else { continue };
        let (dir, done) = (served.path("d"), AtomicBool::new(false));
        fs::create_dir(&dir).unwrap();
        let allowed = |result: io::Result<()>, what: &str| match result {
            Ok(()) => true,
            Err(e) if e.raw_os_error() == Some(libc::EIO) => false,
            Err(e) => panic!("{channel}, {transport}: {what}: {e}"),
        };
        std::thread::scope(|scope| {
            let (dir, done, allowed) = (&dir, &done, &allowed);
            scope.spawn(move || {
                for n in 0.. {
                    let (a, b) = (dir.join(format!("a{n}")), dir.join(format!("b{n}")));
                    let made = allowed(fs::create_dir(&a), "mkdir");
                    assert!(!made || a.is_dir(), "{}", a.display());
                    let moved = made && allowed(fs::rename(&a, &b), "rename");
                    assert!(!moved || b.is_dir() && !a.exists(), "{}", b.display());
                    let removed = moved && allowed(fs::remove_dir(&b), "rmdir");
                    assert!(!removed || !b.exists());
                    let new = File::create_new(dir.join(format!("c{n}")));
                    allowed(new.map(drop), "create");
                    if done.load(Ordering::Acquire) {
                        return;
                    }
                }
            });
            scope.spawn(move || {
                let mut log = OpenOptions::new().append(true).create(true).open(dir.join("log")).unwrap();
                let mut expected = Vec::new();
                for n in 0u32.. {
                    expected.push((n, allowed(log.write_all(&n.to_ne_bytes()), "append")));
                    if done.load(Ordering::Acquire) {
                        break;
                    }
                }
                let bytes = fs::read(dir.join("log")).unwrap();
                let mut found = bytes.chunks_exact(4).map(|n| u32::from_ne_bytes(n.try_into().unwrap())).peekable();
                for (n, told) in expected {
                    let is_there = found.next_if_eq(&n).is_some();
                    assert!(is_there || !told, "{channel}, {transport}: record {n} of the log is lost");
                }
                assert_eq!(found.next(), None, "{channel}, {transport}: nothing twice");
            });
            for round in 0..4 {
                std::thread::sleep(Duration::from_millis(120 + 30 * round));
                served.another_host();
            }
            std::thread::sleep(Duration::from_millis(100));
            done.store(true, Ordering::Release);
        });
        served.unmount();
    }
}

#[test]
fn another_directory_is_stale_until_the_right_one_is_back() {
    for (channel, transport) in [("uring", "ring"), ("fuse", "socket")] {
        let Some(mut served) = Served::new(channel, transport, "") else { continue };
        let file = open(served.path("f"));
        file.write_all_at(b"x", 0).unwrap();
        served.kill_host();
        let (share, aside) = (served.scratch.path("share"), served.scratch.path("aside"));
        fs::rename(&share, &aside).unwrap();
        fs::create_dir(&share).unwrap();
        fs::write(share.join("f"), "another").unwrap();
        served.next_host();
        assert_eq!(errno(file.write_at(b"y", 0)), Some(libc::ESTALE));
        assert_eq!(errno(fs::read_dir(served.path("")).map(drop)), Some(libc::ESTALE));
        served.kill_host();
        fs::remove_dir_all(&share).unwrap();
        fs::rename(&aside, &share).unwrap();
        served.next_host();
        file.write_all_at(b"y", 0).unwrap();
        assert_eq!(fs::read(share.join("f")).unwrap(), b"y");
        drop(file);
        served.unmount();
    }
}

/// The mount waits on: the host that is started as it should be takes over.
#[test]
fn a_host_that_agrees_to_less_is_refused_and_named() {
    for (channel, transport) in [("uring", "ring"), ("fuse", "socket")] {
        let Some(mut served) = Served::new(channel, transport, "") else { continue };
        fs::write(served.path("f"), "x").unwrap();
        served.kill_host();
        served.next_host_with(&["--xattr", "--no-readdirplus"]);
        let path = served.path("f");
        let waiting = std::thread::spawn(move || fs::write(path, "y"));
        let refusals = |served: &Served| served.guest.output().matches("options that differ").count();
        soon("the host is refused", || (refusals(&served) > 0).then_some(()));
        let said = served.guest.output();
        for told in ["cannot go on with the new host", "--posix-acl", "--no-readdirplus"] {
            assert!(said.contains(told), "{channel}, {transport}: {told}: {said}");
        }
        // It is tried more than once, and logged once.
        std::thread::sleep(Duration::from_millis(1200));
        assert!(!waiting.is_finished() && refusals(&served) == 1, "{}", served.guest.output());
        served.another_host();
        within(PATIENCE, "an operation", move || waiting.join().unwrap()).unwrap();
        assert_eq!(fs::read(served.behind("f")).unwrap(), b"y");
        served.unmount();
    }
}

#[test]
fn a_refused_host_is_the_reason_when_none_comes() {
    let Some(mut served) = Served::new("fuse", "ring", ",reconnect_timeout=2") else { return };
    fs::write(served.path("f"), "x").unwrap();
    served.kill_host();
    served.next_host_with(&[]);
    let path = served.path("f");
    let error = within(PATIENCE, "an operation", move || fs::write(path, "y")).unwrap_err();
    assert_ne!(error.raw_os_error(), Some(libc::ESTALE));
    assert!(!served.guest.ended().success());
    assert!(served.guest.output().contains("cannot go on with the new host"), "{}", served.guest.output());
    unmount_what_is_left(&served.guest.point);
}

#[test]
fn no_host_in_time_is_an_error() {
    for (channel, transport) in ALL {
        let Some(mut served) = Served::new(channel, transport, ",reconnect_timeout=1") else { continue };
        let (tell, told) = mpsc::channel();
        let users: Vec<_> = (0..3)
            .map(|i| {
                let (path, tell) = (served.path(&format!("file{i}")), tell.clone());
                std::thread::spawn(move || work_until_it_fails(path, tell))
            })
            .collect();
        users.iter().for_each(|_| told.recv_timeout(PATIENCE).expect("the work has begun"));
        let killed = Instant::now();
        served.kill_host();
        for user in users {
            let (failed, _) = within(PATIENCE, "an operation under way", move || user.join().unwrap());
            let took = failed.duration_since(killed);
            // Not at once, and not later than a busy machine has it.
            assert!(took > Duration::from_millis(800) && took < PATIENCE, "{channel}, {transport}: {took:?}");
        }
        assert!(!served.guest.ended().success());
        assert!(served.guest.output().contains("the host has gone away"), "{}", served.guest.output());
        unmount_what_is_left(&served.guest.point);
    }
}

#[test]
fn whoever_waits_can_be_killed_and_the_mount_taken_away() {
    for (channel, transport) in ALL {
        let Some(mut served) = Served::new(channel, transport, "") else { continue };
        fs::write(served.path("f"), "x").unwrap();
        // One that is under way, one that comes, and one that nobody will kill.
        served.kill_host();
        let mut waiting: Vec<_> = (0..3)
            .map(|i| Command::new("rm").arg(served.path(if i < 2 { "f" } else { "g" })).stderr(Stdio::null()).spawn())
            .map(Result::unwrap)
            .collect();
        std::thread::sleep(Duration::from_millis(300));
        for child in &mut waiting {
            assert!(child.try_wait().unwrap().is_none(), "{channel}, {transport}: it waits");
            kill(nix::unistd::Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
        }
        let killed = Instant::now();
        soon("they end", || waiting.iter_mut().all(|child| child.try_wait().unwrap().is_some()).then_some(()));
        assert!(killed.elapsed() < PROMPT, "{channel}, {transport}: {:?}", killed.elapsed());
        let asked = Instant::now();
        served.guest.signal(Signal::SIGTERM);
        let status = served.guest.ended();
        assert!(status.success(), "{channel}, {transport}: {status}: {}", served.guest.output());
        assert!(asked.elapsed() < PROMPT, "{channel}, {transport}: {:?}", asked.elapsed());
        assert!(!is_mounted(&served.guest.point));
    }
}
