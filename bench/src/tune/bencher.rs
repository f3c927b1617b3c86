//! Measures points: each is a guest and a host with its settings, and all take their turns at every load.

use super::goal::{Figures, Goal};
use super::mix::{Mix, Part};
use super::search::{Measure, Point};
use super::space::Space;
use crate::interrupt;
use crate::plan::{Cpus, HostLocation, Load, Pair, TransportKind};
use crate::session::{Bench, Session};
use crate::workload::{self, Sample};
use indicatif::ProgressBar;
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tunnelfs_ring::allowed_cpus;

/// Guests with hosts that are kept open at a time.
const OPEN: usize = 48;
/// The shortest turn of a load.
const SHORTEST: Duration = Duration::from_millis(8);

/// Of each point and load, the rounds' figures.
pub type Turns = BTreeMap<Point, Vec<Vec<(usize, Figures)>>>;

/// How long all may take, and one turn of all loads on one point.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// All.
    pub total: Duration,
    /// One turn.
    pub turn: Duration,
}

/// What measures.
pub struct Bencher<'a> {
    pub(super) space: &'a Space,
    mix: &'a Mix,
    goal: Goal,
    bench: (PathBuf, PathBuf),
    budget: Budget,
    start: Instant,
    open: BTreeMap<Point, Session>,
    opened: usize,
    round: usize,
    /// Each turn's figures, of each point and load, with the number of its round.
    pub figures: Turns,
    bar: ProgressBar,
}

impl<'a> Bencher<'a> {
    /// Over the files in `dir`, with sockets in `scratch`.
    ///
    /// # Errors
    /// None that is expected: the progress bar's template is fixed.
    pub fn new(
        space: &'a Space,
        mix: &'a Mix,
        goal: Goal,
        (dir, scratch): (PathBuf, PathBuf),
        budget: Budget,
    ) -> io::Result<Bencher<'a>> {
        let bar = crate::progress::timed(budget.total)?;
        Ok(Bencher {
            space,
            mix,
            goal,
            bench: (dir, scratch),
            budget,
            start: Instant::now(),
            open: BTreeMap::new(),
            opened: 0,
            round: 0,
            figures: BTreeMap::new(),
            bar,
        })
    }

    /// Nothing more will be measured.
    pub fn finish(&mut self) {
        self.open.clear();
        self.bar.finish_and_clear();
    }

    fn open(&mut self, points: &[Point]) -> io::Result<()> {
        if self.open.len() + points.len() > OPEN {
            self.open.retain(|point, _| points.contains(point));
        }
        for point in points {
            if self.open.contains_key(point) {
                continue;
            }
            let settings = self.space.settings(point);
            // As in a mount: a queue's thread stays on its CPU, also where the host finds its own place.
            let pinned = allowed_cpus();
            let policy = settings.wait.policy;
            let pair =
                Pair { transport: TransportKind::Ring, placement: HostLocation::Separate, policy, cpus: Cpus::All };
            let (dir, scratch) = self.bench.clone();
            self.opened += 1;
            let told = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", self.space.words(point)));
            let mut session = Session::open(&Bench { dir, scratch, settings }, &pair, self.opened).map_err(told)?;
            session.pinned = pinned;
            self.open.insert(point.clone(), session);
        }
        Ok(())
    }

    /// One turn of one load.
    fn turn(&mut self, point: &Point, part: &Part) -> io::Result<Figures> {
        let time = self.budget.turn.mul_f64(part.share / self.mix.shares()).max(SHORTEST);
        let session = self.open.get_mut(point).ok_or_else(|| io::Error::other("a point that is not open"))?;
        let queues = part.threads.min(session.queues.len() as u32).max(1);
        let load = Load { op: part.op, size: part.size, depth: (part.depth / queues).max(1), queues };
        let pause = Duration::from_micros(part.pause_us.into());
        workload::run_paused(session, load, pause, time / 4, &mut Sample::default())?;
        let mut sample = Sample::default();
        workload::run_paused(session, load, pause, time, &mut sample)?;
        let at = |q| sample.latency.value_at_quantile(q) as f64;
        let cpu = (sample.guest_cpu + sample.host_cpu).as_nanos() as f64 / sample.ops.max(1) as f64;
        Ok(Figures { p50: at(0.5), p99: at(0.99), rate: sample.rate(), cpu })
    }
}

impl Measure for Bencher<'_> {
    fn canonical(&self, point: &Point) -> Option<Point> {
        self.space.canonical(point)
    }

    fn round(&mut self, points: &[Point]) -> io::Result<Vec<f64>> {
        // More than may be open go in parts, each beside the first point: the defaults.
        if points.len() > OPEN {
            let (now, later) = points.split_at(OPEN);
            let mut costs = self.round(now)?;
            let mut rest = vec![points[0].clone()];
            rest.extend_from_slice(later);
            let later = self.round(&rest)?;
            // As they would have cost beside the first ones.
            let scale = costs[0] / later[0];
            costs.extend(later[1..].iter().map(|cost| cost * scale));
            return Ok(costs);
        }
        self.open(points)?;
        self.round += 1;
        let mut costs = vec![0.0; points.len()];
        for (number, part) in self.mix.parts.iter().enumerate() {
            for i in 0..points.len() {
                // Each round begins with another one: none is always the one after a pause.
                let i = (i + self.round) % points.len();
                interrupt::check()?;
                self.bar.set_position(self.start.elapsed().as_millis() as u64);
                let figures = self.turn(&points[i], part)?;
                costs[i] += self.goal.log_cost(&figures) * part.share / self.mix.shares();
                let of = self.figures.entry(points[i].clone()).or_default();
                of.resize(self.mix.parts.len(), Vec::new());
                of[number].push((self.round, figures));
            }
        }
        Ok(costs.into_iter().map(f64::exp).collect())
    }

    fn left(&self) -> f64 {
        1.0 - self.start.elapsed().as_secs_f64() / self.budget.total.as_secs_f64()
    }

    fn says(&mut self, what: &str) {
        self.bar.set_message(what.to_owned());
    }
}
