//! The suites that file systems are judged by, on mounts: pjdfstest, fsx, and
//! many programs at work at once. What runs by default takes about three
//! minutes; `make conformance` runs all of it, which takes hours, and `make soak`
//! all at random for half an hour.
//!
//! Needs root and `/dev/fuse`, and the programs of `make deps-conformance`; skips
//! without them.

mod direct;
mod fsx;
#[path = "../mount/helpers.rs"]
mod helpers;
mod pjdfstest;
mod programs;
#[allow(dead_code)]
#[path = "../mount/rig.rs"]
mod rig;
#[path = "../common/skip.rs"]
mod skip;
mod soak;

use rig::{Guest, Host, Peer, Scratch};
use std::path::PathBuf;
use std::process::{Command, Output};

/// Tests that only `make conformance` runs.
macro_rules! ignored {
    ($($name:ident: $call:expr;)*) => {
        $(
            #[test]
            #[ignore = "make conformance"]
            fn $name() {
                $call
            }
        )*
    };
}
use ignored;

/// What either host offers for these tests, beside its `--cache`.
const FEATURES: [&str; 3] = ["--xattr", "--posix-acl=auto", "--killpriv-v2"];

/// A directory, its host and its mount.
struct Mounted {
    guest: Guest,
    _host: Host,
    scratch: Scratch,
}

impl Mounted {
    /// `None` where it cannot be; `options` are the host's, `words` the guest's.
    fn new(channel: &str, transport: &str, options: &[&str], words: &str) -> Option<Mounted> {
        Some(Mounted::on(Scratch::for_channel(channel)?, (channel, transport), options, words))
    }

    fn on(scratch: Scratch, (channel, transport): (&str, &str), options: &[&str], words: &str) -> Mounted {
        let options = [&FEATURES[..], options].concat();
        let host = Host::start_with(&scratch, if transport == "socket" { Peer::Stream } else { Peer::Ours }, &options);
        let guest = Guest::mount(&scratch, &host, &format!("channel={channel},transport={transport}{words}"));
        Mounted { guest, _host: host, scratch }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.guest.point.join(name)
    }
}

/// A program of `make deps-conformance`.
fn installed(name: &str) -> Option<PathBuf> {
    let found = tunnelfs_bench::session::installed(name);
    if found.is_none() {
        skip::lacking(format_args!("{name} is not installed (`make deps-conformance`)"));
    }
    found
}

/// Runs a program to its end, which must be a good one.
fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said = [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat();
    assert!(output.status.success(), "{command:?}: {}\n{said}", output.status);
    output
}

/// Xorshift: the same numbers for the same seed.
struct Rng(u64);

impl Rng {
    /// Of the environment's SEED, or any; to be printed, so that a failure can be had again.
    fn seed() -> u64 {
        let given = std::env::var("SEED").ok().and_then(|text| text.parse().ok());
        given.unwrap_or_else(|| u64::from(std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos()))
    }

    fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 16) as usize % limit
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_ne_bytes()[..chunk.len()]);
        }
    }
}
