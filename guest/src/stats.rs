//! Statistics of a mount, which `tunnelfs-guest status` and SIGUSR1 print.

use crate::recording::Recording;
use crate::transport::Transport;
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::opcode;
use tunnelfs_ring::{Counters, Policy};

struct Operation {
    failed: u64,
    latency: Histogram<u64>,
}

#[derive(Default)]
struct Counts {
    operations: BTreeMap<u32, Operation>,
    waits: Counters,
    copied: u64,
    /// Number of slots in use at each reply: the maximum, and the sum over all replies.
    in_use_max: usize,
    in_use_sum: u64,
}

/// One queue's statistics. Its worker writes them; any thread may read them.
pub struct QueueStats {
    counts: Mutex<Counts>,
    start: Instant,
    /// By slot: microseconds from `start` to its request, plus one; 0 if no request is in flight.
    asked: Box<[AtomicU64]>,
    /// This queue's part of a recording.
    pub recording: Recording,
}

impl QueueStats {
    /// Makes the statistics for a queue of `slots` slots.
    pub fn new(slots: u32) -> Self {
        let asked = (0..slots).map(|_| AtomicU64::new(0)).collect();
        QueueStats { counts: Mutex::default(), start: Instant::now(), asked, recording: Recording::default() }
    }

    /// Records that the request in `slot` waits for the host from `now` on.
    pub fn begin(&self, slot: u32, now: Instant) {
        let since = now.duration_since(self.start).as_micros() as u64 + 1;
        self.asked[slot as usize].store(since, Ordering::Relaxed);
    }

    /// Records that the request in `slot` no longer waits.
    pub fn end(&self, slot: u32) {
        self.asked[slot as usize].store(0, Ordering::Relaxed);
    }

    /// Returns how long the oldest request has waited; zero if there is none.
    pub fn longest_wait(&self) -> Duration {
        let oldest = self.asked.iter().map(|a| a.load(Ordering::Relaxed)).filter(|&since| since != 0).min();
        oldest.map_or(Duration::ZERO, |since| self.start.elapsed().saturating_sub(Duration::from_micros(since - 1)))
    }

    /// Number of requests that wait for the host.
    pub fn in_use(&self) -> u64 {
        self.asked.iter().filter(|asked| asked.load(Ordering::Relaxed) != 0).count() as u64
    }

    /// Returns how the waits for the host have ended.
    pub fn waits(&self) -> Counters {
        self.counts.lock().waits
    }

    /// Number of payload bytes that this side has copied in user space.
    pub fn copied(&self) -> u64 {
        self.counts.lock().copied
    }

    /// Calls `each` for each operation, with its opcode, its number of failures, and its latencies in nanoseconds.
    pub fn each_operation(&self, mut each: impl FnMut(u32, u64, &Histogram<u64>)) {
        for (&number, operation) in &self.counts.lock().operations {
            each(number, operation.failed, &operation.latency);
        }
    }

    /// Counts an answered request that took `took`, while `in_use` slots were in use.
    pub fn record(&self, opcode: u32, error: i32, took: Duration, in_use: usize, by: &dyn Transport) {
        let mut counts = self.counts.lock();
        counts.waits = by.wait_counters();
        counts.copied = by.copied();
        counts.in_use_max = counts.in_use_max.max(in_use);
        counts.in_use_sum += in_use as u64;
        let operation = counts.operations.entry(opcode).or_insert_with(|| Operation {
            failed: 0,
            latency: Histogram::new_with_bounds(1, 60_000_000_000, 2).expect("valid bounds"),
        });
        operation.failed += u64::from(error != 0);
        operation.latency.saturating_record(took.as_nanos() as u64);
    }
}

/// Renders the statistics of all queues as a table. `policy` is their wait policy.
pub fn render(policy: Policy, queues: &[(&'static str, u32, Arc<QueueStats>)]) -> String {
    let mut out = String::new();
    for (i, (transport, slots, stats)) in queues.iter().enumerate() {
        let counts = stats.counts.lock();
        let Counters { spun, parked, kicks } = counts.waits;
        let (most, done) = (counts.in_use_max, counts.operations.values().map(|op| op.latency.len()).sum::<u64>());
        let mean = counts.in_use_sum as f64 / done.max(1) as f64;
        let _ = writeln!(out, "queue {i}: {transport}, {slots} slots, of which {mean:.1} in use, at most {most}");
        let _ = writeln!(out, "  waits for the host by policy {policy}: {spun} spun, {parked} parked; {kicks} kicks");
        let _ = writeln!(out, "  payload copied in user space: {} bytes", counts.copied);
        for (&number, op) in &counts.operations {
            let us = |q| op.latency.value_at_quantile(q) as f64 / 1e3;
            let _ = writeln!(
                out,
                "  {:<16} {:>10} done {:>8} failed  p50 {:>9.1} us  p99 {:>9.1} us  p99.9 {:>9.1} us  max {:>9.1} us",
                opcode::name(number),
                op.latency.len(),
                op.failed,
                us(0.5),
                us(0.99),
                us(0.999),
                op.latency.max() as f64 / 1e3
            );
        }
    }
    out
}
