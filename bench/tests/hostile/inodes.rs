//! Attacks on the table of inodes: names that change under it, numbers and handles that are made up, are of another
//! guest, or are of what is not there any more, and ways up out of the share. What lies outside has a secret in it.

use crate::guest::{op, request, Answer, Hostile, Ring};
use crate::rig::{has_secret, Random, Target};
use std::fs;
use std::os::unix::fs::{symlink, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// With so few open files most inodes are kept by their handles.
const FEW: &[&str] = &["--rlimit-nofile", "300", "--inode-file-handles", "prefer"];
/// More than there are descriptors for.
const FILES: usize = 400;

/// FUSE_EXPORT_SUPPORT (linux/fuse.h).
const EXPORT_SUPPORT: u32 = 1 << 4;

/// A session that agrees to file handles in the guest, in which `.` and `..` are looked up.
fn begin(target: &Target) -> (Hostile, Ring) {
    let mut guest = target.guest();
    let body = op::words(&[7, 38, 1 << 20, EXPORT_SUPPORT]);
    assert_eq!(guest.call(0, &request(op::INIT, 0, &body)).unwrap().error, 0);
    let ring = guest.ring(1);
    (guest, ring)
}

fn ask(guest: &Hostile, ring: &mut Ring, opcode: u32, node: u64, body: &[u8]) -> Answer {
    let answer = ring.call(guest, &request(opcode, node, body)).expect("an answer");
    assert!(!has_secret(&answer.payload), "opcode {opcode} of node {node} has told what is outside");
    answer
}

fn look_up(guest: &Hostile, ring: &mut Ring, parent: u64, name: &str) -> Result<u64, i32> {
    let answer = ask(guest, ring, op::LOOKUP, parent, &[name.as_bytes(), b"\0"].concat());
    if answer.error == 0 {
        Ok(answer.word(0))
    } else {
        Err(-answer.error)
    }
}

/// Opens, reads and lists a node in every way; the bytes of what could be read.
fn read_all(guest: &Hostile, ring: &mut Ring, node: u64) -> Option<Vec<u8>> {
    for (open, read, release) in [(op::OPEN, op::READ, op::RELEASE), (op::OPENDIR, op::READDIRPLUS, op::RELEASEDIR)] {
        let opened = ask(guest, ring, open, node, &op::words(&[0, 0]));
        if opened.error != 0 {
            continue;
        }
        let handle = opened.word(0);
        let answer = ask(guest, ring, read, node, &op::read_body(handle, 0, 4096));
        ask(guest, ring, release, node, &[&handle.to_ne_bytes()[..], &[0; 16]].concat());
        if answer.error == 0 {
            return Some(answer.payload);
        }
    }
    None
}

/// Makes `FILES` files and looks them up, so that what was looked up before is kept by its handle.
fn fill_table(target: &Target, guest: &Hostile, ring: &mut Ring) {
    for number in 0..2 * FILES {
        let name = format!("filler{}", number % FILES);
        fs::write(target.path("share").join(&name), "x").unwrap();
        let node = look_up(guest, ring, 1, &name).unwrap();
        ask(guest, ring, op::GETATTR, node, &[0; 16]);
    }
}

/// A place outside of the share that changes; what lies beside the share must not.
fn elsewhere(target: &Target) -> tempfile::TempDir {
    let beside = target.path("");
    tempfile::tempdir_in(beside.parent().unwrap()).unwrap()
}

fn exchange(a: &Path, b: &Path) {
    let at = nix::fcntl::AT_FDCWD;
    nix::fcntl::renameat2(at, a, at, b, nix::fcntl::RenameFlags::RENAME_EXCHANGE).unwrap();
}

/// A directory that the guest knows is moved out of the share: no way up leads to what lies there.
#[test]
fn a_directory_that_is_moved_out_has_no_parent() {
    for options in [&[][..], FEW] {
        let mut target = Target::new(options);
        fs::create_dir_all(target.path("share/sub/deep/deeper")).unwrap();
        let (guest, mut ring) = begin(&target);
        let sub = look_up(&guest, &mut ring, 1, "sub").unwrap();
        let deep = look_up(&guest, &mut ring, sub, "deep").unwrap();
        let deeper = look_up(&guest, &mut ring, deep, "deeper").unwrap();
        assert_eq!(look_up(&guest, &mut ring, deeper, ".."), Ok(deep), "inside there is a way up");
        assert_eq!(look_up(&guest, &mut ring, 1, ".."), Ok(1), "the root is its own parent");
        fill_table(&target, &guest, &mut ring);
        let out = elsewhere(&target);
        fs::rename(target.path("share/sub/deep"), out.path().join("deep")).unwrap();
        for node in [deep, deeper] {
            assert_eq!(look_up(&guest, &mut ring, node, ".."), Err(libc::ESTALE));
        }
        fs::rename(out.path().join("deep"), target.path("share/sub/deep")).unwrap();
        assert_eq!(look_up(&guest, &mut ring, deep, ".."), Ok(sub), "it is back");
        drop(guest);
        target.check("ways up");
    }
}

/// The same while it is moved out and back all the time: whatever the guest finds above is in the share.
#[test]
fn ways_up_are_raced_by_renames() {
    let mut target = Target::new(FEW);
    fs::create_dir_all(target.path("share/sub/deep/deeper")).unwrap();
    let known = ["share", "share/sub", "share/sub/deep"].map(|name| fs::metadata(target.path(name)).unwrap().ino());
    let place = elsewhere(&target);
    let (inside, out) = (target.path("share/sub/deep"), place.path().join("moved"));
    let (guest, mut ring) = begin(&target);
    let sub = look_up(&guest, &mut ring, 1, "sub").unwrap();
    let deep = look_up(&guest, &mut ring, sub, "deep").unwrap();
    let deeper = look_up(&guest, &mut ring, deep, "deeper").unwrap();
    fill_table(&target, &guest, &mut ring);
    let done = AtomicBool::new(false);
    let (found, stale) = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                fs::rename(&inside, &out).unwrap();
                fs::rename(&out, &inside).unwrap();
            }
        });
        let (start, mut found, mut stale) = (Instant::now(), 0, 0);
        while (found < 50 || stale < 50) && start.elapsed() < Duration::from_secs(30) {
            for node in [deep, deeper] {
                let answer = ask(&guest, &mut ring, op::LOOKUP, node, b"..\0");
                match answer.error {
                    // struct fuse_entry_out: nodeid, generation, three times, then fuse_attr with the inode's number.
                    0 => {
                        assert!(known.contains(&answer.word(40)), "inode {} is not in the share", answer.word(40));
                        found += 1;
                    }
                    e => {
                        assert_eq!(-e, libc::ESTALE);
                        stale += 1;
                    }
                }
            }
        }
        done.store(true, Ordering::Relaxed);
        (found, stale)
    });
    println!("{found} found, {stale} stale");
    assert!(found > 0 && stale > 0, "no race: {found} found, {stale} stale");
    drop(guest);
    target.check("raced ways up");
}

/// Files and directories change places with links out of the share while their inodes are kept by handles, are looked
/// up anew, opened and listed.
#[test]
fn handles_are_raced_by_renames_and_links() {
    let mut target = Target::new(FEW);
    let (share, outside) = (target.path("share"), target.path("outside"));
    fs::write(share.join("sub/secret"), "inside").unwrap();
    fs::write(share.join("file"), "inside").unwrap();
    symlink(&outside, share.join("dirlink")).unwrap();
    symlink(outside.join("secret"), share.join("filelink")).unwrap();
    let (guest, mut ring) = begin(&target);
    fill_table(&target, &guest, &mut ring);
    let done = AtomicBool::new(false);
    let mut random = Random(0x5eed_0011);
    let (mut reads, mut nodes) = (0, vec![1]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                exchange(&share.join("sub"), &share.join("dirlink"));
                exchange(&share.join("file"), &share.join("filelink"));
            }
        });
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(3) {
            let parent = random.of(&nodes);
            let name = random.of(&["sub", "file", "dirlink", "filelink", "secret", "dir", ".", ".."]);
            if let Ok(node) = look_up(&guest, &mut ring, parent, name) {
                nodes.push(node);
                reads += usize::from(read_all(&guest, &mut ring, node).is_some());
            }
            // Some other inode takes a descriptor, and another one loses it.
            let _ = look_up(&guest, &mut ring, 1, &format!("filler{}", random.next() as usize % FILES));
            let old = random.of(&nodes);
            read_all(&guest, &mut ring, old);
            nodes.truncate(64);
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(reads > 10, "{reads} reads");
    drop(guest);
    target.check("raced handles");
}

/// An inode's number is used again, for a file outside: what the guest still knows by it leads nowhere.
#[test]
fn a_number_that_is_used_again_outside_leads_nowhere() {
    let mut target = Target::new(FEW);
    let (guest, mut ring) = begin(&target);
    let victim = target.path("share/victim");
    let (mut met, place) = (0, elsewhere(&target));
    for _ in 0..6 {
        fs::write(&victim, "inside").unwrap();
        let number = fs::metadata(&victim).unwrap().ino();
        let node = look_up(&guest, &mut ring, 1, "victim").unwrap();
        fill_table(&target, &guest, &mut ring);
        // The host's own program removes it: an inode that is kept by its handle is gone then.
        fs::remove_file(&victim).unwrap();
        let outside: Vec<_> = (0..32).map(|i| place.path().join(format!("again{i}"))).collect();
        outside.iter().for_each(|path| fs::copy(target.path("secret"), path).map(drop).unwrap());
        met += usize::from(outside.iter().any(|path| fs::metadata(path).unwrap().ino() == number));
        for round in 0..3 {
            assert!(read_all(&guest, &mut ring, node).is_none_or(|bytes| bytes == b"inside"), "round {round}");
            ask(&guest, &mut ring, op::GETATTR, node, &[0; 16]);
            let _ = look_up(&guest, &mut ring, node, ".");
        }
        // It is forgotten, and asked for by its number.
        ring.call(&guest, &request(op::FORGET, node, &1u64.to_ne_bytes()));
        if let Ok(node) = look_up(&guest, &mut ring, node, ".") {
            assert!(read_all(&guest, &mut ring, node).is_none_or(|bytes| bytes == b"inside"));
        }
        outside.iter().for_each(|path| fs::remove_file(path).unwrap());
    }
    println!("the number was used again {met} times of 6");
    drop(guest);
    target.check("numbers that are used again");
}

/// Numbers of inodes and of open files that nobody gave, or gave to another guest, are none.
#[test]
fn numbers_of_others_are_none() {
    let mut target = Target::new(&[]);
    let (first, mut its_ring) = begin(&target);
    for name in ["one", "two", "three"] {
        fs::write(target.path("share").join(name), name).unwrap();
    }
    let nodes = ["one", "two", "three"].map(|name| look_up(&first, &mut its_ring, 1, name).unwrap());
    let opened: Vec<u64> =
        nodes.iter().map(|&node| ask(&first, &mut its_ring, op::OPEN, node, &op::words(&[2, 0])).word(0)).collect();
    let (second, mut ring) = begin(&target);
    let mut random = Random(0x5eed_0012);
    let forged = |random: &mut Random, real: &[u64]| {
        let near = random.of(real).wrapping_add(random.next() % 9).wrapping_sub(4);
        let bits = random.of(real) ^ 1 << (random.next() % 64);
        let any = random.next();
        random.of(&[near, bits, any, u64::MAX, 0, 1 << 63])
    };
    let mut bodies: Vec<(u32, u64, Vec<u8>)> = Vec::new();
    for _ in 0..2000 {
        let (node, handle) = (forged(&mut random, &nodes), forged(&mut random, &opened));
        for node in [node, 1] {
            bodies.push((op::READ, node, op::read_body(handle, 0, 4096)));
            bodies.push((op::READDIR, node, op::read_body(handle, 0, 4096)));
        }
        bodies.push((op::OPEN, node, op::words(&[2, 0])));
        bodies.push((op::LOOKUP, node, b".\0".to_vec()));
    }
    let mut served = 0;
    for (opcode, node, body) in bodies {
        // The root is everybody's.
        if node == 1 && opcode != op::READ && opcode != op::READDIR {
            continue;
        }
        let answer = ask(&second, &mut ring, opcode, node, &body);
        served += usize::from(answer.error == 0);
    }
    assert_eq!(served, 0, "the second guest has been given nothing, and has used something");
    // The first one's still are what they were.
    for (node, (handle, name)) in nodes.iter().zip(opened.iter().zip(["one", "two", "three"])) {
        let answer = ask(&first, &mut its_ring, op::READ, *node, &op::read_body(*handle, 0, 4096));
        assert_eq!((answer.error, answer.payload), (0, name.as_bytes().to_vec()));
    }
    drop((first, second));
    target.check("forged numbers");
}
