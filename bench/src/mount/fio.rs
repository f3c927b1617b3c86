//! Drives fio and reads its JSON.

use super::plan::MountPlan;
use super::turn::{Io, Turn};
use crate::record::POINTS;
use serde_json::Value;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

/// Runs one job on the file `data` in `dir`.
///
/// # Errors
/// When fio fails; its own words.
pub fn run(job: &Io, dir: &Path, plan: &MountPlan) -> io::Result<Turn> {
    let mut fio = Command::new("fio");
    fio.args(["--name=job", "--thread", "--group_reporting", "--output-format=json", "--randrepeat=0"]);
    fio.arg(format!("--filename={}", dir.join("data").display()));
    fio.arg(format!("--rw={}", job.rw)).arg(format!("--bs={}", job.bs)).arg(format!("--size={}", plan.file_bytes));
    fio.arg(format!("--numjobs={}", job.numjobs)).arg(format!("--iodepth={}", job.iodepth));
    fio.arg(format!("--percentile_list={}", quantiles().map(|p| p.to_string()).collect::<Vec<_>>().join(":")));
    fio.arg(if job.iodepth > 1 { "--ioengine=io_uring" } else { "--ioengine=psync" });
    if job.user {
        fio.args(["--uid=65534", "--gid=65534"]);
    }
    if job.direct {
        let ms = plan.runtime.as_millis();
        fio.args(["--direct=1", "--time_based"])
            .arg(format!("--runtime={ms}ms"))
            .arg(format!("--ramp_time={}ms", ms / 4));
    } else {
        // The whole file once; fio drops the reader's cache of it first.
        fio.args(["--invalidate=1", "--end_fsync=1"]);
    }
    let out = fio.stdin(Stdio::null()).output()?;
    if !out.status.success() {
        return Err(io::Error::other(format!("fio: {}", String::from_utf8_lossy(&out.stderr).trim())));
    }
    // Notes may stand before the object.
    let text = String::from_utf8_lossy(&out.stdout);
    let json: Value = serde_json::from_str(&text[text.find('{').unwrap_or(0)..])?;
    let result = &json["jobs"][0];
    turn(&result[if job.rw.ends_with("read") { "read" } else { "write" }], result, job)
        .ok_or_else(|| io::Error::other("fio: its report lacks what is needed"))
}

/// What fio is asked for: [`POINTS`] but the maximum, which it tells anyhow.
fn quantiles() -> impl Iterator<Item = f64> {
    POINTS.into_iter().filter(|p| *p < 100.0)
}

fn turn(side: &Value, result: &Value, job: &Io) -> Option<Turn> {
    let percentiles = &side["clat_ns"]["percentile"];
    let at = |q: &str| percentiles[q].as_u64();
    let max_ns = side["clat_ns"]["max"].as_u64()?;
    let curve = POINTS.map(|p| if p < 100.0 { at(&format!("{p:.6}")).unwrap_or(0) } else { max_ns });
    let ops = side["total_ios"].as_u64()?;
    // With a final fsync the time that counts is the whole job's.
    let whole = (!job.direct && job.rw == "write").then(|| result["job_runtime"].as_f64()).flatten();
    let ops_per_s = whole.map_or_else(|| side["iops"].as_f64(), |ms| Some(ops as f64 * 1e3 / ms))?;
    Some(Turn {
        ops,
        ops_per_s,
        p50_ns: at("50.000000")?,
        p99_ns: at("99.000000")?,
        p999_ns: at("99.900000")?,
        max_ns,
        curve,
        ..Turn::default()
    })
}
