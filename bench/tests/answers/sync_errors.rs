//! Errors of the disk that are only found out when the data is written to it: each who has the file open is told once,
//! by fsync or fdatasync, and not less. And a quota that ends in the middle of a transfer.

use crate::common::sys::Answer;
use crate::disk::{tell, uncache, Disk};
use crate::rig::{soon, Guest, Host, Peer, Scratch, FEATURES};
use crate::sizes::block_of;
use nix::errno::Errno;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

fn answer<T>(result: io::Result<T>) -> Answer<()> {
    result.map(drop).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))
}

const BYTES: usize = 1 << 20;

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// What the syncs of two who have the file open say after a write to a disk that takes nothing, and after its repair.
fn syncs(path: &Path, behind: &Path, disk: &Disk) -> Vec<Answer<()>> {
    fs::write(path, vec![1; BYTES]).unwrap();
    let (writer, other) = (open(path), open(path));
    writer.sync_all().unwrap();
    uncache(behind);
    // The file system's own data lies before that of its files, all in one group.
    let first = block_of(&File::open(behind).unwrap(), 0).unwrap();
    disk.break_behind(first * 4096).unwrap();
    let mut told = vec![answer(writer.write_all_at(&vec![2; BYTES], 0))];
    told.push(answer(writer.sync_all()));
    // It has been told, and there is nothing to write any more.
    told.push(answer(writer.sync_all()));
    told.push(answer(other.sync_data()));
    told.push(answer(other.sync_data()));
    disk.repair().unwrap();
    // All goes on.
    told.push(answer(writer.write_all_at(&vec![3; BYTES], 0)));
    told.push(answer(writer.sync_all()));
    told.push(answer(other.sync_all()));
    drop((writer, other));
    uncache(behind);
    assert!(fs::read(path).unwrap() == vec![3; BYTES], "what was synced after the repair");
    told
}

#[test]
fn a_failed_write_is_told_once_to_each() {
    let once = [Ok(()), Err(Errno::EIO), Ok(()), Err(Errno::EIO), Ok(()), Ok(()), Ok(()), Ok(())];
    // Where the guest does not ask to open files, all are told until the file is written again.
    let often = [Ok(()), Err(Errno::EIO), Err(Errno::EIO), Err(Errno::EIO), Err(Errno::EIO), Ok(()), Ok(()), Ok(())];
    for (options, wanted) in [
        (&["--cache=auto"][..], once),
        (&["--cache=never"], once),
        (&["--cache=coherent", "--ask-open"], once),
        (&["--cache=coherent"], often),
    ] {
        let Some(scratch) = Scratch::new() else { return };
        let mut mkfs = Command::new("mkfs.ext4");
        let mkfs = mkfs.args(["-q", "-b", "4096", "-N", "64", "-O", "^has_journal,^metadata_csum"]);
        let Some(disk) = Disk::new(&scratch, 64 << 20, mkfs, "ext4", "errors=continue") else { return };
        let share = scratch.path("share");
        let host = Host::start_with(&scratch, Peer::Ours, &[FEATURES, options].concat());
        let guest = Guest::mount(&scratch, &host, "");
        let native = syncs(&share.join("native"), &share.join("native"), &disk);
        assert_eq!(native, once, "natively");
        let mounted = syncs(&guest.point.join("mounted"), &share.join("mounted"), &disk);
        assert_eq!(mounted, wanted, "{options:?}");
        guest.unmount();
    }
}

/// With writeback the guest's kernel sends the data late too, and tells each once.
#[test]
fn a_failed_write_is_told_once_to_each_with_writeback() {
    let Some(scratch) = Scratch::new() else { return };
    let mut mkfs = Command::new("mkfs.ext4");
    let mkfs = mkfs.args(["-q", "-b", "4096", "-N", "64", "-O", "^has_journal,^metadata_csum"]);
    let Some(disk) = Disk::new(&scratch, 64 << 20, mkfs, "ext4", "errors=continue") else { return };
    let share = scratch.path("share");
    let host = Host::start_with(&scratch, Peer::Ours, &[FEATURES, &["--cache=always", "--writeback"]].concat());
    let guest = Guest::mount(&scratch, &host, "writeback");
    let told = syncs(&guest.point.join("mounted"), &share.join("mounted"), &disk);
    assert_eq!(told[..3], [Ok(()), Err(Errno::EIO), Ok(())]);
    assert_eq!(told[4..], [Ok(()); 4]);
    guest.unmount();
}

/// Bytes that a file takes, and what ends it: by write or by the sync after it.
fn fill(path: &Path, step: usize) -> (u64, Answer<()>, Answer<()>) {
    let (file, data, mut at) = (File::create(path).unwrap(), vec![4; step], 0);
    let ended = loop {
        match file.write_at(&data, at) {
            Ok(n) => at += n as u64,
            Err(e) => break answer::<()>(Err(e)),
        }
        assert!(at < 64 << 20, "no quota ends it");
    };
    (at, ended, answer(file.sync_all()))
}

/// Of a quota that ends in the middle of a transfer the guest is told what is told natively. (ext4 would do as well; but
/// few kernels have its format of quotas built in, and btrfs brings its own.)
#[test]
fn a_quota_ends_in_the_middle() {
    const QUOTA: u64 = 8 << 20;
    for options in [&[][..], &["--cache=never"]] {
        let Some(scratch) = Scratch::new() else { return };
        let mut mkfs = Command::new("mkfs.btrfs");
        let Some(_disk) = Disk::new(&scratch, 256 << 20, mkfs.arg("-q"), "btrfs", "") else { return };
        let share = scratch.path("share");
        for words in [&["quota", "enable"][..], &["qgroup", "limit", "8M"]] {
            if tell(Command::new("btrfs").args(words).arg(&share)).is_none() {
                return;
            }
        }
        let host = Host::start_with(&scratch, Peer::Ours, &[FEATURES, options].concat());
        let guest = Guest::mount(&scratch, &host, "");
        for step in [1 << 20, 100_000] {
            let run = |path: &Path| {
                let told = fill(path, step);
                let behind = share.join(path.file_name().unwrap());
                let len = fs::metadata(path).unwrap().len();
                assert!(len == told.0 && fs::metadata(&behind).unwrap().len() == len, "{len} bytes of {}", told.0);
                assert!(fs::read(path).unwrap() == vec![4; len as usize], "what was told is there");
                fs::remove_file(path).unwrap();
                soon("there is room again", || has_room(&share).then_some(()));
                told
            };
            let (native, mounted) = (run(&share.join("native")), run(&guest.point.join("mounted")));
            println!("{options:?}, {step}: {mounted:?}, natively {native:?}");
            assert_eq!((mounted.1, mounted.2), (native.1, native.2), "{options:?}, {step}");
            assert_eq!(native.1, Err(Errno::EDQUOT), "natively");
            assert!(native.0.abs_diff(mounted.0) <= QUOTA / 4, "{} bytes, natively {}", mounted.0, native.0);
        }
        guest.unmount();
    }
}

/// Whether two mebibytes fit. What is removed counts until btrfs has written its trees.
fn has_room(share: &Path) -> bool {
    nix::unistd::syncfs(File::open(share).unwrap()).unwrap();
    let probe = share.join("probe");
    let fits = fs::write(&probe, vec![0; 2 << 20]).is_ok();
    let _ = fs::remove_file(&probe);
    nix::unistd::syncfs(File::open(share).unwrap()).unwrap();
    fits
}
