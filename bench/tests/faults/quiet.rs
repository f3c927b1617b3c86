//! Who waits for somebody that stands still, in the middle of work, sleeps: a VM or a host may be stopped for hours.

use crate::rig::{cpu_time, soon, Guest, Host, Stopped};
use crate::start;
use nix::unistd::Pid;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Requests that are under way meanwhile.
const ASKING: usize = 6;
/// How long is looked, and what all threads of a process may do in that time: an eighth of what one thread does that
/// looks 200 times a second.
const LOOK: Duration = Duration::from_secs(4);
const WAKES: u64 = 100;

/// How often the threads of a process have begun to wait.
fn waits(pid: Pid) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let texts = tasks.map(|task| fs::read_to_string(task.path().join("status")).unwrap_or_default());
    let count = |text: String| {
        let line = text.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        line.trim().parse::<u64>().ok()
    };
    texts.filter_map(count).sum()
}

/// The process sleeps: some `LOOK` is quiet. What was asked before may still end on a busy machine.
fn assert_quiet(pid: Pid, what: &str) {
    soon(&format!("{what}: it waits asleep"), || {
        let (before, begun) = ((waits(pid), cpu_time(pid)), Instant::now());
        std::thread::sleep(LOOK);
        let (waits, cpu) = (waits(pid).saturating_sub(before.0), cpu_time(pid).saturating_sub(before.1));
        println!("{what}: {waits} waits, {cpu:?} of CPU time in {:?}", begun.elapsed());
        let quiet = waits <= WAKES && cpu < LOOK / 40;
        if !quiet {
            print_threads(pid);
        }
        quiet.then_some(())
    });
}

/// What each thread does: its name, state and times (`stat`), the system call that it is in, and the kernel's stack.
fn print_threads(pid: Pid) {
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        for file in ["stat", "syscall", "stack"] {
            print!("{}", fs::read_to_string(task.path().join(file)).unwrap_or_default());
        }
    }
}

/// Programs in the midst of reading and writing, each on a thread; the end of each is told.
fn ask(dir: &Path) -> mpsc::Receiver<()> {
    let (tell, told) = mpsc::channel();
    let (begun, began) = mpsc::channel();
    for i in 0..ASKING {
        let (tell, begun, path) = (tell.clone(), begun.clone(), dir.join(format!("f{i}")));
        std::thread::spawn(move || {
            let file = File::create(&path).unwrap();
            for round in 0u64.. {
                file.write_all_at(&[round as u8; 20_000], round % 4 * 20_000).unwrap();
                let _ = begun.send(());
                if path.with_file_name("enough").exists() {
                    break;
                }
            }
            let _ = tell.send(());
        });
    }
    (0..ASKING).for_each(|_| began.recv_timeout(crate::PATIENCE).expect("the work has begun"));
    told
}

fn all_end(dir: &Path, told: &mpsc::Receiver<()>, what: &str) {
    fs::write(dir.join("enough"), "").unwrap();
    (0..ASKING).for_each(|_| told.recv_timeout(crate::PATIENCE).unwrap_or_else(|e| panic!("{what}: {e}")));
}

/// One side is stopped in the midst of work; the other one sleeps, and goes on with it afterwards.
fn one_waits_asleep(sides: fn(&Host, &Guest) -> (Pid, Pid)) {
    for (channel, transport) in crate::ALL {
        let Some((_scratch, host, guest)) = start(channel, transport, "") else { continue };
        let told = ask(&guest.point);
        let (stopped, waiting) = sides(&host, &guest);
        let stopped = Stopped::new(stopped);
        assert_quiet(waiting, &format!("{channel}, {transport}"));
        drop(stopped);
        all_end(&guest.point, &told, channel);
        guest.unmount();
    }
}

#[test]
fn a_guest_waits_asleep_for_a_host_that_is_stopped() {
    one_waits_asleep(|host, guest| (host.server(), guest.pid()));
}

#[test]
fn a_host_waits_asleep_for_a_guest_that_is_stopped() {
    one_waits_asleep(|host, guest| (guest.pid(), host.server()));
}
