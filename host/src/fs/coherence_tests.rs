//! What a coherent guest is told, and how long it may keep it. All that others change is changed by another process:
//! this one's own changes are told to nobody but its other guests.

use super::tests::{config, ROOT};
use super::*;
use crate::fs::coherence::LASTING;
use parking_lot::Mutex;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tunnelfs_fuse_abi::changes::kind;
use tunnelfs_fuse_abi::flags::{fopen, init};
use tunnelfs_fuse_abi::*;
use tunnelfs_settings::Cache;

/// Longer than anything takes on a loaded machine.
pub(super) const LONG: Duration = Duration::from_secs(60);

pub(super) struct Guest<'a> {
    pub fs: &'a Passthrough,
    pub seen: Arc<Mutex<Vec<Change>>>,
}

pub(super) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LONG, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs a script in another process.
pub(super) fn others(dir: &Path, script: &str) {
    let status = Command::new("sh").arg("-ec").arg(script).current_dir(dir).status().unwrap();
    assert!(status.success(), "{script}");
}

impl Guest<'_> {
    fn lookup(&self, node: u64, name: &str) -> EntryOut {
        let name = std::ffi::CString::new(name).unwrap();
        self.fs.lookup_by_trait(node, &name).unwrap()
    }

    pub fn node(&self, node: u64, name: &str) -> u64 {
        self.lookup(node, name).nodeid
    }

    pub fn attr_valid(&self, node: u64) -> u64 {
        FileSystem::getattr(self.fs, &ROOT, node, None).unwrap().attr_valid
    }

    fn open(&self, node: u64, flags: i32) -> OpenOut {
        let args = OpenIn { flags: flags as u32, ..OpenIn::default() };
        FileSystem::open(self.fs, &ROOT, node, &args).unwrap()
    }

    fn close(&self, node: u64, fh: u64) {
        FileSystem::flush(self.fs, &ROOT, node, &FlushIn { fh, ..FlushIn::default() }).unwrap();
        FileSystem::release(self.fs, &ROOT, node, &ReleaseIn { fh, ..ReleaseIn::default() }).unwrap();
    }

    /// Opens for reading and closes twice: whether the data may be kept then.
    fn keeps(&self, node: u64) -> bool {
        for _ in 0..2 {
            let first = self.open(node, libc::O_RDONLY);
            self.close(node, first.fh);
        }
        let second = self.open(node, libc::O_RDONLY);
        self.close(node, second.fh);
        second.open_flags & fopen::KEEP_CACHE != 0
    }

    fn wait_for(&self, what: &str, is_it: impl Fn(&Change) -> bool) -> Change {
        let mut found = None;
        until(&format!("{what}, {:?}", self.seen.lock()), || {
            found = self.seen.lock().iter().find(|change| is_it(change)).cloned();
            found.is_some()
        });
        found.unwrap()
    }

    pub fn wait_for_kind(&self, kind: u32, node: u64) -> Change {
        self.wait_for(&format!("kind {kind} of {node}"), |change| (change.kind, change.node) == (kind, node))
    }
}

impl Passthrough {
    fn lookup_by_trait(&self, node: u64, name: &std::ffi::CStr) -> std::io::Result<EntryOut> {
        FileSystem::lookup(self, &ROOT, node, name)
    }
}

/// `guests` guests of a new directory, which listen.
pub(super) fn listening(guests: usize, change: impl Fn(&mut Config), test: impl FnOnce(&[Guest<'_>], &Path) + Send) {
    let dir = TempDir::new().unwrap();
    let all: Vec<Passthrough> = (0..guests)
        .map(|_| {
            let mut config = config(dir.path());
            config.cache = Cache::Coherent;
            config.coherence = Some(Budget { marks: 1000, leases: 100, mounts: None });
            change(&mut config);
            let skips_open = config.exact_times;
            let fs = Passthrough::new(config).unwrap();
            if skips_open {
                FileSystem::init(&fs, !(init::SUBMOUNTS | init::WRITEBACK_CACHE)).unwrap();
            }
            fs
        })
        .collect();
    std::thread::scope(|scope| {
        let guests: Vec<_> = all.iter().map(|fs| Guest { fs, seen: Arc::default() }).collect();
        let mut listeners = Vec::new();
        for guest in &guests {
            let (fs, seen) = (guest.fs, guest.seen.clone());
            let listener = scope.spawn(move || loop {
                let mut sink = |change: &Change| {
                    seen.lock().push(change.clone());
                    true
                };
                match FileSystem::changes(fs, &mut sink) {
                    Ok(()) => {}
                    Err(e) => return assert_eq!(e.raw_os_error(), Some(libc::EINTR)),
                }
            });
            listeners.push(listener);
        }
        let path = dir.path();
        let tested = scope.spawn(move || {
            for guest in &guests {
                guest.fs.prepare_thread();
                until("a listener", || guest.fs.coherence.listens());
            }
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&guests, path)))
        });
        let result = tested.join().unwrap();
        // One that was just between two calls begins anew, as a new guest would.
        until("the end of all listeners", || {
            all.iter().for_each(FileSystem::destroy);
            listeners.iter().all(|listener| listener.is_finished())
        });
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

fn one(test: impl FnOnce(&Guest<'_>, &Path) + Send) {
    listening(1, |_| (), |guests, dir| test(&guests[0], dir));
}

#[test]
fn each_kind_of_change_is_told() {
    one(|guest, dir| {
        others(dir, "mkdir d e; echo x > f; echo y > d/g; echo z > d/h; mkdir d/sub");
        let (f, d, e) = (guest.node(ROOT_ID, "f"), guest.node(ROOT_ID, "d"), guest.node(ROOT_ID, "e"));
        let (g, h, sub) = (guest.node(d, "g"), guest.node(d, "h"), guest.node(d, "sub"));
        let named = |kind: u32, parent: u64, name: &str| {
            guest.wait_for(&format!("kind {kind} of {name}"), |change| {
                (change.kind, change.parent, &*change.name) == (kind, parent, name.as_bytes())
            })
        };
        others(dir, "echo new > d/new; ln -s target d/link; mkdir d/dir; mkfifo d/fifo");
        for (name, mode) in
            [("new", libc::S_IFREG), ("link", libc::S_IFLNK), ("dir", libc::S_IFDIR), ("fifo", libc::S_IFIFO)]
        {
            let created = named(kind::CREATED, d, name);
            assert_eq!((created.node, created.mode), (0, mode), "{name}");
        }
        // What the guest does not know is told of by its name.
        assert_eq!(named(kind::MODIFIED, d, "new").node, 0);
        assert_eq!(named(kind::CLOSED, d, "new").node, 0);
        others(dir, "echo more >> d/g");
        assert_eq!(guest.wait_for_kind(kind::MODIFIED, g).name, b"g");
        guest.wait_for_kind(kind::CLOSED, g);
        others(dir, "chmod 600 d/h; chmod 700 d");
        assert_eq!(guest.wait_for_kind(kind::ATTRIBUTES, h).parent, d);
        guest.wait_for_kind(kind::ATTRIBUTES, d);
        others(dir, "mv d/g e/moved");
        let moved = guest.wait_for_kind(kind::RENAMED, g);
        assert_eq!((moved.parent, &*moved.name), (d, &b"g"[..]));
        // `e` is watched by nobody's look-up in it, but as a directory whose attributes last.
        assert_eq!((moved.to_parent, &*moved.to_name), (e, &b"moved"[..]));
        others(dir, "ln f d/second");
        assert_eq!(named(kind::CREATED, d, "second").node, f);
        others(dir, "rm d/h; rmdir d/sub");
        assert_eq!(guest.wait_for_kind(kind::DELETED, h).name, b"h");
        assert_eq!(guest.wait_for_kind(kind::DELETED, sub).mode, libc::S_IFDIR);
        // What left the directories that are watched.
        others(dir, "mv d/second ..; rm ../second");
        guest.wait_for("a rename to nowhere", |change| change.kind == kind::RENAMED && change.to_parent == 0);
    });
}

#[test]
fn limits_last_only_for_what_is_watched() {
    one(|guest, dir| {
        others(dir, "mkdir d; echo x > d/f; ln d/f d/hard; mkdir out");
        let lasting = LASTING.as_secs();
        let d = guest.lookup(ROOT_ID, "d");
        assert_eq!((d.entry_valid, d.attr_valid), (lasting, lasting));
        let missing = guest.lookup(d.nodeid, "missing");
        assert_eq!((missing.nodeid, missing.entry_valid), (0, lasting));
        // Of several names one might be in a directory that is not watched: the file itself is.
        let before = guest.fs.coherence.marks();
        let f = guest.lookup(d.nodeid, "f");
        assert_eq!((f.entry_valid, f.attr_valid, f.attr.nlink), (lasting, lasting, 2));
        assert_eq!(guest.fs.coherence.marks(), before + 1);
        others(dir, "mv d/hard out/hard; echo more >> out/hard");
        guest.wait_for_kind(kind::MODIFIED, f.nodeid);
        guest.fs.forget(f.nodeid, 1);
        assert_eq!(guest.fs.coherence.marks(), before, "a forgotten file is watched");
        // A file that has been moved away is no longer covered by the directory that it was found in.
        others(dir, "echo x > d/moves");
        let moves = guest.node(d.nodeid, "moves");
        assert_eq!(guest.attr_valid(moves), lasting);
        others(dir, "mv d/moves out/moves");
        guest.wait_for_kind(kind::RENAMED, moves);
        assert_eq!(guest.attr_valid(moves), 1);
        assert_eq!(guest.attr_valid(ROOT_ID), lasting);
        FileSystem::destroy(guest.fs);
        let d = guest.lookup(ROOT_ID, "d");
        assert_eq!((d.entry_valid, d.attr_valid), (1, 1), "nobody listens");
    });
}

#[test]
fn own_renames_keep_the_cover() {
    one(|guest, dir| {
        others(dir, "mkdir a b; echo x > a/f");
        let (a, b) = (guest.node(ROOT_ID, "a"), guest.node(ROOT_ID, "b"));
        let f = guest.node(a, "f");
        FileSystem::rename(guest.fs, &ROOT, a, c"f", b, c"g", 0).unwrap();
        assert_eq!(guest.attr_valid(f), LASTING.as_secs());
        others(dir, "echo more >> b/g");
        let modified = guest.wait_for_kind(kind::MODIFIED, f);
        assert_eq!((modified.parent, &*modified.name), (b, &b"g"[..]));
        assert!(!guest.seen.lock().iter().any(|change| change.kind == kind::RENAMED), "an own change");
    });
}

#[test]
fn guests_of_one_process_are_told_of_each_other() {
    listening(
        2,
        |_| (),
        |guests, dir| {
            others(dir, "mkdir d; echo x > d/f; echo y > d/g");
            let known: Vec<[u64; 3]> = guests
                .iter()
                .map(|guest| {
                    let d = guest.node(ROOT_ID, "d");
                    [d, guest.node(d, "f"), guest.node(d, "g")]
                })
                .collect();
            let (actor, other, [d, f, g]) = (guests[0].fs, &guests[1], known[0]);
            let [to_d, to_f, to_g] = known[1];
            let none = Extensions::default();
            let args = CreateIn { flags: libc::O_RDWR as u32, mode: 0o644, ..CreateIn::default() };
            let new = FileSystem::create(actor, &ROOT, d, c"new", &args, &none).unwrap();
            guests[0].close(new.entry.nodeid, new.open.fh);
            FileSystem::rename(actor, &ROOT, d, c"f", d, c"renamed", 0).unwrap();
            FileSystem::unlink(actor, &ROOT, d, c"g").unwrap();
            let set = SetattrIn { valid: flags::fattr::MODE, mode: 0o600, ..SetattrIn::default() };
            FileSystem::setattr(actor, &ROOT, f, &set).unwrap();
            let created = other.wait_for("CREATED", |change| change.kind == kind::CREATED && change.name == b"new");
            assert_eq!((created.parent, created.mode), (to_d, libc::S_IFREG));
            assert_eq!(other.wait_for_kind(kind::RENAMED, to_f).to_name, b"renamed");
            assert_eq!(other.wait_for_kind(kind::DELETED, to_g).name, b"g");
            other.wait_for_kind(kind::ATTRIBUTES, to_f);
            assert_ne!(g, 0);
            // The last of them was told, so all were: none of them to who did it. (That a file is closed may be told:
            // a child that another test starts just then has a copy of the descriptor, and is the last to close it.)
            let own = |change: &&Change| {
                change.kind != kind::CLOSED && (change.name == b"new" || change.to_name == b"renamed")
            };
            assert_eq!(guests[0].seen.lock().iter().find(own), None);
        },
    );
}

#[test]
fn what_falls_out_of_the_budget_is_told_first() {
    listening(
        1,
        |config| config.coherence = Some(Budget { marks: 4, leases: 0, mounts: None }),
        |guests, dir| {
            let guest = &guests[0];
            others(dir, "for i in 0 1 2 3 4 5 6 7 8 9; do mkdir d$i; echo x > d$i/f; done");
            let dirs: Vec<u64> = (0..10).map(|i| guest.node(ROOT_ID, &format!("d{i}"))).collect();
            let files: Vec<u64> = dirs.iter().map(|d| guest.node(*d, "f")).collect();
            assert!(guest.fs.coherence.marks() <= 4);
            others(dir, "for i in 0 1 2 3 4 5 6 7 8 9; do echo y >> d$i/f; done; echo done > end");
            let told = |file: u64, dir: u64| {
                guest.seen.lock().iter().any(|change| {
                    change.kind == kind::UNWATCHED && change.node == dir
                        || change.node == file && change.kind == kind::MODIFIED
                })
            };
            for (dir, file) in dirs.iter().zip(&files) {
                until("a change, or that nobody looks for it", || told(*file, *dir));
            }
            let lasting = files.iter().filter(|f| guest.attr_valid(**f) == LASTING.as_secs()).count();
            assert!((1..=4).contains(&lasting), "{lasting}");
        },
    );
}

#[test]
fn an_overflow_of_the_kernels_queue_is_told() {
    one(|guest, dir| {
        others(dir, "mkdir d");
        guest.node(ROOT_ID, "d");
        let (mut event, len) = ([0; 24], 24u16);
        event[..2].copy_from_slice(&len.to_ne_bytes());
        event[6..8].copy_from_slice(&len.to_ne_bytes());
        event[8..16].copy_from_slice(&libc::FAN_Q_OVERFLOW.to_ne_bytes());
        guest.fs.coherence.on_events(&event);
        guest.wait_for("OVERFLOW", |change| change.kind == kind::OVERFLOW);
    });
}

/// A name that is missing for a day is told of when it comes, however close to the look-up that was.
#[test]
fn no_change_falls_between_mark_and_lookup() {
    const DIRS: usize = 300;
    one(|guest, dir| {
        (0..DIRS).for_each(|i| fs::create_dir(dir.join(format!("d{i}"))).unwrap());
        let script = format!("i=0; while [ $i -lt {DIRS} ]; do : > d$i/x; i=$((i+1)); done");
        let mut child = Command::new("sh").arg("-ec").arg(script).current_dir(dir).spawn().unwrap();
        let mut missing = Vec::new();
        for i in 0..DIRS {
            let d = guest.node(ROOT_ID, &format!("d{i}"));
            if i % 2 == 0 {
                // Some of them when they are just being made.
                while !dir.join(format!("d{i}/x")).exists() && child.try_wait().unwrap().is_none() && i % 4 == 0 {}
            }
            let x = guest.lookup(d, "x");
            if x.nodeid == 0 {
                assert_eq!(x.entry_valid, LASTING.as_secs());
                missing.push(d);
            }
        }
        assert!(child.wait().unwrap().success());
        for d in missing {
            guest.wait_for("CREATED", |change| change.kind == kind::CREATED && change.parent == d);
        }
    });
}

#[test]
fn a_writer_waits_until_the_guest_has_dropped_the_data() {
    let by_script = |script: &'static str| move |dir: &Path| others(dir, script);
    let truncates = |dir: &Path| nix::unistd::truncate(&dir.join("f"), 1).unwrap();
    // Whoever does not want to wait is refused, as the system has it; the guest drops the data all the same.
    let tries = |dir: &Path| {
        let nonblocking = fs::OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(dir.join("f"));
        assert_eq!(nonblocking.unwrap_err().raw_os_error(), Some(libc::EAGAIN));
    };
    let writers: [&(dyn Fn(&Path) + Sync); 4] =
        [&by_script("echo new > f"), &by_script("echo new >> f"), &truncates, &tries];
    for writes in writers {
        one(|guest, dir| {
            others(dir, "echo old > f");
            let f = guest.node(ROOT_ID, "f");
            let first = guest.open(f, libc::O_RDONLY);
            assert_eq!(first.open_flags & fopen::KEEP_CACHE, 0, "data of before the lease");
            let beside = guest.open(f, libc::O_RDONLY);
            assert_eq!(beside.open_flags & fopen::KEEP_CACHE, 0, "the first one may not have been answered yet");
            guest.close(f, first.fh);
            guest.close(f, beside.fh);
            assert!(guest.keeps(f));
            std::thread::scope(|scope| {
                let writer = scope.spawn(|| writes(dir));
                guest.wait_for_kind(kind::DROP_DATA, f);
                // While it waits nothing is kept.
                let open = guest.open(f, libc::O_RDONLY);
                assert_eq!(open.open_flags & fopen::KEEP_CACHE, 0);
                guest.close(f, open.fh);
                guest.fs.dropped(f);
                writer.join().unwrap();
            });
            assert!(guest.keeps(f), "a new lease");
            assert!(!guest.fs.coherence.is_late());
        });
    }
}

#[test]
fn a_guest_that_does_not_answer_loses_what_lasts() {
    one(|guest, dir| {
        others(dir, "echo old > f; echo other > g");
        let (f, g) = (guest.node(ROOT_ID, "f"), guest.node(ROOT_ID, "g"));
        assert!(guest.keeps(f) && guest.keeps(g));
        let start = Instant::now();
        others(dir, "echo new > f");
        // The system's own bound is 45 s.
        assert!(start.elapsed() >= super::leases::DROP_WITHIN && start.elapsed() < Duration::from_secs(40));
        until("lateness", || guest.fs.coherence.is_late());
        assert_eq!((guest.lookup(ROOT_ID, "f").entry_valid, guest.attr_valid(ROOT_ID)), (1, 1));
        assert!(!guest.keeps(f));
        guest.fs.dropped(f);
        assert!(!guest.fs.coherence.is_late());
        assert_eq!(guest.lookup(ROOT_ID, "f").entry_valid, LASTING.as_secs());
        assert!(guest.keeps(f) && guest.keeps(g));
    });
}

#[test]
fn own_writers_do_not_wait_for_themselves() {
    one(|guest, dir| {
        others(dir, "echo old > f");
        let f = guest.node(ROOT_ID, "f");
        assert!(guest.keeps(f));
        let writer = guest.open(f, libc::O_RDWR);
        assert!(!guest.keeps(f), "somebody has it open for writing");
        guest.close(f, writer.fh);
        assert!(guest.keeps(f));
        let set = SetattrIn { valid: flags::fattr::SIZE, size: 1, ..SetattrIn::default() };
        FileSystem::setattr(guest.fs, &ROOT, f, &set).unwrap();
        let none = |change: &Change| change.kind == kind::DROP_DATA;
        assert!(!guest.seen.lock().iter().any(none));
        assert!(guest.keeps(f));
        // By a name that the host has not looked up, the guest is asked; it need not be, but it must not last.
        std::thread::scope(|scope| {
            let creator = scope.spawn(|| {
                guest.fs.prepare_thread();
                let args = CreateIn { flags: libc::O_RDWR as u32, ..CreateIn::default() };
                FileSystem::create(guest.fs, &ROOT, ROOT_ID, c"f", &args, &Extensions::default()).unwrap()
            });
            guest.wait_for_kind(kind::DROP_DATA, f);
            guest.fs.dropped(f);
            creator.join().unwrap();
        });
    });
}

#[test]
fn a_guests_writer_waits_for_another_guest() {
    listening(
        2,
        |_| (),
        |guests, dir| {
            others(dir, "echo old > f");
            let (writer, reader) = (&guests[0], &guests[1]);
            let (f, to_f) = (writer.node(ROOT_ID, "f"), reader.node(ROOT_ID, "f"));
            assert!(reader.keeps(to_f) && writer.keeps(f));
            std::thread::scope(|scope| {
                let opened = scope.spawn(|| {
                    writer.fs.prepare_thread();
                    writer.open(f, libc::O_WRONLY)
                });
                reader.wait_for_kind(kind::DROP_DATA, to_f);
                reader.fs.dropped(to_f);
                writer.close(f, opened.join().unwrap().fh);
            });
            reader.wait_for_kind(kind::CLOSED, to_f);
            assert!(!writer.seen.lock().iter().any(|change| change.kind == kind::DROP_DATA));
        },
    );
}

#[test]
fn leases_have_a_budget() {
    listening(
        1,
        |config| config.coherence = Some(Budget { marks: 100, leases: 3, mounts: None }),
        |guests, dir| {
            let guest = &guests[0];
            others(dir, "for i in 0 1 2 3 4 5; do echo x > f$i; done");
            let files: Vec<u64> = (0..6).map(|i| guest.node(ROOT_ID, &format!("f{i}"))).collect();
            assert!(files.iter().all(|f| guest.keeps(*f)));
            assert_eq!(guest.fs.coherence.leases(), 3);
            // Those that were not of use for longest have none.
            let kept = |f: &u64| {
                let open = guest.open(*f, libc::O_RDONLY);
                guest.close(*f, open.fh);
                open.open_flags & fopen::KEEP_CACHE != 0
            };
            assert_eq!(files.iter().rev().map(kept).collect::<Vec<_>>(), [true, true, true, false, false, false]);
            files.iter().for_each(|f| guest.fs.forget(*f, 1));
            assert_eq!(guest.fs.coherence.leases(), 0);
        },
    );
}

#[test]
fn file_systems_that_report_nothing_are_cached_for_a_second() {
    listening(
        1,
        |config| config.root = "/proc/sys".into(),
        |guests, _| {
            let kernel = guests[0].lookup(ROOT_ID, "kernel");
            assert_eq!((kernel.entry_valid, kernel.attr_valid), (1, 1));
            let file = guests[0].node(kernel.nodeid, "ostype");
            assert!(!guests[0].keeps(file));
        },
    );
}

/// fanotify tells nothing of mounts: what a directory was is forgotten when one comes or goes below the share.
#[test]
fn mounts_that_come_and_go_are_told() {
    let mounts = |config: &mut Config| {
        let file = fs::File::open("/proc/self/mountinfo").unwrap();
        let under = fs::canonicalize(&config.root).unwrap().to_str().unwrap().to_owned();
        config.coherence = Some(Budget { marks: 100, leases: 0, mounts: Some((file, under)) });
    };
    listening(1, mounts, |guests, dir| {
        let (guest, none) = (&guests[0], None::<&str>);
        others(dir, "mkdir d");
        guest.node(ROOT_ID, "d");
        let flags = nix::mount::MsFlags::empty();
        if let Err(e) = nix::mount::mount(Some("none"), &dir.join("d"), Some("tmpfs"), flags, none) {
            return println!("skipped: no mounts here: {e}");
        }
        guest.wait_for("OVERFLOW", |change| change.kind == kind::OVERFLOW);
        let d = guest.lookup(ROOT_ID, "d");
        assert_eq!((d.entry_valid, d.attr_valid), (LASTING.as_secs(), LASTING.as_secs()));
        guest.seen.lock().clear();
        nix::mount::umount2(&dir.join("d"), nix::mount::MntFlags::MNT_DETACH).unwrap();
        guest.wait_for("OVERFLOW", |change| change.kind == kind::OVERFLOW);
    });
}

#[test]
fn other_modes_tell_nothing() {
    let dir = TempDir::new().unwrap();
    let fs = Passthrough::new(config(dir.path())).unwrap();
    assert_eq!(fs_error(&fs), Some(libc::ENOSYS));
    assert_ne!(FileSystem::init(&fs, 0).unwrap() & init::AUTO_INVAL_DATA, 0);
}

fn fs_error(fs: &Passthrough) -> Option<i32> {
    FileSystem::changes(fs, &mut |_| true).unwrap_err().raw_os_error()
}
