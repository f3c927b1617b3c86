//! `tunnelfs-bench compare`: a verdict for each row of two runs that knows noise from change.
//!
//! A row's interval comes from its rounds in both runs. Two runs of the very same thing differ, too: by where memory lies,
//! by the hour. How much is seen in the rows of others' programs and of the bare file system, which no change of ours
//! touches. All rows together are wrong once in twenty comparisons of equal runs.

use crate::intervals::{apart, log_mean, Interval};
use crate::page::figures;
use crate::page::recorded::{read, Recorded, Row};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// The command line of `compare`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tunnelfs-bench compare before.json after.json
  tunnelfs-bench compare before.json after.json --all --cpu

Exit status: 0 the same or better, 1 a row is worse, 2 bad input.")]
pub struct CompareArgs {
    /// The run before, as --json has written it
    before: PathBuf,
    /// The run after, with the same command
    after: PathBuf,
    /// Also the rows that have not changed
    #[arg(long)]
    all: bool,
    /// Compare CPU time of an operation, too
    #[arg(long)]
    cpu: bool,
}

/// What has become of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The interval says so.
    Better,
    /// The interval has 1 in it.
    Same,
    /// The interval says so.
    Worse,
    /// A run has fewer than two rounds of it.
    Unknown,
}

/// One row of both runs.
#[derive(Clone, Debug)]
pub struct Compared {
    /// Load and series.
    pub name: String,
    /// `rate`, `p50` or `CPU`.
    pub what: &'static str,
    /// Before and after, for people.
    pub shown: [String; 2],
    /// How many times as good as before.
    pub interval: Option<Interval>,
    /// Whether ours can change it at all.
    pub ours: bool,
    /// What the interval says.
    pub verdict: Verdict,
}

/// One figure of a row in one run: its name, each round's values, whether less is better, and for people.
struct Figure<'a> {
    what: &'static str,
    rounds: &'a [f64],
    lower: bool,
    text: String,
}

/// What a row is judged by: the time of one where one is asked at a time, else the rate.
fn speed(row: &Row) -> Figure<'_> {
    let shown = row.shown();
    let time = shown.lower && row.seconds.is_none() && !row.p50s.is_empty();
    match time {
        true => Figure { what: "p50", rounds: &row.p50s, lower: true, text: shown.text },
        false => Figure { what: "rate", rounds: &row.rates, lower: false, text: shown.text },
    }
}

fn cpu(row: &Row) -> Option<Figure<'_>> {
    let text = figures::time(row.cpu_ns?);
    Some(Figure { what: "CPU", rounds: &row.cpus, lower: true, text })
}

/// Whether a series is of others' programs alone.
fn foreign(series: &str) -> bool {
    let others = ["native", "virtiofsd", "hp-", "9p", "virtiofs on virtiofsd"];
    others.iter().any(|name| series.starts_with(name))
}

/// All rows that both runs have.
pub fn compare(before: &Recorded, after: &Recorded, with_cpu: bool) -> Vec<Compared> {
    let mut pairs = Vec::new();
    for old in &before.rows {
        let same = |new: &&Row| (&new.load, &new.series, new.ring) == (&old.load, &old.series, old.ring);
        let Some(new) = after.rows.iter().find(same) else { continue };
        pairs.push((old, speed(old), speed(new)));
        if let (true, Some(a), Some(b)) = (with_cpu, cpu(old), cpu(new)) {
            pairs.push((old, a, b));
        }
    }
    let between = between(pairs.iter().filter(|(row, ..)| foreign(&row.series)).map(|(_, a, b)| (a.rounds, b.rounds)));
    let judged = pairs.iter().filter(|(row, ..)| !foreign(&row.series)).count().max(1);
    // All of ours together keep the chance of a false verdict at one in twenty.
    let confidence = 1.0 - 0.05 / judged as f64;
    let judge = |(row, old, new): (&Row, Figure<'_>, Figure<'_>)| {
        let (one, other) = if old.lower { (old.rounds, new.rounds) } else { (new.rounds, old.rounds) };
        let interval = apart(one, other, between, confidence);
        let verdict = match interval {
            None => Verdict::Unknown,
            Some(i) if i.below(1.0) => Verdict::Worse,
            Some(i) if i.above(1.0) => Verdict::Better,
            Some(_) => Verdict::Same,
        };
        Compared {
            name: format!("{}, {}", row.load, row.series),
            what: old.what,
            shown: [old.text, new.text],
            interval,
            ours: !foreign(&row.series),
            verdict,
        }
    };
    pairs.into_iter().map(judge).collect()
}

/// How much two runs differ in what has not changed: the variance of a row's logarithm, beside that of its rounds.
fn between<'a>(unchanged: impl Iterator<Item = (&'a [f64], &'a [f64])>) -> f64 {
    let excess = |(old, new): (&[f64], &[f64])| {
        let (a, va) = log_mean(old)?;
        let (b, vb) = log_mean(new)?;
        Some((b - a).powi(2) - va - vb)
    };
    let all: Vec<f64> = unchanged.filter_map(excess).collect();
    (all.iter().sum::<f64>() / all.len().max(1) as f64).max(0.0)
}

/// For people: what has changed, and the sum.
pub fn table(rows: &[Compared], all: bool) -> String {
    let mut out = String::new();
    let wanted: Vec<&Compared> = rows.iter().filter(|r| all || (r.ours && r.verdict != Verdict::Same)).collect();
    if !wanted.is_empty() {
        out += "| row | | before | after | times as good | verdict |\n|---|---|--:|--:|--:|---|\n";
    }
    for row in wanted {
        let range = |i: Interval| format!("{:.2} ({:.2} to {:.2})", i.middle, i.low, i.high);
        let verdict = match (row.ours, row.verdict) {
            (_, Verdict::Unknown) => "too few rounds to tell",
            (false, _) => "not ours",
            (_, Verdict::Worse) => "**worse**",
            (_, Verdict::Better) => "better",
            (_, Verdict::Same) => "the same",
        };
        let Compared { name, what, shown: [before, after], interval, .. } = row;
        let _ = writeln!(
            out,
            "| {name} | {what} | {before} | {after} | {} | {verdict} |",
            interval.map_or(String::new(), range)
        );
    }
    let count = |verdict| rows.iter().filter(|r| r.ours && r.verdict == verdict).count();
    let _ = write!(
        out,
        "\n{} worse, {} better, {} the same",
        count(Verdict::Worse),
        count(Verdict::Better),
        count(Verdict::Same)
    );
    let unknown = count(Verdict::Unknown);
    out += &if unknown > 0 { format!(", {unknown} with too few rounds to tell") } else { String::new() };
    out + "."
}

/// Where two runs cannot be told from two machines.
fn doubts(before: &Recorded, after: &Recorded) -> Vec<String> {
    let mut out = Vec::new();
    if let (Some(a), Some(b)) = (before.limits, after.limits) {
        let limits = [
            ("a cache line's round trip", a.cacheline_rtt_ns, b.cacheline_rtt_ns, "ns"),
            ("waking another CPU and back", a.eventfd_rtt_ns, b.eventfd_rtt_ns, "ns"),
        ];
        for (what, a, b, unit) in limits {
            let ratio = b.max(1) as f64 / a.max(1) as f64;
            if !(0.8..1.25).contains(&ratio) {
                out.push(format!("Note: {what} took {a} {unit} before, {b} after: the machine was not the same."));
            }
        }
    }
    let others = |run: &Recorded| run.rows.iter().any(|r| foreign(&r.series));
    if !others(before) || !others(after) {
        out.push(
            "Note: no rows of others' programs in both runs, so what differs from run to run is not counted.".into(),
        );
    }
    out
}

/// Reads, compares, prints.
pub fn run(args: &CompareArgs) -> ExitCode {
    match result(args) {
        Ok(worse) => ExitCode::from(u8::from(worse)),
        Err(e) => {
            eprintln!("tunnelfs-bench: {e}");
            ExitCode::from(2)
        }
    }
}

/// Whether a row is worse.
fn result(args: &CompareArgs) -> Result<bool, String> {
    let read = |path| read(path).map_err(|e| e.to_string());
    let (before, after) = (read(&args.before)?, read(&args.after)?);
    if before.kind != after.kind {
        return Err(format!(
            "{} is a run of `{}`, {} one of `{}`: only the same kind can be compared",
            args.before.display(),
            before.kind,
            args.after.display(),
            after.kind
        ));
    }
    for (run, path) in [(&before, &args.before), (&after, &args.after)] {
        if run.rows.iter().all(|r| r.rates.len() < 2) {
            return Err(format!(
                "{}: no row has two rounds, so noise cannot be told from change; measure again with this version and \
                 several rounds",
                path.display()
            ));
        }
    }
    let rows = compare(&before, &after, args.cpu);
    if !rows.iter().any(|r| r.ours) {
        return Err("the two runs have no row of ours in common: use the same command for both".into());
    }
    println!("{} ({})\n{} ({})\n", before.name, before.machine, after.name, after.machine);
    println!("{}", table(&rows, args.all));
    doubts(&before, &after).iter().for_each(|doubt| println!("{doubt}"));
    Ok(rows.iter().any(|r| r.ours && r.verdict == Verdict::Worse))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A generator of noise that is the same each time.
    struct Noise(u64);

    impl Noise {
        fn next(&mut self) -> f64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 11) as f64 / (1u64 << 53) as f64
        }

        /// About normal.
        fn normal(&mut self) -> f64 {
            (0..12).map(|_| self.next()).sum::<f64>() - 6.0
        }
    }

    /// A run of 30 rows of ours and 10 of others, each run and round with noise, ours `times` as fast.
    fn made(noise: &mut Noise, times: f64, run: f64) -> Recorded {
        let mut rows = Vec::new();
        for i in 0..40 {
            let series = if i < 30 { "ring" } else { "virtiofsd" };
            let level = 1000.0 * (run * noise.normal()).exp() * if i < 30 { times } else { 1.0 };
            let rates: Vec<f64> = (0..6).map(|_| level * (0.02 * noise.normal()).exp()).collect();
            let rate = rates[0];
            rows.push(Row { load: format!("load {i}"), series: series.into(), rate, rates, ..Row::default() });
        }
        Recorded { kind: "mount".into(), rows, ..Recorded::default() }
    }

    fn has(rows: &[Compared], verdict: Verdict) -> bool {
        rows.iter().any(|r| r.ours && r.verdict == verdict)
    }

    #[test]
    fn equal_runs_are_seldom_told_apart() {
        let mut noise = Noise(7);
        for run in [0.0, 0.03] {
            let differ = (0..100).filter(|_| {
                let rows = compare(&made(&mut noise, 1.0, run), &made(&mut noise, 1.0, run), false);
                has(&rows, Verdict::Worse) || has(&rows, Verdict::Better)
            });
            let differ = differ.count();
            assert!(differ <= 12, "{differ} of 100 equal comparisons, of 1200 rows each, with {run} between runs");
        }
    }

    #[test]
    fn real_changes_are_told() {
        let mut noise = Noise(11);
        let slower = compare(&made(&mut noise, 1.0, 0.01), &made(&mut noise, 0.8, 0.01), false);
        assert!(slower.iter().filter(|r| r.verdict == Verdict::Worse).count() > 25, "{}", table(&slower, true));
        assert!(!has(&slower, Verdict::Better));
        let faster = compare(&made(&mut noise, 1.0, 0.01), &made(&mut noise, 1.25, 0.01), false);
        assert!(has(&faster, Verdict::Better) && !has(&faster, Verdict::Worse));
    }
}
