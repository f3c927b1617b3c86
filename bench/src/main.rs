//! `tunnelfs-bench`: the transports side by side.

use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tunnelfs_bench::mount::{self, MountPlan, Peer};
use tunnelfs_bench::plan::{HostLocation, Load, Matrix, Op, Plan, TransportKind};
use tunnelfs_bench::record::{Origin, Run};
use tunnelfs_bench::session::{self, Bench};
use tunnelfs_bench::tree::{self, TreePlan};
use tunnelfs_bench::{
    calls, compare, echo, idle, interrupt, limits, measure, page, report, target, tune, variants, workload,
};
use tunnelfs_ring::Policy;
use tunnelfs_settings::{args, load, parse_bytes, Loader, Settings};

/// The settings that a benchmark's command line has; the others are varied.
const SECTIONS: &[&str] = &[
    "transport.entries",
    "transport.slots",
    "transport.slot_size",
    "transport.huge_pages",
    "wait.spin_us",
    "wait.auto_us",
    "host.cache",
    "host.inode_file_handles",
    "host.thread_pool_size",
];

/// Measure ring, virtqueue, socket, stock virtiofsd and the direct call, interleaved in one run.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// One request at a time
    Latency(MatrixArgs),
    /// Many requests in flight
    Throughput(MatrixArgs),
    /// Both
    All(MatrixArgs),
    /// Jobs on mounted file systems, ours and others' (needs root, /dev/fuse, and fio for all jobs)
    Mount(MountArgs),
    /// tar, find, grep, git, cc and rm on trees of small files, ours and others' (needs root, /dev/fuse, git, cc)
    Tree(TreeArgs),
    /// The best settings for a goal and a workload on this machine, as a tunnelfs.toml
    Tune(tune::TuneArgs),
    /// A live mount's workload, for tune: operations, sizes, requests in flight and pauses
    Record(tune::record::RecordArgs),
    /// A page and a Markdown file from recorded runs
    Report(page::ReportArgs),
    /// What has changed between two recorded runs, told from noise; exit status 1 when something is worse
    Compare(compare::CompareArgs),
    /// Each operation of the host's file server beside the system calls that it needs
    Calls(CallsArgs),
}

#[derive(clap::Args)]
#[command(after_help = "Examples:
  tunnelfs-bench all --quick --report run.md
  tunnelfs-bench latency --transport ring,virtqueue --policy spin --rw noop,read --bs 4k
  tunnelfs-bench throughput --rw read --bs 4k,1m --iodepth 8,32 --numjobs 1,2 --json run.json
  tunnelfs-bench throughput --transport ring --slots 8,16,32 --entries 64 --json rings.json

Settings as lists (--entries, --slots, --slot-size, --spin-us, --auto-us) are measured by turns in one run.")]
struct MatrixArgs {
    /// A smaller matrix, under a minute
    #[arg(long)]
    quick: bool,
    /// Only these transports
    #[arg(long, value_enum, value_delimiter = ',')]
    transport: Vec<TransportKind>,
    /// Only hosts here
    #[arg(long, value_enum, value_delimiter = ',')]
    placement: Vec<HostLocation>,
    /// Only these wait policies
    #[arg(long, value_delimiter = ',')]
    policy: Vec<Policy>,
    /// Only these operations
    #[arg(long = "rw", value_enum, value_delimiter = ',')]
    ops: Vec<Op>,
    /// Payload sizes of read and write, as 4k or 1m, instead of the planned ones
    #[arg(long = "bs", value_delimiter = ',', value_parser = size)]
    sizes: Vec<u32>,
    /// Requests in flight on each queue, instead of the planned ones
    #[arg(long = "iodepth", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    depths: Vec<u32>,
    /// Queues, each with a thread of its own, instead of the planned ones
    #[arg(long = "numjobs", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=62))]
    queues: Vec<u32>,
    /// Length of each case, milliseconds, over all rounds
    #[arg(long, value_name = "MS")]
    runtime: Option<u64>,
    /// Directory for the benchmark's file (default: a new one in /dev/shm)
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Write the run as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the report as Markdown, with its plots beside it
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// What `mount` and `tree` have in common.
#[derive(clap::Args)]
struct MountedArgs {
    /// Rounds, of which the medians count
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Another FUSE program: NAME=COMMAND, in the foreground, with {src} and {mnt} for the directory and the mount point
    #[arg(long = "peer")]
    peers: Vec<Peer>,
    /// Directory to work in (default: a new one in /dev/shm)
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Write the run as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the report as Markdown
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

#[derive(clap::Args)]
#[command(after_help = "Examples:
  tunnelfs-bench mount --quick
  tunnelfs-bench mount --system ring,in-process,virtiofsd --rw randread-4k,read-1m --json run.json
  tunnelfs-bench mount --peer 'hp=passthrough_hp -f --nopassthrough {src} {mnt}' --report run.md")]
struct MountArgs {
    /// One short round, about a minute and a half
    #[arg(long)]
    quick: bool,
    /// Only these: native, floor, floor-fuse, in-process, ring, ring-fuse, virtqueue, socket, virtiofsd
    #[arg(long = "system", value_delimiter = ',')]
    systems: Vec<String>,
    /// Only these jobs, by the names in the report
    #[arg(long = "rw", value_delimiter = ',')]
    jobs: Vec<String>,
    /// Length of each turn of a timed job, milliseconds
    #[arg(long, value_name = "MS")]
    runtime: Option<u64>,
    #[command(flatten)]
    common: MountedArgs,
}

#[derive(clap::Args)]
#[command(after_help = "Examples:
  tunnelfs-bench tree --quick
  tunnelfs-bench tree --system native,ring,ring-always --rw files,git-add --json run.json
  tunnelfs-bench tree --source /usr/include --peer 'hp=passthrough_hp -f --nopassthrough {src} {mnt}'")]
struct TreeArgs {
    /// One round on small trees, about two minutes
    #[arg(long)]
    quick: bool,
    /// Only these: native, ring (--cache), ring-never, ring-metadata, ring-auto, ring-always, virtiofsd
    #[arg(long = "system", value_delimiter = ',')]
    systems: Vec<String>,
    /// Only these jobs, by the names in the report, or groups of them: files, packages, build, git
    #[arg(long = "rw", value_delimiter = ',')]
    jobs: Vec<String>,
    /// Files of the tree, instead of the planned ones
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    files: Option<u32>,
    /// Make the trees of this directory's files (default: the sources of this workspace's dependencies)
    #[arg(long, value_name = "DIR")]
    source: Option<PathBuf>,
    #[command(flatten)]
    common: MountedArgs,
}

#[derive(clap::Args)]
#[command(after_help = "Example:
  tunnelfs-bench calls --directory /dev/shm --directory /srv --report calls.md")]
struct CallsArgs {
    /// Directories to work in, one after the other (default: one in /dev/shm)
    #[arg(long)]
    directory: Vec<PathBuf>,
    /// Length of each turn, milliseconds
    #[arg(long, value_name = "MS", default_value_t = 20)]
    runtime: u64,
    /// Write the tables as Markdown
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

fn main() -> ExitCode {
    let command = ["latency", "throughput", "all", "mount", "tree", "calls", "tune"]
        .into_iter()
        .fold(Args::command(), |c, name| c.mut_subcommand(name, |sub| sub.args(args(SECTIONS))));
    // A list in a setting is refused below where it makes no sense.
    let lines = variants::expand(&std::env::args_os().collect::<Vec<_>>());
    let several: Vec<_> = lines.iter().map(|line| command.clone().get_matches_from(line)).collect();
    let parsed = Args::from_arg_matches(&several[0]).unwrap_or_else(|e| e.exit());
    if let Command::Compare(args) = &parsed.command {
        return compare::run(args);
    }
    let result = interrupt::watch().and_then(|()| dispatch(parsed.command, &several));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("tunnelfs-bench: {e}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command, several: &[ArgMatches]) -> io::Result<()> {
    let settings = |matches: &ArgMatches| {
        let (_, matches) = matches.subcommand().expect("clap asks for one");
        load(SECTIONS, matches).and_then(Loader::finish_with_memory).map_err(io::Error::other)
    };
    let only = || match several {
        [one] => settings(one),
        _ => Err(io::Error::other("settings as lists are for latency, throughput and all")),
    };
    let all = || several.iter().map(settings).collect::<io::Result<Vec<_>>>();
    match command {
        Command::Latency(args) => run(&args, Matrix::Latency, all()?),
        Command::Throughput(args) => run(&args, Matrix::Throughput, all()?),
        Command::All(args) => run(&args, Matrix::All, all()?),
        Command::Tune(args) => tune::run(&args, scratch(None)?.path(), &only()?),
        Command::Record(args) => tune::record::run(&args),
        Command::Report(args) => page::run(&args),
        Command::Compare(_) => Ok(()),
        Command::Mount(args) => run_mount(&args, &only()?),
        Command::Tree(args) => run_tree(&args, &only()?),
        Command::Calls(args) => run_calls(&args),
    }
}

/// A size as fio has it.
fn size(text: &str) -> Result<u32, String> {
    let bytes = parse_bytes(text).and_then(|bytes| u32::try_from(bytes).ok());
    bytes
        .filter(|b| (8..=workload::FILE_BYTES as u32 / 2).contains(b) && b % 8 == 0)
        .ok_or_else(|| format!("`{text}` must be a multiple of 8 bytes, up to {} MiB", workload::FILE_BYTES >> 21))
}

fn run(args: &MatrixArgs, matrix: Matrix, mut settings: Vec<Settings>) -> io::Result<()> {
    let plan = plan(args, matrix, &settings)?;
    let queues = plan.loads.iter().map(|l| l.queues).max().unwrap_or(1) as u16;
    settings.iter_mut().for_each(|s| s.transport.queues = queues);
    let scratch = scratch(None)?;
    let dir = args.directory.clone().unwrap_or_else(|| scratch.path().join("share"));
    std::fs::create_dir_all(&dir)?;
    workload::make_file(&dir)?;
    let scratch_path = scratch.path().to_path_buf();
    let bench =
        |settings: &Settings| Bench { dir: dir.clone(), scratch: scratch_path.clone(), settings: settings.clone() };
    let benches: Vec<Bench> = settings.iter().map(bench).collect();
    let mut cases = target::open(&plan, &benches)?;
    let (rows, limits) = measure::measure(&plan, &mut cases)?;
    let idle = idle::watch(cases)?;
    let echo = echo::measure()?;
    workload::check_file(&dir)?;
    let files = if args.directory.is_some() { "Files in --directory" } else { "Files on tmpfs" };
    let origin = Origin::here("transports");
    let run = Run { origin, files: files.into(), config: settings.swap_remove(0), limits, rows, idle, echo };
    println!("{}", report::summary(&run)?);
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&run)?)?;
    }
    if let Some(path) = &args.report {
        let plots = page::draw(&run, path)?;
        std::fs::write(path, report::page(&run, &plots)?)?;
    }
    Ok(())
}

fn check_root() -> io::Result<()> {
    if nix::unistd::geteuid().is_root() {
        Ok(())
    } else {
        Err(io::Error::other("mounting needs root"))
    }
}

impl MountedArgs {
    /// Prints a run's page, and writes what is to be written.
    fn tell(&self, run: &impl serde::Serialize, page: &str) -> io::Result<()> {
        println!("{page}");
        if let Some(path) = &self.json {
            std::fs::write(path, serde_json::to_vec_pretty(run)?)?;
        }
        if let Some(path) = &self.report {
            std::fs::write(path, page)?;
        }
        Ok(())
    }
}

fn run_mount(args: &MountArgs, settings: &Settings) -> io::Result<()> {
    check_root()?;
    let mut plan = MountPlan::new(args.quick);
    plan.jobs.clone_from(&args.jobs);
    plan.systems.clone_from(&args.systems);
    plan.peers.clone_from(&args.common.peers);
    plan.runtime = args.runtime.map_or(plan.runtime, |ms| Duration::from_millis(ms.max(1)));
    plan.rounds = args.common.rounds.map_or(plan.rounds, |rounds| rounds as usize);
    let scratch = scratch(args.common.directory.as_deref())?;
    let run = mount::run(&plan, scratch.path(), settings)?;
    let page = mount::page(&run)?;
    args.common.tell(&run, &page)
}

fn run_tree(args: &TreeArgs, settings: &Settings) -> io::Result<()> {
    check_root()?;
    let mut plan = TreePlan::new(args.quick);
    plan.jobs.clone_from(&args.jobs);
    plan.systems.clone_from(&args.systems);
    plan.peers.clone_from(&args.common.peers);
    plan.source.clone_from(&args.source);
    plan.rounds = args.common.rounds.map_or(plan.rounds, |rounds| rounds as usize);
    if let Some(files) = args.files {
        (plan.files, plan.git_files) = (files as usize, files as usize);
    }
    let scratch = scratch(args.common.directory.as_deref())?;
    let run = tree::run(&plan, scratch.path(), settings)?;
    let page = tree::page(&run);
    args.common.tell(&run, &page)
}

fn run_calls(args: &CallsArgs) -> io::Result<()> {
    let given = args.directory.iter().map(|dir| Some(dir.as_path()));
    let directories: Vec<_> = if args.directory.is_empty() { vec![None] } else { given.collect() };
    let mut page = Origin::here("calls").heading(&limits::measure());
    println!("{page}");
    for directory in directories {
        let scratch = scratch(directory)?;
        let rows = target::aside(|| calls::run(scratch.path(), Duration::from_millis(args.runtime.max(1))))?;
        let title = directory.map_or_else(|| "memory".into(), |dir| dir.display().to_string());
        let table = calls::table(&title, &rows);
        println!("{table}");
        page += &format!("\n{table}");
    }
    match &args.report {
        Some(path) => std::fs::write(path, page),
        None => Ok(()),
    }
}

/// A new directory in `base`, or in memory; gone when it is dropped.
fn scratch(base: Option<&Path>) -> io::Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    let base = base.map_or_else(|| if memory.is_dir() { memory.into() } else { std::env::temp_dir() }, PathBuf::from);
    let told = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", base.display()));
    tempfile::Builder::new().prefix("tunnelfs-bench").tempdir_in(&base).map_err(told)
}

/// The planned matrix, narrowed or changed as the command line has it.
fn plan(args: &MatrixArgs, matrix: Matrix, settings: &[Settings]) -> io::Result<Plan> {
    let mut plan = Plan::new(matrix, args.quick);
    fn wanted<T: PartialEq>(list: &[T], value: &T) -> bool {
        list.is_empty() || list.contains(value)
    }
    plan.pairs.retain(|p| {
        wanted(&args.transport, &p.transport)
            && wanted(&args.placement, &p.placement)
            && (wanted(&args.policy, &p.policy) || p.transport == TransportKind::Direct)
    });
    if plan.pairs.iter().any(|p| p.transport == TransportKind::Virtiofsd) && session::virtiofsd().is_none() {
        eprintln!("stock virtiofsd is left out: `make deps` installs it");
        plan.pairs.retain(|p| p.transport != TransportKind::Virtiofsd);
    }
    plan.loads.retain(|l| wanted(&args.ops, &l.op));
    vary(&mut plan.loads, &args.depths, |l, &depth| l.depth = depth);
    vary(&mut plan.loads, &args.queues, |l, &queues| l.queues = queues);
    let (mut data, small): (Vec<_>, Vec<_>) = plan.loads.iter().partition(|l| matches!(l.op, Op::Read | Op::Write));
    vary(&mut data, &args.sizes, |l, &size| l.size = size);
    plan.loads = small.into_iter().chain(data).collect();
    if let Some(ms) = args.runtime {
        plan.turn = Duration::from_millis(ms.max(1)) / plan.rounds as u32;
    }
    if plan.pairs.is_empty() || plan.loads.is_empty() {
        return Err(io::Error::other("nothing to measure: no case of the matrix has all that was asked for"));
    }
    let slot = settings.iter().map(|s| s.transport.slot_size).max().unwrap_or(0);
    plan.loads.retain(|l| l.size <= slot);
    if plan.loads.is_empty() {
        return Err(io::Error::other(format!("--bs: nothing fits into slots of {slot} bytes (transport.slot_size)")));
    }
    Ok(plan)
}

/// Puts each of `values` into all loads, once each; leaves them as they are when there are none.
fn vary<T>(loads: &mut Vec<Load>, values: &[T], set: impl Fn(&mut Load, &T)) {
    if values.is_empty() {
        return;
    }
    let mut varied: Vec<Load> = Vec::new();
    for load in loads.iter() {
        for value in values {
            let mut load = *load;
            set(&mut load, value);
            if !varied.contains(&load) {
                varied.push(load);
            }
        }
    }
    *loads = varied;
}
