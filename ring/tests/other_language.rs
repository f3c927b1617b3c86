//! A second implementation of docs/protocol.md (`peer.py`) talks to ours over a real region, in both roles.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::Duration;
use tunnelfs_ring::*;

/// More than a lap of the ring, and even.
const COUNT: usize = 1000;
const SOON: Option<Duration> = Some(Duration::from_secs(20));

/// The peer, and a socket to it; `None` where there is no Python that can be one.
fn peer(role: &str) -> Option<(Child, UnixStream)> {
    let check = ["-c", "import os, platform; os.eventfd; assert platform.machine() == 'x86_64'"];
    if !Command::new("python3").args(check).output().is_ok_and(|out| out.status.success()) {
        eprintln!("skipped: needs python3 3.10 or later, on x86-64");
        return None;
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peer.py");
    let mut command = Command::new("python3");
    command.args([script, role, "0", &COUNT.to_string()]).stdin(OwnedFd::from(theirs));
    Some((command.spawn().unwrap(), ours))
}

#[test]
fn our_driver_and_a_device_in_python() {
    let Some((mut peer, socket)) = peer("device") else { return };
    let geometry = Geometry { entries: 8, slots: 8, slot_size: 4096 };
    let (mut driver, handoff) = Driver::create(geometry, WaitConfig::default()).unwrap();
    handoff.send(&socket).unwrap();
    let (mut sent, mut got) = (0, 0);
    while got < COUNT {
        while let Some(mut slot) = (sent < COUNT).then(|| driver.alloc()).flatten() {
            let text = format!("text {sent}");
            // Short ones, and some that need the entry's second cache line.
            let msg = format!("{sent} ").repeat(1 + sent % 20);
            driver.payload(&mut slot).write_at(0, text.as_bytes()).unwrap();
            driver.submit(msg.as_bytes(), slot, text.len() as u32, 4096).unwrap();
            sent += 1;
        }
        let Some(reply) = driver.reap().unwrap() else {
            driver.wait(SOON).unwrap();
            continue;
        };
        let msg = String::from_utf8(reply.msg().to_vec()).unwrap();
        let number: usize = msg.split(' ').next().unwrap().parse().unwrap();
        let whole = format!("{number} ").repeat(1 + number % 20);
        assert_eq!(msg, whole[..whole.len().min(Device::MAX_MSG)]);
        let (mut text, mut slot) = (vec![0; reply.payload_len()], reply.slot);
        driver.payload(&mut slot).read_at(0, &mut text).unwrap();
        assert_eq!(text, format!("TEXT {number}").as_bytes());
        driver.free(slot);
        got += 1;
    }
    drop(driver);
    assert!(peer.wait().unwrap().success());
}

#[test]
fn a_driver_in_python_and_our_device() {
    let Some((mut peer, socket)) = peer("driver") else { return };
    let mut device = Device::attach(Handoff::recv(&socket).unwrap(), WaitConfig::default()).unwrap();
    let mut served = 0;
    loop {
        let Some(mut request) = device.next().unwrap() else {
            match device.wait(SOON) {
                Err(Error::PeerGone) => break,
                result => result.unwrap(),
            }
            continue;
        };
        let mut text = vec![0; request.payload_len()];
        device.payload(&mut request).read_at(0, &mut text).unwrap();
        text.make_ascii_uppercase();
        device.payload(&mut request).write_at(0, &text).unwrap();
        let msg = request.msg().to_ascii_uppercase();
        device.complete(request, &msg[..msg.len().min(Device::MAX_MSG)], text.len() as u32).unwrap();
        served += 1;
    }
    assert_eq!(served, COUNT);
    assert!(peer.wait().unwrap().success());
}
