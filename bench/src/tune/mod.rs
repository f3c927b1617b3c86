//! `tunnelfs-bench tune`: the best settings for a goal and a workload on this machine.

mod bencher;
mod goal;
mod mix;
mod outcome;
pub mod record;
pub mod search;
mod space;

use crate::record::Origin;
use crate::{interrupt, workload};
use bencher::{Bencher, Budget};
use goal::Goal;
use mix::Mix;
use outcome::Outcome;
use search::search;
use space::Space;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tunnelfs_ring::allowed_cpus;
use tunnelfs_settings::Settings;

/// The command line of `tune`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tunnelfs-bench tune --quick
  tunnelfs-bench tune --goal latency=2,cpu=1 --workload small --output tunnelfs.toml --report tuned.html

Goals: latency (p50, and p99 a third as much), throughput, cpu (CPU time of an operation on both sides),
or several with weights. Workloads: mixed, small, large, parallel, or a file with a workload.
The search ends when further tries cannot matter, or when the time is over; it says which.")]
pub struct TuneArgs {
    /// What is wanted: latency, throughput, cpu, or a mix as latency=2,cpu=1
    #[arg(long, default_value = "latency=1,throughput=1,cpu=1")]
    goal: Goal,
    /// A built-in workload (mixed, small, large, parallel) or a file with one
    #[arg(long, default_value = "mixed")]
    workload: String,
    /// Three minutes at most, with short turns
    #[arg(long)]
    quick: bool,
    /// How long it may take, seconds [default: 900, 180 with --quick]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    time: Option<u64>,
    /// Directory for the benchmark's file (default: a new one in /dev/shm)
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Write the settings as a commented tunnelfs.toml
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write what was tried, and the trade-offs, as a page
    #[arg(long, value_name = "PAGE.html")]
    report: Option<PathBuf>,
}

/// Points at random in the coarse sweep.
const EXTRA: usize = 12;

/// Searches round `settings`, with sockets in `scratch`; prints and writes what has come of it.
///
/// # Errors
/// A workload that cannot be, or a guest or host that fails.
pub fn run(args: &TuneArgs, scratch: &Path, settings: &Settings) -> io::Result<()> {
    let cpus = allowed_cpus().len() as u32;
    let mix = Mix::find(&args.workload, cpus)?;
    let space = Space::new(settings, &mix);
    let total = Duration::from_secs(args.time.unwrap_or(if args.quick { 180 } else { 900 }));
    let turn = Duration::from_millis(if args.quick { 120 } else { 400 });
    // So that even a short time has rounds enough.
    let turn = turn.min(total / 1000).max(Duration::from_millis(5));
    let dir = args.directory.clone().unwrap_or_else(|| scratch.join("share"));
    std::fs::create_dir_all(&dir)?;
    workload::make_file(&dir)?;
    let places = (dir.clone(), scratch.to_path_buf());
    let mut bencher = Bencher::new(&space, &mix, args.goal, places, Budget { total, turn })?;
    let found = search(&space.parameters, &mut bencher, EXTRA);
    bencher.finish();
    let found = found?;
    workload::check_file(&dir)?;
    interrupt::check()?;
    let figures = std::mem::take(&mut bencher.figures);
    let outcome = Outcome { space: &space, goal: args.goal, mix: &mix, found, figures, origin: Origin::here("tune") };
    println!("{}", outcome.text());
    write(args.output.as_deref(), || outcome.toml())?;
    write(args.report.as_deref(), || outcome.page())
}

fn write(path: Option<&Path>, text: impl Fn() -> String) -> io::Result<()> {
    let Some(path) = path else { return Ok(()) };
    std::fs::write(path, text()).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
    println!("{}", path.display());
    Ok(())
}
