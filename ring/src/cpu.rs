//! Which CPUs a thread runs on.

use crate::error::Error;
use nix::sched::{sched_getaffinity, sched_setaffinity, CpuSet};
use nix::unistd::Pid;

/// The CPUs that the calling thread may use, in order.
pub fn allowed_cpus() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else { return vec![0] };
    (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or(false)).collect()
}

/// Returns the first of `cpus` on which no thread of this process can run: it is offline, outside of the process's
/// cpuset, or not there. `None`: all of them serve, or there is no thread to try them on.
pub fn first_unusable_cpu(cpus: &[usize]) -> Option<usize> {
    if cpus.is_empty() {
        return None;
    }
    let refused = |cpu: &usize| set_affinity(&[*cpu]).is_err();
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, || cpus.iter().copied().find(refused));
        thread.ok()?.join().unwrap_or(None)
    })
}

/// Confines the calling thread, and what it starts from now on, to some CPUs.
///
/// # Errors
/// [`Error::Os`] when there is no such CPU, or it is not for this process.
pub fn set_affinity(cpus: &[usize]) -> Result<(), Error> {
    let mut set = CpuSet::new();
    let mut stay = || {
        cpus.iter().try_for_each(|&cpu| set.set(cpu))?;
        sched_setaffinity(Pid::from_raw(0), &set)
    };
    stay().map_err(|e| Error::Os { what: format!("running on CPUs {cpus:?}"), source: e.into() })
}
