//! Two processes that trust nothing but the ring: a client sends lines, a server sends them back in capitals.
//!
//! `cargo run --example echo`

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tunnelfs_ring::{Device, Driver, Error, Geometry, Handoff, WaitConfig};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Longest time that either side waits for the other.
const TIMEOUT: Option<Duration> = Some(Duration::from_secs(5));

fn main() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("server") => server(),
        _ => client(),
    }
}

/// Starts the server as a second process, with one end of a socket pair as its standard input.
fn client() -> Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut server =
        Command::new(std::env::current_exe()?).arg("server").stdin(Stdio::from(OwnedFd::from(theirs))).spawn()?;

    // 16 entries in each ring, and 8 payload buffers of 64 KiB.
    let geometry = Geometry { entries: 16, slots: 8, slot_size: 64 << 10 };
    let (mut driver, handoff) = Driver::create(geometry, WaitConfig::default())?;
    handoff.send(&ours)?;

    for line in ["hello", "from another process"] {
        let mut slot = driver.alloc().expect("nothing else is in flight");
        driver.payload(&mut slot).write_at(0, line.as_bytes())?;
        driver.submit(b"upper", slot, line.len() as u32, geometry.slot_size)?;
        let reply = driver.reap_within(TIMEOUT)?;
        let mut text = vec![0; reply.payload_len()];
        let mut slot = reply.slot;
        driver.payload(&mut slot).read_at(0, &mut text)?;
        driver.free(slot);
        println!("{line} -> {}", String::from_utf8_lossy(&text));
        assert_eq!(text, line.to_uppercase().as_bytes());
    }
    round_trips(&mut driver)?;

    // The server sees that its driver has gone, and ends.
    drop(driver);
    assert!(server.wait()?.success());
    Ok(())
}

/// Times requests without a payload, one at a time.
fn round_trips(driver: &mut Driver) -> Result<()> {
    const COUNT: u32 = 10_000;
    let start = Instant::now();
    for _ in 0..COUNT {
        let slot = driver.alloc().expect("nothing else is in flight");
        driver.submit(b"ping", slot, 0, 0)?;
        let reply = driver.reap_within(TIMEOUT)?;
        driver.free(reply.slot);
    }
    println!("{COUNT} round trips of {:?} each", start.elapsed() / COUNT);
    Ok(())
}

/// Serves until the client goes.
fn server() -> Result<()> {
    let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut device = Device::attach(Handoff::recv(&socket)?, WaitConfig::default())?;
    loop {
        let mut request = match device.next_within(None) {
            Err(Error::PeerGone) => return Ok(()),
            request => request?,
        };
        // The client can still write the buffer: work on a copy.
        let mut text = vec![0; request.payload_len()];
        device.payload(&mut request).read_at(0, &mut text)?;
        text.make_ascii_uppercase();
        text.truncate(request.reply_max());
        device.payload(&mut request).write_at(0, &text)?;
        device.complete(request, b"done", text.len() as u32)?;
    }
}
