//! `tunnelfs-bench`: the transports side by side.

use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tunnelfs_bench::direct::Direct;
use tunnelfs_bench::plan::{self, Load, Pair, Via};
use tunnelfs_bench::record::{Row, Run};
use tunnelfs_bench::session::{self, Session, GEOMETRY};
use tunnelfs_bench::workload::{self, Tally};
use tunnelfs_bench::{limits, report};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// One request at a time
    Latency,
    /// Many requests in flight
    Throughput,
    /// Both
    All,
}

/// Measure ring, virtqueue, socket, stock virtiofsd and the direct call, interleaved in one run.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:\n  tunnelfs-bench latency --quick\n  tunnelfs-bench all --json run.json --report run.md"
)]
struct Args {
    /// What to measure
    #[arg(value_enum)]
    what: What,
    /// A smaller matrix, under a minute
    #[arg(long)]
    quick: bool,
    /// Directory for the benchmark's file (default: a new one in /dev/shm)
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Write the run as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the report as Markdown
    #[arg(long)]
    report: Option<PathBuf>,
    /// Confine both sides to this CPU
    #[arg(long)]
    cpu: Option<usize>,
}

enum Target {
    Direct(Box<Direct>),
    Session(Box<Session>),
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("tunnelfs-bench: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> io::Result<()> {
    let limits = limits::measure();
    if let Some(cpu) = args.cpu {
        limits::pin(cpu).map_err(|e| io::Error::other(format!("--cpu {cpu}: {e}")))?;
    }
    let base = if Path::new("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
    let scratch = tempfile::Builder::new().prefix("tunnelfs-bench").tempdir_in(base)?;
    let dir = args.dir.clone().unwrap_or_else(|| scratch.path().join("share"));
    std::fs::create_dir_all(&dir)?;
    workload::make_file(&dir)?;
    let virtiofsd = session::virtiofsd().is_some();
    if !virtiofsd {
        eprintln!("stock virtiofsd is left out: `make deps` installs it");
    }
    let pairs = plan::pairs(virtiofsd);
    let rows = measure(&pairs, &loads(args), &dir, scratch.path(), args.quick)?;
    workload::check_file(&dir)?;
    let run =
        Run::new(limits, format!("{GEOMETRY:?}; file on {}", if args.dir.is_some() { "--dir" } else { "tmpfs" }), rows);
    let page = report::markdown(&run);
    println!("{page}");
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&run)?)?;
    }
    if let Some(path) = &args.report {
        std::fs::write(path, page)?;
    }
    Ok(())
}

fn loads(args: &Args) -> Vec<Load> {
    let mut loads = Vec::new();
    if args.what != What::Throughput {
        loads.extend(plan::latency(args.quick));
    }
    if args.what != What::Latency {
        loads.extend(plan::throughput(args.quick));
    }
    loads
}

/// Every load takes its turns on every pair, round after round, so that a
/// noisy minute falls on all of them.
fn measure(pairs: &[Pair], loads: &[Load], dir: &Path, scratch: &Path, quick: bool) -> io::Result<Vec<Row>> {
    let (rounds, turn) = if quick { (3, Duration::from_millis(50)) } else { (10, Duration::from_millis(150)) };
    let warm_up = turn / 5;
    let open = |(i, pair): (usize, &Pair)| match pair.transport {
        Via::Direct => Direct::open(dir).map(|d| Target::Direct(Box::new(d))),
        _ => Session::open(pair, dir, scratch, i).map(|s| Target::Session(Box::new(s))),
    };
    let mut targets = pairs.iter().enumerate().map(open).collect::<io::Result<Vec<_>>>()?;
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {eta} left {msg}").map_err(io::Error::other)?;
    let bar = ProgressBar::new((rounds * loads.len() * pairs.len()) as u64).with_style(style);
    let mut rows = Vec::new();
    for &load in loads {
        let mut tallies: Vec<Tally> = pairs.iter().map(|_| Tally::default()).collect();
        for _ in 0..rounds {
            for ((target, tally), pair) in targets.iter_mut().zip(&mut tallies).zip(pairs) {
                bar.set_message(format!("{:?} {} {:?} {}", load.op, load.size, pair.transport, pair.policy));
                let mut go = |time, tally: &mut Tally| match target {
                    Target::Direct(direct) => direct.run(load, time, tally),
                    Target::Session(session) => workload::run(session, load, time, tally),
                };
                let case = |e: io::Error| io::Error::new(e.kind(), format!("{pair:?} {load:?}: {e}"));
                go(warm_up, &mut Tally::default()).map_err(case)?;
                go(turn, tally).map_err(case)?;
                bar.inc(1);
            }
        }
        rows.extend(pairs.iter().zip(&tallies).map(|(&pair, tally)| Row::new(pair, load, tally)));
    }
    bar.finish_and_clear();
    Ok(rows)
}
