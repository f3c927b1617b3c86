//! Locks of one mount's programs, and with `host.locks = "shared"` those between mounts and the host's programs.

use crate::common::pair::{known, shell, Pair, Setup};
use crate::rig::{soon, Guest, Host, Peer, Scratch, FEATURES};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The host keeps the locks.
const SHARED: &[&str] = &["--locks=shared"];

fn with_shared_locks() -> Option<Pair> {
    let pair = Setup::new()?.start(SHARED, "");
    fs::write(pair.on("l"), [0; 100]).unwrap();
    Some(pair)
}

/// The exit code of `flock -n` on one file with another one inside.
fn nested(outer: &Path, outer_kind: &str, inner: &Path, inner_kind: &str) -> Option<i32> {
    let script = format!("flock -n {outer_kind} {} flock -n {inner_kind} {} true", outer.display(), inner.display());
    shell(Path::new("/"), &script).0
}

/// A program that holds a lock of `kind` on `path` until it is killed.
struct Holder(Child);

impl Holder {
    fn flock(path: &Path) -> Holder {
        // It waits: who looks whether the lock is held holds it for a moment.
        let child = Command::new("flock").arg(path).args(["sleep", "60"]).stdin(Stdio::null()).spawn().unwrap();
        Holder(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // flock(1) has left the lock to its child too.
        let id = self.0.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|c| c.parse().ok()) {
            let _ = kill(Pid::from_raw(child), Signal::SIGKILL);
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn is_locked(path: &Path) -> bool {
    shell(Path::new("/"), &format!("flock -n {} true", path.display())).0 == Some(1)
}

#[test]
fn whole_file_locks_hold_in_one_mount() {
    let Some(pair) = Pair::plain() else { return };
    fs::write(pair.on("l"), "").unwrap();
    assert_eq!(nested(&pair.on("l"), "-x", &pair.on("l"), "-s"), Some(1));
    assert_eq!(nested(&pair.on("l"), "-s", &pair.on("l"), "-s"), Some(0));
}

#[test]
fn whole_file_locks_hold_between_guest_and_host() {
    let Some(pair) = with_shared_locks() else { return };
    let (here, there) = (pair.on("l"), pair.behind("l"));
    for (outer, inner) in [(&here, &there), (&there, &here), (&here, &here)] {
        for (kinds, wanted) in [(("-x", "-x"), 1), (("-x", "-s"), 1), (("-s", "-x"), 1), (("-s", "-s"), 0)] {
            assert_eq!(nested(outer, kinds.0, inner, kinds.1), Some(wanted), "{outer:?} {inner:?} {kinds:?}");
        }
    }
}

#[test]
fn locks_hold_between_two_mounts() {
    let Some(scratch) = Scratch::new() else { return };
    let Some(second) = Scratch::new() else { return };
    let options = [FEATURES, &known(SHARED)].concat();
    let host = Host::start_with(&scratch, Peer::Ours, &options);
    fs::remove_dir(second.path("share")).unwrap();
    std::os::unix::fs::symlink(scratch.path("share"), second.path("share")).unwrap();
    let other = Host::start_with(&second, Peer::Ours, &options);
    let one = Guest::mount(&scratch, &host, "");
    let two = Guest::mount(&second, &other, "");
    fs::write(one.point.join("l"), "").unwrap();
    assert_eq!(nested(&one.point.join("l"), "-x", &two.point.join("l"), "-s"), Some(1));
    assert_eq!(nested(&one.point.join("l"), "-s", &two.point.join("l"), "-s"), Some(0));
    assert_eq!(nested(&two.point.join("l"), "-x", &one.point.join("l"), "-x"), Some(1));
}

#[test]
fn locks_end_with_their_holder() {
    let Some(pair) = with_shared_locks() else { return };
    let holder = Holder::flock(&pair.on("l"));
    soon("it holds the lock", || is_locked(&pair.behind("l")).then_some(()));
    drop(holder);
    soon("it has gone with it", || (!is_locked(&pair.behind("l"))).then_some(()));
}

#[test]
fn range_locks_hold_between_guest_and_host() {
    let Some(pair) = with_shared_locks() else { return };
    for open_file in [false, true] {
        for (outer, inner) in [(pair.on("l"), pair.behind("l")), (pair.behind("l"), pair.on("l"))] {
            let held = range::open(&outer);
            range::lock(&held, libc::F_WRLCK, 10, 20, open_file).unwrap();
            // Another process: range locks do not stop their own.
            let others = range::elsewhere(&inner, open_file);
            assert_eq!(others, [1, 0, 0, 1], "{inner:?}, of open files: {open_file}");
            range::lock(&held, libc::F_UNLCK, 10, 20, open_file).unwrap();
            assert_eq!(range::elsewhere(&inner, open_file), [0; 4]);
        }
    }
}

/// fcntl(2)'s locks.
mod range {
    use nix::errno::Errno;
    use std::fs::{File, OpenOptions};
    use std::os::fd::AsRawFd;
    use std::path::Path;

    pub fn open(path: &Path) -> File {
        OpenOptions::new().read(true).write(true).open(path).unwrap()
    }

    fn call(file: &File, command: i32, kind: i32, at: i64, len: i64) -> Result<i32, Errno> {
        // SAFETY: a plain structure, for which zeros are as good as any.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        (lock.l_type, lock.l_whence, lock.l_start, lock.l_len) = (kind as i16, libc::SEEK_SET as i16, at, len);
        // SAFETY: the structure lives as long as the call.
        Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) })?;
        Ok(i32::from(lock.l_type))
    }

    pub fn lock(file: &File, kind: i32, at: i64, len: i64, open_file: bool) -> Result<(), Errno> {
        call(file, if open_file { libc::F_OFD_SETLK } else { libc::F_SETLK }, kind, at, len).map(drop)
    }

    /// What a process of its own meets, 1 for a lock in its way: on bytes 10, 9, 30 and 0 to 100.
    pub fn elsewhere(path: &Path, open_file: bool) -> [u8; 4] {
        let file = open(path);
        // SAFETY: the child makes nothing but system calls, and ends.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                let places = [(10, 1), (9, 1), (30, 1), (0, 100)];
                let bits = places.iter().enumerate().map(|(i, (at, len))| {
                    let asked = call(&file, libc::F_GETLK, libc::F_WRLCK, *at, *len) != Ok(libc::F_UNLCK);
                    let refused = lock(&file, libc::F_WRLCK, *at, *len, open_file).is_err();
                    let _ = lock(&file, libc::F_UNLCK, *at, *len, open_file);
                    // The two have to agree.
                    if asked == refused {
                        i32::from(refused) << i
                    } else {
                        1 << 5
                    }
                });
                // SAFETY: no handlers and destructors of the parent's.
                unsafe { libc::_exit(bits.sum()) }
            }
            nix::unistd::ForkResult::Parent { child } => match nix::sys::wait::waitpid(child, None).unwrap() {
                nix::sys::wait::WaitStatus::Exited(_, bits) if bits < 16 => [0, 1, 2, 3].map(|i| (bits >> i & 1) as u8),
                other => panic!("{other:?}: F_GETLK and F_SETLK do not agree"),
            },
        }
    }
}

/// Who waits for a lock gets it when it is free; can be interrupted; and holds nobody up.
#[test]
fn waiting_for_locks() {
    let Some(pair) = with_shared_locks() else { return };
    let holder = Holder::flock(&pair.behind("l"));
    soon("it holds the lock", || is_locked(&pair.on("l")).then_some(()));
    let wait = || Command::new("flock").arg(pair.on("l")).arg("true").stdin(Stdio::null()).spawn().unwrap();
    let mut waiting: Vec<_> = (0..8).map(|_| wait()).collect();
    // More of them than there are threads for anything; the others go on.
    let start = Instant::now();
    for i in 0..100 {
        fs::write(pair.on("other"), format!("{i}")).unwrap();
        fs::metadata(pair.on("l")).unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(5), "held up: {:?}", start.elapsed());
    for child in &mut waiting {
        assert_eq!(child.try_wait().unwrap(), None, "nobody has the lock yet");
    }
    // One is killed while it waits.
    let mut killed = waiting.pop().unwrap();
    kill(Pid::from_raw(killed.id() as i32), Signal::SIGTERM).unwrap();
    soon("a waiting program can be ended", || killed.try_wait().unwrap());
    drop(holder);
    for mut child in waiting {
        let status = soon("each gets the lock", || child.try_wait().unwrap());
        assert!(status.success());
    }
}

/// Without the option they are the guest's kernel's, and the host's programs are not concerned.
#[test]
fn locks_are_local_by_default() {
    let Some(pair) = Pair::plain() else { return };
    fs::write(pair.on("l"), "").unwrap();
    assert_eq!(nested(&pair.on("l"), "-x", &pair.behind("l"), "-x"), Some(0));
}

/// One database, written from both sides.
#[test]
fn a_database_of_guest_and_host() {
    const ROWS: usize = 60;
    let Some(setup) = Setup::new() else { return };
    let pair = setup.start(&[SHARED, &["--cache=never"]].concat(), "");
    assert_eq!(shell(&pair.behind(""), "sqlite3 db 'CREATE TABLE t(x TEXT)'").0, Some(0), "is sqlite3 installed?");
    let write = |dir: &Path, who: &str| {
        let line = format!("echo \"INSERT INTO t VALUES('{who}');\" | sqlite3 -cmd '.timeout 20000' db || exit 1");
        shell(dir, &format!("i=0; while [ $i -lt {ROWS} ]; do {line}; i=$((i+1)); done"))
    };
    let (one, two) = std::thread::scope(|s| {
        let there = s.spawn(|| write(&pair.behind(""), "host"));
        (write(&pair.guest.point, "guest"), there.join().unwrap())
    });
    assert_eq!((one.0, two.0), (Some(0), Some(0)), "{} {}", one.1, two.1);
    let (_, told) = shell(&pair.guest.point, "sqlite3 db 'PRAGMA integrity_check; SELECT count(*) FROM t'");
    assert_eq!(told, format!("ok\n{}", 2 * ROWS));
}

/// WAL mode shares memory between its users, which a guest and a host do not have, whatever locks they keep: where
/// shared mappings are refused a guest's program is told so, and the host's rows stay. The host says it at its start.
#[test]
fn a_wal_database_of_guest_and_host_is_refused() {
    let Some(setup) = Setup::new() else { return };
    let pair = setup.start(&[SHARED, &["--cache=never", "--no-allow-mmap"]].concat(), "");
    let make = "sqlite3 db 'PRAGMA journal_mode=WAL; CREATE TABLE t(x TEXT)'";
    assert_eq!(shell(&pair.behind(""), make), (Some(0), "wal".into()), "is sqlite3 installed?");
    let insert = |who: &str| format!("sqlite3 -cmd '.timeout 20000' db \"INSERT INTO t VALUES('{who}')\" 2>&1");
    for _ in 0..5 {
        assert_eq!(shell(&pair.behind(""), &insert("host")).0, Some(0));
        let (code, told) = shell(&pair.guest.point, &insert("guest"));
        assert!(code != Some(0) && told.contains("disk I/O error"), "{code:?}: {told}");
    }
    let all = "sqlite3 db 'PRAGMA integrity_check; SELECT count(*) FROM t'";
    assert_eq!(shell(&pair.behind(""), all), (Some(0), "ok\n5".into()));
    // Alone, with the memory that it shares with nobody, it may.
    let alone = "sqlite3 -cmd 'PRAGMA locking_mode=EXCLUSIVE' db \"INSERT INTO t VALUES('guest')\"";
    assert_eq!(shell(&pair.guest.point, alone).0, Some(0));
    assert_eq!(shell(&pair.behind(""), all), (Some(0), "ok\n6".into()));
}

/// They end with the host: such a mount does not go on with another one, and says so.
#[test]
fn shared_locks_win_over_reconnect() {
    let Some(pair) = with_shared_locks() else { return };
    let told = pair.guest.output();
    assert!(told.contains("the host keeps the locks"), "{told}");
    let Pair { mut guest, host, setup: _setup } = pair;
    let point = guest.point.clone();
    drop(host);
    assert!(!guest.ended().success());
    assert!(fs::metadata(point.join("l")).is_err());
}
