//! What a pair costs while nothing is asked of it.

use crate::plan::Cpus;
use crate::record::Idle;
use crate::session::{process_cpu, thread_run_time};
use crate::target::{Case, Target};
use std::io;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How long pairs are left alone before it counts, and how long it counts.
const QUIET: Duration = Duration::from_secs(1);
const WATCH: Duration = Duration::from_secs(2);

/// Watches all pairs with a separate host at once, each with a guest's thread that waits for completions; uses them up.
///
/// # Errors
/// When a host cannot be ended afterwards.
pub fn watch(cases: Vec<Case>) -> io::Result<Vec<Idle>> {
    let mut watched = Vec::new();
    for Case { pair, target, .. } in cases {
        let Target::Session(mut session) = target else { continue };
        let Some(pid) = session.host_pid() else { continue };
        if pair.cpus == Cpus::One {
            continue;
        }
        let mut transport = session.queues.remove(0);
        let (tell, told) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let _ = tell.send(nix::unistd::gettid().as_raw());
            // Ends when the host does.
            while transport.wait().and_then(|()| transport.reap()).is_ok() {}
        });
        let tid = told.recv().map_err(io::Error::other)?;
        watched.push((pair, session, pid, tid, thread));
    }
    std::thread::sleep(QUIET);
    let look =
        || watched.iter().map(|(.., pid, tid, _)| (thread_run_time(*tid), process_cpu(*pid))).collect::<Vec<_>>();
    let (start, before) = (Instant::now(), look());
    std::thread::sleep(WATCH);
    let (after, seconds) = (look(), start.elapsed().as_secs_f64());
    let share = |a: Duration, b: Duration| b.saturating_sub(a).as_secs_f64() / seconds;
    let idle = watched.iter().zip(before.iter().zip(&after)).map(|((pair, ..), (b, a))| Idle {
        pair: *pair,
        guest_cpu: share(b.0, a.0),
        host_cpu: share(b.1, a.1),
    });
    let idle = idle.collect();
    for (_, mut session, _, _, thread) in watched {
        session.kill_host()?;
        let _ = thread.join();
    }
    Ok(idle)
}
