//! For a while, all that a mount must withstand: loads that check their own bytes on mounts of every kind, processes
//! that are stopped, killed and replaced, all at random from a seed. What host and guest hold is recorded, and must
//! stay flat. `make soak` runs it for half an hour.

mod deaths;
mod draw;
mod held;
mod loads;
mod overseer;

use crate::rig::{Guest, Host, Scratch};
use crate::{installed, programs, Rng};
use deaths::End;
use draw::HostPlan;
use held::{Record, State};
use loads::{Tally, Work};
use nix::sys::signal::{kill, Signal};
use overseer::Overseer;
use std::fs;
use std::time::{Duration, Instant};

/// SOAK_SECONDS of it (1800), from SEED.
#[test]
#[ignore = "make soak"]
fn as_long_as_told() {
    let told = std::env::var("SOAK_SECONDS").ok().map(|text| text.parse().expect("SOAK_SECONDS is a number"));
    soak(Duration::from_secs(told.unwrap_or(1800)));
}

/// How long loads run together; then what is held is looked at.
const PHASE: Duration = Duration::from_secs(10);

/// Host after host for `length`.
fn soak(length: Duration) {
    let uring = Scratch::for_channel("uring");
    let channels: &'static [&'static str] = if uring.is_some() { &["uring", "fuse"] } else { &["fuse"] };
    let Some(scratch) = uring.or_else(Scratch::new) else { return };
    if installed("fsx").is_none() {
        return;
    }
    if std::process::Command::new("fio").arg("--version").output().is_err() {
        return crate::skip::lacking("fio is not installed (`make deps-conformance`)");
    }
    let seed = Rng::seed();
    println!("soak: {} s with SEED={seed}", length.as_secs());
    let scratch = scratch.in_memory("1g");
    programs::plant(&scratch.path("source"), 150);
    let mut soak = Soak {
        channels,
        rng: Rng::new(seed),
        end: Instant::now() + length,
        overseer: Overseer::start(scratch.path("mnt")),
        record: Record::new(seed),
        tally: Tally::default(),
        ends: Vec::new(),
        scratch,
    };
    let mut hosts = 0;
    while Instant::now() < soak.end {
        hosts += 1;
        soak.one_host();
    }
    println!("soak: SEED={seed}: {hosts} hosts, {} mounts, which ended by {}", soak.ends.len(), End::count(&soak.ends));
    println!("soak: {}; no wrong byte", soak.tally);
    println!("soak: {}", soak.record.summary());
}

struct Soak {
    channels: &'static [&'static str],
    rng: Rng,
    end: Instant,
    overseer: Overseer,
    record: Record,
    tally: Tally,
    ends: Vec<End>,
    scratch: Scratch,
}

impl Soak {
    /// A host, from its start to its death or for a while; guest after guest.
    fn one_host(&mut self) {
        let plan = HostPlan::draw(&mut self.rng);
        println!("soak: host {}", plan.options.join(" "));
        let until = self.end.min(Instant::now() + PHASE * [4, 20][self.rng.below(2)]);
        self.overseer.begin("a host's start", &[]);
        let mut host = plan.start(&self.scratch);
        self.record.new_host();
        while Instant::now() < until {
            let words = plan.draw_guest(&mut self.rng, self.channels);
            println!("soak:   guest {words}");
            self.overseer.begin("a mount", &[host.server()]);
            let guest = Guest::mount(&self.scratch, &host, &words);
            self.record.new_guest();
            let end = self.one_guest(guest, &mut host, &plan, until);
            self.ends.push(end);
            if end == End::HostKilled {
                return;
            }
            self.overseer.begin("the host's rest", &[host.server()]);
            self.record.look(State::Alone, host.server(), None);
        }
    }

    fn one_guest(&mut self, guest: Guest, host: &mut Host, plan: &HostPlan, until: Instant) -> End {
        // Few live long, to see slow growth.
        let phases = [1, 1, 2, 6][self.rng.below(4)];
        for _ in 0..phases {
            self.one_phase(&guest, host, !plan.keeps_lists());
            if Instant::now() > until {
                break;
            }
        }
        let end = End::draw(&mut self.rng);
        self.overseer.begin(end.name(), &[guest.pid(), host.server()]);
        let checked = end.come(guest, host, &self.scratch);
        self.tally.add("acknowledged records, all there", checked);
        end
    }

    /// Some loads together; then all is removed, and what both sides hold is looked at.
    fn one_phase(&mut self, guest: &Guest, host: &Host, fresh_lists: bool) {
        let pids = [guest.pid(), host.server()];
        let loads = loads::draw(&mut self.rng);
        let names = loads.iter().map(|l| l.0).collect::<Vec<_>>().join(", ");
        self.overseer.begin(&names, &pids);
        let (rng, scratch) = (&mut self.rng, &self.scratch);
        let until = Instant::now() + PHASE;
        let done = std::thread::scope(|scope| {
            let running: Vec<_> = loads
                .iter()
                .enumerate()
                .map(|(i, (name, load))| {
                    let dir = guest.point.join(format!("{name}{i}"));
                    fs::create_dir(&dir).unwrap();
                    let work = Work { dir, scratch, seed: rng.next(), until, fresh_lists };
                    scope.spawn(move || {
                        let done = load(&work);
                        fs::remove_dir_all(&work.dir).unwrap();
                        done
                    })
                })
                .collect();
            // Either side may be held up for a moment.
            for _ in 0..rng.below(4) {
                std::thread::sleep(PHASE / 8);
                let pid = pids[rng.below(2)];
                kill(pid, Signal::SIGSTOP).unwrap();
                std::thread::sleep(Duration::from_millis(rng.below(300) as u64));
                kill(pid, Signal::SIGCONT).unwrap();
            }
            let joined = running.into_iter().map(|load| load.join());
            joined.collect::<Result<Vec<_>, _>>().unwrap_or_else(|panic| {
                println!("soak: failed; the guest has said: {}", guest.output());
                println!("soak: {}", guest.statistics());
                std::panic::resume_unwind(panic)
            })
        });
        done.into_iter().for_each(|(what, count)| self.tally.add(what, count));
        let left = fs::read_dir(&guest.point).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
        assert!(left.is_empty(), "left behind: {left:?}");
        self.overseer.begin("rest", &pids);
        let line = self.record.look(State::Mounted, pids[1], Some(pids[0]));
        println!("soak: {line} after {names}");
    }
}
