//! A run on trees as data: the same form as the other benchmarks'.

use super::session::{Done, Served};
use crate::limits::Limits;
use crate::record::Origin;
use serde::Serialize;
use std::collections::BTreeMap;
use tunnelfs_settings::Settings;

/// A whole run.
#[derive(Debug, Serialize)]
pub struct TreeRun {
    /// Where and how it was made.
    #[serde(flatten)]
    pub origin: Origin,
    /// What the trees have.
    pub trees: String,
    /// The settings in force, but for what each row has itself.
    pub config: Settings,
    /// The machine's limits in this run.
    pub limits: Limits,
    /// One row per job and system.
    pub rows: Vec<Row>,
}

/// One job on one system.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The system's name.
    pub system: String,
    /// What the kernel may keep; empty where it is not ours to say.
    pub cache: String,
    /// The job.
    pub op: String,
    /// Files of its tree.
    pub files: usize,
    /// The median of the rounds.
    pub seconds: f64,
    /// Each round's.
    pub all_seconds: Vec<f64>,
    /// Requests for each file, all and by opcode (medians), where they are counted.
    pub requests_per_file: Option<f64>,
    /// As above.
    pub opcodes_per_file: BTreeMap<String, f64>,
    /// CPU time of the file system's processes for the whole job (medians).
    pub guest_cpu_ns_per_op: f64,
    /// As above.
    pub host_cpu_ns_per_op: f64,
}

/// The outcomes of all rounds.
#[derive(Default)]
pub struct Sums(Vec<(Served, Vec<Done>)>);

impl Sums {
    /// One more turn of a group of jobs.
    pub fn add(&mut self, served: &Served, done: Vec<Done>) {
        for one in done {
            match self.0.iter_mut().find(|(s, all)| s.name == served.name && all[0].op == one.op) {
                Some((_, all)) => all.push(one),
                None => self.0.push((served.clone(), vec![one])),
            }
        }
    }

    /// The rows of the jobs that are wanted.
    pub fn rows(self, wanted: impl Fn(&str) -> bool) -> Vec<Row> {
        self.0.into_iter().filter(|(_, all)| wanted(all[0].op)).map(|(served, all)| row(served, &all)).collect()
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn row(served: Served, all: &[Done]) -> Row {
    let files = all[0].files;
    let cpu = |side: usize| median(all.iter().map(|d| d.cpu[side].as_nanos() as f64).collect());
    let all_seconds: Vec<f64> = all.iter().map(|d| d.seconds).collect();
    let counted: Vec<_> = all.iter().filter_map(|d| d.requests.as_ref()).collect();
    let per_file = |count: u64| count as f64 / files.max(1) as f64;
    let names: std::collections::BTreeSet<_> = counted.iter().flat_map(|c| c.keys()).collect();
    let of = |name: &String| median(counted.iter().map(|c| per_file(c.get(name).copied().unwrap_or(0))).collect());
    Row {
        system: served.name,
        cache: served.cache,
        op: all[0].op.into(),
        files,
        seconds: median(all_seconds.clone()),
        all_seconds,
        requests_per_file: (!counted.is_empty())
            .then(|| median(counted.iter().map(|c| per_file(c.values().sum())).collect())),
        opcodes_per_file: names.into_iter().map(|name| (name.clone(), of(name))).collect(),
        guest_cpu_ns_per_op: cpu(0),
        host_cpu_ns_per_op: cpu(1),
    }
}
