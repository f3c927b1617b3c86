//! A run as data: where it was made, with what, and one row per case.

use crate::echo::Echo;
use crate::limits::Limits;
use crate::plan::{Cpus, HostLocation, Load, Op, Pair, TransportKind};
use crate::workload::Sample;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::time::{SystemTime, UNIX_EPOCH};
use tunnelfs_ring::Policy;
use tunnelfs_settings::Settings;

/// The version of the JSON that is written: readers refuse later ones.
pub const FORMAT: u32 = 2;

/// The percentiles of which each row keeps the latency; the last one is the maximum.
pub const POINTS: [f64; 15] =
    [1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.95, 99.99, 99.999, 100.0];

/// Latencies at [`POINTS`], nanoseconds.
pub type Curve = [u64; POINTS.len()];

/// A histogram's latencies at [`POINTS`].
pub fn curve(latency: &Histogram<u64>) -> Curve {
    POINTS.map(|p| latency.value_at_percentile(p))
}

/// Where and how a run was made.
#[derive(Clone, Debug, Serialize)]
pub struct Origin {
    /// [`FORMAT`].
    pub format: u32,
    /// What was measured: `transports`, `mount` or `tree`.
    pub kind: &'static str,
    /// When, in UTC.
    pub date: String,
    /// [`POINTS`].
    pub points: Vec<f64>,
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
#[derive(Clone, Debug, Serialize)]
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
    /// Entries and slots of each queue's ring, and the wait budget's microseconds, of this row.
    pub entries: u32,
    pub slots: u32,
    pub slot_size: u32,
    pub spin_us: u32,
    pub auto_us: u32,
    /// Requests really in flight on a queue: `depth`, or the slots if there are fewer.
    pub in_flight: u32,
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
    /// Each round's operations a second, p50, and CPU time an operation of both sides, in the order of the rounds.
    pub rates: Vec<f64>,
    pub p50s_ns: Vec<u64>,
    pub cpus_ns_per_op: Vec<f64>,
    /// Latencies at the file's `points`, nanoseconds.
    pub curve_ns: Curve,
}

impl Row {
    /// The row of a finished case.
    pub fn new(pair: Pair, settings: &Settings, load: Load, sample: &Sample) -> Self {
        let transport = &settings.transport;
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
            entries: transport.entries,
            slots: transport.slots,
            slot_size: transport.slot_size,
            spin_us: settings.wait.spin_us,
            auto_us: settings.wait.auto_us,
            in_flight: load.depth.min(transport.slots),
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
            rates: sample.rates.clone(),
            p50s_ns: sample.p50s.clone(),
            cpus_ns_per_op: sample.cpus.clone(),
            curve_ns: curve(&sample.latency),
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
        if self.in_flight < self.depth {
            name += &format!(" ({} slots)", self.in_flight);
        }
        if self.queues > 1 {
            name += &format!(" x {} queues", self.queues);
        }
        name
    }
}

impl Origin {
    /// This machine, this process.
    pub fn here(kind: &'static str) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")?.split(": ").nth(1)).unwrap_or("unknown");
        let git = std::process::Command::new("git").args(["rev-parse", "--short", "HEAD"]).output();
        let commit = git.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
        let args = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
        Origin {
            format: FORMAT,
            kind,
            date: utc(SystemTime::now()),
            points: POINTS.to_vec(),
            machine: format!("{model}, {} CPUs", tunnelfs_ring::allowed_cpus().len()),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            commit,
            command: format!("tunnelfs-bench {args}"),
        }
    }

    /// For people: the command, the machine, and its limits in the run.
    pub fn heading(&self, limits: &Limits) -> String {
        format!(
            "# {}\n\n{}, kernel {}, commit {}, {}.\n\nLimits in this run: cache-line round trip {} ns ({} ns with a line \
             each way), eventfd round trip {} ns, memcpy {:.1} GB/s.\n",
            self.command,
            self.machine,
            self.kernel,
            self.commit,
            self.date,
            limits.cacheline_rtt_ns,
            limits.two_line_rtt_ns,
            limits.eventfd_rtt_ns,
            limits.memcpy_bytes_per_s as f64 / 1e9
        )
    }
}

/// A moment as people write it: `2026-11-26 04:05 UTC`.
pub fn utc(moment: SystemTime) -> String {
    let seconds = moment.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    // Days since 0000-03-01, so that a leap day is the last of its year.
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, next_year) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year + next_year;
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", seconds / 3600 % 24, seconds / 60 % 60)
}

#[cfg(test)]
mod tests {
    use super::utc;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn dates_are_those_of_the_calendar() {
        let at = |seconds| utc(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01 00:00 UTC");
        assert_eq!(at(951_825_599), "2000-02-29 11:59 UTC");
        assert_eq!(at(1_798_761_599), "2026-12-31 23:59 UTC");
    }
}
