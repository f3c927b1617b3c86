//! The search for the best settings: coarse at first, then round the best, then against the defaults.
//!
//! It knows nothing of rings: a point is one value for each parameter, and whatever measures points gives each a cost.
//! All points of a round are measured beside each other, with the defaults among them, and only ratios to those count:
//! what makes a machine slow for a while makes all of them slow.

use crate::intervals::{log_mean, paired, reach, Interval};
use std::io;

/// One thing that can be set.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Its key in `tunnelfs.toml`, or a word.
    pub name: &'static str,
    /// Its values in their order: neighbours are alike.
    pub values: Vec<String>,
    /// Which one is the default.
    pub default: usize,
}

/// An index into each parameter's values.
pub type Point = Vec<usize>;

/// Measures points.
pub trait Measure {
    /// The point that means the same, if this one can be at all: a budget of a policy that is not used does not matter.
    fn canonical(&self, point: &Point) -> Option<Point>;

    /// The cost of each point, above zero, all measured by turns; of all of them, or it is an error.
    ///
    /// # Errors
    /// What went wrong.
    fn round(&mut self, points: &[Point]) -> io::Result<Vec<f64>>;

    /// What part of the time is left, from 1 down to 0.
    fn left(&self) -> f64;

    /// What is being done, for whoever waits.
    fn says(&mut self, _what: &str) {}
}

/// A point, and each round's cost of it as a ratio to the defaults' in the same round.
#[derive(Clone, Debug)]
pub struct Tried {
    /// The point.
    pub point: Point,
    /// In the order of the rounds.
    pub ratios: Vec<f64>,
    /// The same rounds' numbers, so that two points can be compared by the rounds that they shared.
    rounds: Vec<usize>,
}

impl Tried {
    /// The cost as a ratio to the defaults'.
    pub fn middle(&self) -> f64 {
        log_mean(&self.ratios).map_or(self.ratios.first().copied().unwrap_or(f64::INFINITY), |(mean, _)| mean.exp())
    }

    /// The same with its interval.
    pub fn interval(&self) -> Option<Interval> {
        paired(&self.ratios, &vec![1.0; self.ratios.len()], CONFIDENCE)
    }

    /// The cost beside that of `other`, in the rounds that both have.
    fn beside(&self, other: &Tried, confidence: f64) -> Option<Interval> {
        let ratio = |round: &usize| {
            let at = |tried: &Tried| tried.rounds.iter().position(|r| r == round).map(|i| tried.ratios[i]);
            at(self).zip(at(other))
        };
        let (new, old): (Vec<f64>, Vec<f64>) = self.rounds.iter().filter_map(ratio).unzip();
        paired(&new, &old, confidence)
    }
}

/// What has come of a search.
#[derive(Clone, Debug)]
pub struct Found {
    /// The best point: the defaults where nothing is better beyond doubt.
    pub best: Point,
    /// Its cost as a ratio to the defaults', measured anew at the end; `None` for the defaults themselves.
    pub interval: Option<Interval>,
    /// Whether the search has ended because more tries cannot matter, and not because the time was over.
    pub settled: bool,
    /// All that was tried.
    pub tried: Vec<Tried>,
}

/// Of one interval.
const CONFIDENCE: f64 = 0.95;
/// What is nearer to the best than this does not matter.
const MATTERS: f64 = 0.01;
/// Rounds of a point beside its neighbours, at the least before it may win and at the most.
const ROUNDS: (usize, usize) = (4, 12);
/// Rounds of one that looks better, but not beyond doubt.
const MOST_ROUNDS: usize = 36;
/// Rounds of the best beside the defaults, at the least and at the most.
const LAST: (usize, usize) = (8, 24);
/// Points that get to the refinement.
const FINALISTS: usize = 3;
/// What part of the time is kept for the last comparison.
const RESERVE: f64 = 0.15;

/// A search under way.
struct Search<'a, M> {
    parameters: &'a [Parameter],
    by: &'a mut M,
    tried: Vec<Tried>,
    round: usize,
}

/// Finds the best point; `extra` is how many points at random the coarse sweep has beside those with one change.
///
/// # Errors
/// The measuring's.
pub fn search<M: Measure>(parameters: &[Parameter], by: &mut M, extra: usize) -> io::Result<Found> {
    let mut search = Search { parameters, by, tried: Vec::new(), round: 0 };
    let default = search.defaults();
    let finalists = search.coarse(extra)?;
    let (best, settled) = search.refine(finalists)?;
    let interval = if best == default { None } else { search.last(&best)? };
    let better = interval.is_some_and(|i| i.below(1.0));
    let (best, interval) = if better { (best, interval) } else { (default, None) };
    Ok(Found { best, interval, settled, tried: search.tried })
}

impl<M: Measure> Search<'_, M> {
    fn defaults(&self) -> Point {
        let point = self.parameters.iter().map(|p| p.default).collect();
        self.by.canonical(&point).unwrap_or(point)
    }

    /// One round of these points and the defaults.
    fn measure(&mut self, points: &[Point]) -> io::Result<()> {
        let mut all = vec![self.defaults()];
        all.extend(points.iter().filter(|p| **p != all[0]).cloned().collect::<Vec<_>>());
        let costs = self.by.round(&all)?;
        self.round += 1;
        for (point, cost) in all.iter().zip(&costs) {
            let ratio = cost / costs[0];
            let known = self.tried.iter_mut().find(|t| t.point == *point);
            match known {
                Some(tried) => {
                    tried.ratios.push(ratio);
                    tried.rounds.push(self.round);
                }
                None => {
                    let (ratios, rounds) = (vec![ratio], vec![self.round]);
                    self.tried.push(Tried { point: point.clone(), ratios, rounds });
                }
            }
        }
        Ok(())
    }

    fn tried(&self, point: &Point) -> Option<&Tried> {
        self.tried.iter().find(|t| t.point == *point)
    }

    fn middle(&self, point: &Point) -> f64 {
        self.tried(point).map_or(f64::INFINITY, Tried::middle)
    }

    fn sort(&self, points: &mut [Point]) {
        points.sort_by(|a, b| self.middle(a).total_cmp(&self.middle(b)));
    }

    /// The points of the sweep: each parameter at each value with all else at its default, and some at random.
    fn sweep(&self, extra: usize) -> Vec<Point> {
        let default = self.defaults();
        let mut points = vec![default.clone()];
        let add = |points: &mut Vec<Point>, point: Point| match self.by.canonical(&point) {
            Some(point) if !points.contains(&point) => points.push(point),
            _ => {}
        };
        for (i, parameter) in self.parameters.iter().enumerate() {
            for value in 0..parameter.values.len() {
                let mut point = default.clone();
                point[i] = value;
                add(&mut points, point);
            }
        }
        // Always the same ones: a search that is made again tries the same.
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..extra {
            let draw = |parameter: &Parameter| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (random >> 33) as usize % parameter.values.len()
            };
            let point = self.parameters.iter().map(draw).collect();
            add(&mut points, point);
        }
        points
    }

    /// Successive halving: the better half goes on, with twice the rounds.
    fn coarse(&mut self, extra: usize) -> io::Result<Vec<Point>> {
        let mut points = self.sweep(extra);
        // What each parameter's best value alone comes to is a point that halving may not have.
        let mut combined = false;
        let mut rounds = 2;
        while points.len() > FINALISTS && self.by.left() > 0.5 {
            self.by.says(&format!("coarse: {} settings", points.len()));
            for _ in 0..rounds {
                self.measure(&points)?;
            }
            self.sort(&mut points);
            points.truncate((points.len() / 2).max(FINALISTS));
            if !combined {
                combined = true;
                let point = self.best_of_each();
                if let Some(point) = self.by.canonical(&point).filter(|p| !points.contains(p)) {
                    points.push(point);
                }
            }
            rounds = (rounds * 2).min(ROUNDS.1);
        }
        self.sort(&mut points);
        points.truncate(FINALISTS);
        Ok(points)
    }

    /// Each parameter at the value that did best alone.
    fn best_of_each(&self) -> Point {
        let default = self.defaults();
        let best = |(i, parameter): (usize, &Parameter)| {
            let alone = |value: &usize| {
                let mut point = default.clone();
                point[i] = *value;
                self.by.canonical(&point).map_or(f64::INFINITY, |p| self.middle(&p))
            };
            (0..parameter.values.len()).min_by(|a, b| alone(a).total_cmp(&alone(b))).unwrap_or(parameter.default)
        };
        self.parameters.iter().enumerate().map(best).collect()
    }

    fn neighbours(&self, of: &Point) -> Vec<Point> {
        let mut points = Vec::new();
        for (i, parameter) in self.parameters.iter().enumerate() {
            for value in [of[i].wrapping_sub(1), of[i] + 1] {
                if value < parameter.values.len() {
                    let mut point = of.clone();
                    point[i] = value;
                    let point = self.by.canonical(&point).filter(|p| p != of && !points.contains(p));
                    points.extend(point);
                }
            }
        }
        points
    }

    /// Goes from neighbour to neighbour as long as one is better; whether none can be any more.
    fn refine(&mut self, finalists: Vec<Point>) -> io::Result<(Point, bool)> {
        let mut best = finalists.first().cloned().unwrap_or_else(|| self.defaults());
        let mut others = finalists;
        loop {
            others.extend(self.neighbours(&best));
            others.retain(|p| *p != best);
            others.dedup();
            match self.step(&best, &others)? {
                Step::Better(point) => best = point,
                Step::None => return Ok((best, true)),
                Step::NoTime => return Ok((self.nearest(best, &others), false)),
            }
            others.clear();
        }
    }

    /// Without time for more, whatever looks best.
    fn nearest(&self, best: Point, others: &[Point]) -> Point {
        let several = |p: &&Point| self.tried(p).is_some_and(|t| t.ratios.len() >= ROUNDS.0);
        let other = others.iter().filter(several).min_by(|a, b| self.middle(a).total_cmp(&self.middle(b)));
        other.filter(|p| self.middle(p) < self.middle(&best)).cloned().unwrap_or(best)
    }

    /// Measures the best beside others until one has won, or none can by enough to matter.
    fn step(&mut self, best: &Point, others: &[Point]) -> io::Result<Step> {
        let mut left: Vec<Point> = others.to_vec();
        let begin = self.round;
        loop {
            if left.is_empty() {
                return Ok(Step::None);
            }
            if self.by.left() < RESERVE {
                return Ok(Step::NoTime);
            }
            self.by.says(&format!("refining: {} neighbours", left.len()));
            let mut points = vec![best.clone()];
            points.extend(left.iter().cloned());
            self.measure(&points)?;
            let done = self.round - begin;
            if done < ROUNDS.0 {
                continue;
            }
            // Many neighbours are tested again and again: an interval must be surer than a single one.
            let confidence = 1.0 - (1.0 - CONFIDENCE) / left.len() as f64;
            let Some(mine) = self.tried(best) else { return Ok(Step::None) };
            let beside = |p: &Point| self.tried(p).and_then(|t| t.beside(mine, confidence));
            let mut better: Vec<(Point, f64)> = Vec::new();
            left.retain(|p| match beside(p) {
                Some(i) if i.below(1.0) => {
                    better.push((p.clone(), i.middle));
                    true
                }
                // It stays while it can still be better by what matters; longer when it looks so.
                Some(i) if i.middle < 1.0 - MATTERS => i.low < 1.0 - MATTERS,
                Some(i) => i.low < 1.0 - MATTERS && done < ROUNDS.1,
                None => false,
            });
            better.retain(|(_, ratio)| *ratio < 1.0 - MATTERS);
            if let Some((point, _)) = better.into_iter().min_by(|a, b| a.1.total_cmp(&b.1)) {
                return Ok(Step::Better(point));
            }
            if done >= MOST_ROUNDS {
                return Ok(Step::None);
            }
        }
    }

    /// The best beside the defaults, in rounds of their own: what has won until now was also lucky.
    fn last(&mut self, best: &Point) -> io::Result<Option<Interval>> {
        let mut ratios: Vec<f64> = Vec::new();
        while ratios.len() < LAST.1 {
            self.by.says("the best beside the defaults");
            self.measure(std::slice::from_ref(best))?;
            ratios.extend(self.tried(best).and_then(|t| t.ratios.last().copied()));
            let Some((_, variance)) = log_mean(&ratios) else { continue };
            let half = variance.sqrt() * reach(CONFIDENCE, ratios.len() as f64 - 1.0);
            if ratios.len() >= LAST.0 && (half < MATTERS || self.by.left() <= 0.0) {
                break;
            }
        }
        Ok(paired(&ratios, &vec![1.0; ratios.len()], CONFIDENCE))
    }
}

enum Step {
    Better(Point),
    None,
    NoTime,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cost with its optimum at `best`, two parameters that depend on each other, noise in every figure, and a machine
    /// that is up to three times as slow from round to round.
    struct Planted {
        best: [f64; 4],
        random: u64,
        rounds: usize,
        limit: usize,
    }

    impl Planted {
        fn noise(&mut self) -> f64 {
            self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.random >> 11) as f64 / (1u64 << 53) as f64 - 0.5
        }

        fn cost(&self, point: &Point) -> f64 {
            let far = |i: usize| point[i] as f64 - self.best[i];
            let own = 0.04 * far(0).powi(2) + 0.03 * far(1).powi(2) + 0.25 * far(2).abs() + 0.02 * far(3).powi(2);
            (own + 0.03 * far(0) * far(1)).exp()
        }
    }

    impl Measure for Planted {
        fn canonical(&self, point: &Point) -> Option<Point> {
            // Values that do not go together.
            (point[0] + 5 >= point[1]).then(|| point.clone())
        }

        fn round(&mut self, points: &[Point]) -> io::Result<Vec<f64>> {
            self.rounds += points.len();
            let machine = 2.0 + 2.0 * self.noise();
            Ok(points.iter().map(|p| self.cost(p) * machine * (0.12 * self.noise()).exp()).collect())
        }

        fn left(&self) -> f64 {
            1.0 - self.rounds as f64 / self.limit as f64
        }
    }

    fn parameters() -> Vec<Parameter> {
        let parameter = |name, count: usize, default| Parameter {
            name,
            values: (0..count).map(|v| v.to_string()).collect(),
            default,
        };
        vec![parameter("a", 7, 2), parameter("b", 7, 2), parameter("c", 3, 0), parameter("d", 6, 1)]
    }

    #[test]
    fn a_planted_optimum_is_found() {
        for seed in 1..20 {
            let mut planted = Planted { best: [5.0, 4.0, 2.0, 3.0], random: seed * 77, rounds: 0, limit: 4000 };
            let found = search(&parameters(), &mut planted, 12).expect("no errors");
            let (cost, optimum) = (planted.cost(&found.best), planted.cost(&vec![5, 4, 2, 3]));
            assert!(cost < optimum * 1.07, "seed {seed}: {:?} costs {cost}, the optimum {optimum}", found.best);
            let interval = found.interval.expect("better than the defaults");
            let truth = cost / planted.cost(&vec![2, 2, 0, 1]);
            assert!(interval.below(1.0) && (interval.middle / truth - 1.0).abs() < 0.1, "{interval:?}, {truth}");
            assert!(found.settled, "there was time enough");
        }
    }

    #[test]
    fn defaults_that_are_best_stay() {
        let mut changed = 0;
        for seed in 1..20 {
            let mut planted = Planted { best: [2.0, 2.0, 0.0, 1.0], random: seed * 91, rounds: 0, limit: 4000 };
            let found = search(&parameters(), &mut planted, 12).expect("no errors");
            changed += usize::from(found.interval.is_some());
        }
        assert!(changed <= 1, "{changed} of 19 searches left the best");
    }

    #[test]
    fn it_ends_when_the_time_is_over() {
        let mut planted = Planted { best: [5.0, 4.0, 2.0, 3.0], random: 5, rounds: 0, limit: 300 };
        let found = search(&parameters(), &mut planted, 12).expect("no errors");
        assert!(planted.rounds < 450, "{} measurements, 300 were planned", planted.rounds);
        assert!(planted.cost(&found.best) <= planted.cost(&vec![2, 2, 0, 1]), "never worse than the defaults");
    }
}
