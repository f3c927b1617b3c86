//! Attacks by FUSE messages: names that lead out, bodies of any length, nodes and handles that are none.

use crate::guest::{op, request, slot_at, sqe, Answer, Hostile, Ring};
use crate::rig::{has_secret, Random, Target};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub const LAST_OPCODE: u32 = 60;

fn begin(target: &Target) -> (Hostile, Ring) {
    let mut guest = target.guest();
    assert_eq!(guest.call(0, &request(op::INIT, 0, &op::init_body())).unwrap().error, 0);
    let ring = guest.ring(1);
    (guest, ring)
}

/// Every operation that takes a name, with `name` as its (last) name.
fn with_name(name: &[u8], words: u64) -> Vec<(u32, Vec<u8>)> {
    let at = |words: &[u32], first: &[u8]| [&op::words(words)[..], first, name].concat();
    vec![
        (op::LOOKUP, at(&[], b"")),
        (op::MKDIR, at(&[0o755, 0], b"")),
        (op::MKNOD, at(&[0o100644, 0, 0, 0], b"")),
        (op::CREATE, at(&[libc::O_RDWR as u32 | libc::O_CREAT as u32, 0o644, 0, 0], b"")),
        (op::SYMLINK, [name, b"target\0"].concat()),
        (op::UNLINK, at(&[], b"")),
        (op::RMDIR, at(&[], b"")),
        (op::RENAME, at(&[1, 0], b"words\0")),
        (op::RENAME, [&op::words(&[1, 0])[..], name, b"stolen\0"].concat()),
        (op::RENAME2, at(&[1, 0, 0, 0], b"words\0")),
        (op::LINK, [&words.to_ne_bytes()[..], name].concat()),
    ]
}

#[test]
fn names_that_are_paths() {
    let mut target = Target::new(&[]);
    let (guest, mut ring) = begin(&target);
    let words = ring.call(&guest, &request(op::LOOKUP, 1, b"words\0")).unwrap().word(0);
    // The same requests work with a name.
    for (opcode, body) in with_name(b"fine\0", words) {
        let answer = ring.call(&guest, &request(opcode, 1, &body)).unwrap();
        let known = [0, -libc::EEXIST, -libc::ENOENT, -libc::ENOTDIR, -libc::EISDIR, -libc::ENOTEMPTY];
        assert!(known.contains(&answer.error), "opcode {opcode}: {answer:?}");
    }
    let long = [&[b'n'; 256][..], b"\0"].concat();
    let names: [&[u8]; 14] = [
        b"\0",
        b".\0",
        b"..\0",
        b"../x\0",
        b"../secret\0",
        b"../outside/x\0",
        b"../outside/secret\0",
        b"/\0",
        b"/etc/passwd\0",
        b"sub/../../x\0",
        b"sub/..\0",
        b"a\x01/x\0",
        b"no end",
        &long,
    ];
    for name in names {
        for (opcode, body) in with_name(name, words) {
            let answer = ring.call(&guest, &request(opcode, 1, &body)).unwrap();
            assert!(answer.error < 0, "opcode {opcode} with {:?}: {answer:?}", String::from_utf8_lossy(name));
        }
    }
    drop(guest);
    assert!(!target.path("x").exists());
    target.check("names");
}

#[test]
fn links_are_not_followed() {
    let mut target = Target::new(&[]);
    let (guest, mut ring) = begin(&target);
    for (name, to) in [("file", "../secret"), ("dir", "../outside"), ("proc", "/proc/self"), ("dev", "/dev")] {
        let body = [name.as_bytes(), b"\0", to.as_bytes(), b"\0"].concat();
        let node = ring.call(&guest, &request(op::SYMLINK, 1, &body)).unwrap().word(0);
        for opcode in [op::OPEN, 27] {
            let answer = ring.call(&guest, &request(opcode, node, &op::words(&[0, 0]))).unwrap();
            assert!(answer.error < 0, "opening {name}: {answer:?}");
        }
        for below in [&b"secret\0"[..], b"dir\0", b"root\0", b"fd\0", b"null\0"] {
            let answer = ring.call(&guest, &request(op::LOOKUP, node, below)).unwrap();
            assert!(answer.error < 0, "{name} led to {:?}", String::from_utf8_lossy(below));
            let made = ring.call(&guest, &request(op::MKDIR, node, &[&op::words(&[0o755, 0])[..], below].concat()));
            assert!(made.unwrap().error < 0, "made a directory behind {name}");
        }
    }
    // A device node that the guest makes must not be opened by the host.
    let body = [&op::words(&[0o020666, 0x0101, 0, 0])[..], b"mem\0"].concat();
    if let Answer { error: 0, payload } = ring.call(&guest, &request(op::MKNOD, 1, &body)).unwrap() {
        let node = u64::from_ne_bytes(payload[..8].try_into().unwrap());
        assert!(ring.call(&guest, &request(op::OPEN, node, &op::words(&[2, 0]))).unwrap().error < 0);
    }
    drop(guest);
    target.check("links");
}

/// While the guest walks through `sub`, somebody changes it into a link out of the share and back.
#[test]
fn a_walk_that_is_raced_by_renames() {
    let mut target = Target::new(&[]);
    let (share, outside) = (target.path("share"), target.path("outside"));
    std::fs::write(share.join("sub/secret"), "inside").unwrap();
    std::os::unix::fs::symlink(outside, share.join("link")).unwrap();
    let (guest, mut ring) = begin(&target);
    let done = AtomicBool::new(false);
    let reads = std::thread::scope(|scope| {
        scope.spawn(|| {
            let swap = |a: &Path, b: &Path| {
                let at = nix::fcntl::AT_FDCWD;
                nix::fcntl::renameat2(at, a, at, b, nix::fcntl::RenameFlags::RENAME_EXCHANGE).unwrap();
            };
            while !done.load(Ordering::Relaxed) {
                swap(&share.join("sub"), &share.join("link"));
            }
        });
        let (start, mut reads) = (Instant::now(), 0);
        while start.elapsed() < Duration::from_secs(2) {
            reads += usize::from(read_through(&guest, &mut ring).is_some_and(|bytes| {
                assert!(!has_secret(&bytes), "a walk has left the share");
                true
            }));
        }
        done.store(true, Ordering::Relaxed);
        reads
    });
    assert!(reads > 10, "the race was never won: {reads} reads");
    drop(guest);
    target.check("renames");
}

fn read_through(guest: &Hostile, ring: &mut Ring) -> Option<Vec<u8>> {
    let mut node = 1;
    for name in [&b"sub\0"[..], b"secret\0"] {
        let answer = ring.call(guest, &request(op::LOOKUP, node, name)).unwrap();
        node = (answer.error == 0).then(|| answer.word(0))?;
    }
    let opened = ring.call(guest, &request(op::OPEN, node, &op::words(&[0, 0]))).unwrap();
    let handle = (opened.error == 0).then(|| opened.word(0))?;
    let answer = ring.call(guest, &request(op::READ, node, &op::read_body(handle, 0, 4096))).unwrap();
    let release = [&handle.to_ne_bytes()[..], &[0; 16]].concat();
    ring.call(guest, &request(18, node, &release));
    (answer.error == 0).then_some(answer.payload)
}

/// Every opcode with bodies of every length, garbage in them, for nodes and handles that are none.
#[test]
fn every_opcode_with_every_length() {
    every_opcode(Target::new(&[]));
}

/// The same where a forgotten system call or capability would end the host.
#[test]
fn every_opcode_in_a_sandbox() {
    if nix::unistd::geteuid().is_root() {
        every_opcode(Target::inside("namespace", &[]));
    } else {
        crate::skip::lacking("the sandbox needs root");
    }
}

/// Every opcode and some that are none, with bodies of every length, garbage in them, for nodes that are none.
pub fn odd_messages(last_opcode: u32) -> impl Iterator<Item = Vec<u8>> {
    let mut random = Random(0x5eed_0001);
    let opcodes = (0..=last_opcode).chain([4096, 0x5446_0000, 0x5446_0001, 0x5446_0099, u32::MAX]);
    let lengths = || (0..=112usize).chain([200, 4096, 65_536, 131_072, 140_000, 200_000]);
    opcodes.flat_map(move |opcode| lengths().map(move |len| (opcode, len))).map(move |(opcode, len)| {
        let words = [0u32, 1, 2, 0x7fff_ffff, u32::MAX, b'.' as u32, 0x2e2e, 0x782f_2e2e];
        let body: Vec<u8> = (0..len.div_ceil(4)).flat_map(|_| random.of(&words).to_ne_bytes()).take(len).collect();
        request(opcode, random.of(&[0, 1, 1, 1, 2, 3, u64::MAX, 1 << 63]), &body)
    })
}

fn every_opcode(mut target: Target) {
    let mut random = Random(0x5eed_0006);
    let (guest, mut ring) = begin(&target);
    let mut answered = 0;
    for mut message in odd_messages(LAST_OPCODE) {
        // One in four lies about its length.
        if random.next() % 4 == 0 {
            let told = random.of(&[0u32, 1, 39, 40, 41, 80, 1 << 20, u32::MAX]);
            message[..4].copy_from_slice(&told.to_ne_bytes());
        }
        let answer = ring.call(&guest, &message);
        assert!(answer.is_some(), "opcode and length {:?}: no answer", &message[..8]);
        answered += 1;
    }
    println!("{answered} requests, each answered");
    drop(guest);
    target.check("opcodes");
}

/// A name that changes between "fine" and a path out, and a header that changes its length and opcode, while the host
/// works on them.
#[test]
fn a_flipper_thread() {
    let mut target = Target::new(&[]);
    let (guest, mut ring) = begin(&target);
    let words = ring.call(&guest, &request(op::LOOKUP, 1, b"words\0")).unwrap().word(0);
    let done = AtomicBool::new(false);
    let tries = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random(0x5eed_0002);
            while !done.load(Ordering::Relaxed) {
                let name = random.of(&[&b"fine_fine\0"[..], b"../stolen\0", b"../secret\0", b"fine_no_end"]);
                guest.put_bytes(slot_at(1, 0), name);
                // Some entry's header.
                let entry = Hostile::ring_at(1) + 512 + (random.next() as usize % 64) * 128;
                guest.put(entry + 24 + (random.next() as usize % 10) * 4, random.next() as u32);
            }
        });
        let (start, mut tries) = (Instant::now(), 0);
        while start.elapsed() < Duration::from_secs(3) {
            for (opcode, body) in with_name(b"fine_fine\0", words) {
                // The name lies in the slot, behind the operation's structure.
                let fixed = body.len() - 10;
                let mut entry = sqe(&guest, 1, 0, &request(opcode, 1, &body));
                (entry.inline_len, entry.payload_len) = (40 + fixed as u32, 10);
                ring.submit(&guest, &entry);
                ring.reap(Duration::from_millis(200));
                tries += 1;
            }
        }
        done.store(true, Ordering::Relaxed);
        tries
    });
    println!("{tries} requests raced");
    drop(guest);
    assert!(!target.path("stolen").exists());
    target.check("flipper");
}

/// Descriptors by the thousand: opened until the host refuses; other requests go on, and the next guest finds all free.
#[test]
fn open_files_by_the_thousand() {
    let mut target = Target::new(&["--rlimit-nofile", "1000"]);
    let (guest, mut ring) = begin(&target);
    let node = ring.call(&guest, &request(op::LOOKUP, 1, b"words\0")).unwrap().word(0);
    let errors: Vec<i32> = (0..1000)
        .map(|_| ring.call(&guest, &request(op::OPEN, node, &op::words(&[0, 0]))).unwrap().error)
        .filter(|&e| e != 0)
        .collect();
    assert!(!errors.is_empty() && errors.iter().all(|e| matches!(-e, libc::ENFILE | libc::EMFILE)), "{errors:?}");
    assert_eq!(ring.call(&guest, &request(3, node, &[0; 16])).unwrap().error, 0, "GETATTR without a descriptor left");
    drop(guest);
    target.check("open files");
}
