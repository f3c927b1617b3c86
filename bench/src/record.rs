//! A run as data: where it was made, with what, and one row per case.

use crate::echo::Echo;
use crate::limits::Limits;
use crate::plan::{Cpus, HostLocation, Load, Op, Pair, TransportKind};
use crate::workload::Sample;
use serde::Serialize;
use tunnelfs_ring::Policy;
use tunnelfs_settings::Settings;

/// Where and how a run was made.
#[derive(Clone, Debug, Serialize)]
pub struct Origin {
    /// CPU model and count.
    pub machine: String,
    /// Kernel release.
    pub kernel: String,
    /// Commit of the source tree, if it is a checkout.
    pub commit: String,
    /// The command line.
    pub command: String,
}

/// A whole run.
#[derive(Debug, Serialize)]
pub struct Run {
    /// Where and how it was made.
    #[serde(flatten)]
    pub origin: Origin,
    /// Where the files lie.
    pub files: String,
    /// The settings in force, but for what each row has itself.
    pub config: Settings,
    /// The machine's limits in this run.
    pub limits: Limits,
    /// One row per case.
    pub rows: Vec<Row>,
    /// What pairs cost that have nothing to do.
    pub idle: Vec<Idle>,
    /// The ring's safe ends beside its raw queues.
    pub echo: Vec<Echo>,
}

/// One idle pair.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Idle {
    /// Which one.
    #[serde(flatten)]
    pub pair: Pair,
    /// Share of one core that the waiting guest takes.
    pub guest_cpu: f64,
    /// Share of one core that the host's process takes.
    pub host_cpu: f64,
}

/// One case.
#[derive(Clone, Copy, Debug, Serialize)]
#[allow(missing_docs)]
pub struct Row {
    pub transport: TransportKind,
    pub placement: HostLocation,
    pub policy: Policy,
    pub cpus: Cpus,
    pub op: Op,
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
    pub copied_bytes_per_op: f64,
}

impl Row {
    /// The row of a finished case.
    pub fn new(pair: Pair, load: Load, sample: &Sample) -> Self {
        let ops = sample.ops.max(1) as f64;
        let ops_per_s = sample.rate();
        let quantile = |q| sample.latency.value_at_quantile(q);
        Row {
            transport: pair.transport,
            placement: pair.placement,
            policy: pair.policy,
            cpus: pair.cpus,
            op: load.op,
            size: load.size,
            depth: load.depth,
            queues: load.queues,
            ops: sample.ops,
            ops_per_s,
            bytes_per_s: ops_per_s * f64::from(load.size),
            p50_ns: quantile(0.5),
            p99_ns: quantile(0.99),
            p999_ns: quantile(0.999),
            max_ns: sample.latency.max(),
            guest_cpu_ns_per_op: sample.guest_cpu.as_nanos() as f64 / ops,
            host_cpu_ns_per_op: sample.host_cpu.as_nanos() as f64 / ops,
            copied_bytes_per_op: sample.copied as f64 / ops,
        }
    }
}

impl Row {
    /// The load's coordinates.
    pub fn load(&self) -> Load {
        Load { op: self.op, size: self.size, depth: self.depth, queues: self.queues }
    }

    /// The load in words.
    pub fn load_name(&self) -> String {
        let mut name = format!("{:?}", self.op).to_uppercase();
        match self.size {
            0 => {}
            s if s % (1 << 20) == 0 => name += &format!(" {} MiB", s >> 20),
            s if s % 1024 == 0 => name += &format!(" {} KiB", s >> 10),
            s => name += &format!(" {s} B"),
        }
        if (self.depth, self.queues) != (1, 1) {
            name += &format!(" depth {}", self.depth);
        }
        if self.queues > 1 {
            name += &format!(" x {} queues", self.queues);
        }
        name
    }
}

impl Origin {
    /// This machine, this process.
    pub fn here() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")?.split(": ").nth(1)).unwrap_or("unknown");
        let git = std::process::Command::new("git").args(["rev-parse", "--short", "HEAD"]).output();
        let commit = git.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
        let args = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
        Origin {
            machine: format!("{model}, {} CPUs", tunnelfs_ring::allowed_cpus().len()),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            commit,
            command: format!("tunnelfs-bench {args}"),
        }
    }

    /// For people: the command, the machine, and its limits in the run.
    pub fn heading(&self, limits: &Limits) -> String {
        format!(
            "# {}\n\n{}, kernel {}, commit {}.\n\nLimits in this run: cache-line round trip {} ns ({} ns with a line \
             each way), eventfd round trip {} ns, memcpy {:.1} GB/s.\n",
            self.command,
            self.machine,
            self.kernel,
            self.commit,
            limits.cacheline_rtt_ns,
            limits.two_line_rtt_ns,
            limits.eventfd_rtt_ns,
            limits.memcpy_bytes_per_s as f64 / 1e9
        )
    }
}
