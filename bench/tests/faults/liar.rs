//! A host that lies: the streamed transport, with answers that cannot be.

use crate::rig::{is_mounted, mount_command, soon, Scratch, Unmounted};
use crate::{poke, unmount_what_is_left};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;
use std::time::Duration;
use tunnelfs_guest::fuse::abi::opcode;

/// What is wrong with the answers.
#[derive(Clone, Copy, Debug)]
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
    /// Closes the connection at the n-th request.
    Die(u32),
}

use Lie::*;

const LIES: [Lie; 18] = [
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
    Die(0),
    Die(1),
    Die(2),
    Die(5),
];

#[test]
fn whatever_a_host_answers() {
    for channel in ["fuse", "uring"] {
        let Some(scratch) = Scratch::for_channel(channel) else { continue };
        for lie in LIES {
            face(&scratch, channel, lie);
        }
    }
}

fn face(scratch: &Scratch, channel: &str, lie: Lie) {
    let socket = scratch.path("liar");
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || serve(stream, lie));
        }
    });
    let mut command =
        mount_command(scratch, &socket, &format!("channel={channel},transport=socket,timeout=1,noreconnect"));
    command.arg("-f").stdout(Stdio::null()).stderr(Stdio::null());
    let mut guest = command.spawn().unwrap();
    let point = scratch.path("mnt");
    let _unmount = Unmounted(point.clone());
    let mut came_up = false;
    soon("it is mounted, or over", || {
        came_up |= is_mounted(&point);
        (came_up || guest.try_wait().unwrap().is_some()).then_some(())
    });
    poke(&point);
    // It can be taken away, and then the process ends.
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(guest.id() as i32), nix::sys::signal::Signal::SIGTERM);
    soon(&format!("{channel}, {lie:?}: the guest ends"), || guest.try_wait().unwrap());
    unmount_what_is_left(&point);
    println!("{channel}, {lie:?}: mounted: {came_up}");
}

fn serve(mut stream: UnixStream, lie: Lie) -> io::Result<()> {
    for number in 0.. {
        let mut head = [0; 40];
        stream.read_exact(&mut head)?;
        let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
        let mut body = vec![0; word(0) as usize - 40];
        stream.read_exact(&mut body)?;
        let unique = &head[8..16];
        if let Die(0) = lie {
            return Ok(());
        }
        if word(4) == tunnelfs_ring::OP_JOIN && !matches!(lie, NeverAnything) {
            answer(&mut stream, 16, 0, unique, &[])?;
            continue;
        }
        if word(4) == opcode::INIT && !matches!(lie, NeverAnything) {
            // Protocol 7.38, writes of 64 KiB.
            let mut reply = [0u32; 16];
            (reply[0], reply[1], reply[5]) = (7, 38, 65_536);
            let body: Vec<u8> = reply.iter().flat_map(|w| w.to_ne_bytes()).collect();
            answer(&mut stream, 80, 0, unique, &body)?;
            continue;
        }
        if matches!(word(4), 2 | 42) {
            continue;
        }
        let enosys = -libc::ENOSYS;
        match lie {
            None => answer(&mut stream, 16, enosys, unique, &[])?,
            WrongUnique => answer(&mut stream, 16, enosys, &[0xee; 8], &[])?,
            Twice => (0..2).try_for_each(|_| answer(&mut stream, 16, enosys, unique, &[]))?,
            NeverAnything | Never => {}
            Half => stream.write_all(&[16, 0, 0, 0, 0, 0])?,
            LongLength => answer(&mut stream, 4096, 0, unique, &[0x55; 80])?,
            HugeLength => answer(&mut stream, u32::MAX, 0, unique, &[0x55; 80])?,
            ShortLength => answer(&mut stream, 3, 0, unique, &[])?,
            PositiveError => answer(&mut stream, 16, 5, unique, &[])?,
            HugeError => answer(&mut stream, 16, i32::MIN, unique, &[])?,
            ErrorWithBody => answer(&mut stream, 16 + 128, enosys, unique, &[0x55; 128])?,
            Garbage => answer(&mut stream, 16 + 128, 0, unique, &[0x55; 128])?,
            Empty => answer(&mut stream, 16, 0, unique, &[])?,
            Die(n) if number >= n => return Ok(()),
            Die(_) => answer(&mut stream, 16, enosys, unique, &[])?,
        }
    }
    Ok(())
}

fn answer(stream: &mut UnixStream, len: u32, error: i32, unique: &[u8], body: &[u8]) -> io::Result<()> {
    let mut reply = len.to_ne_bytes().to_vec();
    reply.extend(error.to_ne_bytes());
    reply.extend(unique);
    reply.extend(body);
    stream.write_all(&reply)?;
    // The guest need not find all of it at once.
    std::thread::sleep(Duration::from_micros(50));
    Ok(())
}
