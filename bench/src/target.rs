//! What loads run on: the host's server called as a function, or a guest with its host.

use crate::direct::Direct;
use crate::plan::{Load, Op, Pair, Plan, TransportKind};
use crate::session::{Bench, Session};
use crate::workload::{self, Sample};
use std::io;
use std::time::Duration;
use tunnelfs_settings::Settings;

/// An opened pair.
pub enum Target {
    /// The server called as a function.
    Direct(Box<Direct>),
    /// A guest and its host.
    Session(Box<Session>),
}

/// An opened pair, and the settings that it was opened with.
pub struct Case {
    /// Guest and host.
    pub pair: Pair,
    /// Sizes and budgets.
    pub settings: Settings,
    /// What loads run on.
    pub target: Target,
}

/// Opens all pairs of a plan with each of the settings; the direct call, which has none, once.
///
/// # Errors
/// The first that cannot be opened; names it.
pub fn open(plan: &Plan, benches: &[Bench]) -> io::Result<Vec<Case>> {
    let mut cases = Vec::new();
    for (number, bench) in benches.iter().enumerate() {
        for &pair in &plan.pairs {
            let target = match pair.transport {
                TransportKind::Direct if number > 0 => continue,
                TransportKind::Direct => aside(|| Direct::open(bench)).map(|d| Target::Direct(Box::new(d))),
                _ => Session::open(bench, &pair, cases.len()).map(|s| Target::Session(Box::new(s))),
            };
            let target = target.map_err(|e| io::Error::new(e.kind(), format!("{pair:?}: {e}")))?;
            cases.push(Case { pair, settings: bench.settings.clone(), target });
        }
    }
    Ok(cases)
}

impl Case {
    /// Whether the load makes sense here: its payload must fit a slot, too.
    pub fn can(&self, load: Load) -> bool {
        load.size <= self.settings.transport.slot_size && self.target.can(load)
    }
}

/// Calls `work` on a thread of its own: a thread that calls the server gets another working directory and umask.
pub fn aside<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

impl Target {
    /// Whether the load makes sense here: one call at a time cannot use several queues.
    pub fn can(&self, load: Load) -> bool {
        match self {
            Target::Direct(_) => load.queues == 1 && (load.depth == 1 || matches!(load.op, Op::Read | Op::Write)),
            Target::Session(session) => load.queues as usize <= session.queues.len(),
        }
    }

    /// Runs the load for a time, and adds what came of it to `sample`.
    ///
    /// # Errors
    /// The load's.
    pub fn run(&mut self, load: Load, time: Duration, sample: &mut Sample) -> io::Result<()> {
        match self {
            Target::Direct(direct) => aside(|| direct.run(load, time, sample)),
            Target::Session(session) => workload::run(session, load, time, sample),
        }
    }
}
