//! The safe ends of a queue: between threads, against a peer that lies or dies.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use tunnelfs_ring::*;

const GEOMETRY: Geometry = Geometry { entries: 4, slots: 4, slot_size: 4096 };
const SOON: Option<Duration> = Some(Duration::from_secs(20));

fn pair(policy: Policy) -> (Driver, Device) {
    let wait = WaitConfig { policy, ..WaitConfig::default() };
    let (driver, handoff) = Driver::create(GEOMETRY, wait).unwrap();
    (driver, Device::attach(handoff, wait).unwrap())
}

#[test]
fn payloads_and_messages_cross_under_every_policy() {
    for policy in [Policy::Park, Policy::Spin, Policy::Auto] {
        let (mut driver, mut device) = pair(policy);
        let server = std::thread::spawn(move || {
            for _ in 0..500 {
                let mut request = device.next_within(SOON).unwrap();
                let mut bytes = vec![0; request.payload_len()];
                device.payload(&mut request).read_at(0, &mut bytes).unwrap();
                bytes.reverse();
                device.payload(&mut request).write_at(0, &bytes).unwrap();
                let msg = request.msg().to_vec();
                device.complete(request, &msg[..8], bytes.len() as u32).unwrap();
            }
        });
        for n in 0..500u64 {
            let mut slot = driver.alloc().unwrap();
            driver.payload(&mut slot).write_at(0, &n.to_le_bytes()).unwrap();
            driver.submit(&n.to_ne_bytes(), slot, 8, 8).unwrap();
            let reply = driver.reap_within(SOON).unwrap();
            assert_eq!(reply.msg(), n.to_ne_bytes());
            let (mut bytes, len) = ([0; 8], reply.payload_len());
            let mut slot = reply.slot;
            driver.payload(&mut slot).read_at(0, &mut bytes).unwrap();
            assert_eq!((bytes, len), (n.to_be_bytes(), 8));
            driver.free(slot);
        }
        server.join().unwrap();
    }
}

#[test]
fn a_hand_off_crosses_a_socket() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut driver, handoff) = Driver::create(GEOMETRY, WaitConfig::default()).unwrap();
    handoff.send(&ours).unwrap();
    let mut device = Device::attach(Handoff::recv(&theirs).unwrap(), WaitConfig::default()).unwrap();
    let slot = driver.alloc().unwrap();
    driver.submit(b"x", slot, 0, 0).unwrap();
    assert_eq!(device.next_within(SOON).unwrap().msg(), b"x");
    drop(ours);
    assert!(matches!(Handoff::recv(&theirs), Err(Error::PeerGone)));
}

#[test]
fn a_full_ring_gives_the_slot_back() {
    let (mut driver, _device) = pair(Policy::Park);
    let slots: Vec<_> = std::iter::from_fn(|| driver.alloc()).collect();
    assert_eq!(slots.len(), 4);
    for slot in slots {
        driver.submit(b"", slot, 0, 0).unwrap();
    }
    assert!(driver.alloc().is_none());
    assert!(matches!(driver.wait(Some(Duration::from_millis(5))), Err(Error::TimedOut)));
}

#[test]
fn too_long_messages_and_lengths_are_refused() {
    let (mut driver, mut device) = pair(Policy::Park);
    let mut slot = driver.alloc().unwrap();
    for (msg, payload, reply) in [(&[0; Driver::MAX_MSG + 1][..], 0, 0), (b"", 4097, 0), (b"", 0, u32::MAX)] {
        match driver.submit(msg, slot, payload, reply) {
            Err(SubmitError::TooLong { slot: back, .. }) => slot = back,
            other => panic!("{other:?}"),
        }
    }
    assert!(driver.payload(&mut slot).write_at(4090, &[0; 7]).is_err());
    assert!(driver.payload(&mut slot).read_at(usize::MAX, &mut [0]).is_err());
    driver.submit(b"", slot, 0, 16).unwrap();
    let request = device.next_within(SOON).unwrap();
    assert!(matches!(device.complete(request, b"", 17), Err(Error::TooLong { .. })));
    assert_eq!(driver.reap_within(SOON).unwrap().payload_len(), 0, "the request is completed all the same");
}

#[test]
fn a_peer_that_goes_is_an_error_at_once() {
    let start = Instant::now();
    let (mut driver, mut device) = pair(Policy::Park);
    let slot = driver.alloc().unwrap();
    driver.submit(b"last", slot, 0, 0).unwrap();
    drop(driver);
    assert_eq!(device.next_within(SOON).unwrap().msg(), b"last", "what was submitted is still served");
    assert!(matches!(device.next_within(SOON), Err(Error::PeerGone)));
    let (mut driver, device) = pair(Policy::Park);
    drop(device);
    assert!(matches!(driver.wait(None), Err(Error::PeerGone)));
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_spin_ends_in_time_and_with_the_peer() {
    let start = Instant::now();
    for policy in [Policy::Spin, Policy::Auto] {
        let long = WaitConfig { policy, spin_us: 60_000_000, auto_us: 60_000_000, goal: Goal::Latency };
        let (mut driver, handoff) = Driver::create(GEOMETRY, long).unwrap();
        let mut device = Device::attach(handoff, long).unwrap();
        for timeout in [Duration::ZERO, Duration::from_millis(20)] {
            assert!(matches!(driver.wait(Some(timeout)), Err(Error::TimedOut)));
            assert!(matches!(device.next_within(Some(timeout)), Err(Error::TimedOut)));
        }
        let slot = driver.alloc().unwrap();
        driver.submit(b"answered first", slot, 0, 0).unwrap();
        let request = device.next_within(SOON).unwrap();
        device.complete(request, b"", 0).unwrap();
        drop(device);
        driver.reap_within(None).map(|reply| driver.free(reply.slot)).unwrap();
        assert!(matches!(driver.wait(None), Err(Error::PeerGone)));
    }
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_peer_that_only_signals_does_not_lengthen_a_wait() {
    let (mut driver, handoff) = Driver::create(GEOMETRY, WaitConfig::default()).unwrap();
    let (call, alive) = (handoff.call.try_clone().unwrap(), handoff.alive.try_clone().unwrap());
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                Eventfd::signal(&call);
            }
        });
        let waited = driver.reap_within(Some(Duration::from_millis(100)));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(matches!(waited, Err(Error::TimedOut)));
    });
    drop(alive);
}

#[test]
fn what_does_not_belong_together_is_refused() {
    for wrong in [
        Geometry { entries: 16, ..GEOMETRY },
        Geometry { slots: 2, ..GEOMETRY },
        Geometry { slot_size: 8192, ..GEOMETRY },
        Geometry { slots: 2, slot_size: 8192, entries: 2 },
    ] {
        let (_driver, handoff) = Driver::create(GEOMETRY, WaitConfig::default()).unwrap();
        let refused = Device::attach(Handoff { geometry: wrong, ..handoff }, WaitConfig::default());
        // The same size by chance is not noticed.
        assert_eq!(refused.is_err(), wrong.bytes() != GEOMETRY.bytes(), "{wrong:?}");
    }
    let (_driver, handoff) = Driver::create(GEOMETRY, WaitConfig::default()).unwrap();
    let alive = std::fs::File::open("/dev/null").unwrap().into();
    assert!(matches!(Device::attach(Handoff { alive, ..handoff }, WaitConfig::default()), Err(Error::Handoff(_))));
}

#[test]
fn errors_say_what_would_do() {
    let (mut driver, _device) = pair(Policy::Park);
    let mut slot = driver.alloc().unwrap();
    let outside = driver.payload(&mut slot).write_at(4090, &[0; 10]).unwrap_err();
    assert_eq!(outside.to_string(), "bytes 4090..4100 of a buffer of 4096");
    let refused = driver.submit(b"", slot, 4097, 0).unwrap_err();
    assert_eq!(refused.to_string(), "payload_len of 4097 bytes: at most 4096");
    assert_eq!(std::io::Error::from(refused).kind(), std::io::ErrorKind::InvalidInput);
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    assert!(matches!(Handoff::recv(&theirs), Err(Error::TimedOut)));
    std::io::Write::write_all(&mut &ours, b"something else than a hand-off").unwrap();
    assert!(matches!(Handoff::recv(&theirs), Err(Error::Handoff(_))));
}

#[test]
fn a_slot_of_another_driver_is_refused() {
    let ((mut one, _one), (mut other, _other)) = (pair(Policy::Park), pair(Policy::Park));
    let slot = one.alloc().unwrap();
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| other.free(slot)));
    assert!(refused.is_err());
}

#[test]
fn descriptors_of_another_kind_are_refused() {
    let handoff = || Driver::create(GEOMETRY, WaitConfig::default()).unwrap();
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let refused = |handoff| Device::attach(handoff, WaitConfig::default()).is_err();
    let (_driver, good) = handoff();
    assert!(refused(Handoff { kick: null(), ..good }));
    let (_driver, good) = handoff();
    assert!(refused(Handoff { call: null(), ..good }));
    let (_driver, good) = handoff();
    assert!(refused(Handoff { memory: null(), ..good }));
    let (_driver, good) = handoff();
    let larger = Geometry { slots: 4, slot_size: 1 << 20, entries: 4 };
    assert!(refused(Handoff { geometry: larger, ..good }), "more than the memory has");
    let (_driver, good) = handoff();
    let file = tempfile_without_seals(good.memory.as_fd());
    assert!(refused(Handoff { memory: file, ..good }), "memory that could shrink");
}

/// A memfd as large as another one, without its seals.
fn tempfile_without_seals(like: impl AsFd) -> OwnedFd {
    let flags = nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING;
    let fd = nix::sys::memfd::memfd_create(c"open", flags).unwrap();
    nix::unistd::ftruncate(&fd, nix::sys::stat::fstat(like).unwrap().st_size).unwrap();
    fd
}

/// The slot of one page is the smallest.
#[test]
fn the_smallest_slot_is_a_page() {
    assert!(Geometry { slot_size: PAGE as u32, ..GEOMETRY }.check().is_ok());
    for slot_size in [0, PAGE as u32 / 2, PAGE as u32 + 1] {
        assert!(Geometry { slot_size, ..GEOMETRY }.check().is_err(), "{slot_size}");
    }
}

#[test]
fn files_are_read_and_written_in_place() {
    let (mut driver, _device) = pair(Policy::Park);
    let flags = nix::sys::memfd::MFdFlags::empty();
    let file = nix::sys::memfd::memfd_create(c"file", flags).unwrap();
    let mut slot = driver.alloc().unwrap();
    let mut payload = driver.payload(&mut slot);
    payload.write_at(0, b"0123456789").unwrap();
    assert_eq!(payload.write_to(&file, 10, 100).unwrap(), 10);
    payload.write_at(0, b"xxxxxxxxxx").unwrap();
    assert_eq!(payload.read_from(&file, 4096, 104).unwrap(), 6);
    let mut bytes = [0; 8];
    payload.read_at(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"456789xx");
    assert!(payload.read_from(&file, 4097, 0).is_err());
    assert!(payload.write_to(&file, 4097, 0).is_err());
    assert!(payload.read_from(&file, 1, u64::MAX).is_err());
    driver.free(slot);
}

const PEER: &str = "TUNNELFS_RING_TEST_PEER";

/// The other process of the next test: takes one request, and neither completes it nor ends.
#[test]
fn a_peer_process() {
    let Ok(fd) = std::env::var(PEER) else { return };
    // SAFETY: the parent has left this descriptor open for this process alone.
    let socket = unsafe { <UnixStream as std::os::fd::FromRawFd>::from_raw_fd(fd.parse().unwrap()) };
    let mut device = Device::attach(Handoff::recv(&socket).unwrap(), WaitConfig::default()).unwrap();
    let _held = device.next_within(SOON).unwrap();
    std::io::Write::write_all(&mut &socket, b"x").unwrap();
    loop {
        std::thread::park();
    }
}

/// A process that is killed with a request in hand: the wait without a time limit ends.
#[test]
fn a_killed_process_ends_the_wait() {
    for policy in [Policy::Park, Policy::Spin, Policy::Auto] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "a_peer_process", "--nocapture"]).env(PEER, "0").stdin(OwnedFd::from(theirs));
        let mut peer = command.stdout(std::process::Stdio::null()).spawn().unwrap();
        let wait = WaitConfig { policy, ..WaitConfig::default() };
        let (mut driver, handoff) = Driver::create(GEOMETRY, wait).unwrap();
        handoff.send(&ours).unwrap();
        let slot = driver.alloc().unwrap();
        driver.submit(b"", slot, 0, 0).unwrap();
        std::io::Read::read_exact(&mut &ours, &mut [0]).unwrap();
        assert!(matches!(driver.wait(Some(Duration::from_millis(20))), Err(Error::TimedOut)));
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            peer.kill().unwrap();
            peer.wait().unwrap();
        });
        let started = Instant::now();
        assert!(matches!(reap_without_limit(&mut driver), Err(Error::PeerGone)), "{policy}");
        assert!(started.elapsed() < Duration::from_secs(20));
        killer.join().unwrap();
    }
}

fn reap_without_limit(driver: &mut Driver) -> Result<Reply, Error> {
    loop {
        match driver.reap()? {
            Some(reply) => return Ok(reply),
            None => driver.wait(None)?,
        }
    }
}
