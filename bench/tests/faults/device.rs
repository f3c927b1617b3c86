//! Disks that fail: a device that answers with errors, and a quota.

use crate::disk::{tell, uncache, Disk};
use crate::rig::{Guest, Host, Peer, Scratch, PATIENCE};
use crate::within;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = PATIENCE;

fn synced(path: &Path, data: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(data)?;
    file.sync_all()
}

/// The error of what must fail, in time.
fn failure<T: Send + 'static>(what: &str, work: impl FnOnce() -> io::Result<T> + Send + 'static) -> i32 {
    let error = within(LIMIT, what, work).err().unwrap_or_else(|| panic!("{what}: no error"));
    error.raw_os_error().unwrap()
}

/// What was synced before is there afterwards; what fails says so; and then all goes on, with the same processes.
#[test]
fn a_broken_device() {
    for (channel, transport) in crate::ALL {
        let Some(scratch) = Scratch::for_channel(channel) else { continue };
        let mut mkfs = Command::new("mkfs.ext4");
        // Without a journal, whose loss would end the whole file system.
        mkfs.args(["-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=0"]);
        let Some(disk) = Disk::new(&scratch, 64 << 20, &mut mkfs, "ext4", "errors=continue") else { return };
        let peer = if transport == "socket" { Peer::Stream } else { Peer::Ours };
        let host = Host::start_with(&scratch, peer, &["--cache=never"]);
        let guest = Guest::mount(&scratch, &host, &format!("channel={channel},transport={transport}"));
        let kept: Vec<u8> = (0..1 << 20).map(|i: u32| (i ^ i >> 8) as u8).collect();
        let at = |name: &str| guest.point.join(name);
        synced(&at("kept"), &kept).unwrap();
        fs::create_dir(at("dir")).unwrap();
        let (mut opened, mut written) = (File::open(at("kept")).unwrap(), File::create(at("written")).unwrap());
        uncache(&scratch.path("share/kept"));

        disk.break_behind(1 << 20).unwrap();
        let read = failure("a read", move || opened.read_exact(&mut [0; 4096]));
        // Whether the write or the sync: it is told.
        let write = failure("a write", move || written.write_all(&[7; 300_000]).and_then(|()| written.sync_all()));
        let path = at("new");
        let create = failure("a new file", move || synced(&path, &[8; 300_000]));
        assert_eq!([read, write], [libc::EIO; 2], "{channel}, {transport}");
        // ext4's word for a block that it cannot have is the other one.
        assert!(matches!(create, libc::EIO | libc::ENOMEM), "{channel}, {transport}: errno {create}");
        // What needs no device goes on.
        assert!(fs::metadata(at("kept")).unwrap().len() == 1 << 20 && at("dir").is_dir());

        disk.repair().unwrap();
        assert!(fs::read(at("kept")).unwrap() == kept, "{channel}, {transport}: what was synced has changed");
        synced(&at("after"), &kept).unwrap();
        uncache(&scratch.path("share/after"));
        assert!(fs::read(at("after")).unwrap() == kept, "{channel}, {transport}");
        guest.unmount();
        drop((host, disk));
        println!("{channel}, {transport}: errors while the device was broken, and none after");
    }
}

/// btrfs has quotas on every kernel that has btrfs.
#[test]
fn a_quota() {
    let Some(scratch) = Scratch::new() else { return };
    let mut mkfs = Command::new("mkfs.btrfs");
    let Some(disk) = Disk::new(&scratch, 256 << 20, mkfs.arg("-q"), "btrfs", "") else { return };
    let share: PathBuf = scratch.path("share");
    for words in [&["quota", "enable"][..], &["qgroup", "limit", "8M"]] {
        if tell(Command::new("btrfs").args(words).arg(&share)).is_none() {
            return;
        }
    }
    let host = Host::start(&scratch, Peer::Ours);
    let guest = Guest::mount(&scratch, &host, "transport=ring");
    synced(&guest.point.join("kept"), &[1; 1 << 20]).unwrap();
    let path = guest.point.join("much");
    let much = path.clone();
    let errno = failure("more than the quota", move || synced(&much, &vec![2; 16 << 20]));
    assert_eq!(errno, libc::EDQUOT);
    fs::remove_file(&path).unwrap();
    nix::unistd::syncfs(File::open(&share).unwrap()).unwrap();
    assert!(fs::read(guest.point.join("kept")).unwrap() == [1; 1 << 20]);
    synced(&path, &[3; 2 << 20]).unwrap();
    assert!(fs::read(&path).unwrap() == [3; 2 << 20]);
    guest.unmount();
    drop((host, disk));
}
