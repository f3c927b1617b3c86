//! Each case of pjdfstest that passes on the local file system passes on a mount of it.

use crate::helpers::Helpers;
use crate::rig::{Guest, Host, Peer, Scratch};
use crate::{ignored, installed, Mounted, FEATURES};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Where it is told that both file systems have the same features.
const CONFIG: &str = "
[features]
posix_fallocate = {}
rename_ctime = {}
utimensat = {}
utime_now = {}
stat_st_birthtime = {}
[settings]
naptime = 0.01
allow_remount = REMOUNT
[dummy_auth]
entries = [[\"nobody\", \"nogroup\"], [\"daemon\", \"daemon\"]]
";

/// What the C library cannot say of a FUSE file system: the most links of a file.
const UNKNOWN: &str = "link::link_count_max";

/// `ok`, `FAILED` or `skipped`, by the case's name.
type Results = BTreeMap<String, String>;

/// Runs the cases whose names have `pattern` in them.
fn run(program: &Path, scratch: &Scratch, dir: &str, remount: bool, pattern: &str) -> (Results, String) {
    let config = scratch.path("pjdfstest.toml");
    fs::write(&config, CONFIG.replace("REMOUNT", if remount { "true" } else { "false" })).unwrap();
    let mut command = Command::new(program);
    command.arg("-c").arg(config).arg("-p").arg(scratch.path(dir)).arg("-s").arg("/dev/shm").arg("--").arg(pattern);
    let output = command.env("RUST_BACKTRACE", "0").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let cases = said.lines().filter_map(|line| {
        let (name, result) = line.split_once(char::is_whitespace)?;
        let result = Some(result.trim()).filter(|r| ["ok", "FAILED", "skipped"].contains(r))?;
        Some((name.to_string(), result.to_string()))
    });
    (cases.collect(), said)
}

/// What was said about cases that failed.
fn failures(said: &str) -> String {
    let parts = said.split("FAILED").skip(1).map(|part| part.lines().take(10).collect::<Vec<_>>().join("\n"));
    parts.collect()
}

/// `mounted` has `scratch`'s directory on its `mnt`; a directory of the same length is for the local run.
fn compare(program: &Path, scratch: &Scratch, through: &str) {
    let _ = fs::create_dir(scratch.path("nat"));
    let (local, _) = run(program, scratch, "nat", false, "");
    let passes = local.values().filter(|r| *r == "ok").count();
    assert!(passes > 380 && !local.values().any(|r| r == "FAILED"), "here it does not pass itself: {local:?}");
    let (mut ours, said) = run(program, scratch, "mnt", false, "");
    // Only where nothing else has been open before can a file system be made read-only.
    let (read_only, said_too) = run(program, scratch, "mnt", true, "erofs");
    ours.extend(read_only);
    let bad = local.keys().filter(|name| ours.get(*name).is_none_or(|r| r != "ok") && *name != UNKNOWN);
    let bad: Vec<_> = bad.collect();
    assert!(bad.is_empty(), "over {through}: {bad:?}\n{}", failures(&said) + &failures(&said_too));
    println!(
        "{through}: {} of {} cases pass ({passes} locally)",
        ours.values().filter(|r| *r == "ok").count(),
        ours.len()
    );
}

fn over(channel: &str, transport: &str) {
    let (Some(program), Some(_helpers)) = (installed("pjdfstest"), Helpers::install()) else { return };
    let Some(mounted) = Mounted::new(channel, transport, &[], "") else { return };
    compare(&program, &mounted.scratch, &format!("{channel}, {transport}"));
    mounted.guest.unmount();
}

#[test]
fn io_uring_over_the_ring() {
    over("uring", "ring");
}

#[test]
fn the_device_over_the_ring() {
    over("fuse", "ring");
}

ignored! {
    io_uring_over_virtqueues: over("uring", "virtqueue");
    io_uring_over_a_socket: over("uring", "socket");
    the_device_over_virtqueues: over("fuse", "virtqueue");
    the_device_over_a_socket: over("fuse", "socket");
    stock_virtiofsd: with_stock_virtiofsd();
}

fn with_stock_virtiofsd() {
    let (Some(program), Some(_helpers)) = (installed("pjdfstest"), Helpers::install()) else { return };
    let (Some(scratch), Some(_)) = (Scratch::new(), installed("virtiofsd")) else { return };
    let host = Host::start_with(&scratch, Peer::Virtiofsd, &FEATURES);
    let guest = Guest::mount(&scratch, &host, "transport=ring");
    compare(&program, &scratch, "stock virtiofsd");
    guest.unmount();
}
