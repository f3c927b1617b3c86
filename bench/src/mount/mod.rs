//! Jobs on mounted file systems: the same directory natively, through our
//! mounts and through others', round after round in one run.

mod fio;
mod jobs;
mod metadata;
mod own;
mod ratios;
mod record;
mod report;
mod systems;

pub use record::{MountRun, Row};
pub use report::page;
pub use systems::Peer;

use crate::interrupt;
use crate::limits::{self, Limits};
use crate::measure::progress;
use crate::record::Origin;
use jobs::{Job, Tool};
use record::Sum;
use std::io;
use std::path::Path;
use std::time::Duration;
use systems::{System, Systems};
use tunnelfs_settings::{Cache, Settings};

/// What is to be compared, and how long.
#[derive(Clone, Debug)]
pub struct MountPlan {
    /// Rounds of all jobs on all systems.
    pub rounds: usize,
    /// Length of a timed job.
    pub runtime: Duration,
    /// Bytes of each file.
    pub file_bytes: u64,
    /// Files of the metadata jobs.
    pub files: usize,
    /// Jobs by name; none: all.
    pub jobs: Vec<String>,
    /// Systems by name; none: all.
    pub systems: Vec<String>,
    /// Other FUSE programs.
    pub peers: Vec<Peer>,
}

impl MountPlan {
    /// The planned run; `quick` takes about a minute and a half.
    pub fn new(quick: bool) -> Self {
        let (rounds, runtime_ms, files) = if quick { (1, 400, 1000) } else { (5, 1000, 10_000) };
        MountPlan {
            rounds,
            runtime: Duration::from_millis(runtime_ms),
            file_bytes: 256 << 20,
            files,
            jobs: Vec::new(),
            systems: Vec::new(),
            peers: Vec::new(),
        }
    }

    fn wants(list: &[String], name: &str) -> bool {
        list.is_empty() || list.iter().any(|n| n == name)
    }
}

/// Runs the plan in `scratch`, an empty directory of the file system under test.
///
/// # Errors
/// The first system that cannot be mounted or job that fails; names it. Nothing stays mounted.
pub fn run(plan: &MountPlan, scratch: &Path, settings: &Settings) -> io::Result<MountRun> {
    let tool = Tool::find();
    let mut phases = Vec::new();
    for cache in [Cache::Never, Cache::Auto] {
        let jobs: Vec<Job> = jobs::all(cache).into_iter().filter(|j| MountPlan::wants(&plan.jobs, j.name)).collect();
        if !jobs.is_empty() {
            phases.push((cache, jobs));
        }
    }
    if phases.is_empty() {
        let names =
            [Cache::Never, Cache::Auto].map(|c| jobs::all(c).iter().map(|j| j.name).collect::<Vec<_>>().join(", "));
        return Err(io::Error::other(format!("--rw: no such job; there are {}", names.join(", "))));
    }
    let (mut rows, mut limits) = (Vec::new(), Vec::new());
    for (cache, jobs) in phases {
        let dir = scratch.join(format!("{cache:?}").to_lowercase());
        let mut systems = Systems::start(plan, &dir, cache, settings)?;
        limits.push(limits::measure());
        rows.extend(phase(plan, &mut systems, &jobs, &tool)?);
        systems.stop()?;
    }
    let limits = Limits::median(&limits).ok_or_else(|| io::Error::other("nothing to measure"))?;
    Ok(MountRun { origin: Origin::here(), tool: tool.describe(), config: settings.clone(), limits, rows })
}

fn phase(plan: &MountPlan, systems: &mut Systems, jobs: &[Job], tool: &Tool) -> io::Result<Vec<Row>> {
    let turns: usize = jobs.iter().map(|job| plan.rounds * job.turns()).sum();
    let bar = progress(turns * systems.list.len())?;
    let mut rows = Vec::new();
    for job in jobs {
        let mut sums: Vec<Sum> = Vec::new();
        for _ in 0..plan.rounds * job.turns() {
            for system in &systems.list {
                bar.set_message(format!("{} on {}", job.name, system.name));
                bar.inc(1);
                interrupt::check()?;
                let told = |e: io::Error| io::Error::new(e.kind(), format!("{} on {}: {e}", job.name, system.name));
                one(job, system, plan, tool, &mut sums).map_err(told)?;
            }
        }
        rows.extend(sums.into_iter().map(Sum::row));
    }
    bar.finish_and_clear();
    Ok(rows)
}

/// One job's turn on one system; a job may come to several rows (create, stat, ...).
fn one(job: &Job, system: &System, plan: &MountPlan, tool: &Tool, sums: &mut Vec<Sum>) -> io::Result<()> {
    for (op, turn) in job.run(tool, &system.dir, plan, &|| system.cpu())? {
        match sums.iter_mut().find(|s| s.is(&op, system)) {
            Some(sum) => sum.add(&turn),
            None => sums.push(Sum::new(op, job, system, &turn)),
        }
    }
    Ok(())
}
