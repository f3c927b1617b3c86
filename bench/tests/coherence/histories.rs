//! Random histories: the host and a guest create, write, truncate, rename, link, chmod and unlink; what another thread of
//! the guest reads meanwhile must be explained by what the share was like (history.rs).
//!
//! Changes come one after the other, whoever makes them, so that their order is known; reads come at any time.

use crate::history::{History, Stat, Verdict};
use crate::World;
use std::collections::HashMap;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::changes::kind;

const DIRS: [&str; 2] = ["p", "q"];
const NAMES: usize = 4;
/// How old an answer may be on a machine that others keep busy. What the kernel keeps by mistake, it keeps for a day.
const BOUND: Duration = Duration::from_secs(5);
/// Each so many changes there is a pause of [`BOUND`], and all must be right after it.
const QUIET_EVERY: usize = 2_000;

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % n
    }
}

/// What has been changed so far; its lock makes changes come one by one.
struct Model {
    /// Contents by inode number.
    contents: HashMap<u64, Vec<u8>>,
    /// Files by inode number: the file system may use a number again.
    files: HashMap<u64, u64>,
    next: u64,
}

struct Test<'a> {
    world: &'a World,
    model: Mutex<Model>,
    history: Mutex<History>,
    origin: Instant,
    ages: Mutex<Vec<Duration>>,
    reads: std::sync::atomic::AtomicUsize,
    over: AtomicBool,
}

fn all_names() -> Vec<String> {
    DIRS.iter().flat_map(|dir| (0..NAMES).map(move |n| format!("{dir}/{n}"))).collect()
}

/// What a name is, and its inode number; `None`: there is no such name.
fn stat(path: &Path) -> Option<(Stat, u64)> {
    match fs::symlink_metadata(path) {
        Ok(m) => Some((Stat { links: m.nlink(), size: m.len(), mode: m.mode() & 0o7777 }, m.ino())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(e) => panic!("{}: {e}", path.display()),
    }
}

/// Also after another thread has failed: its message is the one that counts.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who changes something.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Host,
    Guest,
}

impl Test<'_> {
    fn path(&self, side: Side, name: &str) -> PathBuf {
        match side {
            Side::Host => self.world.behind(name),
            Side::Guest => self.world.inside(name),
        }
    }

    /// Makes one change, and records what the share is like then.
    fn change(&self, side: Side, random: &mut Random) {
        let names = all_names();
        let (a, b) = (&names[random.below(names.len())], &names[random.below(names.len())]);
        let mut model = lock(&self.model);
        if side == Side::Guest {
            [a, b].into_iter().for_each(|name| self.wait_for_name(name));
        }
        let begun = Instant::now();
        let content = self.apply(side, a, b, random, &mut model);
        self.record(&mut model, begun, content);
    }

    /// A guest that changes something by an old name would change another file: that is right, but not what is meant.
    fn wait_for_name(&self, name: &str) {
        let until = Instant::now() + BOUND;
        let ino = |path: PathBuf| stat(&path).map(|(_, ino)| ino);
        while ino(self.world.inside(name)) != ino(self.world.behind(name)) {
            assert!(Instant::now() < until, "{name} is another file in the guest");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// The inode whose content has changed, and the content.
    fn apply(&self, side: Side, a: &str, b: &str, random: &mut Random, model: &mut Model) -> Option<(u64, Vec<u8>)> {
        let (path, other) = (self.path(side, a), self.path(side, b));
        let (script, host) = (&self.world.script, side == Side::Host);
        let there = stat(&self.world.behind(a)).map(|(_, ino)| ino);
        match (random.below(7), there) {
            (0 | 1, None) => {
                let mode = 0o600 + random.below(0o100) as u32;
                let created = File::options().write(true).create_new(true).mode(mode).open(&path);
                drop(created.unwrap());
                let ino = stat(&self.world.behind(a)).unwrap().1;
                if host {
                    script.name(kind::CREATED, &path, 0);
                }
                model.next += 1;
                model.files.insert(ino, model.next);
                Some((ino, Vec::new()))
            }
            (0 | 2, Some(ino)) => {
                model.next += 1;
                let content = format!("{:08}", model.next).repeat(1 + random.below(8)).into_bytes();
                let write = || File::options().write(true).open(&path)?.write_all_at(&content, 0);
                let written = if host { script.write(&path, write) } else { write() };
                written.unwrap();
                let mut now = model.contents[&ino].clone();
                now.resize(now.len().max(content.len()), 0);
                now[..content.len()].copy_from_slice(&content);
                Some((ino, now))
            }
            (3, Some(ino)) => {
                let len = random.below(40);
                let truncate = || File::options().write(true).open(&path)?.set_len(len as u64);
                let done = if host { script.write(&path, truncate) } else { truncate() };
                done.unwrap();
                let mut now = model.contents[&ino].clone();
                now.resize(len, 0);
                Some((ino, now))
            }
            (4, Some(_)) if a != b => {
                let rename = || fs::rename(&path, &other);
                let done = if host { script.rename(&path, &other, rename) } else { rename() };
                done.unwrap();
                None
            }
            (5, Some(_)) => {
                fs::set_permissions(&path, Permissions::from_mode(0o600 + random.below(0o100) as u32)).unwrap();
                if host {
                    script.inode(kind::ATTRIBUTES, &path);
                }
                None
            }
            (6, Some(_)) => {
                let remove = || fs::remove_file(&path);
                let done = if host { script.remove(&path, remove) } else { remove() };
                done.unwrap();
                // Its other names have one link less, which a watch of the inode tells.
                if host {
                    self.tell_links(a);
                }
                None
            }
            (1, Some(_)) if stat(&self.world.behind(b)).is_none() => {
                fs::hard_link(&path, &other).unwrap();
                if host {
                    script.name(kind::CREATED, &other, 0);
                    script.inode(kind::ATTRIBUTES, &path);
                }
                None
            }
            _ => None,
        }
    }

    /// Tells of the attributes of all files with several names, or that had.
    fn tell_links(&self, but: &str) {
        for name in all_names().iter().filter(|name| *name != but) {
            self.world.script.inode(kind::ATTRIBUTES, &self.world.behind(name));
        }
    }

    fn record(&self, model: &mut Model, begun: Instant, content: Option<(u64, Vec<u8>)>) {
        let states: Vec<_> = all_names().into_iter().map(|name| (stat(&self.world.behind(&name)), name)).collect();
        let at = (begun, Instant::now());
        let mut history = lock(&self.history);
        if let Some((ino, content)) = content {
            history.content(model.files[&ino], &content, at);
            model.contents.insert(ino, content);
        }
        let states = states.into_iter().map(|(state, name)| match state {
            Some((stat, ino)) => (name, model.files[&ino], stat),
            None => (name, 0, Stat::default()),
        });
        history.names(&states.collect::<Vec<_>>(), at);
        history.forget_before(at.0 - BOUND * 4);
    }

    /// Reads one name as the guest has it, and judges that.
    fn read(&self, random: &mut Random) {
        let names = all_names();
        let name = &names[random.below(names.len())];
        let path = self.world.inside(name);
        let from = Instant::now();
        let verdict = if random.below(3) > 0 {
            let stat = stat(&path).map(|(stat, _)| stat);
            let to = Instant::now();
            let history = self.history_at(to);
            let verdict = history.judge_stat(name, stat, from, to);
            self.check(&history, verdict, name, format_args!("{stat:?}"), from, to);
            verdict
        } else {
            // A name that is gone is the stat's business.
            let Ok(content) = fs::read(&path) else { return };
            let to = Instant::now();
            let history = self.history_at(to);
            let verdict = history.judge_content(name, &content, from, to);
            self.check(&history, verdict, name, format_args!("{}", content.escape_ascii()), from, to);
            verdict
        };
        self.reads.fetch_add(1, Ordering::Relaxed);
        if let Verdict::Stale(age) = verdict {
            lock(&self.ages).push(age);
        }
    }

    /// The history when the change that was under way at `to` has been recorded.
    fn history_at(&self, _to: Instant) -> MutexGuard<'_, History> {
        drop(lock(&self.model));
        lock(&self.history)
    }

    fn check(
        &self,
        history: &History,
        verdict: Verdict,
        name: &str,
        value: std::fmt::Arguments<'_>,
        from: Instant,
        to: Instant,
    ) {
        let fine = match verdict {
            Verdict::Current => true,
            Verdict::Stale(age) => age <= BOUND,
            Verdict::Wrong => false,
        };
        if !fine {
            self.over.store(true, Ordering::Relaxed);
            let at = |instant: Instant| instant.duration_since(self.origin).as_micros();
            let told = history.tell(name, self.origin);
            panic!("{name} at {}..{} us: {value} is {verdict:?}\n{told}", at(from), at(to));
        }
    }

    /// After a while without changes all is as it is.
    fn check_quiet(&self) {
        let _quiet = lock(&self.model);
        let until = Instant::now() + BOUND;
        for name in all_names() {
            let wanted = stat(&self.world.behind(&name)).map(|(stat, _)| stat);
            let got = || stat(&self.world.inside(&name)).map(|(stat, _)| stat);
            while got() != wanted {
                assert!(Instant::now() < until, "{name} stays {:?}, and is {wanted:?}", got());
                std::thread::sleep(Duration::from_millis(1));
            }
            let content = fs::read(self.world.behind(&name)).ok();
            assert_eq!(fs::read(self.world.inside(&name)).ok(), content, "{name}");
        }
    }
}

fn run(world: Option<World>, through: &str, changes: usize) {
    let Some(world) = world else { return };
    for dir in DIRS {
        fs::create_dir(world.behind(dir)).unwrap();
        fs::metadata(world.inside(dir)).unwrap();
    }
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    println!("seed {seed}");
    let origin = Instant::now();
    let test = Test {
        world: &world,
        model: Mutex::new(Model { contents: HashMap::new(), files: HashMap::new(), next: 0 }),
        history: Mutex::default(),
        origin,
        ages: Mutex::default(),
        reads: Default::default(),
        over: AtomicBool::new(false),
    };
    test.record(&mut lock(&test.model), origin, None);
    std::thread::scope(|scope| {
        for reader in 1..=2 {
            let test = &test;
            scope.spawn(move || {
                let mut random = Random(seed.wrapping_mul(2 * reader + 1));
                while !test.over.load(Ordering::Relaxed) {
                    test.read(&mut random);
                }
            });
        }
        let work = || {
            let mut random = Random(seed);
            for n in 1..=changes {
                if test.over.load(Ordering::Relaxed) {
                    return;
                }
                let side = if random.below(3) == 0 { Side::Guest } else { Side::Host };
                test.change(side, &mut random);
                if n % QUIET_EVERY == 0 || n == changes {
                    test.check_quiet();
                }
            }
        };
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        test.over.store(true, Ordering::Relaxed);
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    let mut ages = test.ages.into_inner().unwrap();
    ages.sort_unstable();
    let us = |q: f64| ages.get((ages.len() as f64 * q) as usize).map_or(0, Duration::as_micros);
    println!(
        "{through}: {changes} changes, {} reads, of which {} had been right before: by p50 {} us, p99 {} us, at most {} us",
        test.reads.into_inner(),
        ages.len(),
        us(0.5),
        us(0.99),
        ages.last().map_or(0, Duration::as_micros),
    );
    world.guest.unmount();
}

#[test]
fn short_histories_by_io_uring() {
    run(World::new("uring", "ring"), "io_uring", 3_000);
}

#[test]
fn short_histories_by_dev_fuse() {
    run(World::new("fuse", "virtqueue"), "/dev/fuse", 3_000);
}

#[test]
#[ignore = "make conformance"]
fn long_histories() {
    run(World::real("uring", "ring"), "a host that watches", 1_000_000);
}

#[test]
fn short_histories_of_a_host_that_watches() {
    run(World::real("uring", "ring"), "a host that watches", 3_000);
}
