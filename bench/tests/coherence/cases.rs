//! One kind of change each. The guest's kernel has the answer in its cache first, and would keep it for a day.

use crate::rig::soon;
use crate::{names, World};
use std::fs::{self, File, Permissions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::atomic::Ordering;
use std::time::Duration;
use tunnelfs_fuse_abi::changes::kind;

pub type Case = (&'static str, fn(&World));

pub const CASES: &[Case] = &[
    ("a missing name appears", missing_name),
    ("a name disappears", deleted),
    ("a name moves to another directory", renamed),
    ("a file replaces another", replaced),
    ("attributes", attributes),
    ("a further link", linked),
    ("a list", list),
    ("data after open", data),
    ("data of an open file", open_data),
    ("truncation", truncated),
];

/// Those that count on a host that does as it is told.
pub const SCRIPTED: &[Case] = &[
    ("answers stay without a change", answers_stay),
    ("lost changes", overflow),
    ("what is no longer watched", unwatched),
];

/// Not over a stream, where a CREATE that the host holds is not seen to leave the others alone.
pub const BUSY: &[Case] = &[("a directory in use does not hold up others", busy_directory)];

fn write(world: &World, name: &str, content: &str) {
    let path = world.behind(name);
    world.script.write(&path, || fs::write(&path, content)).unwrap();
}

fn create(world: &World, name: &str, content: &str) {
    let path = world.behind(name);
    fs::write(&path, content).unwrap();
    world.script.name(kind::CREATED, &path, 0);
}

/// Changes something without a word: the guest must not see it, else the test shows nothing.
fn answers_stay(world: &World) {
    fs::create_dir(world.behind("stay")).unwrap();
    let (inside, behind) = (world.inside("stay/file"), world.behind("stay/file"));
    assert!(fs::metadata(&inside).is_err());
    fs::write(&behind, "x").unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    assert!(fs::metadata(&inside).is_err(), "the kernel does not keep what is missing");
    world.script.name(kind::CREATED, &behind, 0);
    soon("it appears", || fs::metadata(&inside).ok());
    fs::set_permissions(&behind, Permissions::from_mode(0o640)).unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    assert_ne!(fs::metadata(&inside).unwrap().mode() & 0o777, 0o640, "the kernel does not keep attributes");
    world.script.inode(kind::ATTRIBUTES, &behind);
    soon("its mode is seen", || (fs::metadata(&inside).unwrap().mode() & 0o777 == 0o640).then_some(()));
}

fn missing_name(world: &World) {
    assert!(fs::metadata(world.inside("new")).is_err());
    create(world, "new", "content");
    soon("it appears", || fs::read_to_string(world.inside("new")).ok().filter(|text| text == "content"));
}

fn deleted(world: &World) {
    create(world, "gone", "x");
    soon("it appears", || fs::metadata(world.inside("gone")).ok());
    let open = File::open(world.inside("gone")).unwrap();
    let path = world.behind("gone");
    world.script.remove(&path, || fs::remove_file(&path)).unwrap();
    soon("it is gone", || fs::metadata(world.inside("gone")).is_err().then_some(()));
    soon("the open file has no name", || (open.metadata().unwrap().nlink() == 0).then_some(()));
}

fn renamed(world: &World) {
    for dir in ["from", "to"] {
        fs::create_dir(world.behind(dir)).unwrap();
        world.script.name(kind::CREATED, &world.behind(dir), 0);
    }
    create(world, "from/a", "x");
    soon("it appears", || fs::metadata(world.inside("from/a")).ok());
    assert!(fs::metadata(world.inside("to/b")).is_err());
    let (from, to) = (world.behind("from/a"), world.behind("to/b"));
    world.script.rename(&from, &to, || fs::rename(&from, &to)).unwrap();
    soon("it is there", || fs::metadata(world.inside("to/b")).ok());
    soon("and not here", || fs::metadata(world.inside("from/a")).is_err().then_some(()));
}

fn replaced(world: &World) {
    create(world, "old", "old");
    create(world, "fresh", "new content");
    soon("it appears", || fs::read_to_string(world.inside("old")).ok());
    let open = File::open(world.inside("old")).unwrap();
    let (from, to) = (world.behind("fresh"), world.behind("old"));
    world.script.rename(&from, &to, || fs::rename(&from, &to)).unwrap();
    soon("it is the new one", || (fs::read_to_string(world.inside("old")).unwrap() == "new content").then_some(()));
    soon("the old one has no name", || (open.metadata().unwrap().nlink() == 0).then_some(()));
}

fn attributes(world: &World) {
    create(world, "mode", "x");
    let inside = world.inside("mode");
    soon("it appears", || fs::metadata(&inside).ok());
    let open = File::open(&inside).unwrap();
    for mode in [0o600, 0o755, 0o640] {
        fs::set_permissions(world.behind("mode"), Permissions::from_mode(mode)).unwrap();
        world.script.inode(kind::ATTRIBUTES, &world.behind("mode"));
        soon("its mode", || (fs::metadata(&inside).unwrap().mode() & 0o777 == mode).then_some(()));
        assert_eq!(open.metadata().unwrap().mode() & 0o777, mode);
    }
}

fn linked(world: &World) {
    create(world, "one", "x");
    soon("it appears", || fs::metadata(world.inside("one")).ok());
    assert!(fs::metadata(world.inside("two")).is_err());
    fs::hard_link(world.behind("one"), world.behind("two")).unwrap();
    world.script.name(kind::CREATED, &world.behind("two"), 0);
    world.script.inode(kind::ATTRIBUTES, &world.behind("one"));
    soon("the link appears", || fs::metadata(world.inside("two")).ok());
    soon("both have two names", || {
        let links = ["one", "two"].map(|name| fs::metadata(world.inside(name)).unwrap().nlink());
        (links == [2, 2]).then_some(())
    });
}

fn list(world: &World) {
    fs::create_dir(world.behind("list")).unwrap();
    world.script.name(kind::CREATED, &world.behind("list"), 0);
    soon("it appears", || fs::metadata(world.inside("list")).ok());
    let mut wanted = Vec::new();
    for round in 0..10 {
        let name = format!("entry-{round}");
        create(world, &format!("list/{name}"), "x");
        wanted.push(name);
        soon("the list has it", || (names(&world.inside("list")) == wanted).then_some(()));
        // From the cache.
        assert_eq!(names(&world.inside("list")), wanted);
    }
    let path = world.behind("list/entry-3");
    world.script.remove(&path, || fs::remove_file(&path)).unwrap();
    wanted.remove(3);
    soon("the list does not have it", || (names(&world.inside("list")) == wanted).then_some(()));
}

/// Strictly right for whoever opens, at once.
fn data(world: &World) {
    create(world, "data", "first");
    let inside = world.inside("data");
    soon("it appears", || fs::read_to_string(&inside).ok());
    for round in 0..20 {
        let content = format!("content of round {round}");
        write(world, "data", &content);
        assert_eq!(fs::read_to_string(&inside).unwrap().len().min(7), 7);
        soon("its whole content", || (fs::read_to_string(&inside).unwrap() == content).then_some(()));
    }
}

fn open_data(world: &World) {
    create(world, "open", "one");
    let inside = world.inside("open");
    soon("it appears", || fs::metadata(&inside).ok());
    let mut open = File::open(&inside).unwrap();
    let mut read = || {
        let mut text = String::new();
        open.seek(SeekFrom::Start(0)).unwrap();
        open.read_to_string(&mut text).unwrap();
        text
    };
    assert_eq!(read(), "one");
    write(world, "open", "two");
    soon("an open file has the new data", || (read() == "two").then_some(()));
    write(world, "open", "three, which is longer");
    soon("and what was appended", || (read() == "three, which is longer").then_some(()));
}

fn truncated(world: &World) {
    create(world, "short", "a long content");
    let inside = world.inside("short");
    soon("it appears", || fs::read_to_string(&inside).ok());
    let path = world.behind("short");
    let truncate = || File::options().write(true).open(&path)?.set_len(3);
    world.script.write(&path, truncate).unwrap();
    soon("its size", || (fs::metadata(&inside).unwrap().len() == 3).then_some(()));
    assert_eq!(fs::read_to_string(&inside).unwrap(), "a l");
}

fn overflow(world: &World) {
    fs::create_dir(world.behind("lost")).unwrap();
    world.script.name(kind::CREATED, &world.behind("lost"), 0);
    soon("it appears", || fs::metadata(world.inside("lost")).ok());
    create(world, "lost/file", "x");
    soon("it appears", || fs::metadata(world.inside("lost/file")).ok());
    let open = File::open(world.inside("lost/file")).unwrap();
    assert!(fs::metadata(world.inside("lost/other")).is_err());
    assert_eq!(names(&world.inside("lost")), ["file"]);
    // Nobody tells of these.
    fs::write(world.behind("lost/other"), "y").unwrap();
    fs::set_permissions(world.behind("lost/file"), Permissions::from_mode(0o604)).unwrap();
    world.script.overflow();
    soon("a missing name", || fs::metadata(world.inside("lost/other")).ok());
    soon("a list", || (names(&world.inside("lost")) == ["file", "other"]).then_some(()));
    soon("an open file", || (open.metadata().unwrap().mode() & 0o777 == 0o604).then_some(()));
    soon("the log says so", || world.guest.output().contains("has lost changes").then_some(()));
}

fn unwatched(world: &World) {
    fs::create_dir(world.behind("watched")).unwrap();
    world.script.name(kind::CREATED, &world.behind("watched"), 0);
    soon("it appears", || fs::metadata(world.inside("watched")).ok());
    create(world, "watched/file", "x");
    soon("it appears", || fs::metadata(world.inside("watched/file")).ok());
    fs::remove_file(world.behind("watched/file")).unwrap();
    world.script.inode(kind::UNWATCHED, &world.behind("watched"));
    soon("its names are asked for", || fs::metadata(world.inside("watched/file")).is_err().then_some(()));
}

/// A list that somebody is reading holds the directory's lock: other directories are told of meanwhile.
fn busy_directory(world: &World) {
    for dir in ["busy", "idle"] {
        fs::create_dir(world.behind(dir)).unwrap();
        world.script.name(kind::CREATED, &world.behind(dir), 0);
        soon("it appears", || fs::metadata(world.inside(dir)).ok());
        assert!(fs::metadata(world.inside(&format!("{dir}/new"))).is_err());
    }
    world.script.hold_creates.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let creating = scope.spawn(|| File::create(world.inside("busy/mine")));
        soon("the host has the CREATE", || (world.script.held_creates.load(Ordering::SeqCst) > 0).then_some(()));
        create(world, "busy/new", "x");
        create(world, "idle/new", "x");
        soon("the idle directory's name", || fs::metadata(world.inside("idle/new")).ok());
        assert!(!creating.is_finished());
        world.script.hold_creates.store(false, Ordering::SeqCst);
        creating.join().unwrap().unwrap();
        soon("the busy directory's name", || fs::metadata(world.inside("busy/new")).ok());
    });
}
