//! What loads run on: the host's server called as a function, or a guest with its host.

use crate::direct::Direct;
use crate::plan::{Load, Op, Pair, Plan, TransportKind};
use crate::session::{Bench, Session};
use crate::workload::{self, Sample};
use std::io;
use std::time::Duration;

/// An opened pair.
pub enum Target {
    /// The server called as a function.
    Direct(Box<Direct>),
    /// A guest and its host.
    Session(Box<Session>),
}

/// Opens all pairs of a plan.
///
/// # Errors
/// The first that cannot be opened; names it.
pub fn open(plan: &Plan, bench: &Bench) -> io::Result<Vec<(Pair, Target)>> {
    let open = |(i, &pair): (usize, &Pair)| {
        let target = match pair.transport {
            TransportKind::Direct => Direct::open(bench).map(|d| Target::Direct(Box::new(d))),
            _ => Session::open(bench, &pair, i).map(|s| Target::Session(Box::new(s))),
        };
        target.map(|t| (pair, t)).map_err(|e| io::Error::new(e.kind(), format!("{pair:?}: {e}")))
    };
    // A thread that calls the server has /proc/self/fd as its working directory from then on.
    let here = std::env::current_dir()?;
    let opened = plan.pairs.iter().enumerate().map(|pair| {
        let opened = open(pair);
        std::env::set_current_dir(&here)?;
        opened
    });
    opened.collect()
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
            Target::Direct(direct) => direct.run(load, time, sample),
            Target::Session(session) => workload::run(session, load, time, sample),
        }
    }
}
