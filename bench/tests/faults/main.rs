//! A mount when things go wrong: a host that dies, stops, lies or is silent,
//! a guest that dies, a disk that is full or broken, memory that ends. Programs go on with the next host, or
//! get errors in time, and the mount can always be taken away. About a minute and a half; `make kills` has fifty
//! hosts killed under load beside that.
//!
//! Needs root and `/dev/fuse`; skips without them.

mod device;
mod disk;
mod kills;
mod liar;
mod memory;
mod quiet;
mod reconnect;
#[allow(dead_code)]
#[path = "../mount/rig.rs"]
mod rig;
mod scribbler;
#[path = "../common/skip.rs"]
mod skip;

use nix::mount::{umount2, MntFlags};
use nix::sys::signal::{kill, Signal};
use rig::{is_listening, is_mounted, soon, Guest, Host, Peer, Scratch, Stopped, PATIENCE, PROMPT};
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Runs `work`; it must end in time.
pub fn within<T: Send + 'static>(limit: Duration, what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || tell.send(work()));
    told.recv_timeout(limit).unwrap_or_else(|_| panic!("{what}: not within {limit:?}"))
}

/// A mount that ends with its host.
fn start(channel: &str, transport: &str, more: &str) -> Option<(Scratch, Host, Guest)> {
    let scratch = Scratch::for_channel(channel)?;
    let host = Host::start(&scratch, peer(transport));
    let words = format!("channel={channel},transport={transport},noreconnect{more}");
    let guest = Guest::mount(&scratch, &host, &words);
    Some((scratch, host, guest))
}

fn peer(transport: &str) -> Peer {
    if transport == "socket" {
        Peer::Stream
    } else {
        Peer::Ours
    }
}

/// Writes, syncs and reads a file of its own until something fails; when, and what.
fn work_until_it_fails(path: PathBuf, started: mpsc::Sender<()>) -> (Instant, io::Error) {
    let attempt = |n: u8| -> io::Result<()> {
        let data = vec![n; 200_000];
        let mut file = fs::File::create(&path)?;
        file.write_all(&data)?;
        file.sync_all()?;
        let mut back = Vec::new();
        fs::File::open(&path)?.read_to_end(&mut back)?;
        assert!(back == data, "wrong bytes in {}", path.display());
        Ok(())
    };
    for n in 0.. {
        if let Err(e) = attempt(n as u8) {
            return (Instant::now(), e);
        }
        if n == 3 {
            let _ = started.send(());
        }
    }
    unreachable!()
}

/// Every channel with every transport.
pub const ALL: [(&str, &str); 6] = [
    ("uring", "ring"),
    ("uring", "virtqueue"),
    ("uring", "socket"),
    ("fuse", "ring"),
    ("fuse", "virtqueue"),
    ("fuse", "socket"),
];

#[test]
fn a_killed_host_is_an_error_at_once() {
    for (channel, transport) in ALL {
        let Some((_scratch, host, mut guest)) = start(channel, transport, "") else { continue };
        let (tell, told) = mpsc::channel();
        let users: Vec<_> = (0..4)
            .map(|i| {
                let (path, tell) = (guest.point.join(format!("file{i}")), tell.clone());
                std::thread::spawn(move || work_until_it_fails(path, tell))
            })
            .collect();
        for _ in &users {
            told.recv_timeout(PATIENCE).expect("the work has begun");
        }
        let killed = Instant::now();
        kill(host.server(), Signal::SIGKILL).unwrap();
        for user in users {
            let (failed, error) = within(PATIENCE, "an operation under way", move || user.join().unwrap());
            let took = failed.duration_since(killed);
            assert!(took < PROMPT, "{channel}, {transport}: {error} after {took:?}");
        }
        assert!(!guest.ended().success(), "{channel}, {transport}: the guest says so");
        assert!(guest.output().contains("the host has gone away"), "{}", guest.output());
        assert_dead(&guest.point);
        println!("{channel}, {transport}: all errors at once");
    }
}

/// A mount whose guest gave up stays, dead, and can be unmounted as any other.
pub fn unmount_what_is_left(point: &Path) {
    // For a moment the guest is inside, to end what is under way.
    soon("it is unmounted", || (!is_mounted(point) || umount2(point, MntFlags::empty()).is_ok()).then_some(()));
}

/// What lies below a dead mount must not be taken for it: it stays, answers with errors, and can be unmounted.
fn assert_dead(point: &Path) {
    assert!(is_mounted(point));
    let asked = Instant::now();
    let answers =
        [fs::read_dir(point).err(), fs::metadata(point.join("x")).err(), fs::write(point.join("y"), "").err()];
    for answer in answers {
        let errno = answer.unwrap().raw_os_error().unwrap();
        assert!(matches!(errno, libc::ENOTCONN | libc::ECONNABORTED), "errno {errno}");
    }
    assert!(asked.elapsed() < PROMPT);
    unmount_what_is_left(point);
}

#[test]
fn a_host_dies_while_nobody_asks() {
    for (channel, transport) in ALL {
        let Some((_scratch, host, mut guest)) = start(channel, transport, "") else { continue };
        kill(host.server(), Signal::SIGKILL).unwrap();
        soon("the host is dead", || (!is_listening(&host.socket)).then_some(()));
        // What is asked while the guest lets go has the error of that moment, over io_uring ECANCELED.
        soon("the mount is dead", || {
            let error = fs::metadata(guest.point.join("x")).expect_err("nobody is there to answer");
            matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED)).then_some(())
        });
        assert_dead(&guest.point);
        assert!(!guest.ended().success());
    }
}

/// The last users of a detached mount have no mount point by which it could be ended.
#[test]
fn a_host_of_a_detached_mount_dies() {
    for (channel, transport) in ALL {
        let Some((_scratch, host, mut guest)) = start(channel, transport, "") else { continue };
        let file = fs::File::create_new(guest.point.join("f")).unwrap();
        guest.signal(Signal::SIGTERM);
        soon("it is detached", || (!is_mounted(&guest.point)).then_some(()));
        (&file).write_all(b"x").unwrap();
        kill(host.server(), Signal::SIGKILL).unwrap();
        let killed = Instant::now();
        assert!(file.sync_all().is_err() && killed.elapsed() < PROMPT, "{channel}, {transport}");
        assert!(!guest.ended().success());
    }
}

#[test]
fn a_stopped_side_goes_on() {
    for (channel, transport) in [("uring", "ring"), ("fuse", "ring"), ("fuse", "socket")] {
        let Some((_scratch, host, guest)) = start(channel, transport, "") else { continue };
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for pid in [host.server(), guest.pid()].repeat(3) {
                    kill(pid, Signal::SIGSTOP).unwrap();
                    std::thread::sleep(Duration::from_millis(200));
                    kill(pid, Signal::SIGCONT).unwrap();
                    std::thread::sleep(Duration::from_millis(100));
                }
                done.store(true, Ordering::Release);
            });
            for n in 0.. {
                let path = guest.point.join(format!("file{}", n % 7));
                fs::write(&path, vec![n as u8; 100_000]).unwrap();
                assert!(fs::read(&path).unwrap() == vec![n as u8; 100_000], "wrong bytes");
                if done.load(Ordering::Acquire) {
                    break;
                }
            }
        });
        guest.unmount();
    }
}

#[test]
fn a_silent_host_is_given_up() {
    for (channel, transport) in ALL {
        let Some((_scratch, host, mut guest)) = start(channel, transport, ",timeout=1") else { continue };
        fs::write(guest.point.join("file"), "before").unwrap();
        let _stopped = Stopped::new(host.server());
        let path = guest.point.join("other");
        let asked = Instant::now();
        let result = within(PATIENCE, "an operation", move || fs::write(path, "never"));
        assert!(result.is_err() && asked.elapsed() > Duration::from_millis(900), "{channel}, {transport}: {result:?}");
        assert!(!guest.ended().success());
        assert!(guest.output().contains("does not answer"), "{}", guest.output());
        assert_dead(&guest.point);
    }
}

#[test]
fn a_killed_guest_is_forgotten_at_once() {
    for (channel, transport) in [("uring", "ring"), ("fuse", "virtqueue"), ("fuse", "socket")] {
        let Some((scratch, host, guest)) = start(channel, transport, "") else { continue };
        drop(guest);
        let host_pid = host.server();
        let held = || fs::read_dir(format!("/proc/{host_pid}/fd")).unwrap().count();
        let before = soon("the host's rest", || {
            let first = held();
            std::thread::sleep(Duration::from_secs(1));
            (first == held()).then_some(first)
        });
        let guest = Guest::mount(&scratch, &host, &format!("channel={channel},transport={transport}"));
        let files: Vec<_> = (0..50).map(|i| fs::File::create(guest.point.join(format!("f{i}"))).unwrap()).collect();
        assert!(held() >= before + 50, "files are open in the host");
        kill(guest.pid(), Signal::SIGKILL).unwrap();
        let killed = Instant::now();
        soon("the host releases all", || (held() <= before).then_some(()));
        assert!(killed.elapsed() < PROMPT, "{channel}, {transport}: {:?}", killed.elapsed());
        drop((files, guest));
        let next = Guest::mount(&scratch, &host, &format!("channel={channel},transport={transport}"));
        assert!(next.point.join("f49").exists());
        next.unmount();
    }
}

#[test]
fn a_full_disk_and_room_again() {
    let Some(scratch) = Scratch::new() else { return };
    let scratch = scratch.in_memory("2m");
    let host = Host::start(&scratch, Peer::Ours);
    let guest = Guest::mount(&scratch, &host, "transport=ring");
    let big = guest.point.join("big");
    let error = fs::write(&big, vec![1; 4 << 20]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    fs::remove_file(&big).unwrap();
    fs::write(&big, vec![2; 1 << 20]).unwrap();
    assert!(fs::read(&big).unwrap() == vec![2; 1 << 20]);
    guest.unmount();
    drop(host);
}

/// What programs do to a directory; each call ends in time, whatever it comes to.
pub fn poke(dir: &Path) {
    let limit = PATIENCE;
    let calls: [fn(PathBuf); 5] = [
        |dir| drop(fs::metadata(dir)),
        |dir| drop(fs::read_dir(dir).map(|entries| entries.take(1000).count())),
        |dir| drop(fs::write(dir.join("poked"), vec![7; 50_000])),
        |dir| drop(fs::read(dir.join("poked"))),
        |dir| drop(fs::remove_file(dir.join("poked"))),
    ];
    for (i, call) in calls.into_iter().enumerate() {
        let dir = dir.to_path_buf();
        within(limit, &format!("call {i} on a liar's mount"), move || call(dir));
    }
}
