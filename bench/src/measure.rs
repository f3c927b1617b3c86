//! Every load takes its turns on every pair, round after round, so that a noisy minute falls on all of them.

use crate::interrupt;
use crate::limits::{self, Limits};
use crate::plan::{Cpus, Plan};
use crate::progress::progress;
use crate::record::Row;
use crate::target::Case;
use crate::workload::Sample;
use std::io;
use tunnelfs_ring::{allowed_cpus, set_affinity};

/// Runs a plan; one row for each case, and the machine's limits, measured between the loads.
///
/// # Errors
/// The first case that fails; names it.
pub fn measure(plan: &Plan, cases: &mut [Case]) -> io::Result<(Vec<Row>, Limits)> {
    let bar = progress(plan.rounds * plan.loads.len() * cases.len())?;
    let all = allowed_cpus();
    let (mut rows, mut limits) = (Vec::new(), Vec::new());
    for &load in &plan.loads {
        set_affinity(&all).map_err(io::Error::other)?;
        limits.push(limits::measure());
        let mut samples: Vec<Sample> = cases.iter().map(|_| Sample::default()).collect();
        for _ in 0..plan.rounds {
            for (case, sample) in cases.iter_mut().zip(&mut samples) {
                bar.inc(1);
                interrupt::check()?;
                if !case.can(load) {
                    continue;
                }
                let (pair, target) = (case.pair, &mut case.target);
                bar.set_message(format!("{:?} {} {:?} {}", load.op, load.size, pair.transport, pair.policy));
                set_affinity(if pair.cpus == Cpus::One { &all[..1] } else { &all }).map_err(io::Error::other)?;
                let told = |e: io::Error| io::Error::new(e.kind(), format!("{pair:?} {load:?}: {e}"));
                target.run(load, plan.turn / 5, &mut Sample::default()).map_err(told)?;
                let mut turn = Sample::default();
                target.run(load, plan.turn, &mut turn).map_err(told)?;
                if turn.ops > 0 {
                    sample.add(&turn)?;
                }
            }
        }
        let measured = cases.iter().zip(&samples).filter(|(_, sample)| sample.ops > 0);
        rows.extend(measured.map(|(case, sample)| Row::new(case.pair, &case.settings, load, sample)));
    }
    set_affinity(&all).map_err(io::Error::other)?;
    bar.finish_and_clear();
    let limits = Limits::median(&limits).ok_or_else(|| io::Error::other("nothing to measure"))?;
    Ok((rows, limits))
}
