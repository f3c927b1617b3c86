//! Checks of directories, names and what they lead to.

use crate::files::{open, pattern};
use crate::rig::{errno, Place};
use crate::Check;
use nix::fcntl::{renameat2, OFlag, RenameFlags, AT_FDCWD};
use nix::sys::stat::{mknod, Mode, SFlag};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{symlink, FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

pub const CHECKS: &[Check] = &[
    ("long_names", names_of_255_bytes),
    ("unlinked", unlinked_files_live_while_open),
    ("tmpfile", files_without_a_name),
    ("hard_links", hard_links),
    ("renames", renames),
    ("symlinks", symbolic_links),
    ("special", fifos_sockets_and_devices),
    ("big_directory", a_directory_of_10_000_entries),
    ("deleting", deleting_while_reading),
    ("seekdir", directories_can_be_rewound),
    ("exclusive", one_creator_wins),
    ("trees", trees_beside_each_other),
    ("errors", errors_are_the_right_ones),
    ("statfs", the_file_system_s_size),
    ("forgets", forgotten_files_are_found_again),
];

pub fn listing(dir: &Path) -> BTreeSet<OsString> {
    let names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    let set: BTreeSet<_> = names.iter().cloned().collect();
    assert_eq!(set.len(), names.len(), "a name twice");
    set
}

fn names_of_255_bytes(p: &Place) {
    let names = ["x".repeat(255), "ä".repeat(127) + "!"];
    for name in &names {
        fs::write(p.path(name), name).unwrap();
        assert_eq!(fs::read_to_string(p.path(name)).unwrap(), *name);
    }
    assert_eq!(listing(&p.dir), names.iter().map(Into::into).collect());
    assert_eq!(errno(File::create(p.path(&"y".repeat(256)))), libc::ENAMETOOLONG);
    let deep = (0..12).fold(p.dir.clone(), |dir, _| dir.join("z".repeat(250)));
    fs::create_dir_all(&deep).unwrap();
    assert!(deep.is_dir());
}

fn unlinked_files_live_while_open(p: &Place) {
    let file = open(&p.path("f"));
    file.write_all_at(b"before", 0).unwrap();
    fs::remove_file(p.path("f")).unwrap();
    assert!(listing(&p.dir).is_empty());
    file.write_all_at(b"after", 6).unwrap();
    let mut back = [0; 11];
    file.read_exact_at(&mut back, 0).unwrap();
    assert_eq!(&back, b"beforeafter");
    file.set_len(3).unwrap();
    let meta = file.metadata().unwrap();
    assert_eq!((meta.nlink(), meta.len()), (0, 3));

    // One file takes another's name while that is open.
    fs::write(p.path("old"), "old").unwrap();
    fs::write(p.path("new"), "new").unwrap();
    let old = open(&p.path("old"));
    fs::rename(p.path("new"), p.path("old")).unwrap();
    let mut text = String::new();
    (&old).read_to_string(&mut text).unwrap();
    assert_eq!((text.as_str(), fs::read_to_string(p.path("old")).unwrap().as_str()), ("old", "new"));
}

/// virtiofsd's library has no O_TMPFILE; programs then use a name and unlink it.
fn files_without_a_name(p: &Place) {
    let flags = libc::O_TMPFILE;
    let mut file = match OpenOptions::new().read(true).write(true).custom_flags(flags).open(&p.dir) {
        Ok(file) => file,
        Err(e) => return assert!(p.mounted && e.raw_os_error() == Some(libc::EOPNOTSUPP), "{e}"),
    };
    file.write_all(b"x").unwrap();
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    nix::unistd::linkat(AT_FDCWD, link.as_str(), AT_FDCWD, &p.path("f"), nix::fcntl::AtFlags::AT_SYMLINK_FOLLOW)
        .unwrap();
    assert_eq!(fs::read(p.path("f")).unwrap(), b"x");
}

fn hard_links(p: &Place) {
    fs::write(p.path("a"), "1").unwrap();
    fs::hard_link(p.path("a"), p.path("b")).unwrap();
    let (a, b) = (fs::metadata(p.path("a")).unwrap(), fs::metadata(p.path("b")).unwrap());
    assert_eq!((a.ino(), b.nlink()), (b.ino(), 2));
    fs::write(p.path("b"), "22").unwrap();
    assert_eq!(fs::read_to_string(p.path("a")).unwrap(), "22");
    fs::remove_file(p.path("a")).unwrap();
    assert_eq!(fs::metadata(p.path("b")).unwrap().nlink(), 1);
    fs::create_dir(p.path("d")).unwrap();
    assert_eq!(errno(fs::hard_link(p.path("d"), p.path("e"))), libc::EPERM);
}

fn renames(p: &Place) {
    let with = |from: &str, to: &str, flags| renameat2(AT_FDCWD, &p.path(from), AT_FDCWD, &p.path(to), flags);
    let text = |name: &str| fs::read_to_string(p.path(name)).unwrap();
    fs::write(p.path("a"), "a").unwrap();
    fs::create_dir_all(p.path("d/e")).unwrap();
    fs::write(p.path("d/e/b"), "b").unwrap();
    assert_eq!(with("a", "d/e/b", RenameFlags::RENAME_NOREPLACE), Err(nix::Error::EEXIST));
    with("a", "d/e/b", RenameFlags::RENAME_EXCHANGE).unwrap();
    assert_eq!((text("a"), text("d/e/b")), ("b".into(), "a".into()));
    with("a", "d", RenameFlags::RENAME_EXCHANGE).unwrap();
    assert_eq!((text("d"), text("a/e/b")), ("b".into(), "a".into()));
    with("d", "c", RenameFlags::RENAME_NOREPLACE).unwrap();
    assert_eq!((text("c"), listing(&p.dir).len()), ("b".into(), 2));
    assert_eq!(errno(fs::rename(p.path("a"), p.path("a/e/f"))), libc::EINVAL);
    assert_eq!(errno(fs::rename(p.path("c"), p.path("a"))), libc::EISDIR);
    fs::create_dir_all(p.path("full/x")).unwrap();
    assert_eq!(errno(fs::rename(p.path("a"), p.path("full"))), libc::ENOTEMPTY);
    fs::remove_dir(p.path("full/x")).unwrap();
    fs::rename(p.path("a"), p.path("full")).unwrap();
    assert_eq!(fs::read_to_string(p.behind.join("full/e/b")).unwrap(), "a");
}

fn symbolic_links(p: &Place) {
    fs::write(p.path("f"), "text").unwrap();
    let long = "l".repeat(4000);
    for (target, name) in [("f", "good"), ("nowhere", "bad"), ("loop", "loop"), (&long, "long")] {
        symlink(target, p.path(name)).unwrap();
        assert_eq!(fs::read_link(p.path(name)).unwrap(), Path::new(target));
        assert_eq!(fs::symlink_metadata(p.path(name)).unwrap().len(), target.len() as u64);
    }
    assert_eq!(fs::read_to_string(p.path("good")).unwrap(), "text");
    assert_eq!(errno(File::open(p.path("bad"))), libc::ENOENT);
    assert_eq!(errno(File::open(p.path("loop"))), libc::ELOOP);
    let no_follow = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(p.path("good"));
    assert_eq!(errno(no_follow), libc::ELOOP);
}

fn fifos_sockets_and_devices(p: &Place) {
    nix::unistd::mkfifo(&p.path("fifo"), Mode::S_IRWXU).unwrap();
    std::thread::scope(|s| {
        s.spawn(|| fs::write(p.path("fifo"), "through"));
        assert_eq!(fs::read_to_string(p.path("fifo")).unwrap(), "through");
    });
    // Reached by a short path: a socket's is limited to 108 bytes.
    let dir = File::open(&p.dir).unwrap();
    let address = format!("/proc/self/fd/{}/socket", dir.as_raw_fd());
    let listener = std::os::unix::net::UnixListener::bind(&address).unwrap();
    std::os::unix::net::UnixStream::connect(&address).unwrap();
    drop(listener);
    assert!(fs::metadata(p.path("socket")).unwrap().file_type().is_socket());
    let null = nix::sys::stat::makedev(1, 3);
    mknod(&p.path("null"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), null).unwrap();
    assert_eq!(fs::metadata(p.path("null")).unwrap().rdev(), null);
}

fn a_directory_of_10_000_entries(p: &Place) {
    let names: BTreeSet<OsString> = (0..10_000).map(|i| format!("entry-{i:06}").into()).collect();
    for name in &names {
        File::create(p.dir.join(name)).unwrap();
    }
    assert!(listing(&p.dir) == names);
    assert!(listing(&p.behind) == names);
    for entry in fs::read_dir(&p.dir).unwrap() {
        assert!(entry.unwrap().metadata().unwrap().is_file());
    }
}

fn deleting_while_reading(p: &Place) {
    for i in 0..3000 {
        File::create(p.path(&format!("{i}"))).unwrap();
    }
    let mut seen = BTreeSet::new();
    for entry in fs::read_dir(&p.dir).unwrap() {
        let entry = entry.unwrap();
        fs::remove_file(entry.path()).unwrap();
        assert!(seen.insert(entry.file_name()));
    }
    assert_eq!((seen.len(), listing(&p.dir).len()), (3000, 0));
    assert_eq!(listing(&p.behind).len(), 0);
}

fn directories_can_be_rewound(p: &Place) {
    for i in 0..500 {
        File::create(p.path(&format!("{i}"))).unwrap();
    }
    let path = std::ffi::CString::new(p.dir.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: an open directory stream, used by this thread alone and closed at the end.
    unsafe {
        let dir = libc::opendir(path.as_ptr());
        let next = || match libc::readdir(dir) {
            entry if entry.is_null() => None,
            entry => Some(std::ffi::CStr::from_ptr((*entry).d_name.as_ptr()).to_owned()),
        };
        for _ in 0..100 {
            next().unwrap();
        }
        let place = libc::telldir(dir);
        let rest: Vec<_> = std::iter::from_fn(next).collect();
        assert_eq!(rest.len(), 402, "with . and ..");
        libc::seekdir(dir, place);
        assert_eq!(std::iter::from_fn(next).collect::<Vec<_>>(), rest);
        libc::rewinddir(dir);
        assert_eq!(std::iter::from_fn(next).count(), 502);
        libc::closedir(dir);
    }
}

fn one_creator_wins(p: &Place) {
    for round in 0..20 {
        let path = p.path(&format!("{round}"));
        let create = || OpenOptions::new().write(true).create_new(true).open(&path).is_ok();
        let wins = std::thread::scope(|s| {
            let threads: Vec<_> = (0..4).map(|_| s.spawn(create)).collect();
            threads.into_iter().map(|t| usize::from(t.join().unwrap())).sum::<usize>()
        });
        assert_eq!(wins, 1);
    }
}

fn trees_beside_each_other(p: &Place) {
    std::thread::scope(|s| {
        for thread in 0..4 {
            s.spawn(move || {
                let mine = p.path(&format!("t{thread}"));
                for round in 0..10 {
                    let dir = mine.join(format!("{round}"));
                    fs::create_dir_all(&dir).unwrap();
                    for i in 0..10u64 {
                        fs::write(dir.join("new"), pattern(500, i)).unwrap();
                        fs::rename(dir.join("new"), dir.join(format!("{i}"))).unwrap();
                    }
                    fs::rename(&dir, p.path(&format!("moved-{thread}-{round}"))).unwrap();
                    fs::remove_file(p.path(&format!("moved-{thread}-{round}/3"))).unwrap();
                }
            });
        }
    });
    assert_eq!(listing(&p.dir).len(), 4 + 40);
    for name in listing(&p.dir).iter().filter(|n| n.to_string_lossy().starts_with("moved")) {
        assert_eq!(listing(&p.dir.join(name)).len(), 9);
        assert_eq!(fs::read(p.dir.join(name).join("7")).unwrap(), pattern(500, 7));
    }
}

fn errors_are_the_right_ones(p: &Place) {
    fs::create_dir_all(p.path("d/e")).unwrap();
    fs::write(p.path("f"), "").unwrap();
    assert_eq!(errno(File::open(p.path("nothing"))), libc::ENOENT);
    assert_eq!(errno(File::create(p.path("d"))), libc::EISDIR);
    assert_eq!(errno(fs::remove_dir(p.path("d"))), libc::ENOTEMPTY);
    assert_eq!(errno(fs::remove_dir(p.path("f"))), libc::ENOTDIR);
    assert_eq!(errno(fs::remove_file(p.path("d"))), libc::EISDIR);
    assert_eq!(errno(fs::create_dir(p.path("d"))), libc::EEXIST);
    assert_eq!(errno(File::open(p.path("f/x"))), libc::ENOTDIR);
    assert_eq!(errno(fs::hard_link(p.path("f"), p.path("d"))), libc::EEXIST);
    let directory = OFlag::O_DIRECTORY.bits();
    assert_eq!(errno(OpenOptions::new().read(true).custom_flags(directory).open(p.path("f"))), libc::ENOTDIR);
    assert_eq!(errno(File::open(p.path("f")).unwrap().write_at(b"x", 0)), libc::EBADF);
}

fn the_file_system_s_size(p: &Place) {
    let (here, there) = (nix::sys::statvfs::statvfs(&p.dir).unwrap(), nix::sys::statvfs::statvfs(&p.behind).unwrap());
    assert_eq!((here.blocks(), here.files(), here.name_max()), (there.blocks(), there.files(), there.name_max()));
    assert!(here.blocks_available() > 0);
}

/// The kernel sends FORGET for what it drops; a new look finds the same file.
fn forgotten_files_are_found_again(p: &Place) {
    let path = |i: u64| p.path(&format!("{}/{i}", i % 10));
    (0..10).for_each(|i| fs::create_dir(p.path(&format!("{i}"))).unwrap());
    let numbers: Vec<u64> = (0..1000)
        .map(|i| {
            fs::write(path(i), i.to_string()).unwrap();
            fs::metadata(path(i)).unwrap().ino()
        })
        .collect();
    for _ in 0..2 {
        // Names and inodes that nobody uses.
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        for (i, &number) in (0..).zip(&numbers) {
            assert_eq!(fs::read_to_string(path(i)).unwrap(), i.to_string());
            assert_eq!(fs::metadata(path(i)).unwrap().ino(), number);
        }
    }
}
