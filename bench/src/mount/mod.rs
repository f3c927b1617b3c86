//! Jobs on mounted file systems: the same directory natively, through our
//! mounts and through others', round after round in one run.

mod builtin;
mod fio;
mod floor;
mod jobs;
mod metadata;
mod patience;
mod plan;
mod ratios;
mod record;
mod report;
pub(crate) mod requests;
pub(crate) mod systems;
pub(crate) mod turn;

pub use plan::{MountPlan, Peer};
pub use record::{MountRun, Row};
pub use report::page;

use crate::interrupt;
use crate::limits::{self, Limits};
use crate::progress::progress;
use crate::record::Origin;
use jobs::{Job, Tool};
use record::Sum;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use systems::{System, Systems};
use tunnelfs_settings::{Cache, Settings};

/// Runs the plan in `scratch`, an empty directory of the file system under test.
///
/// # Errors
/// The first system that cannot be mounted or job that fails; names it. Nothing stays mounted.
pub fn run(plan: &MountPlan, scratch: &Path, settings: &Settings) -> io::Result<MountRun> {
    let tool = Tool::find();
    // One job is an ordinary user's.
    fs::set_permissions(scratch, Permissions::from_mode(0o711))?;
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
    Ok(MountRun { origin: Origin::here("mount"), tool: tool.describe(), config: settings.clone(), limits, rows })
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
