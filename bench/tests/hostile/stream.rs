//! Attacks over a stream: frames of any length, cut off, without end, and connections by the dozen.

use crate::fuse::{odd_messages, LAST_OPCODE};
use crate::guest::{op, request, Answer};
use crate::rig::{Random, Target, PATIENCE};
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::control::OP_NOOP;
use tunnelfs_ring::MAX_SLOT_SIZE;

/// FORGET, INTERRUPT and BATCH_FORGET have no answer.
const UNANSWERED: [u32; 3] = [2, 36, 42];
/// Most bytes of a message.
const MOST: u32 = MAX_SLOT_SIZE + 4096;

fn target() -> Target {
    Target::new(&["--transport", "socket"])
}

/// One connection.
pub struct Stream(pub UnixStream);

impl Stream {
    pub fn connect(socket: &Path) -> Stream {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Stream(stream)
    }

    pub fn receive(&mut self) -> std::io::Result<(u64, Answer)> {
        let mut header = [0; 16];
        self.0.read_exact(&mut header)?;
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; (word(0) as usize).checked_sub(16).expect("a header's length at least")];
        self.0.read_exact(&mut payload)?;
        let unique = u64::from_ne_bytes(header[8..].try_into().unwrap());
        Ok((unique, Answer { error: word(4) as i32, payload }))
    }

    /// One request and its answer; `None` when the host has closed the connection.
    pub fn call(&mut self, message: &[u8]) -> Option<Answer> {
        self.0.write_all(message).ok()?;
        self.receive()
            .map(|answer| answer.1)
            .inspect_err(|e| assert_ne!(e.kind(), ErrorKind::WouldBlock, "silence"))
            .ok()
    }

    /// With an open file, which the host must close again with the connection.
    fn with_open_file(target: &Target) -> Stream {
        let mut stream = Stream::connect(&target.socket());
        assert_eq!(stream.call(&request(op::INIT, 0, &op::init_body())).unwrap().error, 0);
        let node = stream.call(&request(op::LOOKUP, 1, b"words\0")).unwrap().word(0);
        stream.call(&request(op::OPEN, node, &op::words(&[0, 0]))).unwrap().word(0);
        stream
    }

    /// The host has ended the connection.
    fn assert_closed(mut self, why: &str) {
        let end = self.0.read(&mut [0; 1]);
        let closed = match &end {
            Ok(n) => *n == 0,
            Err(e) => matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
        };
        assert!(closed, "{why}: {end:?}");
    }
}

/// A message that announces `len` bytes.
fn announcing(len: u32) -> Vec<u8> {
    let mut message = request(OP_NOOP, 1, &[0; 40]);
    message[..4].copy_from_slice(&len.to_ne_bytes());
    message
}

#[test]
fn lengths_that_cannot_be() {
    let mut target = target();
    for len in [0, 1, 15, 16, 39, MOST + 1, 1 << 30, 1 << 31, u32::MAX - 4095, u32::MAX] {
        let mut stream = Stream::with_open_file(&target);
        stream.0.write_all(&announcing(len)).unwrap();
        stream.assert_closed(&format!("a message of {len} bytes"));
    }
    target.check("lengths");
}

#[test]
fn frames_cut_off() {
    let mut target = target();
    let message = request(op::LOOKUP, 1, b"words\0");
    for cut in 1..message.len() {
        let mut stream = Stream::with_open_file(&target);
        stream.0.write_all(&message[..cut]).unwrap();
        stream.0.shutdown(Shutdown::Write).unwrap();
        stream.assert_closed(&format!("cut off after {cut} bytes"));
    }
    // Without a word of farewell, and the largest there is.
    for len in [80, 4096, 1 << 20, MOST] {
        let mut stream = Stream::with_open_file(&target);
        stream.0.write_all(&announcing(len)).unwrap();
        stream.0.write_all(&vec![0x55; (len as usize - 80) / 2]).unwrap();
    }
    target.check("cut off");
}

/// Byte after byte, with others served meanwhile.
#[test]
fn a_slow_writer() {
    let mut target = target();
    let (mut slow, mut other) = (Stream::with_open_file(&target), Stream::connect(&target.socket()));
    for byte in request(op::LOOKUP, 1, b"words\0") {
        slow.0.write_all(&[byte]).unwrap();
        assert_eq!(other.call(&request(OP_NOOP, 1, b"")).unwrap().error, 0);
    }
    assert_eq!(slow.receive().unwrap().1.error, 0);
    drop((slow, other));
    target.check("a slow writer");
}

/// Every opcode with bodies of every length; each is answered, unless it is one that is not.
#[test]
fn every_opcode_with_every_length() {
    let mut target = target();
    let mut stream = Stream::with_open_file(&target);
    let mut answers = Vec::new();
    for (number, mut message) in odd_messages(LAST_OPCODE).enumerate() {
        message[8..16].copy_from_slice(&(number as u64).to_ne_bytes());
        stream.0.write_all(&message).unwrap();
        let mut last = request(OP_NOOP, 1, b"");
        last[8..16].copy_from_slice(&u64::MAX.to_ne_bytes());
        stream.0.write_all(&last).unwrap();
        let opcode = u32::from_ne_bytes(message[4..8].try_into().unwrap());
        answers.push(0);
        // A request that takes long is overtaken by the last one.
        let mut end = false;
        while !end || answers[number] == 0 && !UNANSWERED.contains(&opcode) {
            match stream.receive().unwrap().0 {
                u64::MAX => end = true,
                other => answers[other as usize] += 1,
            }
        }
    }
    assert!(answers.iter().all(|&count| count <= 1), "answered twice");
    let (asked, answered) = (answers.len(), answers.iter().sum::<usize>());
    println!("{asked} requests, {answered} answers");
    drop(stream);
    target.check("opcodes");
}

#[test]
fn bytes_that_mean_nothing() {
    let mut target = target();
    let mut random = Random(0x5eed_0005);
    for _ in 0..200 {
        let mut stream = Stream::connect(&target.socket());
        let len = random.of(&[1usize, 40, 100, 5000, 200_000]);
        let mut bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        if let (Some(first), true) = (bytes.get_mut(..4), random.next() % 2 == 0) {
            // A length that can be.
            first.copy_from_slice(&(len as u32).to_ne_bytes());
        }
        let _ = stream.0.write_all(&bytes);
        let _ = stream.0.shutdown(Shutdown::Write);
        let _ = stream.0.read(&mut [0; 64]);
    }
    target.check("noise");
}

/// Connections that are opened and say nothing, or half a header, more than there may be.
#[test]
fn half_open_connections() {
    let mut target = target();
    let open = |n: usize| {
        let mut stream = Stream::connect(&target.socket());
        let _ = stream.0.write_all(&announcing(80)[..n % 40]);
        stream
    };
    // So many that even the listening socket has no room for the next.
    let many: Vec<_> = (0..60).map(open).collect();
    std::thread::sleep(Duration::from_millis(200));
    drop(many);
    for n in 0..300 {
        drop(open(n));
    }
    target.check("half-open connections");
}

/// More requests than are ever answered: nobody reads. The host waits with that connection, and with no other.
#[test]
fn a_flood_without_a_reader() {
    let mut target = target();
    let mut other = Stream::connect(&target.socket());
    for message in
        [request(op::LOOKUP, 1, b"words\0"), request(op::READ, 1, &op::read_body(0, 0, 1 << 20)), announcing(80)]
    {
        let flood = Stream::with_open_file(&target);
        flood.0.set_nonblocking(true).unwrap();
        let (start, mut sent) = (Instant::now(), 0);
        while start.elapsed() < Duration::from_millis(500) {
            match (&flood.0).write(&message[sent % message.len()..]) {
                Ok(n) => sent += n,
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
            assert_eq!(other.call(&request(OP_NOOP, 1, b"")).unwrap().error, 0);
        }
        // The sockets' buffers, and no more.
        assert!((10_000..16 << 20).contains(&sent), "{sent} bytes were taken");
    }
    drop(other);
    target.check("flood");
}

/// Descriptors beside the bytes: nobody wants them.
#[test]
fn descriptors_with_frames() {
    let mut target = target();
    for _ in 0..20 {
        let mut stream = Stream::with_open_file(&target);
        let fds = vec![stream.0.as_raw_fd(); 250];
        let message = request(OP_NOOP, 1, b"");
        let parts = [IoSlice::new(&message)];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(stream.0.as_raw_fd(), &parts, &rights, MsgFlags::MSG_NOSIGNAL, None).unwrap();
        assert_eq!(stream.receive().unwrap().1.error, 0);
    }
    target.check("descriptors");
}
