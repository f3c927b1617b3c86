//! `tunnelfs-bench record`: a live mount's workload, for `tune`. The guest counts operations, sizes, requests in flight
//! and pauses from one SIGUSR2 to the next, and leaves them in a file of its own.

use super::mix::{Mix, Part};
use crate::interrupt;
use crate::plan::Op;
use crate::progress::timed;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde::Deserialize;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::opcode;
use tunnelfs_guest::recording;

/// The command line of `record`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tunnelfs-bench record /mnt --seconds 60 --output work.json
  tunnelfs-bench record --pid 1234 --output work.json
  tunnelfs-bench tune --workload work.json --goal latency=2,cpu=1 --output tunnelfs.toml

Use the mount meanwhile as always. Kept are operations, sizes, requests in flight and pauses, no names and no data.")]
pub struct RecordArgs {
    /// The mount point
    #[arg(required_unless_present = "pid")]
    mount: Option<PathBuf>,
    /// The guest's process, where the mount point does not tell (several namespaces)
    #[arg(long, conflicts_with = "mount", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// How long
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Where the workload goes
    #[arg(long, short)]
    output: PathBuf,
}

#[derive(Deserialize)]
struct Recorded {
    kind: String,
    queues: Vec<Vec<Kind>>,
}

#[derive(Clone, Copy, Deserialize)]
struct Kind {
    opcode: u32,
    bytes: u32,
    in_flight: u32,
    requests: u64,
    pause_us: u32,
}

/// Parts of a workload, at most; and the least share of one.
const PARTS: usize = 12;
const LEAST: f64 = 0.005;

/// Records and writes the workload.
///
/// # Errors
/// When there is no such mount, or nothing was asked of it.
pub fn run(args: &RecordArgs) -> io::Result<()> {
    let pid = match (&args.mount, args.pid) {
        (_, Some(pid)) => Pid::from_raw(pid),
        (Some(mount), _) => guest_of(mount)?,
        _ => return Err(io::Error::other("a mount point or --pid is needed")),
    };
    if !waits_for_signal(pid) {
        return Err(io::Error::other(format!("process {pid} is not a tunnelfs-guest that can record")));
    }
    let file = file_of(pid)?;
    let _ = std::fs::remove_file(&file);
    kill(pid, Signal::SIGUSR2)?;
    let waited = wait(Duration::from_secs(args.seconds));
    // Also when interrupted: the guest must not go on for ever.
    kill(pid, Signal::SIGUSR2)?;
    let text = soon(&file)?;
    let _ = std::fs::remove_file(&file);
    waited?;
    let name = args.output.file_stem().unwrap_or_default().to_string_lossy();
    let mix = convert(&text, &name)?;
    let told = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", args.output.display()));
    std::fs::write(&args.output, serde_json::to_vec_pretty(&mix)?).map_err(told)?;
    for part in &mix.parts {
        println!(
            "{:>5.1} %  {:?} of {} bytes, {} in flight, {} threads, {} µs apart",
            part.share * 100.0,
            part.op,
            part.size,
            part.depth,
            part.threads,
            part.pause_us
        );
    }
    println!("{}: for tunnelfs-bench tune --workload", args.output.display());
    Ok(())
}

fn wait(time: Duration) -> io::Result<()> {
    let (start, bar) = (Instant::now(), timed(time)?);
    bar.set_message("recording");
    while start.elapsed() < time {
        interrupt::check()?;
        bar.set_position(start.elapsed().as_millis() as u64);
        std::thread::sleep(Duration::from_millis(50).min(time.saturating_sub(start.elapsed())));
    }
    bar.finish_and_clear();
    Ok(())
}

/// The file, as soon as the guest has written all of it.
fn soon(file: &Path) -> io::Result<String> {
    let start = Instant::now();
    loop {
        match std::fs::read_to_string(file) {
            Ok(text) if text.ends_with('\n') => return Ok(text),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", file.display()))),
        }
        if start.elapsed() > Duration::from_secs(30) {
            return Err(io::Error::other(format!("{}: the guest has not written it within 30 s", file.display())));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The guest that serves a mount point: the process whose command line ends with it.
fn guest_of(mount: &Path) -> io::Result<Pid> {
    let mount = mount.canonicalize().map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", mount.display())))?;
    let serves = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|b| *b == 0).map(String::from_utf8_lossy);
        let program = words.next().unwrap_or_default();
        let ours =
            ["tunnelfs-guest", "mount.tunnelfs", "mount.fuse.tunnelfs"].iter().any(|name| program.ends_with(name));
        let base = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        ours && words.any(|word| base.join(&*word) == mount || Path::new(&*word) == mount)
    };
    let all = std::fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let found: Vec<i32> = all.filter(serves).collect();
    match found[..] {
        [pid] => Ok(Pid::from_raw(pid)),
        [] => Err(io::Error::other(format!(
            "{}: no tunnelfs-guest serves it; name its process by --pid",
            mount.display()
        ))),
        _ => Err(io::Error::other(format!(
            "{}: several processes serve it ({found:?}): name one by --pid",
            mount.display()
        ))),
    }
}

/// Where that process leaves its recording: seen from here, also where it has other mounts and process numbers.
fn file_of(pid: Pid) -> io::Result<PathBuf> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let last = |field: &str, column: usize| {
        let words: Vec<&str> = status.lines().find_map(|line| line.strip_prefix(field))?.split_whitespace().collect();
        words.get(column.min(words.len().checked_sub(1)?))?.parse::<u32>().ok()
    };
    // The second of four is the effective user; the last of the numbers is the process's own.
    let (user, own) = (last("Uid:", 1), last("NSpid:", usize::MAX));
    let (Some(user), Some(own)) = (user, own) else {
        return Err(io::Error::other(format!("/proc/{pid}/status is odd")));
    };
    let file = recording::file(user, own as i32);
    Ok(PathBuf::from(format!("/proc/{pid}/root")).join(file.strip_prefix("/").unwrap_or(&file)))
}

/// Whether SIGUSR2 is blocked there, as in a guest that reads it from a descriptor: others it would end.
fn waits_for_signal(pid: Pid) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let ours = name.starts_with("tunnelfs") || name.starts_with("mount.");
    let blocked = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ours && blocked.is_some_and(|mask| mask & (1 << (Signal::SIGUSR2 as u32 - 1)) != 0)
}

/// Which of the benchmark's operations stands for one of FUSE's; `None` for what has no answer.
fn stands_for(number: u32) -> Option<Op> {
    match number {
        opcode::READ => Some(Op::Read),
        opcode::WRITE => Some(Op::Write),
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT | opcode::INIT | opcode::DESTROY => None,
        opcode::LOOKUP
        | opcode::CREATE
        | opcode::MKNOD
        | opcode::MKDIR
        | opcode::UNLINK
        | opcode::RMDIR
        | opcode::RENAME
        | opcode::RENAME2
        | opcode::LINK
        | opcode::SYMLINK => Some(Op::Lookup),
        _ => Some(Op::Getattr),
    }
}

/// A guest's recording as a workload.
fn convert(text: &str, name: &str) -> io::Result<Mix> {
    let recorded: Recorded = serde_json::from_str(text)
        .ok()
        .filter(|r: &Recorded| r.kind == "recording")
        .ok_or_else(|| io::Error::other("the guest's recording cannot be read: it is of another version"))?;
    let answered = |k: &&Kind| stands_for(k.opcode).is_some();
    let total = |queue: &Vec<Kind>| queue.iter().filter(answered).map(|k| k.requests).sum::<u64>();
    let all: u64 = recorded.queues.iter().map(total).sum();
    // A queue that has next to nothing to do is no thread that asks.
    let threads = recorded.queues.iter().filter(|q| total(q) * 20 > all).count().max(1) as u32;
    let mut parts: Vec<(Part, u64, f64)> = Vec::new();
    for kind in recorded.queues.iter().flatten() {
        let Some(op) = stands_for(kind.opcode) else { continue };
        let data = matches!(op, Op::Read | Op::Write);
        let size = if data { kind.bytes.clamp(512, 16 << 20) } else { 0 };
        let depth = kind.in_flight.clamp(1, 64) * threads;
        // Pauses that are alike are one load.
        let pause_us = if kind.pause_us == 0 { 0 } else { kind.pause_us.min(100_000).next_power_of_two() };
        let part = Part { op, size, depth, threads, pause_us, share: 0.0 };
        match parts.iter_mut().find(|(known, ..)| *known == part) {
            Some((_, requests, _)) => *requests += kind.requests,
            None => parts.push((part, kind.requests, 0.0)),
        }
    }
    let counted: u64 = parts.iter().map(|(_, requests, _)| requests).sum();
    parts.iter_mut().for_each(|(part, requests, _)| part.share = *requests as f64 / counted.max(1) as f64);
    parts.sort_by(|a, b| b.0.share.total_cmp(&a.0.share));
    let parts: Vec<Part> = parts.into_iter().map(|(part, ..)| part).filter(|p| p.share >= LEAST).take(PARTS).collect();
    if parts.is_empty() {
        return Err(io::Error::other("nothing was asked of the mount while it was recorded"));
    }
    Ok(Mix::new(name, parts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recording_becomes_a_workload() {
        let text = r#"{"kind":"recording","format":1,"queues":[
            [{"opcode":15,"bytes":4096,"in_flight":1,"requests":600,"pause_us":9},
             {"opcode":1,"bytes":64,"in_flight":1,"requests":300,"pause_us":0},
             {"opcode":2,"bytes":0,"in_flight":1,"requests":5000,"pause_us":0}],
            [{"opcode":15,"bytes":4096,"in_flight":1,"requests":100,"pause_us":12}]]}"#;
        let mix = convert(text, "work").expect("a workload");
        let read = Part { op: Op::Read, size: 4096, depth: 2, threads: 2, pause_us: 16, share: 0.7 };
        assert_eq!(mix.parts[0], read);
        assert_eq!((mix.parts[1].op, mix.parts[1].size), (Op::Lookup, 0));
        assert_eq!(mix.parts.len(), 2, "a FORGET has no answer");
        assert_eq!(Mix::parse(&serde_json::to_vec(&mix).expect("JSON")), Ok(mix));
        let empty = r#"{"kind":"recording","format":1,"queues":[[]]}"#;
        assert!(convert(empty, "work").is_err_and(|e| e.to_string().contains("nothing was asked")));
        assert!(convert("{}", "work").is_err_and(|e| e.to_string().contains("another version")));
    }
}
