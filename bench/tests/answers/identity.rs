//! Which file is which: device and inode numbers, file handles, names that others replace.

use crate::common::pair::{make_dir, shell, Pair, Setup};
use crate::common::sys::{name_to_handle, open_handle, statx};
use crate::rig::soon;
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{symlink, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Two file systems below the share, with the same inode numbers.
fn with_submounts(options: &[&str]) -> Option<Pair> {
    let mut setup = Setup::new()?;
    for name in ["a", "b"] {
        let dir = setup.path("share").join(name);
        make_dir(&dir);
        setup.mount_tmpfs(&dir, "size=1m");
        fs::write(dir.join("f"), name).unwrap();
        fs::hard_link(dir.join("f"), dir.join("g")).unwrap();
    }
    Some(setup.start(options, ""))
}

fn identity(path: &Path) -> (u64, u64) {
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.dev(), meta.ino())
}

fn assert_files_are_told_apart(options: &[&str]) {
    let Some(pair) = with_submounts(options) else { return };
    let first = identity(&pair.on("a/f"));
    assert_eq!(first, identity(&pair.on("a/g")), "two names of one file");
    assert_ne!(first, identity(&pair.on("b/f")), "two files");
    assert_ne!(identity(&pair.on("a")), identity(&pair.on("b")), "two directories");
    let copy = pair.setup.path("copy");
    let (code, _) = shell(&pair.guest.point, &format!("cp -a . {}", copy.display()));
    assert_eq!(code, Some(0));
    for name in ["a", "b"] {
        assert_eq!(fs::read_to_string(copy.join(name).join("f")).unwrap(), name);
        assert_eq!(identity(&copy.join(name).join("f")), identity(&copy.join(name).join("g")));
    }
    // tar and rsync decide by the same numbers.
    let archive = pair.setup.path("tar");
    let untar = pair.setup.path("untar");
    make_dir(&untar);
    let (code, _) =
        shell(&pair.guest.point, &format!("tar cf {} . && tar xf {0} -C {}", archive.display(), untar.display()));
    assert_eq!(code, Some(0));
    assert_eq!(fs::read_to_string(untar.join("b/f")).unwrap(), "b");
}

#[test]
fn files_of_announced_submounts_are_told_apart() {
    assert_files_are_told_apart(&[]);
}

#[test]
fn files_of_hidden_submounts_are_told_apart() {
    assert_files_are_told_apart(&["--no-announce-submounts"]);
}

/// As `ls -i` and `find -inum` have them.
#[test]
fn listings_have_the_numbers_of_stat() {
    let Some(pair) = with_submounts(&["--no-announce-submounts"]) else { return };
    for dir in ["a", "b"] {
        for entry in fs::read_dir(pair.on(dir)).unwrap().map(Result::unwrap) {
            use std::os::unix::fs::DirEntryExt;
            assert_eq!(entry.ino(), fs::metadata(entry.path()).unwrap().ino(), "{:?}", entry.path());
        }
    }
}

#[test]
fn names_cross_no_file_system() {
    let Some(pair) = with_submounts(&["--no-announce-submounts"]) else { return };
    assert_eq!(crate::rig::errno(fs::rename(pair.on("a/f"), pair.on("b/new"))), libc::EXDEV);
    assert_eq!(crate::rig::errno(fs::hard_link(pair.on("a/f"), pair.on("b/new"))), libc::EXDEV);
    assert_eq!(fs::read_to_string(pair.on("a/f")).unwrap(), "a");
}

/// The host can take away what the guest has only looked at.
#[test]
fn a_submount_can_be_unmounted() {
    let Some(mut setup) = Setup::new() else { return };
    let share = setup.path("share");
    setup.mount_tmpfs(&share, "size=1m,mode=755");
    mount(None::<&str>, &share, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
    let sub = share.join("sub");
    make_dir(&sub);
    let pair = setup.start(&[], "");
    mount(Some("none"), &sub, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    let _gone_in_the_end = crate::rig::Unmounted(sub.clone());
    fs::write(sub.join("f"), "x").unwrap();
    // Names are cached for a second.
    soon("the guest sees it", || (shell(&pair.guest.point, "ls sub").1 == "f").then_some(()));
    soon("it can be unmounted", || umount2(&sub, MntFlags::empty()).ok());
    soon("the guest sees that it has gone", || (shell(&pair.guest.point, "ls -A sub").1.is_empty()).then_some(()));
}

/// Runs `host` until `guest` has looked often enough.
fn race(host: impl Fn() + Sync, mut guest: impl FnMut(u32)) {
    const LOOKS: u32 = 20_000;
    const LONGEST: Duration = Duration::from_secs(5);
    let done = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            while !done.load(Relaxed) {
                host();
            }
        });
        let start = Instant::now();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for look in (0..LOOKS).take_while(|_| start.elapsed() < LONGEST) {
                guest(look);
            }
        }));
        done.store(true, Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

fn assert_a_replaced_file_is_always_there(options: &[&str]) {
    let Some(setup) = Setup::in_memory("16m") else { return };
    let pair = setup.start(options, "");
    let (temporary, name) = (pair.behind("t"), pair.behind("v"));
    fs::write(&name, "content").unwrap();
    let replace = || {
        fs::write(&temporary, "content").unwrap();
        fs::rename(&temporary, &name).unwrap();
    };
    race(replace, |look| {
        let mut file = File::open(pair.on("v")).unwrap_or_else(|e| panic!("open {look}: {e}"));
        fs::metadata(pair.on("v")).unwrap_or_else(|e| panic!("stat {look}: {e}"));
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap_or_else(|e| panic!("read {look}: {e}"));
        assert_eq!(text, "content", "read {look}");
    });
}

#[test]
fn a_replaced_file_is_always_there() {
    assert_a_replaced_file_is_always_there(&[]);
}

#[test]
fn a_replaced_file_is_always_there_without_caches() {
    assert_a_replaced_file_is_always_there(&["--cache=never"]);
}

#[test]
fn a_replaced_link_always_leads_somewhere() {
    let Some(setup) = Setup::in_memory("16m") else { return };
    let pair = setup.start(&["--cache=never"], "");
    for dir in ["one", "two"] {
        make_dir(&pair.behind(dir));
        fs::write(pair.behind(dir).join("f"), "content").unwrap();
    }
    symlink("one", pair.behind("v")).unwrap();
    let replace = || {
        for target in ["two", "one"] {
            symlink(target, pair.behind("t")).unwrap();
            fs::rename(pair.behind("t"), pair.behind("v")).unwrap();
        }
    };
    race(replace, |look| {
        let text = fs::read_to_string(pair.on("v/f")).unwrap_or_else(|e| panic!("look {look}: {e}"));
        assert_eq!(text, "content");
    });
}

/// Two directories that change places: what is open stays what it was.
#[test]
fn exchanged_directories_keep_their_files() {
    let Some(setup) = Setup::in_memory("16m") else { return };
    let pair = setup.start(&["--cache=never"], "");
    for dir in ["a", "b"] {
        make_dir(&pair.behind(dir));
        fs::write(pair.behind(dir).join("f"), "content").unwrap();
    }
    let exchange = || crate::common::sys::rename(&pair.behind("a"), &pair.behind("b"), libc::RENAME_EXCHANGE).unwrap();
    race(exchange, |look| {
        let text = fs::read_to_string(pair.on("a/f")).unwrap_or_else(|e| panic!("look {look}: {e}"));
        assert_eq!(text, "content");
    });
}

/// A handle finds its file when nothing about it is in the guest's memory any more.
#[test]
fn file_handles_outlive_the_cache() {
    let Some(pair) = Pair::plain() else { return };
    let opened = pair.same_value("name_to_handle_at, drop_caches, open_by_handle_at", |dir| {
        fs::create_dir_all(dir.join("d/e")).unwrap();
        fs::write(dir.join("d/e/f"), "content").unwrap();
        let handles: Vec<_> = ["d", "d/e", "d/e/f"].iter().map(|n| name_to_handle(&dir.join(n))).collect();
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        let of = File::open(dir).unwrap();
        let open = |h: Result<_, nix::Error>| open_handle(&of, &h?, libc::O_RDONLY).map(File::from);
        let mut opened: Vec<_> = handles.into_iter().map(open).collect();
        let mut text = String::new();
        if let Some(Ok(file)) = opened.last_mut() {
            file.read_to_string(&mut text).unwrap();
        }
        (opened.into_iter().map(|f| f.map(drop)).collect::<Vec<_>>(), text)
    });
    assert_eq!(opened, (vec![Ok(()); 3], "content".into()), "natively");
}

/// Renamed behind the mount's back it is still the file; deleted it is stale.
#[test]
fn file_handles_are_of_files_and_not_of_names() {
    let Some(pair) = Pair::plain() else { return };
    fs::write(pair.on("f"), "content").unwrap();
    fs::write(pair.on("gone"), "").unwrap();
    let handles = [name_to_handle(&pair.on("f")).unwrap(), name_to_handle(&pair.on("gone")).unwrap()];
    fs::rename(pair.behind("f"), pair.behind("g")).unwrap();
    fs::remove_file(pair.behind("gone")).unwrap();
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    let of = File::open(&pair.guest.point).unwrap();
    let mut text = String::new();
    File::from(open_handle(&of, &handles[0], libc::O_RDONLY).unwrap()).read_to_string(&mut text).unwrap();
    assert_eq!(text, "content");
    // The file that was written is still open until its RELEASE, which nobody waits for; so is what was opened here.
    soon("a deleted file's handle is stale", || {
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        match open_handle(&of, &handles[1], libc::O_RDONLY) {
            Ok(_) => None,
            Err(e) => {
                assert_eq!(e, nix::Error::ESTALE);
                Some(())
            }
        }
    });
}

#[test]
fn birth_times_are_told() {
    let Some(pair) = Pair::plain() else { return };
    fs::write(pair.on("f"), "").unwrap();
    fs::create_dir(pair.on("d")).unwrap();
    for name in ["f", "d"] {
        let (here, there) = (statx(&pair.on(name)).unwrap(), statx(&pair.behind(name)).unwrap());
        if there.stx_mask & libc::STATX_BTIME == 0 {
            return crate::skip::unsupported("the file system below has no birth times");
        }
        assert_ne!(here.stx_mask & libc::STATX_BTIME, 0, "{name}");
        let time = |s: &libc::statx| (s.stx_btime.tv_sec, s.stx_btime.tv_nsec);
        assert_eq!(time(&here), time(&there), "{name}");
    }
    assert_ne!(shell(&pair.guest.point, "stat -c %W f").1, "0");
}

/// With fewer descriptors than files, all of them can be used.
#[test]
fn more_files_than_descriptors() {
    const FILES: usize = 3000;
    let Some(setup) = Setup::in_memory("64m") else { return };
    let share = setup.path("share");
    for i in 0..FILES {
        fs::write(share.join(format!("{i}")), format!("{i}")).unwrap();
    }
    let pair = setup.start(&["--rlimit-nofile=1000", "--cache=always"], "");
    let open: Vec<_> = (0..100).map(|i| File::open(pair.on(&format!("{i}"))).unwrap()).collect();
    // What is open, or deleted while open, is never turned into a handle.
    for i in 0..50 {
        fs::remove_file(pair.on(&format!("{i}"))).unwrap();
    }
    for round in 0..2 {
        for i in 50..FILES {
            let meta = fs::metadata(pair.on(&format!("{i}"))).unwrap_or_else(|e| panic!("{round}, stat {i}: {e}"));
            assert_eq!(meta.len(), format!("{i}").len() as u64);
        }
        let listed = fs::read_dir(&pair.guest.point).unwrap().map(Result::unwrap).count();
        assert_eq!(listed, FILES - 50);
    }
    for i in (50..FILES).step_by(7) {
        assert_eq!(fs::read_to_string(pair.on(&format!("{i}"))).unwrap(), format!("{i}"));
    }
    for (i, mut file) in open.into_iter().enumerate() {
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!((text, file.metadata().unwrap().nlink()), (format!("{i}"), u64::from(i >= 50)));
    }
}

/// Deleted, replaced, renamed: an open file stays what it was.
#[test]
fn open_files_without_their_names() {
    let Some(pair) = Pair::plain() else { return };
    pair.same("open files", |dir| {
        use std::os::unix::fs::FileExt;
        let (f, g) = (dir.join("f"), dir.join("g"));
        fs::write(&f, "one").unwrap();
        fs::write(&g, "two").unwrap();
        let one = File::options().read(true).write(true).open(&f).unwrap();
        let two = File::options().read(true).write(true).open(&g).unwrap();
        fs::rename(&f, &g).unwrap();
        two.set_len(1).unwrap();
        two.write_at(b"xyz", 1).unwrap();
        let mut text = [0; 4];
        two.read_exact_at(&mut text, 0).unwrap();
        let (first, second) = (one.metadata().unwrap(), two.metadata().unwrap());
        let relinked = crate::common::sys::link_open(&two, &dir.join("h"));
        let renamed = fs::metadata(&g).unwrap().ino() == first.ino();
        fs::remove_file(&g).unwrap();
        (text, first.nlink(), second.nlink(), second.len(), relinked, renamed, one.metadata().unwrap().nlink())
    });
    pair.same_script("mkdir d && cd d && rmdir ../d && ls -A . && touch x; echo $?");
    pair.same_script("mkdir -p e/f/g && cd e/f/g && mv ../../../e ../../../h; cat ../../x; cd .. && ls && pwd -P | sed 's/.*\\(h.*\\)/\\1/'");
}

/// Deleting while listing reaches every entry (`rm -r`, `find -delete`), also with a small buffer.
#[test]
fn listings_while_entries_go() {
    let Some(pair) = Pair::plain() else { return };
    pair.same("read and remove", |dir| {
        let many = dir.join("many");
        fs::create_dir(&many).unwrap();
        for i in 0..2000 {
            fs::write(many.join(format!("file-with-a-name-{i}")), "").unwrap();
        }
        let mut removed = 0;
        for entry in fs::read_dir(&many).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
            removed += 1;
        }
        (removed, fs::read_dir(&many).unwrap().count(), fs::remove_dir(&many).is_ok())
    });
}

/// seekdir(3) to any place that telldir(3) gave.
#[test]
fn listings_continue_anywhere() {
    let Some(pair) = Pair::plain() else { return };
    fs::create_dir(pair.on("many")).unwrap();
    for i in 0..500 {
        fs::write(pair.on("many").join(format!("n{i}")), "").unwrap();
    }
    let path = crate::common::sys::c(&pair.on("many"));
    // SAFETY: one thread uses the stream, and names are copied before the next call.
    unsafe {
        let stream = libc::opendir(path.as_ptr());
        assert!(!stream.is_null());
        let next = || {
            let entry = libc::readdir(stream);
            (!entry.is_null()).then(|| std::ffi::CStr::from_ptr((*entry).d_name.as_ptr()).to_owned())
        };
        let mut places = Vec::new();
        loop {
            let place = libc::telldir(stream);
            let Some(name) = next() else { break };
            places.push((place, name));
        }
        assert_eq!(places.len(), 502);
        for (place, name) in places.iter().rev().step_by(37) {
            libc::seekdir(stream, *place);
            assert_eq!(next().as_ref(), Some(name));
        }
        libc::closedir(stream);
    }
}
