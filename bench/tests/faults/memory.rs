//! A host in a cgroup whose memory ends.

use crate::rig::{soon, Guest, Host, Peer, Scratch, PATIENCE, PROMPT};
use crate::{unmount_what_is_left, within};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A memory cgroup, of version 1 or 2; gone when dropped, after its processes.
struct Group {
    path: PathBuf,
    /// Where it tells how many processes it has cost.
    events: &'static str,
}

impl Group {
    /// `None` where there can be none.
    fn new(name: &str, bytes: u64) -> Option<Group> {
        let root = Path::new("/sys/fs/cgroup");
        let (root, limit, events) = match root.join("memory/memory.limit_in_bytes").exists() {
            true => (root.join("memory"), "memory.limit_in_bytes", "memory.oom_control"),
            false => (root.into(), "memory.max", "memory.events"),
        };
        let _ = fs::write(root.join("cgroup.subtree_control"), "+memory");
        let path = root.join(format!("tunnelfs-{name}-{}", std::process::id()));
        let made = fs::create_dir(&path).and_then(|()| fs::write(path.join(limit), bytes.to_string()));
        if let Err(e) = made {
            crate::skip::unsupported(format_args!("no memory cgroup at {}: {e}", path.display()));
            let _ = fs::remove_dir(&path);
            return None;
        }
        Some(Group { path, events })
    }

    /// A host that serves already: in a sandbox it is two processes.
    fn take(&self, host: &Host) {
        for pid in [host.child.id(), host.server().as_raw() as u32] {
            fs::write(self.path.join("cgroup.procs"), pid.to_string()).unwrap();
        }
    }

    fn killed(&self) -> u64 {
        let told = fs::read_to_string(self.path.join(self.events)).unwrap();
        told.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Ended processes are in it for a moment more.
        for _ in 0..100 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn data(n: u8) -> Vec<u8> {
    (0..4u32 << 20).map(|i| (i ^ i >> 8) as u8 ^ n).collect()
}

fn write_synced(path: &Path, n: u8) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(&data(n))?;
    file.sync_data()
}

/// Files of three times the memory pass through a host that must not keep them.
#[test]
fn a_host_with_little_memory() {
    let Some(group) = Group::new("little", 32 << 20) else { return };
    let Some(scratch) = Scratch::new() else { return };
    let host = Host::start(&scratch, Peer::Ours);
    let guest = Guest::mount(&scratch, &host, "transport=ring");
    group.take(&host);
    let name = |n: u8| guest.point.join(format!("file{n}"));
    (0..24).for_each(|n| write_synced(&name(n), n).unwrap());
    (0..24).for_each(|n| assert!(fs::read(name(n)).unwrap() == data(n), "file {n} has wrong bytes"));
    assert_eq!(group.killed(), 0);
    guest.unmount();
    drop(host);
}

/// Files in memory that is the host's, until the kernel ends it.
#[test]
fn a_host_without_memory() {
    let Some(group) = Group::new("none", 32 << 20) else { return };
    let Some(scratch) = Scratch::new() else { return };
    let scratch = scratch.in_memory("200m");
    let host = Host::start(&scratch, Peer::Ours);
    let mut guest = Guest::mount(&scratch, &host, "transport=ring,noreconnect");
    group.take(&host);
    let point = guest.point.clone();
    let (synced, ended) = within(3 * PATIENCE, "writing into memory that ends", move || {
        let failed = (0..40).find_map(|n| Some((n, write_synced(&point.join(format!("file{n}")), n).err()?)));
        let (synced, error) = failed.expect("more than there is room for was written");
        println!("{synced} files, then {error}");
        (synced, Instant::now())
    });
    assert!(synced > 0 && group.killed() > 0, "{synced} files; the kernel did not end the host");
    assert!(!guest.ended().success());
    assert!(ended.elapsed() < PROMPT);
    unmount_what_is_left(&guest.point);
    drop((host, guest));

    // A host with more memory finds all that was synced.
    let host = Host::start(&scratch, Peer::Ours);
    let guest = Guest::mount(&scratch, &host, "transport=ring");
    for n in 0..synced {
        assert!(fs::read(guest.point.join(format!("file{n}"))).unwrap() == data(n), "file {n} has wrong bytes");
    }
    soon("there is room", || write_synced(&guest.point.join("after"), 1).ok());
    guest.unmount();
}
