//! What a mount has done so far, for people: printed on SIGUSR1.

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
    /// Slots in use, seen whenever an answer came: the most, and their sum.
    in_use_max: usize,
    in_use_sum: u64,
}

/// One queue's counts; its worker writes, whoever asks reads.
pub struct QueueStats {
    counts: Mutex<Counts>,
    start: Instant,
    /// Of each slot: microseconds from `start` to its request, and one; 0 when none is under way.
    asked: Box<[AtomicU64]>,
    /// For the benchmark's `record`.
    pub recording: Recording,
}

impl QueueStats {
    /// For a queue of so many slots.
    pub fn new(slots: u32) -> Self {
        let asked = (0..slots).map(|_| AtomicU64::new(0)).collect();
        QueueStats { counts: Mutex::default(), start: Instant::now(), asked, recording: Recording::default() }
    }

    /// A request in `slot` goes to the host.
    pub fn begin(&self, slot: u32, now: Instant) {
        let since = now.duration_since(self.start).as_micros() as u64 + 1;
        self.asked[slot as usize].store(since, Ordering::Relaxed);
    }

    /// It has been answered.
    pub fn end(&self, slot: u32) {
        self.asked[slot as usize].store(0, Ordering::Relaxed);
    }

    /// How long the oldest request has waited.
    pub fn longest_wait(&self) -> Duration {
        let oldest = self.asked.iter().map(|a| a.load(Ordering::Relaxed)).filter(|&since| since != 0).min();
        oldest.map_or(Duration::ZERO, |since| self.start.elapsed().saturating_sub(Duration::from_micros(since - 1)))
    }

    /// Requests that the host has.
    pub fn in_use(&self) -> u64 {
        self.asked.iter().filter(|asked| asked.load(Ordering::Relaxed) != 0).count() as u64
    }

    /// How waits have ended.
    pub fn waits(&self) -> Counters {
        self.counts.lock().waits
    }

    /// Payload bytes that were copied in user space.
    pub fn copied(&self) -> u64 {
        self.counts.lock().copied
    }

    /// Calls `each` with the opcode, the failures and the latencies in nanoseconds of each operation.
    pub fn each_operation(&self, mut each: impl FnMut(u32, u64, &Histogram<u64>)) {
        for (&number, operation) in &self.counts.lock().operations {
            each(number, operation.failed, &operation.latency);
        }
    }

    /// Counts an answered request, while `in_use` slots were in use.
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

/// A table of all queues' operations; all wait by `policy`.
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
