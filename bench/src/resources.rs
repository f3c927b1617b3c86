//! What a process holds of its machine: a leak shows here.

use nix::unistd::Pid;
use std::fmt;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// At one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Resources {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads, without those that the kernel lends an io_uring (`iou-wrk`) and takes back when they idle.
    pub threads: usize,
    /// Resident memory, KiB, with what is shared with others.
    pub resident_kib: usize,
    /// Resident memory, KiB, that is its own.
    pub anonymous_kib: usize,
}

impl Resources {
    /// Nothing for a process that has ended.
    pub fn of(pid: Pid) -> Resources {
        let proc = format!("/proc/{pid}");
        let entries = |dir: &str| fs::read_dir(Path::new(&proc).join(dir)).into_iter().flatten().flatten();
        let lent = |task: &fs::DirEntry| {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("iou-wrk"))
        };
        let status = fs::read_to_string(format!("{proc}/status")).unwrap_or_default();
        let kib = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field));
            line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(0)
        };
        Resources {
            descriptors: entries("fd").count(),
            threads: entries("task").filter(|task| !lent(task)).count(),
            resident_kib: kib("VmRSS:"),
            anonymous_kib: kib("RssAnon:"),
        }
    }

    /// As soon as descriptors and threads come and go no more, or after three seconds.
    pub fn at_rest(pid: Pid) -> Resources {
        let mut last = Resources::of(pid);
        for _ in 0..30 {
            std::thread::sleep(Duration::from_millis(100));
            let now = Resources::of(pid);
            if (now.descriptors, now.threads) == (last.descriptors, last.threads) {
                return now;
            }
            last = now;
        }
        last
    }
}

impl fmt::Display for Resources {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Resources { descriptors, threads, anonymous_kib, .. } = self;
        write!(f, "{descriptors} descriptors, {threads} threads, {anonymous_kib} KiB")
    }
}
