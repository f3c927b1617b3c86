//! Nothing here may hang for ever: what takes too long is ended with all that it holds up.

use nix::mount::{umount2, MntFlags};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long one step may take.
const LIMIT: Duration = Duration::from_secs(400);

struct Step {
    what: String,
    begun: Instant,
    pids: Vec<Pid>,
    over: bool,
}

/// Watches one step after the other.
pub struct Overseer(Arc<Mutex<Step>>);

impl Overseer {
    /// For what works on the mount at `point`.
    pub fn start(point: PathBuf) -> Overseer {
        let step = Step { what: "the start".into(), begun: Instant::now(), pids: Vec::new(), over: false };
        let step = Arc::new(Mutex::new(step));
        let watched = step.clone();
        std::thread::spawn(move || loop {
            std::thread::sleep(Duration::from_millis(500));
            let step = watched.lock().unwrap();
            if step.over {
                return;
            }
            if step.begun.elapsed() > LIMIT {
                give_up(&step, &point);
            }
        });
        Overseer(step)
    }

    /// The next step, and the processes that it needs.
    pub fn begin(&self, what: &str, pids: &[Pid]) {
        let mut step = self.0.lock().unwrap();
        *step = Step { what: what.into(), begun: Instant::now(), pids: pids.into(), over: false };
    }
}

impl Drop for Overseer {
    fn drop(&mut self) {
        self.0.lock().unwrap().over = true;
    }
}

/// A thread that hangs in the mount can only be freed by the end of the mount.
fn give_up(step: &Step, point: &std::path::Path) -> ! {
    println!("soak: HANGS: {} took more than {LIMIT:?}", step.what);
    for pid in &step.pids {
        let _ = kill(*pid, Signal::SIGKILL);
    }
    let _ = umount2(point, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
    let _ = umount2(&point.with_file_name("share"), MntFlags::MNT_DETACH);
    std::thread::sleep(Duration::from_secs(1));
    std::process::exit(101);
}
