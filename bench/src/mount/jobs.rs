//! The jobs, in fio's words.

use super::plan::MountPlan;
use super::turn::{used, Cpu, Io, Turn};
use super::{builtin, fio, metadata};
use std::io;
use std::path::Path;
use tunnelfs_settings::Cache;

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// I/O on one file.
    Io(Io),
    /// Many small files: created, looked at, listed, removed.
    Metadata,
}

/// One job.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// Its name in reports.
    pub name: &'static str,
    /// What it does.
    pub work: Work,
}

/// The jobs that make sense under a cache mode: `never` for direct I/O and metadata, `auto` for buffered I/O.
pub fn all(cache: Cache) -> Vec<Job> {
    let direct = cache == Cache::Never;
    let job = |name, rw, bs, numjobs, iodepth, user| Job {
        name,
        work: Work::Io(Io { rw, bs, direct, numjobs, iodepth, user }),
    };
    let io = |name, rw, bs, numjobs, iodepth| job(name, rw, bs, numjobs, iodepth, false);
    match cache {
        Cache::Never => vec![
            io("randread-4k", "randread", 4 << 10, 1, 1),
            io("randread-4k-2jobs", "randread", 4 << 10, 2, 1),
            io("randread-4k-qd16", "randread", 4 << 10, 1, 16),
            io("randwrite-4k", "randwrite", 4 << 10, 1, 1),
            job("randwrite-4k-user", "randwrite", 4 << 10, 1, 1, true),
            io("randwrite-4k-qd16", "randwrite", 4 << 10, 1, 16),
            io("randread-64k", "randread", 64 << 10, 1, 1),
            io("read-1m", "read", 1 << 20, 1, 1),
            io("write-1m", "write", 1 << 20, 1, 1),
            Job { name: "metadata", work: Work::Metadata },
        ],
        _ => vec![io("read-1m-buffered", "read", 1 << 20, 1, 1), io("write-1m-buffered", "write", 1 << 20, 1, 1)],
    }
}

/// What drives I/O.
pub enum Tool {
    /// The real fio, of this version.
    Fio(String),
    /// Loads of our own.
    Own,
}

impl Tool {
    /// fio, where there is one.
    pub fn find() -> Tool {
        match std::process::Command::new("fio").arg("--version").output() {
            Ok(out) if out.status.success() => Tool::Fio(String::from_utf8_lossy(&out.stdout).trim().into()),
            _ => Tool::Own,
        }
    }

    /// For the report.
    pub fn describe(&self) -> String {
        match self {
            Tool::Fio(version) => version.clone(),
            Tool::Own => {
                "own loads (fio is not installed; jobs of io_uring depth 16 and of an ordinary user are left out)"
                    .into()
            }
        }
    }
}

impl Job {
    /// Turns in a round: of those that one pass over the file makes short, a few.
    pub fn turns(&self) -> usize {
        match self.work {
            Work::Io(Io { direct: false, .. }) => 4,
            _ => 1,
        }
    }

    /// Runs the job in `dir`; one turn for each operation that it reports. `cpu` reads the file system's CPU time.
    ///
    /// # Errors
    /// The file system's, or the tool's words.
    pub fn run(
        &self,
        tool: &Tool,
        dir: &Path,
        plan: &MountPlan,
        cpu: &dyn Fn() -> Cpu,
    ) -> io::Result<Vec<(String, Turn)>> {
        let io = match self.work {
            Work::Metadata => return metadata::run(dir, plan.files, cpu),
            Work::Io(io) => io,
        };
        let before = cpu();
        let mut turn = match tool {
            Tool::Fio(_) => fio::run(&io, dir, plan)?,
            Tool::Own if io.iodepth > 1 || io.user => return Ok(Vec::new()),
            Tool::Own => builtin::run(&io, dir, plan)?,
        };
        turn.cpu = used(cpu(), before);
        Ok(vec![(self.name.into(), turn)])
    }
}
