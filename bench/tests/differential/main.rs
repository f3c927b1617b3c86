//! Random sequences of every operation, in a mount and in a native directory of the same file system: each result,
//! error, attribute and byte must be the same. A sequence that tells them apart is made small before it is shown.
//!
//! Half a minute; `DIFFERENTIAL_SECONDS` makes it longer, `DIFFERENTIAL_SEED` draws other sequences, and
//! `DIFFERENTIAL_WITHOUT` leaves operations out; `--ignored` runs every way of caching for minutes with sequences that are new each time. Needs root and
//! `/dev/fuse`; is skipped without them.

#[allow(dead_code)] // Shared: not every test program has a use for all of it.
#[path = "../common/mod.rs"]
mod common;
mod differences;
mod ops;
#[allow(dead_code)]
#[path = "../mount/rig.rs"]
mod rig;
#[path = "../common/skip.rs"]
mod skip;
mod world;

use common::pair::{Pair, Setup};
use ops::Op;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::LazyLock;
use std::time::{Duration, Instant};
use world::World;

/// Options of the host and of the mount.
type Way = (&'static [&'static str], &'static str);

/// For `trusted.*` attributes, which are among those that are set.
const TRUSTED: &str = "--modcaps=+sys_admin";
const PLAIN: Way = (&[TRUSTED], "");
const WRITEBACK: Way = (&[TRUSTED, "--cache=always", "--writeback"], "writeback");
const UNCACHED: Way = (&[TRUSTED, "--cache=never", "--allow-mmap"], "");
const DEV: Way = (&[TRUSTED, "--cache=always"], "channel=fuse,transport=virtqueue");

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text}: a number is wanted")),
        Err(_) => default,
    }
}

/// A new directory on each side, gone at the end.
struct Sides {
    mount: PathBuf,
    native: PathBuf,
    behind: PathBuf,
}

impl Sides {
    fn new(pair: &Pair) -> Sides {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("case-{}", COUNT.fetch_add(1, Relaxed));
        let sides = Sides { mount: pair.on(&name), native: pair.native(&name), behind: pair.behind(&name) };
        for dir in [&sides.mount, &sides.native] {
            std::fs::create_dir(dir).unwrap();
            world::set_mode(dir, 0o777);
        }
        sides
    }
}

impl Drop for Sides {
    fn drop(&mut self) {
        for dir in [&self.behind, &self.native] {
            let _ = std::fs::remove_dir_all(dir);
        }
    }
}

/// Operations that `DIFFERENTIAL_WITHOUT` names (`Tmpfile,Seek`): to find what else differs behind what is known.
fn is_left_out(op: &Op) -> bool {
    static LEFT_OUT: LazyLock<Vec<String>> = LazyLock::new(|| {
        let names = std::env::var("DIFFERENTIAL_WITHOUT").unwrap_or_default();
        names.split(',').filter(|n| !n.is_empty()).map(|n| format!("{n} ")).collect()
    });
    !LEFT_OUT.is_empty() && LEFT_OUT.iter().any(|name| format!("{op:?}").starts_with(name))
}

/// Operations that have failed natively, and that have not: what is compared must not be errors alone.
static DONE: [AtomicU32; 2] = [AtomicU32::new(0), AtomicU32::new(0)];

/// Does it on both sides.
fn run(ops: &[Op], mount: &Path, native: &Path) -> Result<(), String> {
    let (mut here, mut there) = (World::begun(mount), World::begun(native));
    for (i, op) in ops.iter().enumerate().filter(|(_, op)| !is_left_out(op)) {
        let (mounted, native) = (here.apply(op), there.apply(op));
        DONE[usize::from(native.is_ok())].fetch_add(1, Relaxed);
        if mounted != native && !differences::is_known(op, &mounted, &native) {
            return Err(format!("step {i}, {op:?}: {mounted:?} on the mount, {native:?} natively"));
        }
    }
    let (here, there) = (here.finish(), there.finish());
    differences::of_trees(&here, &there).map_or(Ok(()), |d| Err(format!("in the end: {d}")))
}

fn check(pair: &Pair, ops: &[Op]) -> Result<(), TestCaseError> {
    let sides = Sides::new(pair);
    run(ops, &sides.mount, &sides.native).map_err(TestCaseError::fail)?;
    // And the host has what the mount shows.
    let (shown, is) = (World::new(&sides.mount).finish(), World::new(&sides.behind).finish());
    differences::of_trees(&shown, &is)
        .map_or(Ok(()), |d| Err(TestCaseError::fail(format!("between the mount and the host's directory: {d}"))))
}

/// Threads, each with a part of the tree of its own.
fn check_threads(pair: &Pair, threads: &[Vec<Op>]) -> Result<(), TestCaseError> {
    let sides = Sides::new(pair);
    let results: Vec<_> = std::thread::scope(|s| {
        let spawn = |(i, ops): (usize, &Vec<Op>)| {
            let dirs = [&sides.mount, &sides.native].map(|side| side.join(format!("{i}")));
            for dir in &dirs {
                std::fs::create_dir(dir).unwrap();
                world::set_mode(dir, 0o777);
            }
            let ops = ops.clone();
            s.spawn(move || run(&ops, &dirs[0], &dirs[1]))
        };
        let threads: Vec<_> = threads.iter().enumerate().map(spawn).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    results.into_iter().collect::<Result<(), String>>().map_err(TestCaseError::fail)
}

/// For a time, as many cases as there is room for.
fn compare((host, mount): Way, time: Duration, seed: u64, with_threads: bool) {
    let Some(setup) = Setup::new() else { return };
    let pair = setup.start(host, mount);
    let config = Config { cases: 8, failure_persistence: None, max_shrink_iters: 400, ..Config::default() };
    let (start, mut cases) = (Instant::now(), 0u64);
    while start.elapsed() < time {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        bytes[8..16].copy_from_slice(&cases.to_le_bytes());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let mut runner = TestRunner::new_with_rng(config.clone(), rng);
        let result = if with_threads {
            let threads = prop::collection::vec(prop::collection::vec(ops::any_op(), 1..25), 3);
            runner.run(&threads, |threads| check_threads(&pair, &threads)).map_err(|e| e.to_string())
        } else {
            let ops = prop::collection::vec(ops::any_op(), 1..60);
            runner.run(&ops, |ops| check(&pair, &ops)).map_err(|e| e.to_string())
        };
        if let Err(e) = result {
            panic!("host {host:?}, mount {mount:?}, DIFFERENTIAL_SEED={seed}: {e}");
        }
        cases += u64::from(config.cases);
    }
    println!("host {host:?}, mount {mount:?}: {cases} cases in {:?}", start.elapsed());
    let [refused, done] = DONE.each_ref().map(|n| n.load(Relaxed));
    println!("host {host:?}, mount {mount:?}: {cases} cases in {:?}", start.elapsed());
    println!("of all operations so far {done} were done, {refused} refused");
    assert!(done > refused / 3, "most are refused: nothing is compared");
}

/// Seconds of each of the four tests below.
fn quick() -> (Duration, u64) {
    (Duration::from_secs(number("DIFFERENTIAL_SECONDS", 30)) / 4, number("DIFFERENTIAL_SEED", 1))
}

#[test]
fn one_program() {
    let (time, seed) = quick();
    compare(PLAIN, time, seed, false);
}

#[test]
fn one_program_with_writeback() {
    let (time, seed) = quick();
    compare(WRITEBACK, time, seed, false);
}

#[test]
fn one_program_without_caches() {
    let (time, seed) = quick();
    compare(UNCACHED, time, seed, false);
}

#[test]
fn several_threads() {
    let (time, seed) = quick();
    compare(PLAIN, time, seed, true);
}

/// For `make conformance`: ten minutes, or as long as told.
#[test]
#[ignore = "ten minutes"]
fn all_ways_for_long() {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let seed = number("DIFFERENTIAL_SEED", now);
    let time = Duration::from_secs(number("DIFFERENTIAL_SECONDS", 600));
    println!("DIFFERENTIAL_SEED={seed}");
    for way in [PLAIN, WRITEBACK, UNCACHED, DEV] {
        for with_threads in [false, true] {
            compare(way, time / 8, seed, with_threads);
        }
    }
}

/// The rig notices what it is for: two directories that are not alike.
#[test]
fn differences_are_seen() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let sides = dirs.each_ref().map(|d| d.path());
    let nothing = || run(&[Op::List { user: 0, name: ops::Name(0) }], sides[0], sides[1]);
    assert_eq!(nothing(), Ok(()));
    std::fs::write(sides[0].join("x"), "x").unwrap();
    assert!(nothing().is_err(), "a file too many");
    std::fs::write(sides[1].join("x"), "y").unwrap();
    assert!(nothing().is_err(), "another content");
    std::fs::write(sides[1].join("x"), "x").unwrap();
    assert_eq!(nothing(), Ok(()));
    world::set_mode(&sides[1].join("x"), 0o600);
    world::set_mode(&sides[0].join("x"), 0o640);
    assert!(nothing().is_err(), "another mode");
    world::set_mode(&sides[0].join("x"), 0o600);
    std::fs::hard_link(sides[0].join("x"), sides[0].join("y")).unwrap();
    std::fs::write(sides[1].join("y"), "x").unwrap();
    world::set_mode(&sides[1].join("y"), 0o600);
    assert!(nothing().is_err(), "one file, or two");
}
