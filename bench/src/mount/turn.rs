//! One turn of a job: what it asked for, and what came of it.

use crate::record::{curve, Curve};
use hdrhistogram::Histogram;
use std::time::Duration;

/// How a job reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Io {
    /// fio's `rw`: `read`, `write`, `randread` or `randwrite`.
    pub rw: &'static str,
    /// Bytes of one request.
    pub bs: u32,
    /// O_DIRECT, for a while; otherwise the whole file once, through the page cache.
    pub direct: bool,
    /// Threads.
    pub numjobs: u32,
    /// Requests in flight of each, by io_uring where more than one.
    pub iodepth: u32,
    /// By an ordinary user (65534), not by root, whose writes leave setuid bits alone.
    pub user: bool,
}

/// CPU time of a file system's guest and host processes.
pub type Cpu = [Duration; 2];

/// What has been used `since`.
pub fn used(now: Cpu, since: Cpu) -> Cpu {
    [0, 1].map(|side| now[side].saturating_sub(since[side]))
}

/// What a job's turn came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Turn {
    pub ops: u64,
    pub ops_per_s: f64,
    pub p50_ns: u64,
    pub p99_ns: u64,
    pub p999_ns: u64,
    pub max_ns: u64,
    /// Latencies at [`crate::record::POINTS`]; all zero where they are not known.
    pub curve: Curve,
    /// CPU time of the file system's guest and host processes, not of the job.
    pub cpu: Cpu,
}

impl Turn {
    /// From a histogram of nanoseconds.
    pub fn of(latency: &Histogram<u64>, elapsed: Duration) -> Turn {
        let at = |q| latency.value_at_quantile(q);
        Turn {
            ops: latency.len(),
            ops_per_s: latency.len() as f64 / elapsed.as_secs_f64(),
            p50_ns: at(0.5),
            p99_ns: at(0.99),
            p999_ns: at(0.999),
            max_ns: latency.max(),
            curve: curve(latency),
            cpu: [Duration::ZERO; 2],
        }
    }
}
