//! Fifty hosts killed, one after the other, under programs that check every byte: fio with verification, fsx, and a log
//! whose records are remembered as soon as fsync has acknowledged them.

use crate::reconnect::Served;
use crate::rig::Scratch;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, UNIX_EPOCH};

/// Hosts killed in each run.
const KILLS: u32 = 50;
/// Bytes of one record of the log.
const RECORD: usize = 256;

/// A record: its number, and bytes that follow from it.
fn record(number: u32) -> [u8; RECORD] {
    let mut bytes = [0; RECORD];
    for (i, chunk) in bytes.chunks_mut(4).enumerate() {
        chunk.copy_from_slice(&number.wrapping_mul(2_654_435_761).rotate_left(i as u32).to_ne_bytes());
    }
    bytes[..4].copy_from_slice(&number.to_ne_bytes());
    bytes
}

/// Runs a checking program over and over; how often.
fn over_and_over(done: &AtomicBool, mut command: impl FnMut() -> Command) -> u32 {
    let mut runs = 0;
    while !done.load(Ordering::Acquire) {
        let output = command().stdin(Stdio::null()).output().unwrap();
        let said = [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat();
        assert!(output.status.success(), "run {runs}: {}\n{said}", output.status);
        runs += 1;
    }
    runs
}

fn fio(file: &Path) -> Command {
    let mut fio = Command::new("fio");
    fio.args(["--name=verify", "--thread", "--rw=randrw", "--bsrange=4k-256k", "--size=16m", "--io_size=48m"]);
    fio.args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64", "--randrepeat=0", "--fsync=32"]);
    fio.args(["--ioengine=psync", "--fallocate=none", "--verify_state_save=0"])
        .arg(format!("--filename={}", file.display()));
    fio.args(["--direct=1", "--numjobs=1"]);
    fio
}

fn fsx(program: &Path, scratch: &Path, seed: u32, file: &Path) -> Command {
    let mut fsx = Command::new(program);
    fsx.arg("-P").arg(scratch).args(["-N", "3000", "-S", &seed.to_string()]).arg(file);
    fsx
}

/// Appends by position and syncs; how many records are acknowledged is told at once.
fn log(path: &Path, acknowledged: &AtomicU32, done: &AtomicBool) {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    for number in 0.. {
        file.write_all_at(&record(number), u64::from(number) * RECORD as u64).unwrap();
        file.sync_data().unwrap();
        acknowledged.store(number + 1, Ordering::Release);
        if done.load(Ordering::Acquire) {
            return;
        }
    }
}

fn assert_log(path: &Path, count: u32) {
    // The first host may die before there is a log.
    let bytes = if count == 0 { Vec::new() } else { fs::read(path).unwrap() };
    for number in 0..count {
        let at = number as usize * RECORD;
        assert!(bytes.get(at..at + RECORD) == Some(&record(number)[..]), "record {number} of {count} is lost");
    }
}

fn survive(channel: &str, transport: &str, words: &str) {
    let Some(fsx_program) = tunnelfs_bench::session::installed("fsx") else {
        return crate::skip::lacking("fsx is not installed (`make deps-conformance`)");
    };
    if Command::new("fio").arg("--version").output().is_err() {
        return crate::skip::lacking("fio is not installed (`make deps-conformance`)");
    }
    let Some(scratch) = Scratch::for_channel(channel) else { return };
    let fsx_dir = tempfile::tempdir().unwrap();
    let mut served = Served::on(scratch.in_memory("200m"), channel, transport, words);
    let seed = std::env::var("SEED").ok().and_then(|text| text.parse().ok());
    let seed: u32 = seed.unwrap_or_else(|| UNIX_EPOCH.elapsed().unwrap().subsec_nanos());
    println!("{channel}, {transport}{words}: SEED={seed}");
    let [fio_file, fsx_file, log_file] = ["fio", "fsx", "log"].map(|name| served.path(name));
    let behind = served.behind("log");
    let (done, acknowledged) = (AtomicBool::new(false), AtomicU32::new(0));
    let (mut random, mut lived) = (seed | 1, 0);
    let (fios, fsxs) = std::thread::scope(|scope| {
        let (done, acknowledged) = (&done, &acknowledged);
        let fios = scope.spawn(move || over_and_over(done, || fio(&fio_file)));
        let mut number = seed;
        let dir = fsx_dir.path();
        let fsxs = scope.spawn(move || {
            over_and_over(done, || {
                number = number.wrapping_add(1);
                fsx(&fsx_program, dir, number, &fsx_file)
            })
        });
        let logs = scope.spawn(move || log(&log_file, acknowledged, done));
        for _ in 0..KILLS {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            std::thread::sleep(Duration::from_millis(u64::from(random >> 8) % 500 + 50));
            if fios.is_finished() || fsxs.is_finished() || logs.is_finished() {
                break;
            }
            served.kill_host();
            lived += 1;
            let before = acknowledged.load(Ordering::Acquire);
            assert_log(&behind, before);
            std::thread::sleep(Duration::from_millis(u64::from(random >> 20) % 150));
            served.next_host();
        }
        done.store(true, Ordering::Release);
        (fios.join().unwrap(), fsxs.join().unwrap())
    });
    let records = acknowledged.load(Ordering::Acquire);
    assert_log(&behind, records);
    served.unmount();
    println!(
        "{channel}, {transport}{words}: {lived} hosts killed; {fios} runs of fio, {fsxs} of fsx (3000 operations each), \
         {records} records acknowledged by fsync: no wrong byte, none lost"
    );
    assert_eq!(lived, KILLS);
}

macro_rules! runs {
    ($($name:ident: $channel:literal, $transport:literal, $words:literal;)*) => {
        $(
            #[test]
            #[ignore = "make kills"]
            fn $name() {
                survive($channel, $transport, $words);
            }
        )*
    };
}

runs! {
    uring_ring: "uring", "ring", "";
    uring_virtqueue: "uring", "virtqueue", "";
    uring_socket: "uring", "socket", "";
    fuse_ring: "fuse", "ring", "";
    fuse_virtqueue: "fuse", "virtqueue", "";
    fuse_socket: "fuse", "socket", "";
}
