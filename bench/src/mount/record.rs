//! A run on mounts as data: the same form as the other benchmarks'.

use super::jobs::{Job, Work};
use super::systems::System;
use super::turn::Turn;
use crate::limits::Limits;
use crate::record::{Curve, Origin, POINTS};
use serde::Serialize;
use tunnelfs_settings::Settings;

/// A whole run.
#[derive(Debug, Serialize)]
pub struct MountRun {
    /// Where and how it was made.
    #[serde(flatten)]
    pub origin: Origin,
    /// What drove the I/O.
    pub tool: String,
    /// The settings in force, but for what each row has itself.
    pub config: Settings,
    /// The machine's limits in this run.
    pub limits: Limits,
    /// One row per operation and system.
    pub rows: Vec<Row>,
}

/// One operation on one system.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs)]
pub struct Row {
    pub system: String,
    /// `ring`, `virtqueue`, `socket`, `direct` (no transport), `virtiofsd`, `native` or a peer's name.
    pub transport: String,
    pub placement: &'static str,
    pub policy: String,
    /// `uring` or `fuse`, empty for others' mounts.
    pub channel: String,
    pub op: String,
    pub size: u32,
    pub depth: u32,
    pub queues: u32,
    pub ops: u64,
    pub ops_per_s: f64,
    pub bytes_per_s: f64,
    pub p50_ns: u64,
    pub p99_ns: u64,
    pub p999_ns: u64,
    pub max_ns: u64,
    pub guest_cpu_ns_per_op: f64,
    pub host_cpu_ns_per_op: f64,
    /// Each turn's operations a second, p50, and CPU time an operation of both sides, in their order.
    pub rates: Vec<f64>,
    pub p50s_ns: Vec<u64>,
    pub cpus_ns_per_op: Vec<f64>,
    /// Medians of the turns' latencies at the file's `points`, nanoseconds; none of sums.
    pub curve_ns: Vec<u64>,
}

/// All turns of one row; the medians count.
pub struct Sum {
    row: Row,
    turns: Vec<Turn>,
}

impl Sum {
    /// The first turn of `op` on `system`.
    pub fn new(op: String, job: &Job, system: &System, first: &Turn) -> Sum {
        let (size, depth, jobs) = match job.work {
            Work::Io(io) => (io.bs, io.iodepth, io.numjobs),
            Work::Metadata => (0, 1, 1),
        };
        let row = Row {
            system: system.name.clone(),
            transport: system.transport.clone(),
            placement: system.placement,
            policy: system.policy.clone(),
            channel: system.channel.clone(),
            op,
            size,
            depth,
            queues: jobs,
            ops: 0,
            ops_per_s: 0.0,
            bytes_per_s: 0.0,
            p50_ns: 0,
            p99_ns: 0,
            p999_ns: 0,
            max_ns: 0,
            guest_cpu_ns_per_op: 0.0,
            host_cpu_ns_per_op: 0.0,
            rates: Vec::new(),
            p50s_ns: Vec::new(),
            cpus_ns_per_op: Vec::new(),
            curve_ns: Vec::new(),
        };
        Sum { row, turns: vec![*first] }
    }

    /// Whether this is the sum of `op` on `system`.
    pub fn is(&self, op: &str, system: &System) -> bool {
        self.row.op == op && self.row.system == system.name
    }

    /// One more turn.
    pub fn add(&mut self, turn: &Turn) {
        self.turns.push(*turn);
    }

    /// The medians of all turns; the maximum of the maxima.
    pub fn row(self) -> Row {
        let Sum { mut row, turns } = self;
        let median = |value: &dyn Fn(&Turn) -> f64| {
            let mut values: Vec<f64> = turns.iter().map(value).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        let cpu = |side: usize| median(&|t| t.cpu[side].as_nanos() as f64 / t.ops.max(1) as f64);
        row.rates = turns.iter().map(|t| t.ops_per_s).collect();
        row.p50s_ns = turns.iter().map(|t| t.p50_ns).collect();
        row.cpus_ns_per_op =
            turns.iter().map(|t| (t.cpu[0] + t.cpu[1]).as_nanos() as f64 / t.ops.max(1) as f64).collect();
        if turns.iter().all(|t| t.curve != Curve::default()) {
            row.curve_ns = (0..POINTS.len()).map(|i| median(&|t| t.curve[i] as f64) as u64).collect();
        }
        row.ops = turns.iter().map(|t| t.ops).sum();
        row.ops_per_s = median(&|t| t.ops_per_s);
        row.bytes_per_s = row.ops_per_s * f64::from(row.size);
        row.p50_ns = median(&|t| t.p50_ns as f64) as u64;
        row.p99_ns = median(&|t| t.p99_ns as f64) as u64;
        row.p999_ns = median(&|t| t.p999_ns as f64) as u64;
        row.max_ns = turns.iter().map(|t| t.max_ns).max().unwrap_or(0);
        (row.guest_cpu_ns_per_op, row.host_cpu_ns_per_op) = (cpu(0), cpu(1));
        row
    }
}
