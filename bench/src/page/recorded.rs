//! Recorded runs of every kind, read from their JSON into one form.

use super::figures;
use crate::record::FORMAT;
use serde::Deserialize;
use serde_json::Value;
use std::io;
use std::path::Path;

/// A run, as pages and comparisons want it.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    /// The file's name without its ending.
    pub name: String,
    /// `transports`, `mount`, `tree` or `vm`.
    pub kind: String,
    /// CPU model and count, kernels, commit and date, in one line.
    pub machine: String,
    /// The command line.
    pub command: String,
    /// The machine's limits, where they were measured.
    pub limits: Option<Limits>,
    /// The settings in force.
    pub config: Option<Value>,
    /// One for each load and series.
    pub rows: Vec<Row>,
}

/// What the machine itself can do.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[allow(missing_docs)]
pub struct Limits {
    pub cacheline_rtt_ns: u64,
    #[serde(default)]
    pub two_line_rtt_ns: u64,
    pub eventfd_rtt_ns: u64,
    pub memcpy_bytes_per_s: u64,
}

/// What a series is to ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// The ring with a separate host.
    Ours,
    /// Something else that one could use.
    #[default]
    Peer,
    /// What no separate host can beat: the call or the file system itself.
    Floor,
}

/// One load on one series.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// The load in words.
    pub load: String,
    /// What served it, in words.
    pub series: String,
    /// The series without the settings that the run varies.
    pub family: String,
    /// What that is to ours.
    pub role: Role,
    /// Whether it belongs among the first pictures: wait policy auto, all CPUs.
    pub usual: bool,
    /// `read`, `noop`, `randread-4k`: the operation alone.
    pub op: String,
    /// Payload bytes of an operation.
    pub size: u64,
    /// Requests in flight, over all queues.
    pub in_flight: u32,
    /// What each queue was asked to have in flight, where its slots were fewer.
    pub asked: Option<u32>,
    /// Queues or threads.
    pub queues: u32,
    /// Entries and slots of a queue's ring, where they are recorded.
    pub ring: Option<(u32, u32)>,
    /// Operations a second.
    pub rate: f64,
    /// Seconds of a whole job, where that is what was measured.
    pub seconds: Option<f64>,
    /// Latencies: (percentile, nanoseconds); the last may be the maximum, at 100.
    pub curve: Vec<(f64, f64)>,
    /// CPU time of both sides, nanoseconds an operation.
    pub cpu_ns: Option<f64>,
    /// Each round's operations a second, p50 and CPU time.
    pub rates: Vec<f64>,
    /// As above.
    pub p50s: Vec<f64>,
    /// As above.
    pub cpus: Vec<f64>,
    /// Requests that the kernel sent for each file.
    pub requests_per_file: Option<f64>,
}

#[derive(Deserialize)]
struct File {
    format: Option<u32>,
    kind: Option<String>,
    machine: Option<String>,
    cpus: Option<u32>,
    accelerator: Option<String>,
    kernel: String,
    guest_kernel: Option<String>,
    commit: String,
    date: Option<String>,
    command: String,
    limits: Option<Limits>,
    config: Option<Value>,
    #[serde(default)]
    points: Vec<f64>,
    rows: Vec<RawRow>,
}

/// A row of any kind of run.
#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct RawRow {
    system: Option<String>,
    way: Option<String>,
    transport: String,
    placement: String,
    policy: String,
    cpus: String,
    op: String,
    size: u64,
    depth: u32,
    queues: u32,
    entries: Option<u32>,
    slots: Option<u32>,
    spin_us: Option<u32>,
    auto_us: Option<u32>,
    in_flight: Option<u32>,
    ops_per_s: f64,
    p50_ns: u64,
    p99_ns: u64,
    p999_ns: u64,
    max_ns: u64,
    guest_cpu_ns_per_op: Option<f64>,
    host_cpu_ns_per_op: Option<f64>,
    rates: Vec<f64>,
    p50s_ns: Vec<f64>,
    cpus_ns_per_op: Vec<f64>,
    curve_ns: Vec<f64>,
    unit: Option<String>,
    value: f64,
    values: Vec<f64>,
    seconds: Option<f64>,
    all_seconds: Vec<f64>,
    requests_per_file: Option<f64>,
}

/// Reads a run.
///
/// # Errors
/// When the file is missing, is not one of ours, or is of a later version; says which.
pub fn read(path: &Path) -> io::Result<Recorded> {
    let shown = path.display();
    let told = |e: io::Error| io::Error::new(e.kind(), format!("{shown}: {e}"));
    let bytes = std::fs::read(path).map_err(told)?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    parse(&bytes, &name).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("{shown}: {e}")))
}

/// As [`read`], of bytes.
///
/// # Errors
/// The reason in words.
pub fn parse(bytes: &[u8], name: &str) -> Result<Recorded, String> {
    let value: Value = serde_json::from_slice(bytes).map_err(|e| format!("not JSON: {e}"))?;
    let format = value.get("format").and_then(Value::as_u64);
    if format.is_some_and(|f| f > u64::from(FORMAT)) {
        return Err(format!(
            "written by a later tunnelfs-bench (format {}, this one reads up to {FORMAT}): use that one",
            format.unwrap_or(0)
        ));
    }
    let file: File = serde_json::from_value(value)
        .map_err(|e| format!("not a run of tunnelfs-bench (write one with --json FILE): {e}"))?;
    if file.rows.is_empty() {
        return Err("a run without rows: nothing was measured".into());
    }
    let kind = file.kind.clone().unwrap_or_else(|| kind_of(&file.rows[0]).into());
    let several = Several::of(&file.rows);
    let rows = file.rows.iter().map(|raw| row(raw, &file.points, &several)).collect();
    let words = [
        file.machine.clone().or_else(|| file.cpus.map(|n| format!("{n} CPUs"))),
        file.accelerator.clone().map(|a| format!("guest under QEMU ({a})")),
        file.guest_kernel.clone().map(|k| format!("guest kernel {k}")),
        Some(format!("kernel {}", file.kernel)),
        Some(format!("commit {}", file.commit)).filter(|_| !file.commit.is_empty()),
        file.date.clone(),
    ];
    debug_assert!(file.format.unwrap_or(1) <= FORMAT);
    Ok(Recorded {
        name: name.into(),
        kind,
        machine: words.into_iter().flatten().collect::<Vec<_>>().join(", "),
        command: file.command,
        limits: file.limits,
        config: file.config,
        rows,
    })
}

/// The kind of a run before it was recorded in the file.
fn kind_of(first: &RawRow) -> &'static str {
    match first {
        RawRow { way: Some(_), .. } => "vm",
        RawRow { system: Some(_), .. } => "mount",
        _ => "transports",
    }
}

/// Which settings have more than one value in a run: those are part of the series' names.
struct Several {
    entries: bool,
    slots: bool,
    auto_us: bool,
    spin_us: bool,
}

impl Several {
    fn of(rows: &[RawRow]) -> Several {
        let differ = |key: fn(&RawRow) -> Option<u32>| {
            rows.iter().filter(|r| r.transport != "direct").any(|r| key(r) != key(&rows[rows.len() - 1]))
        };
        Several {
            entries: differ(|r| r.entries),
            slots: differ(|r| r.slots),
            auto_us: differ(|r| r.auto_us),
            spin_us: differ(|r| r.spin_us),
        }
    }

    /// For a series' name: `, 8 slots`.
    fn words(&self, raw: &RawRow) -> String {
        if raw.system.is_some() || raw.way.is_some() || raw.transport == "direct" {
            return String::new();
        }
        let part = |wanted: bool, value: Option<u32>, unit: &str| {
            value.filter(|_| wanted).map_or(String::new(), |v| format!(", {v} {unit}"))
        };
        part(self.entries, raw.entries, "entries")
            + &part(self.slots, raw.slots, "slots")
            + &part(self.auto_us && raw.policy == "auto", raw.auto_us, "µs auto")
            + &part(self.spin_us && raw.policy == "spin", raw.spin_us, "µs spin")
    }
}

fn row(raw: &RawRow, points: &[f64], several: &Several) -> Row {
    let (family, role, usual) = series(raw);
    let series = format!("{family}{}", several.words(raw));
    let in_flight = raw.in_flight.unwrap_or(raw.depth).max(1) * raw.queues.max(1);
    let unit = raw.unit.as_deref().unwrap_or("");
    let seconds = raw.seconds.or((unit.starts_with("ms")).then_some(raw.value / 1e3));
    let size = if unit == "MiB/s" { 1 << 20 } else { raw.size };
    let rate = match (unit, seconds) {
        ("iops", _) => raw.value,
        ("MiB/s", _) => raw.value,
        (_, Some(s)) if s > 0.0 && raw.ops_per_s == 0.0 => 1.0 / s,
        _ => raw.ops_per_s,
    };
    let in_vm = raw.values.iter().map(|v| if unit.starts_with("ms") { 1e3 / v } else { *v });
    let rates = match raw {
        _ if !raw.rates.is_empty() => raw.rates.clone(),
        _ if !raw.values.is_empty() => in_vm.collect(),
        _ => raw.all_seconds.iter().map(|s| 1.0 / s).collect(),
    };
    let cpu_ns = raw.guest_cpu_ns_per_op.zip(raw.host_cpu_ns_per_op).map(|(guest, host)| guest + host);
    Row {
        load: load(raw),
        series,
        family,
        role,
        usual,
        op: raw.op.clone(),
        size,
        in_flight,
        asked: raw.in_flight.filter(|n| *n < raw.depth).map(|_| raw.depth),
        queues: raw.queues.max(1),
        ring: raw.entries.zip(raw.slots),
        rate,
        seconds: seconds.filter(|_| raw.ops_per_s == 0.0),
        curve: curve(raw, points),
        // What has no process of its own was not watched.
        cpu_ns: cpu_ns.filter(|ns| *ns > 0.0),
        rates,
        p50s: raw.p50s_ns.clone(),
        cpus: raw.cpus_ns_per_op.clone(),
        requests_per_file: raw.requests_per_file,
    }
}

fn curve(raw: &RawRow, points: &[f64]) -> Vec<(f64, f64)> {
    if !raw.curve_ns.is_empty() && raw.curve_ns.len() == points.len() {
        return points.iter().copied().zip(raw.curve_ns.iter().copied()).collect();
    }
    let few = [(50.0, raw.p50_ns), (99.0, raw.p99_ns), (99.9, raw.p999_ns), (100.0, raw.max_ns)];
    few.into_iter().filter(|(_, ns)| *ns > 0).map(|(p, ns)| (p, ns as f64)).collect()
}

fn series(raw: &RawRow) -> (String, Role, bool) {
    let named = raw.system.as_ref().or(raw.way.as_ref());
    if let Some(name) = named {
        let role = match name.as_str() {
            "ring" => Role::Ours,
            "native" | "in-process" | "floor" | "floor-fuse" => Role::Floor,
            _ => Role::Peer,
        };
        return (name.clone(), role, true);
    }
    if raw.transport == "direct" {
        return ("direct call".into(), Role::Floor, true);
    }
    let mut name = raw.transport.clone();
    let inside = raw.placement == "in-process";
    if inside {
        name += ", in-process";
    }
    if raw.policy != "auto" {
        name += &format!(", {}", raw.policy);
    }
    if raw.cpus == "one" {
        name += ", one core";
    }
    let usual = raw.policy == "auto" && raw.cpus != "one" && (!inside || raw.transport == "ring");
    let ours = raw.transport == "ring" && !inside && usual;
    let role = if ours { Role::Ours } else { Role::Peer };
    (name, role, usual)
}

fn load(raw: &RawRow) -> String {
    if raw.system.is_some() || raw.way.is_some() {
        return raw.op.clone();
    }
    let mut name = raw.op.to_uppercase();
    if raw.size > 0 {
        name += &format!(" {}", figures::bytes(raw.size));
    }
    if (raw.depth, raw.queues) != (1, 1) {
        name += &format!(" depth {}", raw.depth);
    }
    if raw.queues > 1 {
        name += &format!(" x {} queues", raw.queues);
    }
    name
}

impl Row {
    /// The latency at a percentile that was recorded, nanoseconds.
    pub fn at(&self, percentile: f64) -> Option<f64> {
        self.curve.iter().find(|(p, _)| *p == percentile).map(|(_, ns)| *ns)
    }

    /// How long one request takes, or how much comes through, or a job's seconds: what people look at first.
    pub fn shown(&self) -> Shown {
        if let Some(seconds) = self.seconds {
            return Shown { value: seconds, lower: true, text: figures::time(seconds * 1e9) };
        }
        match self.at(50.0) {
            _ if self.size >= 1 << 20 => {
                let bytes = self.rate * self.size as f64;
                Shown { value: bytes, lower: false, text: figures::bandwidth(bytes) }
            }
            Some(p50) if self.in_flight == 1 => Shown { value: p50, lower: true, text: figures::time(p50) },
            _ => Shown { value: self.rate, lower: false, text: figures::rate(self.rate) },
        }
    }

    /// For tables: that fewer were in flight than the load's name says.
    pub fn honest(&self) -> String {
        self.asked.map_or(String::new(), |_| format!("{} in flight", self.in_flight))
    }
}

/// One figure of a row.
#[derive(Clone, Debug)]
pub struct Shown {
    /// For bars.
    pub value: f64,
    /// Whether less is better.
    pub lower: bool,
    /// For people.
    pub text: String,
}

impl Shown {
    /// How many times as fast this is as `other`.
    pub fn times(&self, other: &Shown) -> Option<f64> {
        let ratio = if self.lower { other.value / self.value } else { self.value / other.value };
        (self.lower == other.lower && ratio.is_finite() && ratio > 0.0).then_some(ratio)
    }
}

impl Recorded {
    /// The loads, in the run's order.
    pub fn loads(&self) -> Vec<&str> {
        let mut found: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !found.contains(&row.load.as_str()) {
                found.push(&row.load);
            }
        }
        found
    }

    /// The rows of a load that belong among the first pictures.
    pub fn usual<'a>(&'a self, load: &'a str) -> impl Iterator<Item = &'a Row> {
        self.rows.iter().filter(move |r| r.load == load && r.usual)
    }

    /// Our row of a load.
    pub fn ours<'a>(&'a self, load: &'a str) -> Option<&'a Row> {
        self.usual(load).find(|r| r.role == Role::Ours)
    }
}
