//! Loads that check what they do: each works in a directory of its own for a while.

use crate::rig::Scratch;
use crate::{fsx, installed, programs, run, Rng};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::{symlink, MetadataExt};
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

/// Where, and until when.
pub struct Work<'a> {
    pub dir: PathBuf,
    pub scratch: &'a Scratch,
    pub seed: u64,
    pub until: Instant,
    /// Whether lists of names come from the host, and not from the guest's kernel.
    pub fresh_lists: bool,
}

/// Does it; what was checked, and how often.
pub type Load = fn(&Work) -> (&'static str, u64);

const LOADS: [(&str, Load); 4] = [("fsx", fsx), ("fio", fio), ("storm", storm), ("programs", a_program)];

/// Two or three of them.
pub fn draw(rng: &mut Rng) -> Vec<(&'static str, Load)> {
    (0..2 + rng.below(2)).map(|_| LOADS[rng.below(LOADS.len())]).collect()
}

/// What has been checked so far.
#[derive(Default)]
pub struct Tally(BTreeMap<&'static str, u64>);

impl Tally {
    pub fn add(&mut self, what: &'static str, count: u64) {
        *self.0.entry(what).or_default() += count;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let words: Vec<_> = self.0.iter().map(|(what, count)| format!("{count} {what}")).collect();
        f.write_str(&words.join(", "))
    }
}

fn fsx(work: &Work) -> (&'static str, u64) {
    const OPERATIONS: u32 = 1000;
    let (mut rng, mut done) = (Rng::new(work.seed), 0);
    let program = installed("fsx").expect("it was there before");
    let config = work.scratch.path(&format!("fsx{}.toml", work.seed));
    while Instant::now() < work.until {
        let plan = [fsx::ANYTHING, fsx::BLOCKS][usize::from(rng.below(4) == 0)];
        fs::write(&config, plan).unwrap();
        let seed = rng.next() as u32;
        fsx::exercise(&program, &config, work.scratch, &work.dir.join("file"), OPERATIONS, seed.into());
        done += u64::from(OPERATIONS);
    }
    fs::remove_file(config).unwrap();
    ("operations of fsx", done)
}

/// fio writes a file, and then reads it with a checksum in each block.
fn fio(work: &Work) -> (&'static str, u64) {
    let (mut rng, mut verified) = (Rng::new(work.seed), 0);
    while Instant::now() < work.until {
        let mut of = |words: &[&'static str]| words[rng.below(words.len())];
        let mut fio = Command::new("fio");
        fio.args(["--name=verify", "--thread", "--output-format=json", "--size=16m", "--fallocate=none"]);
        fio.args(["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0", "--end_fsync=1"]);
        fio.args([of(&["--rw=write", "--rw=randwrite"]), of(&["--bs=4k", "--bs=20k", "--bs=64k", "--bs=1m"])]);
        fio.args([of(&["--direct=0", "--direct=1"]), of(&["--ioengine=psync", "--ioengine=io_uring"])]);
        fio.args([of(&["--iodepth=1", "--iodepth=8"]), of(&["--numjobs=1", "--numjobs=2"])]);
        fio.arg(format!("--directory={}", work.dir.display())).arg(format!("--randseed={}", rng.next() as u32));
        let said = String::from_utf8(run(fio.current_dir(work.scratch.path(""))).stdout).unwrap();
        // Notes may stand before the object.
        let report: serde_json::Value = serde_json::from_str(&said[said.find('{').unwrap()..]).unwrap();
        let jobs = report["jobs"].as_array().unwrap();
        let read: u64 = jobs.iter().map(|job| job["read"]["io_bytes"].as_u64().unwrap()).sum();
        // Whole blocks.
        assert!(read > 15 << 20, "fio has verified {read} bytes");
        verified += read;
        for entry in fs::read_dir(&work.dir).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
    }
    ("bytes verified by fio", verified)
}

/// One of the programs of the conformance tests.
fn a_program(work: &Work) -> (&'static str, u64) {
    let (_, load) = programs::LOADS[work.seed as usize % programs::LOADS.len()];
    load(&work.dir, &work.scratch.path("source"), 1);
    ("runs of programs", 1)
}

/// Names made, changed, listed and removed by several threads in one directory.
fn storm(work: &Work) -> (&'static str, u64) {
    let threads = (0..3).map(|n| Names { work, prefix: format!("{n}-"), sizes: BTreeMap::new() });
    let calls = std::thread::scope(|scope| {
        let running = threads.enumerate().map(|(n, mut names)| {
            let mut rng = Rng::new(work.seed.wrapping_add(n as u64));
            scope.spawn(move || {
                let mut calls = 0;
                while Instant::now() < work.until {
                    names.step(&mut rng);
                    calls += 1;
                }
                calls
            })
        });
        running.collect::<Vec<_>>().into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    ("steps of metadata storms", calls)
}

/// A thread's own names, and how large the files are.
struct Names<'a> {
    work: &'a Work<'a>,
    prefix: String,
    sizes: BTreeMap<String, u64>,
}

impl Names<'_> {
    const MOST: usize = 200;

    fn path(&self, name: &str) -> PathBuf {
        self.work.dir.join(name)
    }

    fn any(&self, rng: &mut Rng) -> Option<String> {
        self.sizes.keys().nth(rng.below(self.sizes.len().max(1))).cloned()
    }

    fn step(&mut self, rng: &mut Rng) {
        let new = format!("{}{}", self.prefix, rng.below(Self::MOST));
        let old = self.any(rng);
        match (rng.below(12), old) {
            (0..4, _) if !self.sizes.contains_key(&new) => {
                let size = rng.below(9000) as u64;
                File::create_new(self.path(&new)).and_then(|f| f.set_len(size)).unwrap();
                self.sizes.insert(new, size);
            }
            (4, Some(old)) => {
                fs::rename(self.path(&old), self.path(&new)).unwrap();
                let size = self.sizes.remove(&old).unwrap();
                self.sizes.insert(new, size);
            }
            (5, Some(old)) => {
                let link = self.path(&format!("{}link", self.prefix));
                fs::hard_link(self.path(&old), &link).unwrap();
                assert_eq!(fs::metadata(self.path(&old)).unwrap().nlink(), 2);
                fs::remove_file(link).unwrap();
            }
            (6, Some(old)) => {
                let link = self.path(&format!("{}sym", self.prefix));
                symlink(&old, &link).unwrap();
                assert_eq!(fs::metadata(&link).unwrap().len(), self.sizes[&old]);
                fs::remove_file(link).unwrap();
            }
            (7, _) => {
                let dir = self.path(&format!("{}dir", self.prefix));
                fs::create_dir(&dir).unwrap();
                File::create_new(dir.join("f")).unwrap();
                assert!(fs::remove_dir(&dir).is_err());
                fs::remove_dir_all(dir).unwrap();
            }
            (8, _) => self.list(),
            (9, Some(old)) => {
                fs::remove_file(self.path(&old)).unwrap();
                self.sizes.remove(&old);
            }
            (_, Some(old)) => assert_eq!(fs::metadata(self.path(&old)).unwrap().len(), self.sizes[&old], "{old}"),
            _ => {}
        }
    }

    /// No name is listed that is not there. More cannot be asked of a directory in memory: while others change it, Linux
    /// 6.18's tmpfs itself hides and doubles names when a list takes several calls (ext4 does not).
    fn list(&self) {
        let names = fs::read_dir(&self.work.dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut ours = names.filter(|name| name.starts_with(&self.prefix));
        let gone = ours.find(|name| !self.sizes.contains_key(name));
        assert!(gone.is_none() || !self.work.fresh_lists, "{gone:?} is listed, {:?} are there", self.sizes.keys());
    }
}
