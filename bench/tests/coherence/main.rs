//! Caches without a time limit stay right: what is changed on the host is seen through a mount soon, although its kernel
//! was told to keep all for a day. About a minute; the long histories run in `make conformance`.
//!
//! The host is one of this process, which tells of changes as a script says, so that the guest's part is under test
//! alone; or (real.rs) the program with `--cache coherent`. Needs root and `/dev/fuse`; skips without them.

mod cases;
mod histories;
mod history;
mod real;
#[allow(dead_code)]
#[path = "../mount/rig.rs"]
mod rig;
mod scripted;
#[path = "../common/skip.rs"]
mod skip;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rig::{soon, Guest, Host, Scratch};
use scripted::Script;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use tunnelfs_fuse_abi::changes::kind;
use tunnelfs_settings::TransportKind;

/// A share, a mount of it, and the script between them. Dropped in this order.
pub struct World {
    /// The process that mounts.
    pub guest: Guest,
    /// What the guest is told.
    pub script: Arc<Script>,
    _host: Host,
    /// Where all of it is.
    pub scratch: Scratch,
}

impl World {
    /// `None` where nothing can be mounted.
    pub fn new(channel: &str, transport: &str) -> Option<World> {
        let scratch = Scratch::for_channel(channel)?.in_memory("64m");
        let kind = match transport {
            "ring" => TransportKind::Ring,
            "virtqueue" => TransportKind::Virtqueue,
            _ => TransportKind::Socket,
        };
        let (share, socket) = (scratch.path("share"), scratch.path("socket"));
        let script = scripted::serve(&share, &socket, kind);
        // The rig wants a process for a host.
        let child = Command::new("sleep").arg("100000").stdin(Stdio::null()).spawn().unwrap();
        let host = Host::of(child, socket, share);
        let guest = Guest::mount(&scratch, &host, &format!("channel={channel},transport={transport}"));
        Some(World { guest, script, _host: host, scratch })
    }

    /// A world whose host is a process of its own, which watches the share.
    pub fn real(channel: &str, transport: &str) -> Option<World> {
        let scratch = Scratch::for_channel(channel)?.in_memory("64m");
        let host = real::start(&scratch);
        let guest = Guest::mount(&scratch, &host, &format!("channel={channel},transport={transport}"));
        let script = Arc::new(Script::silent());
        Some(World { guest, script, _host: host, scratch })
    }

    /// A path as the guest has it.
    pub fn inside(&self, name: &str) -> PathBuf {
        self.guest.point.join(name)
    }

    /// As the host has it.
    pub fn behind(&self, name: &str) -> PathBuf {
        self.scratch.path("share").join(name)
    }
}

/// The names in a directory.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn all_cases(channel: &str, transport: &str) {
    let Some(world) = World::new(channel, transport) else { return };
    let busy = if transport == "socket" { &[][..] } else { cases::BUSY };
    run_cases(world, &[cases::CASES, cases::SCRIPTED, busy].concat(), &format!("{channel}, {transport}"));
}

fn run_cases(world: World, cases: &[cases::Case], through: &str) {
    for (name, case) in cases {
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| case(&world)));
        assert!(done.is_ok(), "{name}: failed over {through}: {}", world.guest.output());
    }
    world.guest.unmount();
}

#[test]
fn changes_are_seen_by_io_uring() {
    all_cases("uring", "ring");
}

#[test]
fn changes_are_seen_by_dev_fuse() {
    all_cases("fuse", "virtqueue");
}

#[test]
fn changes_are_seen_over_a_stream() {
    all_cases("fuse", "socket");
}

/// Whether a thread of the guest waits in the kernel, and no signal wakes it.
fn is_stuck(guest: Pid) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{guest}/task")).unwrap();
    tasks.flatten().any(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.contains(") D ")
    })
}

/// The kernel's thread for a name waits for the directory's lock, which a CREATE has that nobody will answer.
fn killed_beside_a_busy_directory(channel: &str, transport: &str) {
    let Some(mut world) = World::new(channel, transport) else { return };
    std::fs::create_dir(world.behind("busy")).unwrap();
    world.script.name(kind::CREATED, &world.behind("busy"), 0);
    soon("it appears", || std::fs::metadata(world.inside("busy")).ok());
    assert!(std::fs::metadata(world.inside("busy/new")).is_err());
    world.script.hold_creates.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let creating = scope.spawn(|| std::fs::File::create(world.inside("busy/mine")).map(drop));
        soon("the host has the CREATE", || (world.script.held_creates.load(Ordering::SeqCst) > 0).then_some(()));
        std::fs::write(world.behind("busy/new"), "x").unwrap();
        world.script.name(kind::CREATED, &world.behind("busy/new"), 0);
        soon("the guest waits for the directory", || is_stuck(world.guest.pid()).then_some(()));
        world.guest.signal(Signal::SIGKILL);
        soon("the program goes on", || creating.is_finished().then_some(()));
        world.script.hold_creates.store(false, Ordering::SeqCst);
        assert!(creating.join().unwrap().is_err());
    });
    assert_eq!(world.guest.ended().signal(), Some(libc::SIGKILL));
}

#[test]
fn a_guest_that_is_killed_beside_a_busy_directory_ends() {
    killed_beside_a_busy_directory("uring", "ring");
    killed_beside_a_busy_directory("fuse", "socket");
}
