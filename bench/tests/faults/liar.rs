//! A host that lies, over each transport: answers that cannot be, and completions of what was not asked. The guest ends
//! the mount or goes on; it never panics, and never dies of a signal.

#[path = "false_host.rs"]
mod false_host;

use crate::rig::{is_mounted, mount_command, soon, Scratch, Unmounted};
use crate::{poke, unmount_what_is_left, within};
use false_host::{Said, Speaker, Twist, Used};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_fuse_abi::opcode;
use tunnelfs_ring::Cqe;

/// What is wrong with the answers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Lie {
    /// Nothing, as a check of the liar itself: all is ENOSYS.
    None,
    WrongUnique,
    Twice,
    /// Not even to INIT.
    NeverAnything,
    Never,
    /// A header, and silence.
    Half,
    LongLength,
    HugeLength,
    ShortLength,
    PositiveError,
    HugeError,
    /// An error, and a body behind it.
    ErrorWithBody,
    /// No error, and bytes that mean nothing.
    Garbage,
    /// Answers of no bytes to what needs some.
    Empty,
    /// Nodes, handles, names and attributes that no honest host has.
    Numbers,
    /// The same, and the connection ends at one of so many requests; the guest connects again.
    NumbersAndEnds(u64),
    /// Closes the connection at the n-th request.
    Die(u64),
}

use Lie::*;

const LIES: [Lie; 21] = [
    None,
    WrongUnique,
    Twice,
    NeverAnything,
    Never,
    Half,
    LongLength,
    HugeLength,
    ShortLength,
    PositiveError,
    HugeError,
    ErrorWithBody,
    Garbage,
    Empty,
    Numbers,
    NumbersAndEnds(4),
    NumbersAndEnds(9),
    Die(0),
    Die(1),
    Die(2),
    Die(5),
];

/// Completions that are wrong, with the field that is.
const TWISTS: [(&str, Twist); 9] = {
    const fn twist(cqe: fn(&mut Cqe), used: fn(&mut Used)) -> Twist {
        Twist { cqe, used }
    }
    [
        ("a number beyond all", twist(|c| c.user_data = u32::MAX, |u| u.id = u32::MAX)),
        ("the first number behind", twist(|c| c.user_data = 4, |u| u.id = 16)),
        ("the middle of a chain", twist(|c| c.user_data ^= 1 << 31, |u| u.id += 1)),
        ("another one's number", twist(|c| c.user_data = (c.user_data + 1) % 4, |u| u.id = (u.id + 4) % 16)),
        ("a huge payload", twist(|c| c.payload_len = u32::MAX, |u| u.len = u32::MAX)),
        ("a payload beyond the slot", twist(longer_than_a_slot, |u| u.step = 2)),
        ("a header beyond the entry", twist(|c| (c.inline_len, c.payload_len) = (u32::MAX, 17), |u| u.step = 1000)),
        ("a header of one byte too many", twist(|c| c.inline_len = 49, |u| u.step = u16::MAX)),
        ("no header", twist(|c| (c.inline_len, c.payload_len) = (8, 8), |u| u.step = 0x8000)),
    ]
};

/// It fits what the header says.
fn longer_than_a_slot(cqe: &mut Cqe) {
    cqe.payload_len = 16_384 + 1;
    cqe.inline[..4].copy_from_slice(&(16 + cqe.payload_len).to_ne_bytes());
}

const NO_TWIST: Twist = Twist { cqe: |_| {}, used: |_| {} };

#[test]
fn whatever_a_host_answers() {
    lies("socket");
}

#[test]
fn whatever_a_host_answers_over_the_ring() {
    lies("ring");
}

#[test]
fn whatever_a_host_answers_over_the_virtqueue() {
    lies("virtqueue");
}

fn lies(transport: &str) {
    for channel in ["fuse", "uring"] {
        let Some(scratch) = Scratch::for_channel(channel) else { continue };
        for lie in LIES {
            face(&scratch, channel, transport, lie, Option::None, &format!("{lie:?}"));
        }
    }
}

#[test]
fn whatever_a_host_completes() {
    for channel in ["fuse", "uring"] {
        let Some(scratch) = Scratch::for_channel(channel) else { continue };
        for transport in ["ring", "virtqueue"] {
            for (what, twist) in TWISTS {
                for lie in [None, Numbers, Twice] {
                    face(&scratch, channel, transport, lie, Some(twist), &format!("{what}, {lie:?}"));
                }
            }
        }
    }
}

/// How a guest may end: by itself, and not by a panic.
pub fn assert_ended_well(status: ExitStatus, output: &str, what: &str) {
    assert!(status.signal().is_none() && status.code() != Some(101), "{what}: {status}: {output}");
    assert!(!output.contains("panicked"), "{what}: {output}");
}

fn face(scratch: &Scratch, channel: &str, transport: &str, lie: Lie, twist: Option<Twist>, what: &str) {
    let (plain, twist) = (twist.is_none(), twist.unwrap_or(NO_TWIST));
    let what = format!("{channel}, {transport}, {what}");
    let (socket, output) = (scratch.path("liar"), scratch.path("liar-output"));
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).unwrap();
    let streamed = transport == "socket";
    let ends = matches!(lie, NumbersAndEnds(_));
    // The requests of all connections: the same one is not always the last.
    let all = Arc::<AtomicU64>::default();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let speaker = speaker(lie, plain, if ends { all.clone() } else { Arc::default() });
            std::thread::spawn(move || match streamed {
                true => serve(stream, &speaker),
                false => false_host::serve(stream, speaker, twist),
            });
        }
    });
    let reconnect = if ends { "reconnect_timeout=1" } else { "noreconnect" };
    // The twists count on four slots of 16 KiB.
    let sizes = "entries=8,slots=4,slot_size=16384,queues=2";
    let words = format!("channel={channel},transport={transport},timeout=1,{reconnect},{sizes}");
    let mut command = mount_command(scratch, &socket, &words);
    command.arg("-f").stdout(Stdio::null()).stderr(File::create(&output).unwrap());
    let mut guest = command.spawn().unwrap();
    let point = scratch.path("mnt");
    let _unmount = Unmounted(point.clone());
    let mut came_up = false;
    soon("it is mounted, or over", || {
        came_up |= is_mounted(&point);
        (came_up || guest.try_wait().unwrap().is_some()).then_some(())
    });
    poke(&point);
    look_around(&point);
    // It can be taken away, and then the process ends.
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(guest.id() as i32), nix::sys::signal::Signal::SIGTERM);
    let status = soon(&format!("{what}: the guest ends"), || guest.try_wait().unwrap());
    unmount_what_is_left(&point);
    let said = fs::read_to_string(&output).unwrap();
    // SIGTERM before its handler is there is no crash.
    let early = !came_up && status.signal() == Some(libc::SIGTERM);
    if !early {
        assert_ended_well(status, &said, &what);
    }
    // The kernel has not been given bytes that are not the reply's.
    if came_up && transport == "virtqueue" && lie == HugeLength {
        assert!(said.contains("longer than its room"), "{what}: {said}");
    }
    println!("{what}: mounted: {came_up}, {status}");
}

/// Goes where a liar's names lead.
fn look_around(point: &std::path::Path) {
    let point = point.to_owned();
    within(Duration::from_secs(20), "looks on a liar's mount", move || {
        for name in ["a", "a/a", "a/b/a", "b"] {
            let _ = fs::metadata(point.join(name));
            let _ = fs::read_dir(point.join(name)).map(|entries| entries.take(100).count());
            let _ = File::open(point.join(name)).and_then(|mut file| file.read(&mut [0; 100]));
        }
        let _ = fs::rename(point.join("a"), point.join("b"));
        let _ = fs::hard_link(point.join("b"), point.join("c"));
    });
}

/// What a lie comes to, request by request; `plain`: nothing is wrong with the completions.
fn speaker(lie: Lie, plain: bool, count: Arc<AtomicU64>) -> Speaker {
    Arc::new(move |request| {
        let number = count.fetch_add(1, Ordering::Relaxed);
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let unique: [u8; 8] = request[8..16].try_into().unwrap();
        let reply = |len: u32, error: i32, body: &[u8]| Said::Reply { len, error, unique, body: body.to_vec() };
        if let Die(0) = lie {
            return (vec![Said::End], true);
        }
        if word(4) == tunnelfs_fuse_abi::control::OP_JOIN && !matches!(lie, NeverAnything) {
            return (vec![reply(16, 0, &[])], true);
        }
        if word(4) == opcode::INIT && !matches!(lie, NeverAnything) {
            // Protocol 7.38, writes of 64 KiB; READDIRPLUS for those that have something to say there.
            let mut words = [0u32; 16];
            (words[0], words[1], words[5]) = (7, 38, 65_536);
            words[3] = if matches!(lie, Numbers | NumbersAndEnds(_)) { 1 << 13 } else { 0 };
            let body: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
            return (vec![reply(80, 0, &body)], true);
        }
        if matches!(word(4), opcode::FORGET | opcode::BATCH_FORGET) {
            return (vec![Said::Done], true);
        }
        let enosys = -libc::ENOSYS;
        let said = match lie {
            None => vec![reply(16, enosys, &[])],
            WrongUnique => vec![Said::Reply { len: 16, error: enosys, unique: [0xee; 8], body: Vec::new() }],
            Twice => vec![reply(16, enosys, &[]), reply(16, enosys, &[])],
            NeverAnything | Never => Vec::new(),
            Half => vec![reply(17, 0, &[])],
            LongLength => vec![reply(4096, 0, &[0x55; 80])],
            HugeLength => vec![reply(u32::MAX, 0, &[0x55; 80])],
            ShortLength => vec![reply(3, 0, &[])],
            PositiveError => vec![reply(16, 5, &[])],
            HugeError => vec![reply(16, i32::MIN, &[])],
            ErrorWithBody => vec![reply(16 + 128, enosys, &[0x55; 128])],
            Garbage => vec![reply(16 + 128, 0, &[0x55; 128])],
            Empty => vec![reply(16, 0, &[])],
            NumbersAndEnds(n) if (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) % n == 0 => vec![Said::End],
            Numbers | NumbersAndEnds(_) => match numbers(request, number) {
                Some(body) => vec![reply(16 + body.len() as u32, 0, &body)],
                Option::None => vec![reply(16, enosys, &[])],
            },
            Die(n) if number >= n => vec![Said::End],
            Die(_) => vec![reply(16, enosys, &[])],
        };
        (said, plain)
    })
}

/// A reply's body of numbers that are nobody's; none to what has no such reply.
fn numbers(request: &[u8], number: u64) -> Option<Vec<u8>> {
    let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
    let node = u64::from(word(16)) | u64::from(word(20)) << 32;
    const WILD: [u64; 8] = [2, 3, 1, u64::MAX, 1 << 62 | 1, 2, 1 << 63, 0];
    let wild = WILD[number as usize % WILD.len()];
    // FUSE_GETATTR of the root: a directory, or nobody gets in.
    let attr = |is_dir: bool| {
        let mut attr = vec![0u8; 88];
        let (mode, links) = (if is_dir { libc::S_IFDIR | 0o755 } else { libc::S_IFREG | 0o644 }, 3u32);
        attr[..8].copy_from_slice(&7u64.to_ne_bytes());
        attr[8..16].copy_from_slice(&(i64::MAX as u64).to_ne_bytes());
        attr[60..64].copy_from_slice(&mode.to_ne_bytes());
        attr[64..68].copy_from_slice(&links.to_ne_bytes());
        attr
    };
    let entry = |node: u64, is_dir: bool| [&node.to_ne_bytes()[..], &[0; 32], &attr(is_dir)].concat();
    let open = [&wild.to_ne_bytes()[..], &[0; 8]].concat();
    Some(match word(4) {
        opcode::LOOKUP | opcode::MKDIR | opcode::MKNOD | opcode::LINK | opcode::SYMLINK => entry(wild, number % 3 != 0),
        opcode::GETATTR => [vec![0; 16], attr(node == 1 || number % 2 == 0)].concat(),
        opcode::OPEN | opcode::OPENDIR => open,
        opcode::CREATE => [entry(wild, false), open].concat(),
        opcode::READDIRPLUS => {
            let names: [&[u8]; 8] = [b"a", b"b", b"..", b".", b"x/y", b"", &[b'n'; 255], &[b'n'; 300]];
            let mut list = Vec::new();
            for (i, name) in names[number as usize % 5..].iter().enumerate() {
                list.extend(entry(WILD[i % WILD.len()], i % 2 == 0));
                let offset = if number % 4 == 0 { u64::MAX } else { i as u64 };
                list.extend([7, offset].into_iter().flat_map(u64::to_ne_bytes));
                list.extend([name.len() as u32, 4].into_iter().flat_map(u32::to_ne_bytes));
                list.extend(*name);
                list.resize(list.len().next_multiple_of(8), 0);
            }
            list.truncate(4096);
            list
        }
        opcode::READ => vec![0x55; word(56).min(4096) as usize],
        opcode::UNLINK | opcode::RMDIR | opcode::RENAME | opcode::RENAME2 | opcode::RELEASE | opcode::FLUSH => vec![],
        _ => return Option::None,
    })
}

/// The streamed transport.
fn serve(mut stream: UnixStream, speaker: &Speaker) -> io::Result<()> {
    loop {
        let mut request = vec![0; 40];
        stream.read_exact(&mut request)?;
        let len = u32::from_ne_bytes(request[..4].try_into().unwrap()) as usize;
        request.resize(len, 0);
        stream.read_exact(&mut request[40..])?;
        for said in speaker(&request).0 {
            let (len, error, unique, body) = match said {
                Said::Reply { len, error, unique, body } => (len, error, unique, body),
                Said::Done => continue,
                Said::End => return Ok(()),
            };
            stream.write_all(&[&len.to_ne_bytes()[..], &error.to_ne_bytes(), &unique, &body].concat())?;
            // The guest need not find all of it at once.
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}
