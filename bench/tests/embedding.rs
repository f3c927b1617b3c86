//! A program that has a mount in its own process: what else it has open is its own, also when the mount's host does not
//! answer. About six seconds, the guest's patience.
//!
//! The half that mounts needs root and `/dev/fuse`; is skipped without them.

#[allow(dead_code)]
#[path = "faults/false_host.rs"]
mod false_host;
#[allow(dead_code)]
#[path = "mount/rig.rs"]
mod rig;
#[path = "common/skip.rs"]
mod skip;

use false_host::{Said, Twist};
use nix::mount::{umount2, MntFlags};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use rig::{is_mounted, soon, Scratch, Unmounted};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_fuse_abi::opcode;
use tunnelfs_guest::fuse::device::MountOptions;
use tunnelfs_guest::mount::{Mount, MountConfig};
use tunnelfs_guest::Error;
use tunnelfs_settings::{Channel, Settings, TransportKind};

fn config(socket: &Path, point: &Path, transport: TransportKind) -> MountConfig {
    let mut settings = Settings::default();
    settings.transport.kind = transport;
    settings.transport.socket_path = socket.into();
    settings.transport.queues = 1;
    settings.mount.channel = Channel::Fuse;
    settings.mount.timeout = 1;
    settings.mount.reconnect = false;
    MountConfig::new(&settings, point, MountOptions::default())
}

/// One end here, the other one wherever the listener's thread has put it.
struct Own {
    ours: UnixStream,
    theirs: UnixStream,
}

impl Own {
    /// A connection to `path`, where a listener gives away what it accepts.
    fn new(path: &Path, accepted: &Receiver<UnixStream>) -> Own {
        let mut ours = UnixStream::connect(path).unwrap();
        ours.write_all(b"mine").unwrap();
        // The mount's own connections are there, too: whoever has said so is ours.
        let theirs = accepted.iter().find_map(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            let mut said = [0; 4];
            let is_ours = stream.read_exact(&mut said).is_ok() && said == *b"mine";
            is_ours.then_some(stream)
        });
        Own { ours, theirs: theirs.expect("the listener accepts it") }
    }

    fn assert_open(&mut self) {
        for stream in [&self.ours, &self.theirs] {
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        }
        self.ours.write_all(b"x").unwrap();
        self.theirs.read_exact(&mut [0]).unwrap();
        self.theirs.write_all(b"y").unwrap();
        self.ours.read_exact(&mut [0]).unwrap();
    }
}

/// The listener never answers: connecting times out while the program opens and uses connections to the same path.
#[test]
fn connections_of_the_program_outlive_a_mount_that_times_out() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let (give, accepted) = channel();
    std::thread::spawn(move || listener.incoming().flatten().try_for_each(|stream| give.send(stream)));
    let mut before = Own::new(&socket, &accepted);
    let (mut pair, other_end) = UnixStream::pair().unwrap();
    let config = config(&socket, &dir.path().join("nowhere"), TransportKind::Ring);
    let mounting = std::thread::spawn(move || Mount::new(&config).map(drop));
    // A new connection after the mount's own: that is what a deadline used to take for the mount's.
    let front_end = accepted.recv_timeout(Duration::from_secs(10)).expect("the mount connects");
    let mut meanwhile = Own::new(&socket, &accepted);
    let refused = mounting.join().unwrap().unwrap_err().to_string();
    assert!(refused.contains("does not answer within"), "{refused}");
    drop(front_end);
    before.assert_open();
    meanwhile.assert_open();
    pair.write_all(b"x").unwrap();
    (&other_end).read_exact(&mut [0]).unwrap();
}

/// Answers INIT, and nothing else.
fn only_init(request: &[u8]) -> Option<Vec<u8>> {
    if request[4..8] != opcode::INIT.to_ne_bytes() {
        return None;
    }
    let mut words = [0u32; 16];
    (words[0], words[1], words[5]) = (7, 38, 65_536);
    Some(words.iter().flat_map(|word| word.to_ne_bytes()).collect())
}

/// What is answered before the host falls silent: an error and a body.
fn until_mounted(request: &[u8]) -> Option<(i32, Vec<u8>)> {
    match u32::from_ne_bytes(request[4..8].try_into().unwrap()) {
        tunnelfs_fuse_abi::control::OP_JOIN => Some((0, Vec::new())),
        opcode::ACCESS => Some((-libc::ENOSYS, Vec::new())),
        _ => only_init(request).map(|body| (0, body)),
    }
}

/// Answers the messages of a stream; each begins with its length.
fn answer_stream(mut stream: UnixStream) -> std::io::Result<()> {
    loop {
        let mut request = vec![0; 4];
        stream.read_exact(&mut request)?;
        request.resize(u32::from_ne_bytes(request[..].try_into().unwrap()) as usize, 0);
        stream.read_exact(&mut request[4..])?;
        if let Some((error, body)) = until_mounted(&request) {
            let len = 16 + body.len() as u32;
            let head = [&len.to_ne_bytes()[..], &error.to_ne_bytes(), &request[8..16]].concat();
            stream.write_all(&[head, body].concat())?;
        }
    }
}

/// Serves whoever connects and does not say "mine".
fn silent_host(listener: UnixListener, transport: TransportKind, own: Sender<UnixStream>) {
    for stream in listener.incoming().flatten() {
        let own = own.clone();
        std::thread::spawn(move || {
            let mut first = [0; 4];
            // The first bytes stay there for whoever serves.
            let peeked = nix::sys::socket::recv(
                std::os::fd::AsRawFd::as_raw_fd(&stream),
                &mut first,
                nix::sys::socket::MsgFlags::MSG_PEEK,
            );
            if peeked == Ok(4) && first == *b"mine" {
                return drop(own.send(stream));
            }
            if transport == TransportKind::Socket {
                return drop(answer_stream(stream));
            }
            let speaker = |request: &[u8]| {
                let unique = request[8..16].try_into().unwrap();
                let said = until_mounted(request);
                let said = said.map(|(error, body)| Said::Reply { len: 16 + body.len() as u32, error, unique, body });
                (said.into_iter().collect(), true)
            };
            let _ = false_host::serve(stream, Arc::new(speaker), Twist { cqe: |_| {}, used: |_| {} });
        });
    }
}

/// The host is silent once it is mounted: `mount.timeout` ends the mount, and nothing else.
#[test]
fn connections_of_the_program_outlive_a_mount_whose_host_falls_silent() {
    for transport in [TransportKind::Ring, TransportKind::Virtqueue, TransportKind::Socket] {
        let Some(scratch) = Scratch::new() else { return };
        let (socket, point) = (scratch.path("socket"), scratch.path("mnt"));
        let listener = UnixListener::bind(&socket).unwrap();
        let (give, accepted) = channel();
        std::thread::spawn(move || silent_host(listener, transport, give));
        let mut before = Own::new(&socket, &accepted);
        let _unmount = Unmounted(point.clone());
        let mount = Mount::new(&config(&socket, &point, transport)).unwrap();
        let mut meanwhile = Own::new(&socket, &accepted);
        // Another process waits for the host, not this one.
        let mut user = Command::new("stat").arg(point.join("x")).spawn().unwrap();
        let mut ended = [PollFd::new(mount.exit_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ended, PollTimeout::from(20_000u16)).unwrap(), 1, "the mount times out");
        assert!(matches!(mount.finish(), Err(Error::HostSilent)));
        soon("its user gets an error", || user.try_wait().unwrap());
        before.assert_open();
        meanwhile.assert_open();
        soon("it is unmounted", || (!is_mounted(&point) || umount2(&point, MntFlags::empty()).is_ok()).then_some(()));
    }
}
