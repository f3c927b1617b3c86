//! Programs on trees of small files: the same tree natively, through our mounts with each cache mode and through
//! others', round after round in one run; with what the kernel asked for each file.

mod jobs;
mod made;
mod plan;
mod ratios;
mod record;
mod report;
mod session;
mod source;

pub use plan::TreePlan;
pub use record::{Row, TreeRun};
pub use report::page;

use crate::interrupt;
use crate::limits::{self, Limits};
use crate::mount::systems::Setup;
use crate::mount::MountPlan;
use crate::progress::progress;
use crate::record::Origin;
use crate::session::virtiofsd;
use jobs::{Trees, GROUPS};
use record::Sums;
use session::{Kind, Served, Session};
use std::io;
use std::path::Path;
use tunnelfs_settings::{Cache, Settings};

/// Words for cache modes; those that this version does not have are left out.
const CACHES: [&str; 5] = ["never", "metadata", "auto", "always", "coherent"];

fn cache_of(word: &str) -> Option<Cache> {
    serde_json::from_value(word.into()).ok()
}

fn word_of(cache: Cache) -> String {
    format!("{cache:?}").to_lowercase()
}

/// Runs the plan in `scratch`, an empty directory of the file system under test.
///
/// # Errors
/// The first system of ours that fails; names it. Nothing stays mounted.
pub fn run(plan: &TreePlan, scratch: &Path, settings: &Settings) -> io::Result<TreeRun> {
    let groups: Vec<_> = GROUPS
        .iter()
        .filter(|(name, jobs)| {
            plan.jobs.is_empty() || plan.jobs.iter().any(|j| j == name || jobs.contains(&j.as_str()))
        })
        .map(|(name, _)| *name)
        .collect();
    if groups.is_empty() {
        let names = GROUPS.map(|(name, jobs)| format!("{name} ({})", jobs.join(", ")));
        return Err(io::Error::other(format!("--rw: no such job; there are {}", names.join("; "))));
    }
    let systems = systems(plan, settings);
    let trees = Trees::make(plan, scratch)?;
    let (mut sums, mut limits) = (Sums::default(), Vec::new());
    let bar = progress(groups.len() * plan.rounds * systems.len())?;
    for _ in 0..plan.rounds {
        limits.push(limits::measure());
        for group in &groups {
            for served in &systems {
                interrupt::check()?;
                bar.set_message(format!("{group} on {}", served.name));
                bar.inc(1);
                match one(&trees, group, served, scratch, settings) {
                    Ok(done) => sums.add(served, done),
                    // Others' limits are part of the comparison.
                    Err(e) if served.is_foreign() && e.kind() != io::ErrorKind::Interrupted => {
                        bar.suspend(|| eprintln!("{group} on {} is left out: {e}", served.name));
                    }
                    Err(e) => return Err(io::Error::new(e.kind(), format!("{group} on {}: {e}", served.name))),
                }
            }
        }
    }
    bar.finish_and_clear();
    let limits = Limits::median(&limits).ok_or_else(|| io::Error::other("nothing to measure"))?;
    let rows = sums.rows(|op| plan.jobs.is_empty() || wanted(plan, op));
    Ok(TreeRun { origin: Origin::here("tree"), trees: trees.describe(), config: settings.clone(), limits, rows })
}

/// Whether a job is asked for by its name or its group's.
fn wanted(plan: &TreePlan, op: &str) -> bool {
    plan.jobs.iter().any(|j| j == op || GROUPS.iter().any(|(group, jobs)| j == group && jobs.contains(&op)))
}

fn one(
    trees: &Trees,
    group: &str,
    served: &Served,
    scratch: &Path,
    settings: &Settings,
) -> io::Result<Vec<session::Done>> {
    let cache = cache_of(&served.cache).unwrap_or(settings.host.cache);
    let source = scratch.join("source");
    let setup = Setup { source, scratch: scratch.into(), cache, settings, file_bytes: 0, count: true };
    let mut session = Session::start(&setup, served)?;
    trees.run(group, &mut session)?;
    session.finish()
}

impl Served {
    fn is_foreign(&self) -> bool {
        matches!(self.kind, Kind::Peer(_) | Kind::Own("virtiofsd"))
    }
}

/// `ring` has the settings' cache mode; the other modes are named after it.
fn systems(plan: &TreePlan, settings: &Settings) -> Vec<Served> {
    let own =
        |name: &str, kind: &'static str, cache: String| Served { name: name.into(), kind: Kind::Own(kind), cache };
    let default = word_of(settings.host.cache);
    let mut all = vec![own("native", "native", String::new()), own("ring", "ring", default.clone())];
    for word in CACHES.into_iter().filter(|word| *word != default && cache_of(word).is_some()) {
        all.push(own(&format!("ring-{word}"), "ring", word.into()));
    }
    if virtiofsd().is_some() {
        all.push(own("virtiofsd", "virtiofsd", "auto".into()));
    } else {
        eprintln!("virtiofsd is left out: `make deps` installs stock virtiofsd");
    }
    all.retain(|served| MountPlan::wants(&plan.systems, &served.name));
    all.extend(plan.peers.iter().map(|peer| Served {
        name: peer.name.clone(),
        kind: Kind::Peer(peer.clone()),
        cache: String::new(),
    }));
    all
}
