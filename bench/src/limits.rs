//! What the machine itself can do, measured in the same run.

use crossbeam_utils::CachePadded;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::hint::spin_loop;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tunnelfs_ring::{allowed_cpus, set_affinity, Eventfd};

/// The limits that transports are held against.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Limits {
    /// A cache line to another core and back, median, nanoseconds; 0 with one core.
    pub cacheline_rtt_ns: u64,
    /// The same with a line of its own each way, as messages travel: whoever writes must take the line
    /// from whoever polls it, which on some machines (Intel's) costs as much again; 0 with one core.
    pub two_line_rtt_ns: u64,
    /// Two eventfds across cores, both sides asleep, median, nanoseconds.
    pub eventfd_rtt_ns: u64,
    /// Copying 1 MiB between warm buffers.
    pub memcpy_bytes_per_s: u64,
}

impl Limits {
    /// Each limit's median over several measurements in one run; `None` of nothing.
    pub fn median(of: &[Limits]) -> Option<Limits> {
        let middle = |value: fn(&Limits) -> u64| {
            let mut values: Vec<u64> = of.iter().map(value).collect();
            values.sort_unstable();
            values.get(values.len() / 2).copied()
        };
        Some(Limits {
            cacheline_rtt_ns: middle(|l| l.cacheline_rtt_ns)?,
            two_line_rtt_ns: middle(|l| l.two_line_rtt_ns)?,
            eventfd_rtt_ns: middle(|l| l.eventfd_rtt_ns)?,
            memcpy_bytes_per_s: middle(|l| l.memcpy_bytes_per_s)?,
        })
    }
}

/// Measures all of them (about 0.2 s).
pub fn measure() -> Limits {
    let (one, other) = (CachePadded::new(AtomicU32::new(0)), CachePadded::new(AtomicU32::new(0)));
    let two_line_rtt_ns = round_trip(&one, &other);
    one.store(0, Ordering::Relaxed);
    Limits {
        cacheline_rtt_ns: round_trip(&one, &one),
        two_line_rtt_ns,
        eventfd_rtt_ns: eventfd(),
        memcpy_bytes_per_s: memcpy(),
    }
}

/// For nanoseconds, up to a minute.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("valid bounds")
}

/// Batches of round trips, so that the clock costs nothing; the median batch.
fn round_trip(there: &AtomicU32, back: &AtomicU32) -> u64 {
    const BATCH: u32 = 200;
    const BATCHES: u32 = 400;
    let &[first, second, ..] = &allowed_cpus()[..] else { return 0 };
    let mut batches = histogram();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = set_affinity(&[second]);
            for i in 0..BATCH * BATCHES {
                while there.load(Ordering::Acquire) != 2 * i + 1 {
                    spin_loop();
                }
                back.store(2 * i + 2, Ordering::Release);
            }
        });
        let timed = scope.spawn(|| {
            let _ = set_affinity(&[first]);
            let mut batches = histogram();
            for batch in 0..BATCHES {
                let start = Instant::now();
                for i in batch * BATCH..(batch + 1) * BATCH {
                    there.store(2 * i + 1, Ordering::Release);
                    while back.load(Ordering::Acquire) != 2 * i + 2 {
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
    const ROUNDS: u32 = 500;
    let (Ok(there), Ok(back)) = (Eventfd::new(), Eventfd::new()) else { return 0 };
    let all = allowed_cpus();
    let mut times = histogram();
    let sleep = |fd: &std::os::fd::OwnedFd| {
        let mut fds = [nix::poll::PollFd::new(fd.as_fd(), nix::poll::PollFlags::POLLIN)];
        let _ = nix::poll::poll(&mut fds, nix::poll::PollTimeout::NONE);
        Eventfd::drain(fd);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = set_affinity(&[all[all.len() - 1]]);
            for _ in 0..ROUNDS {
                sleep(&there);
                Eventfd::signal(&back);
            }
        });
        let timed = scope.spawn(|| {
            let _ = set_affinity(&[all[0]]);
            let mut times = histogram();
            for _ in 0..ROUNDS {
                let start = Instant::now();
                Eventfd::signal(&there);
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
    while start.elapsed() < Duration::from_millis(50) {
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut to);
        bytes += from.len() as u64;
    }
    (bytes as f64 / start.elapsed().as_secs_f64()) as u64
}
