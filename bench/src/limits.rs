//! What the machine itself can do, measured in the same run.

use hdrhistogram::Histogram;
use serde::Serialize;
use std::hint::spin_loop;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tunnelfs_ring::{allowed_cpus, drain, new_eventfd, ring_bell, stay_on};

/// The limits that transports are held against.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Limits {
    /// A cache line to another core and back, median, nanoseconds; 0 with one core.
    pub cacheline_rtt_ns: u64,
    /// Two eventfds across cores, both sides asleep, median, nanoseconds.
    pub eventfd_rtt_ns: u64,
    /// Copying 1 MiB between warm buffers.
    pub memcpy_bytes_per_s: u64,
}

/// Measures all three (about 0.3 s).
pub fn measure() -> Limits {
    Limits { cacheline_rtt_ns: cacheline(), eventfd_rtt_ns: eventfd(), memcpy_bytes_per_s: memcpy() }
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 1_000_000_000, 3).expect("valid bounds")
}

/// Batches of round trips, so that the clock costs nothing; the median batch.
fn cacheline() -> u64 {
    const BATCH: u32 = 200;
    const BATCHES: u32 = 400;
    let &[first, second, ..] = &allowed_cpus()[..] else { return 0 };
    let turn = AtomicU32::new(0);
    let mut batches = histogram();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = stay_on(&[second]);
            for i in 0..BATCH * BATCHES {
                while turn.load(Ordering::Acquire) != 2 * i + 1 {
                    spin_loop();
                }
                turn.store(2 * i + 2, Ordering::Release);
            }
        });
        let timed = scope.spawn(|| {
            let _ = stay_on(&[first]);
            let mut batches = histogram();
            for batch in 0..BATCHES {
                let start = Instant::now();
                for i in batch * BATCH..(batch + 1) * BATCH {
                    turn.store(2 * i + 1, Ordering::Release);
                    while turn.load(Ordering::Acquire) != 2 * i + 2 {
                        spin_loop();
                    }
                }
                batches.saturating_record(start.elapsed().as_nanos() as u64 / u64::from(BATCH));
            }
            batches
        });
        batches = timed.join().expect("no panic");
    });
    batches.value_at_quantile(0.5)
}

fn eventfd() -> u64 {
    const ROUNDS: u32 = 1000;
    let (Ok(there), Ok(back)) = (new_eventfd(), new_eventfd()) else { return 0 };
    let all = allowed_cpus();
    let mut times = histogram();
    let sleep = |fd: &std::os::fd::OwnedFd| {
        let mut fds = [nix::poll::PollFd::new(fd.as_fd(), nix::poll::PollFlags::POLLIN)];
        let _ = nix::poll::poll(&mut fds, nix::poll::PollTimeout::NONE);
        drain(fd);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = stay_on(&[all[all.len() - 1]]);
            for _ in 0..ROUNDS {
                sleep(&there);
                ring_bell(&back);
            }
        });
        let timed = scope.spawn(|| {
            let _ = stay_on(&[all[0]]);
            let mut times = histogram();
            for _ in 0..ROUNDS {
                let start = Instant::now();
                ring_bell(&there);
                sleep(&back);
                times.saturating_record(start.elapsed().as_nanos() as u64);
            }
            times
        });
        times = timed.join().expect("no panic");
    });
    times.value_at_quantile(0.5)
}

fn memcpy() -> u64 {
    let (from, mut to) = (vec![7u8; 1 << 20], vec![0u8; 1 << 20]);
    let (start, mut bytes) = (Instant::now(), 0u64);
    while start.elapsed() < Duration::from_millis(100) {
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut to);
        bytes += from.len() as u64;
    }
    (bytes as f64 / start.elapsed().as_secs_f64()) as u64
}
