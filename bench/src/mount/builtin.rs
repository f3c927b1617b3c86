//! Loads of our own, where fio is not installed: `pread` and `pwrite`, one request at a time in each thread.

use super::plan::MountPlan;
use super::turn::{Io, Turn};
use crate::limits::histogram;
use hdrhistogram::Histogram;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Instant;
use tunnelfs_ring::Region;

/// Runs one job on the file `data` in `dir`.
///
/// # Errors
/// The file system's.
pub fn run(job: &Io, dir: &Path, plan: &MountPlan) -> io::Result<Turn> {
    let path = dir.join("data");
    let flags = if job.direct { libc::O_DIRECT } else { 0 };
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
    if !job.direct {
        nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    }
    let start = Instant::now();
    let parts = std::thread::scope(|s| {
        let file = &file;
        let threads: Vec<_> =
            (0..job.numjobs).map(|number| s.spawn(move || thread(job, file, plan, number.into()))).collect();
        threads.into_iter().map(|t| t.join().expect("no panic")).collect::<io::Result<Vec<_>>>()
    })?;
    if !job.direct && job.rw == "write" {
        file.sync_all()?;
    }
    let elapsed = start.elapsed();
    let mut all = histogram();
    parts.iter().for_each(|part| all.add(part).expect("same bounds"));
    Ok(Turn::of(&all, elapsed))
}

fn thread(job: &Io, file: &File, plan: &MountPlan, number: u64) -> io::Result<Histogram<u64>> {
    // Page-aligned, as O_DIRECT wants it.
    let memory = Region::new(job.bs as usize, false).map_err(io::Error::other)?;
    // SAFETY: private to this thread, as long as the request is.
    let buffer = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr(), job.bs as usize) };
    let (blocks, start) = (plan.file_bytes / u64::from(job.bs), Instant::now());
    let (mut latency, mut random, mut n) = (histogram(), number * 2 + 1, 0u64);
    while if job.direct { start.elapsed() < plan.runtime } else { n < blocks } {
        let block = if job.rw.starts_with("rand") {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % blocks
        } else {
            n % blocks
        };
        let (at, begin) = (block * u64::from(job.bs), Instant::now());
        if job.rw.ends_with("read") {
            file.read_exact_at(buffer, at)?;
        } else {
            file.write_all_at(buffer, at)?;
        }
        latency.saturating_record(begin.elapsed().as_nanos() as u64);
        n += 1;
    }
    Ok(latency)
}
