//! Many small files: created, looked at, listed, removed, by one thread.

use super::turn::{used, Cpu, Turn};
use crate::limits::histogram;
use crate::record::Curve;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Runs all four on `files` files in a new directory of `dir`, and `create+stat+unlink` as their sum.
///
/// # Errors
/// The file system's.
pub fn run(dir: &Path, files: usize, cpu: &dyn Fn() -> Cpu) -> io::Result<Vec<(String, Turn)>> {
    let dir = dir.join("many");
    fs::create_dir(&dir)?;
    let paths: Vec<PathBuf> = (0..files).map(|i| dir.join(format!("file-{i}"))).collect();
    let create = each("create", &paths, cpu, |p| File::create_new(p).map(drop))?;
    let stat = each("stat", &paths, cpu, |p| fs::metadata(p).map(drop))?;
    let list = each("readdir", std::slice::from_ref(&dir), cpu, |d| {
        let found = fs::read_dir(d)?.count();
        if found == files {
            Ok(())
        } else {
            Err(io::Error::other(format!("{found} of {files} files listed")))
        }
    })?;
    let unlink = each("unlink", &paths, cpu, |p| fs::remove_file(p))?;
    fs::remove_dir(&dir)?;
    let three = [&create.1, &stat.1, &unlink.1];
    let seconds: f64 = three.iter().map(|t| t.ops as f64 / t.ops_per_s).sum();
    let sum = Turn {
        ops: create.1.ops,
        ops_per_s: create.1.ops as f64 / seconds,
        p50_ns: three.iter().map(|t| t.p50_ns).sum(),
        p99_ns: three.iter().map(|t| t.p99_ns).sum(),
        p999_ns: three.iter().map(|t| t.p999_ns).sum(),
        max_ns: three.iter().map(|t| t.max_ns).sum(),
        curve: Curve::default(),
        cpu: [0, 1].map(|side| three.iter().map(|t| t.cpu[side]).sum()),
    };
    Ok(vec![create, stat, list, unlink, ("create+stat+unlink".into(), sum)])
}

fn each(
    name: &str,
    paths: &[PathBuf],
    cpu: &dyn Fn() -> Cpu,
    work: impl Fn(&Path) -> io::Result<()>,
) -> io::Result<(String, Turn)> {
    let (mut latency, start, before) = (histogram(), Instant::now(), cpu());
    for path in paths {
        let begin = Instant::now();
        work(path)?;
        latency.saturating_record(begin.elapsed().as_nanos() as u64);
    }
    let mut turn = Turn::of(&latency, start.elapsed());
    turn.cpu = used(cpu(), before);
    Ok((name.into(), turn))
}
