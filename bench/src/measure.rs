//! Every load takes its turns on every pair, round after round, so that a noisy minute falls on all of them.

use crate::interrupt;
use crate::limits::{self, Limits};
use crate::plan::{Cpus, Pair, Plan};
use crate::progress::progress;
use crate::record::Row;
use crate::target::Target;
use crate::workload::Sample;
use std::io;
use tunnelfs_ring::{allowed_cpus, set_affinity};

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
        let mut samples: Vec<Sample> = targets.iter().map(|_| Sample::default()).collect();
        for _ in 0..plan.rounds {
            for ((pair, target), sample) in targets.iter_mut().zip(&mut samples) {
                bar.inc(1);
                interrupt::check()?;
                if !target.can(load) {
                    continue;
                }
                bar.set_message(format!("{:?} {} {:?} {}", load.op, load.size, pair.transport, pair.policy));
                set_affinity(if pair.cpus == Cpus::One { &all[..1] } else { &all }).map_err(io::Error::other)?;
                let case = |e: io::Error| io::Error::new(e.kind(), format!("{pair:?} {load:?}: {e}"));
                target.run(load, plan.turn / 5, &mut Sample::default()).map_err(case)?;
                target.run(load, plan.turn, sample).map_err(case)?;
            }
        }
        let measured = targets.iter().zip(&samples).filter(|(_, sample)| sample.ops > 0);
        rows.extend(measured.map(|((pair, _), sample)| Row::new(*pair, load, sample)));
    }
    set_affinity(&all).map_err(io::Error::other)?;
    bar.finish_and_clear();
    let limits = Limits::median(&limits).ok_or_else(|| io::Error::other("nothing to measure"))?;
    Ok((rows, limits))
}
