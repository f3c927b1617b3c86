//! Every load takes its turns on every pair, round after round, so that a
//! noisy minute falls on all of them.

use crate::direct::Direct;
use crate::interrupt;
use crate::limits::{self, Limits};
use crate::plan::{Cpus, Load, Op, Pair, Plan, Via};
use crate::record::Row;
use crate::session::{Bench, Session};
use crate::workload::{self, Tally};
use indicatif::{ProgressBar, ProgressStyle};
use std::io;
use std::time::Duration;
use tunnelfs_ring::{allowed_cpus, set_affinity};

/// An opened pair.
pub enum Target {
    /// The server called as a function.
    Direct(Box<Direct>),
    /// A guest and its host.
    Session(Box<Session>),
}

/// A bar for `steps` steps of a long work.
///
/// # Errors
/// None that is expected: the template is fixed.
pub fn progress(steps: usize) -> io::Result<ProgressBar> {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {eta} left  {msg}").map_err(io::Error::other)?;
    Ok(ProgressBar::new(steps as u64).with_style(style))
}

/// Opens all pairs of a plan.
///
/// # Errors
/// The first that cannot be opened; names it.
pub fn open(plan: &Plan, bench: &Bench) -> io::Result<Vec<(Pair, Target)>> {
    let open = |(i, &pair): (usize, &Pair)| {
        let target = match pair.transport {
            Via::Direct => Direct::open(bench).map(|d| Target::Direct(Box::new(d))),
            _ => Session::open(bench, &pair, i).map(|s| Target::Session(Box::new(s))),
        };
        target.map(|t| (pair, t)).map_err(|e| io::Error::new(e.kind(), format!("{pair:?}: {e}")))
    };
    plan.pairs.iter().enumerate().map(open).collect()
}

impl Target {
    /// Whether the load makes sense here: one call at a time cannot use several queues.
    fn can(&self, load: Load) -> bool {
        match self {
            Target::Direct(_) => load.queues == 1 && (load.depth == 1 || matches!(load.op, Op::Read | Op::Write)),
            Target::Session(session) => load.queues as usize <= session.queues.len(),
        }
    }

    fn run(&mut self, load: Load, time: Duration, tally: &mut Tally) -> io::Result<()> {
        match self {
            Target::Direct(direct) => direct.run(load, time, tally),
            Target::Session(session) => workload::run(session, load, time, tally),
        }
    }
}

/// Runs a plan; one row for each case, and the machine's limits, measured between the loads.
///
/// # Errors
/// The first case that fails; names it.
pub fn measure(plan: &Plan, targets: &mut [(Pair, Target)]) -> io::Result<(Vec<Row>, Limits)> {
    let bar = progress(plan.rounds * plan.loads.len() * targets.len())?;
    let all = allowed_cpus();
    let (mut rows, mut limits) = (Vec::new(), Vec::new());
    for &load in &plan.loads {
        set_affinity(&all).map_err(io::Error::other)?;
        limits.push(limits::measure());
        let mut tallies: Vec<Tally> = targets.iter().map(|_| Tally::default()).collect();
        for _ in 0..plan.rounds {
            for ((pair, target), tally) in targets.iter_mut().zip(&mut tallies) {
                bar.inc(1);
                interrupt::check()?;
                if !target.can(load) {
                    continue;
                }
                bar.set_message(format!("{:?} {} {:?} {}", load.op, load.size, pair.transport, pair.policy));
                set_affinity(if pair.cpus == Cpus::One { &all[..1] } else { &all }).map_err(io::Error::other)?;
                let case = |e: io::Error| io::Error::new(e.kind(), format!("{pair:?} {load:?}: {e}"));
                target.run(load, plan.turn / 5, &mut Tally::default()).map_err(case)?;
                target.run(load, plan.turn, tally).map_err(case)?;
            }
        }
        let measured = targets.iter().zip(&tallies).filter(|(_, tally)| tally.ops > 0);
        rows.extend(measured.map(|((pair, _), tally)| Row::new(*pair, load, tally)));
    }
    set_affinity(&all).map_err(io::Error::other)?;
    bar.finish_and_clear();
    let limits = Limits::median(&limits).ok_or_else(|| io::Error::other("nothing to measure"))?;
    Ok((rows, limits))
}
