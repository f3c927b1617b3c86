//! fsx: a file under random reads, writes, mappings, truncations, holes and
//! copies always has the bytes that were put there.

use crate::rig::Scratch;
use crate::{ignored, installed, run, Mounted, Rng};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Operations of a run. fsx 0.3.2 never unmaps what it has read by mapping, and each operation looks through all of a
/// file's mappings: a million operations in one process get ever slower, and end at `vm.max_map_count`.
const RUN: u32 = 20_000;
/// Runs that make a million operations.
const MILLION: u32 = 50;

/// A cache mode: its name, and what host and guest are told.
type Mode = (&'static str, &'static [&'static str], &'static str);

/// Without a cache, mappings must be allowed.
const MODES: [Mode; 6] = [
    ("auto", &["--cache=auto"], ""),
    ("never", &["--cache=never", "--allow-mmap"], ""),
    ("metadata", &["--cache=metadata", "--allow-mmap"], ""),
    ("always", &["--cache=always"], ""),
    ("auto and writeback", &["--cache=auto", "--writeback"], ",writeback"),
    ("always and writeback", &["--cache=always", "--writeback"], ",writeback"),
];

/// How often what is done, in parts of the whole: reads and writes of any offset and length, and all else that fsx has.
/// It takes the error of a posix_fallocate of nothing for the lack of it: no operation is empty.
pub const ANYTHING: &str = "
flen = 262144
[opsize]
min = 1
max = 65536
[weights]
read = 10
write = 10
mapread = 6
mapwrite = 6
truncate = 4
invalidate = 1
close_open = 1
fsync = 0.5
fdatasync = 0.5
posix_fallocate = 2
punch_hole = 2
sendfile = 2
posix_fadvise = 1
copy_file_range = 3
";

/// Large requests, whole blocks.
pub const BLOCKS: &str = "
flen = 16777216
[opsize]
min = 4096
max = 4194304
align = 4096
[weights]
read = 10
write = 10
mapread = 1
mapwrite = 1
truncate = 3
close_open = 1
punch_hole = 1
copy_file_range = 1
";

/// Runs it to its end on `file`; what it leaves after a failure goes into the scratch.
pub fn exercise(program: &Path, config: &Path, scratch: &Scratch, file: &Path, operations: u32, seed: u64) {
    let mut command = Command::new(program);
    command.arg("-f").arg(config).arg("-P").arg(scratch.path("")).args(["-N", &operations.to_string()]);
    run(command.args(["-S", &seed.to_string()]).arg(file));
    fs::remove_file(file).unwrap();
}

fn over(channel: &str, mode: Mode, plans: &[(&str, u32, u32)]) {
    let Some(program) = installed("fsx") else { return };
    let Some(scratch) = Scratch::for_channel(channel) else { return };
    let (name, options, words) = mode;
    // In memory: else most of the time would go into the disk's syncs.
    let mounted = Mounted::on(scratch.in_memory("100m"), (channel, "ring"), options, words);
    let config = mounted.scratch.path("fsx.toml");
    for &(plan, runs, operations) in plans {
        fs::write(&config, plan).unwrap();
        let first = Rng::seed();
        println!("{channel}, cache {name}: {operations} operations {runs} times, with SEED={first} and the next ones");
        for seed in (0..runs).map(|run| first.wrapping_add(run.into())) {
            exercise(&program, &config, &mounted.scratch, &mounted.path("file"), operations, seed);
        }
    }
    mounted.guest.unmount();
}

#[test]
fn io_uring() {
    over("uring", MODES[0], &[(ANYTHING, 1, RUN)]);
}

#[test]
fn the_device() {
    over("fuse", MODES[0], &[(ANYTHING, 1, RUN)]);
}

#[test]
fn without_a_cache() {
    over("uring", MODES[1], &[(ANYTHING, 1, RUN)]);
}

/// The other modes, a little of each.
#[test]
fn other_caches() {
    for (i, mode) in MODES[2..].iter().enumerate() {
        over(["uring", "fuse"][i % 2], *mode, &[(ANYTHING, 1, RUN / 10), (BLOCKS, 1, RUN / 10)]);
    }
}

/// A million operations of any kind, and some on large blocks.
fn long(channel: &str, mode: Mode) {
    over(channel, mode, &[(ANYTHING, MILLION, RUN), (BLOCKS, 1, RUN)]);
}

ignored! {
    uring_auto: long("uring", MODES[0]);
    uring_never: long("uring", MODES[1]);
    uring_metadata: long("uring", MODES[2]);
    uring_always: long("uring", MODES[3]);
    uring_auto_writeback: long("uring", MODES[4]);
    uring_always_writeback: long("uring", MODES[5]);
    fuse_auto: long("fuse", MODES[0]);
    fuse_never: long("fuse", MODES[1]);
    fuse_metadata: long("fuse", MODES[2]);
    fuse_always: long("fuse", MODES[3]);
    fuse_auto_writeback: long("fuse", MODES[4]);
    fuse_always_writeback: long("fuse", MODES[5]);
}
