//! What is told when a transfer ends half way: the disk is full, or breaks.

use crate::common::pair::{Pair, Setup};
use crate::common::sys::{fallocate, Answer};
use crate::disk::{uncache, Disk};
use crate::rig::{soon, Guest, Host, Peer, Scratch, FEATURES};
use nix::errno::Errno;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

fn errno(e: &std::io::Error) -> Errno {
    Errno::from_raw(e.raw_os_error().unwrap_or(0))
}

/// Writes until it is refused: how many bytes, and by what.
fn fill(file: &File, step: usize) -> (u64, Errno) {
    let (data, mut at) = (vec![3; step], 0);
    loop {
        match file.write_at(&data, at) {
            Ok(0) => return (at, Errno::from_raw(0)),
            Ok(n) => at += n as u64,
            Err(e) => return (at, errno(&e)),
        }
    }
}

/// A page here or there is the file system's own business.
const SLACK: u64 = 64 << 10;

#[test]
fn a_full_disk() {
    for (options, mount) in [(&[][..], ""), (&["--cache=never"], ""), (&["--allow-direct-io"], "")] {
        let Some(setup) = Setup::in_memory("8m") else { return };
        let pair = setup.start(options, mount);
        let run = |dir: &Path, step: usize, flags: i32| {
            let path = dir.join("f");
            let file =
                OpenOptions::new().read(true).write(true).create_new(true).custom_flags(flags).open(&path).unwrap();
            let (bytes, error) = fill(&file, step);
            let len = file.metadata().unwrap().len();
            let synced = file.sync_all().map_err(|e| errno(&e));
            let space = fallocate(&file, 0, 0, 64 << 20);
            let after = file.metadata().unwrap().len();
            drop(file);
            let content = fs::read(&path).unwrap();
            assert!(
                content.len() as u64 == bytes && content.iter().all(|b| *b == 3),
                "{}: what was told is there",
                step
            );
            fs::remove_file(&path).unwrap();
            (bytes, (error, len == bytes, synced, space, after == bytes))
        };
        for step in [1 << 20, 5000, 6 << 20] {
            // What is removed on the mount is free when the kernel's FORGET has come.
            let free = || nix::sys::statvfs::statvfs(&pair.native("")).unwrap().blocks_free();
            let before = free();
            let (native, mounted) = (run(&pair.native(""), step, 0), run(&pair.guest.point, step, 0));
            soon("its space is free again", || (free() >= before).then_some(()));
            assert!(native.0.abs_diff(mounted.0) <= SLACK, "{step}: {} bytes, natively {}", mounted.0, native.0);
            assert_eq!(mounted.1, native.1, "{options:?}: {step} bytes at a time");
        }
        // Names and attributes go on.
        pair.same_script("dd if=/dev/zero of=full bs=64k 2>/dev/null; mkdir d; mv full d/g && rm -r d && ls");
    }
}

/// With writeback what does not fit is told by fsync or close, once.
#[test]
fn a_full_disk_with_writeback() {
    let Some(setup) = Setup::in_memory("8m") else { return };
    let pair = setup.start(&["--cache=always", "--writeback"], "writeback");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(pair.on("f")).unwrap();
    let data = vec![3; 16 << 20];
    let written = file.write_at(&data, 0).map_err(|e| errno(&e));
    let first = file.sync_all().map_err(|e| errno(&e));
    assert!(written == Err(Errno::ENOSPC) || first == Err(Errno::ENOSPC), "{written:?}, then {first:?}");
    assert_eq!(file.sync_all().map_err(|e| errno(&e)), Ok(()), "it is told once");
    drop(file);
    fs::remove_file(pair.on("f")).unwrap();
    let free = || nix::sys::statvfs::statvfs(&pair.native("")).unwrap().blocks_free();
    soon("its space is free again", || (free() > 1000).then_some(()));
    fs::write(pair.on("g"), "fits").unwrap();
    assert_eq!(fs::read(pair.behind("g")).unwrap(), b"fits");
}

/// A limit of the process's own: EFBIG, and as many bytes as fit.
#[test]
fn a_limited_file_size() {
    let Some(pair) = Pair::plain() else { return };
    pair.same_script(
        "trap '' XFSZ; ulimit -f 100; head -c 200000 /dev/zero > f; echo $?; stat -c %s f; truncate -s 1m g; echo $?",
    );
}

/// Where in its disk the block of a file's byte lies (FIBMAP), in blocks.
pub fn block_of(file: &File, block: i32) -> Answer<u64> {
    const FIBMAP: libc::Ioctl = 1;
    let mut number = block;
    // SAFETY: it reads and writes an int.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), FIBMAP, &raw mut number) }).map(|_| number as u64)
}

const WHOLE: u64 = 1 << 20;
const GOOD: u64 = 256 << 10;

/// Reads on until an error or the end: bytes, and what ended it.
fn read_on(file: &File, step: usize) -> (u64, Answer<()>) {
    let (mut at, layout) = (0, std::alloc::Layout::from_size_align(step, 4096).unwrap());
    // SAFETY: an allocation that each read fills at most, freed at the end.
    unsafe {
        let buffer = std::alloc::alloc_zeroed(layout);
        let ended = loop {
            match Errno::result(libc::pread(file.as_raw_fd(), buffer.cast(), step, at as i64)) {
                Ok(0) => break Ok(()),
                Ok(n) => at += n as u64,
                Err(e) => break Err(e),
            }
        };
        std::alloc::dealloc(buffer, layout);
        (at, ended)
    }
}

/// A READ that fails half way is an error, and not the end of the file.
#[test]
fn a_disk_that_breaks_half_way() {
    for options in [&[][..], &["--cache=never"], &["--allow-direct-io"]] {
        let Some(scratch) = Scratch::new() else { return };
        let mut mkfs = Command::new("mkfs.ext4");
        let mkfs = mkfs.args(["-q", "-b", "4096", "-O", "^has_journal,^metadata_csum"]);
        let Some(disk) = Disk::new(&scratch, 64 << 20, mkfs, "ext4", "errors=continue") else { return };
        let path = scratch.path("share/f");
        // More than one file, until one lies in one piece.
        fs::write(&path, vec![5; WHOLE as usize]).unwrap();
        uncache(&path);
        let file = File::open(&path).unwrap();
        let at = |byte: u64| block_of(&file, (byte / 4096) as i32).unwrap();
        let cut = at(GOOD);
        if (0..WHOLE).step_by(4096).any(|byte| at(byte) != at(0) + byte / 4096) {
            crate::skip::unsupported("the file does not lie in one piece");
            continue;
        }
        drop(file);
        let host = Host::start_with(&scratch, Peer::Ours, &[FEATURES, options].concat());
        let guest = Guest::mount(&scratch, &host, "");
        let here = guest.point.join("f");
        assert_eq!(fs::metadata(&here).unwrap().len(), WHOLE);
        disk.break_behind(cut * 4096).unwrap();
        // The host reads by way of its memory, as the native program does.
        for step in [WHOLE as usize, 128 << 10, 4096] {
            uncache(&path);
            let native = read_on(&File::open(&path).unwrap(), step);
            assert_eq!(native.1, Err(Errno::EIO), "natively");
            for flags in [0, libc::O_DIRECT] {
                uncache(&path);
                // As a program does that prepares a file: the attributes have just been asked for.
                fs::set_permissions(&here, fs::Permissions::from_mode(0o640)).unwrap();
                let file = OpenOptions::new().read(true).custom_flags(flags).open(&here).unwrap();
                let (bytes, ended) = read_on(&file, step);
                assert_eq!(ended, Err(Errno::EIO), "{options:?}, {step} bytes, flags {flags:#o}, after {bytes} bytes");
                assert!(bytes <= GOOD, "{bytes} bytes could be read");
                assert_eq!(file.metadata().unwrap().len(), WHOLE);
                assert_eq!(fs::metadata(&here).unwrap().len(), WHOLE);
            }
        }
        disk.repair().unwrap();
        uncache(&path);
        assert_eq!(read_on(&File::open(&here).unwrap(), 1 << 20), (WHOLE, Ok(())));
        guest.unmount();
    }
}
