//! What is in a file while some of it is on its way.

use crate::common::pair::{shell, Pair, Setup};
use crate::common::sys::{copy_range, fallocate, inode_flags, seek, set_inode_flags, Answer};
use crate::rig::{as_user, soon};
use nix::errno::Errno;
use nix::sys::mman::{mmap, munmap, MapFlags, ProtFlags};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Both sides cache writes, or neither.
const WAYS: [(&[&str], &str); 3] =
    [(&[], ""), (&["--cache=always", "--writeback"], "writeback"), (&["--cache=never"], "")];

fn for_each_way(work: impl Fn(&Pair)) {
    for (host, mount) in WAYS {
        let Some(setup) = Setup::new() else { return };
        println!("host {host:?}, mount {mount:?}");
        work(&setup.start(host, mount));
    }
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// Where data and holes begin, from every 64 KiB on.
fn map_of(file: &File, to: i64) -> Vec<(i64, Answer<i64>, Answer<i64>)> {
    let places = (0..=to).step_by(65_536);
    places.map(|at| (at, seek(file, at, libc::SEEK_DATA), seek(file, at, libc::SEEK_HOLE))).collect()
}

/// With writeback the guest's kernel would keep its own size of a file that others write to: where the host watches the
/// directory for such changes, it does not agree to that.
#[test]
fn what_others_append_is_not_overwritten() {
    for (host, mount) in
        [(&[][..], ""), (&["--writeback"], "writeback"), (&["--cache=never", "--writeback"], "writeback")]
    {
        let Some(setup) = Setup::new() else { return };
        let pair = setup.start(host, mount);
        let append = |path: &Path, text: &str| {
            let mut file = OpenOptions::new().append(true).create(true).open(path).unwrap();
            file.write_all(text.as_bytes()).unwrap();
            file.sync_all().unwrap();
        };
        append(&pair.behind("f"), "one ");
        assert_eq!(fs::read_to_string(pair.on("f")).unwrap(), "one ");
        append(&pair.behind("f"), "two ");
        append(&pair.on("f"), "three");
        assert_eq!(fs::read_to_string(pair.behind("f")).unwrap(), "one two three", "{host:?}");
        soon("the guest sees it", || (fs::read_to_string(pair.on("f")).unwrap() == "one two three").then_some(()));
        fs::write(pair.behind("f"), "x").unwrap();
        soon("and that it is shorter", || (fs::metadata(pair.on("f")).unwrap().len() == 1).then_some(()));
    }
}

#[test]
fn data_that_is_not_written_back_is_no_hole() {
    for_each_way(|pair| {
        let first = pair.same_value("a file that was just written", |dir| {
            let file = open(&dir.join("f"));
            file.write_all_at(&[1; 1 << 20], 0).unwrap();
            (seek(&file, 0, libc::SEEK_DATA), seek(&file, 0, libc::SEEK_HOLE))
        });
        assert_eq!(first, (Ok(0), Ok(1 << 20)), "natively");
        let holes = |dir: &Path| {
            let file = open(&dir.join("holes"));
            file.set_len(1 << 20).unwrap();
            file.write_all_at(&[1; 65_536], 131_072).unwrap();
            let one = map_of(&file, 1 << 20);
            file.write_all_at(&[1; 65_536], 524_288).unwrap();
            fallocate(&file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 131_072, 65_536).unwrap();
            [one, map_of(&file, 1 << 20)].concat()
        };
        // With writeback the host cannot know what is data: then all is. A hole is never told where there is data.
        let (native, mounted) = (holes(&pair.native("")), holes(&pair.guest.point));
        for (native, mounted) in native.iter().zip(&mounted) {
            let ((at, data, hole), (_, mounted_data, mounted_hole)) = (native, mounted);
            assert!(
                mounted_data.unwrap_or(i64::MAX) <= data.unwrap_or(i64::MAX),
                "at {at}: {mounted:?}, natively {native:?}"
            );
            assert!(
                mounted_hole.unwrap_or(i64::MAX) >= hole.unwrap_or(i64::MAX),
                "at {at}: {mounted:?}, natively {native:?}"
            );
        }
        let mapped = |dir: &Path| {
            let file = open(&dir.join("mapped"));
            file.set_len(1 << 20).unwrap();
            store(&file, 1 << 20, 262_144, 7);
            (seek(&file, 0, libc::SEEK_DATA).unwrap(), seek(&file, 262_144, libc::SEEK_HOLE).unwrap())
        };
        let (native, mounted) = (mapped(&pair.native("")), mapped(&pair.guest.point));
        assert!(mounted.0 <= native.0 && mounted.1 >= native.1, "{mounted:?}, natively {native:?}");
        pair.same("by another descriptor", |dir| {
            open(&dir.join("other")).write_all(&[1; 100_000]).unwrap();
            let file = File::open(dir.join("other")).unwrap();
            let all =
                [(0, libc::SEEK_DATA), (0, libc::SEEK_HOLE), (99_999, libc::SEEK_DATA), (100_000, libc::SEEK_DATA)];
            (all.map(|(at, whence)| seek(&file, at, whence)), seek(&file, -1, libc::SEEK_DATA))
        });
    });
}

/// Writes one byte through a shared mapping.
fn store(file: &File, len: usize, at: usize, byte: u8) {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping of `len` bytes, of which one is written before it is unmapped.
    unsafe {
        let area = mmap(None, len.try_into().unwrap(), protection, MapFlags::MAP_SHARED, file, 0).unwrap();
        area.as_ptr().cast::<u8>().add(at).write_volatile(byte);
        munmap(area, len).unwrap();
    }
}

/// With writeback the kernel reads the page first: the host must have opened the file for that too.
#[test]
fn files_opened_for_writing_only() {
    for_each_way(|pair| {
        let written = pair.same_value("truncate, then write in the middle", |dir| {
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(dir.join("new")).unwrap();
            file.set_len(8192).unwrap();
            let n = file.write_at(b"x", 5000).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap()));
            let closed = file.sync_all().is_ok();
            drop(file);
            (n, closed, fs::read(dir.join("new")).unwrap()[4990..5010].to_vec())
        });
        assert_eq!(written.0, Ok(1), "natively");
        pair.same("in a file that is there", |dir| {
            fs::write(dir.join("old"), [1; 10_000]).unwrap();
            let file = OpenOptions::new().write(true).open(dir.join("old")).unwrap();
            file.write_all_at(b"x", 9999).unwrap();
            file.write_all_at(b"y", 20_001).unwrap();
            drop(file);
            fs::read(dir.join("old")).unwrap()
        });
        pair.same("appended, with holes", |dir| {
            fs::write(dir.join("log"), "first").unwrap();
            let mut file = OpenOptions::new().append(true).open(dir.join("log")).unwrap();
            file.write_all(b" second").unwrap();
            file.set_len(5000).unwrap();
            file.write_all(b"third").unwrap();
            drop(file);
            fs::read(dir.join("log")).unwrap()
        });
        // Which its owner may not read.
        pair.same("of mode 0200", |dir| {
            fs::create_dir(dir.join("theirs")).unwrap();
            std::os::unix::fs::chown(dir.join("theirs"), Some(1000), Some(1000)).unwrap();
            as_user(1000, 1000, &[], || {
                let path = dir.join("theirs/f");
                let file = OpenOptions::new().write(true).create_new(true).mode(0o200).open(&path).unwrap();
                file.set_len(8192).unwrap();
                let one = file.write_at(b"x", 5000).map_err(|e| e.raw_os_error());
                let again = OpenOptions::new().write(true).open(&path).unwrap();
                let two = again.write_at(b"y", 100).map_err(|e| e.raw_os_error());
                (one, two, file.sync_all().is_ok(), File::open(&path).map(drop).map_err(|e| e.raw_os_error()))
            })
        });
    });
}

/// What a program has set stays, whatever is written back later.
#[test]
fn times_and_sizes_with_writes_under_way() {
    for_each_way(|pair| {
        pair.same("times", |dir| {
            let path = dir.join("f");
            let file = open(&path);
            file.write_all_at(&[1; 100_000], 0).unwrap();
            let then = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::new(5, 7);
            file.set_modified(then).unwrap();
            let at_once = fs::metadata(&path).unwrap();
            file.sync_all().unwrap();
            drop(file);
            let later = fs::metadata(&path).unwrap();
            [at_once, later].map(|m| (m.mtime(), m.mtime_nsec(), m.len()))
        });
        let behind = fs::metadata(pair.behind("f")).unwrap();
        assert_eq!((behind.mtime(), behind.mtime_nsec(), behind.len()), (5, 7, 100_000));
        pair.same("sizes", |dir| {
            let file = open(&dir.join("g"));
            let mut seen = Vec::new();
            for (write, cut) in [(10_000u64, 5000), (3000, 4000), (70_000, 0), (1, 65_536)] {
                file.write_all_at(&vec![2; write as usize], write / 2).unwrap();
                seen.push(file.metadata().unwrap().len());
                file.set_len(cut).unwrap();
                seen.push((file.metadata().unwrap().len(), seek(&file, 0, libc::SEEK_END)).0);
            }
            (seen, fs::read(dir.join("g")).unwrap())
        });
        assert_eq!(fs::read(pair.behind("g")).unwrap().len(), 65_536);
    });
}

/// Page-aligned memory.
struct Aligned(*mut u8, std::alloc::Layout);

impl Aligned {
    fn new(len: usize, fill: u8) -> Aligned {
        let layout = std::alloc::Layout::from_size_align(len, 4096).unwrap();
        // SAFETY: a layout of more than no bytes, filled at once.
        let start = unsafe {
            let start = std::alloc::alloc(layout);
            start.write_bytes(fill, len);
            start
        };
        Aligned(start, layout)
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: our own allocation, initialised.
        unsafe { std::slice::from_raw_parts_mut(self.0, self.1.size()) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated so.
        unsafe { std::alloc::dealloc(self.0, self.1) }
    }
}

#[test]
fn direct_beside_buffered() {
    for (host, mount) in [
        (&["--allow-direct-io"][..], ""),
        (&[], ""),
        (&["--allow-direct-io", "--cache=always", "--writeback"], "writeback"),
    ] {
        let Some(setup) = Setup::new() else { return };
        let pair = setup.start(host, mount);
        pair.same("direct and buffered", |dir| {
            let path = dir.join("f");
            let buffered = open(&path);
            let direct = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
            let mut seen = Vec::new();
            for round in 0..8u8 {
                let at = u64::from(round) * 4096;
                // Written through the cache, read without it.
                buffered.write_all_at(&[round + 1; 8192], at).unwrap();
                let mut memory = Aligned::new(8192, 0);
                direct.read_exact_at(memory.bytes(), at).unwrap();
                seen.push(memory.bytes().to_vec());
                // And the other way round, over pages that are cached.
                let mut memory = Aligned::new(4096, 100 + round);
                direct.write_all_at(memory.bytes(), at).unwrap();
                let mut back = vec![0; 8192];
                buffered.read_exact_at(&mut back, at).unwrap();
                seen.push(back);
                // Mapped.
                store(&buffered, 4096, 5, round);
                direct.read_exact_at(memory.bytes(), 0).unwrap();
                seen.push(memory.bytes()[..16].to_vec());
            }
            (seen, fs::read(&path).unwrap())
        });
        assert_eq!(fs::read(pair.behind("f")).unwrap(), fs::read(pair.native("f")).unwrap());
    }
}

/// The kernel may write an unaligned page back by a handle that was opened with O_DIRECT.
#[test]
fn unaligned_writeback_beside_a_direct_handle() {
    let Some(setup) = Setup::new() else { return };
    let pair = setup.start(&["--allow-direct-io", "--cache=always", "--writeback"], "writeback");
    pair.same("write back", |dir| {
        let path = dir.join("f");
        let mut options = OpenOptions::new();
        let direct = options.read(true).write(true).create(true).truncate(true).custom_flags(libc::O_DIRECT);
        let direct = direct.open(&path).unwrap();
        fs::OpenOptions::new().write(true).open(&path).unwrap().write_all(&[3; 5001]).unwrap();
        let synced = direct.sync_all().map_err(|e| e.raw_os_error());
        (synced, fs::read(&path).unwrap())
    });
    assert_eq!(fs::read(pair.behind("f")).unwrap(), [3; 5001]);
}

/// `cache = "never"` is for directories that others change: shared mappings work all the same.
#[test]
fn mappings_without_caches() {
    for host in [&["--cache=never"][..], &["--cache=metadata"]] {
        let Some(setup) = Setup::new() else { return };
        let pair = setup.start(host, "");
        pair.same("shared mappings", |dir| {
            let file = open(&dir.join("f"));
            file.write_all_at(&[1; 8192], 0).unwrap();
            let only = File::open(dir.join("f")).unwrap();
            // SAFETY: a new mapping, of which one byte is read before it is unmapped.
            let read = unsafe {
                mmap(None, 10.try_into().unwrap(), ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &only, 0).map(|area| {
                    let byte = area.as_ptr().cast::<u8>().read_volatile();
                    munmap(area, 10).unwrap();
                    byte
                })
            };
            (read, read.is_ok().then(|| store(&file, 8192, 5000, 9)), fs::read(dir.join("f")).unwrap())
        });
        assert_eq!(fs::read(pair.behind("f")).unwrap()[5000], 9);
        let (code, text) = pair.same_script(
            "sqlite3 db 'PRAGMA journal_mode=WAL; CREATE TABLE t(x); INSERT INTO t VALUES(1),(2); SELECT sum(x) FROM t;' \
             && sqlite3 db 'PRAGMA integrity_check; SELECT count(*) FROM t;'",
        );
        assert_eq!((code, text.as_str()), (Some(0), "wal\n3\nok\n2"), "natively: is sqlite3 installed?");
    }
}

/// All modes of fallocate(2), on a small file: results, sizes, contents.
#[test]
fn modes_of_fallocate() {
    use libc::{FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE};
    use libc::{FALLOC_FL_UNSHARE_RANGE, FALLOC_FL_ZERO_RANGE};
    let kept = [0, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE];
    let modes = [kept.as_slice(), &[FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, 0x1000]].concat();
    for_each_way(|pair| {
        pair.same("fallocate", |dir| {
            let mut seen = Vec::new();
            for &mode in &modes {
                for (at, len) in [(0, 4096), (100, 5000), (15_000, 9000), (30_000, 10), (0, 0), (-1, 5)] {
                    let path = dir.join("f");
                    fs::write(&path, [5; 16_384]).unwrap();
                    let file = open(&path);
                    let result = fallocate(&file, mode, at, len);
                    seen.push((mode, at, len, result, fs::read(&path).unwrap()));
                }
            }
            seen.retain(|(mode, ..)| *mode != 0x1000 && *mode != FALLOC_FL_PUNCH_HOLE);
            seen
        });
        // The guest's kernel has these for no FUSE file system (6.18): refused, and nothing is changed.
        for mode in [FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE, FALLOC_FL_UNSHARE_RANGE] {
            let file = open(&pair.on("f"));
            file.set_len(0).unwrap();
            file.write_all_at(&[5; 16_384], 0).unwrap();
            if let Err(e) = fallocate(&file, mode, 0, 4096) {
                assert_eq!(e, Errno::EOPNOTSUPP, "{mode:#x}");
                assert_eq!(fs::read(pair.on("f")).unwrap(), [5; 16_384], "{mode:#x}");
            }
        }
    });
}

#[test]
fn ranges_far_away_and_in_one_file() {
    for_each_way(|pair| {
        pair.same("copy_file_range", |dir| {
            const FAR: i64 = 5 << 30;
            let (one, two) = (open(&dir.join("one")), open(&dir.join("two")));
            one.write_all_at(&[7; 70_000], FAR as u64).unwrap();
            two.write_all_at(b"before", 0).unwrap();
            let reader = File::open(dir.join("one")).unwrap();
            let results = [
                copy_range(&one, FAR, &two, FAR + 4096, 65_536),
                copy_range(&one, FAR, &one, FAR + 100_000, 50_000),
                copy_range(&one, FAR, &one, FAR + 10, 50_000),
                copy_range(&one, FAR + 69_990, &two, 0, 100),
                copy_range(&one, FAR + 80_000, &two, 0, 100),
                copy_range(&two, 0, &reader, 0, 10),
                copy_range(&one, 0, &two, i64::MAX - 5, 100),
                copy_range(&one, FAR, &two, 10, 0),
            ];
            let mut part = vec![0; 65_536];
            two.read_exact_at(&mut part, FAR as u64 + 4096).unwrap();
            let sizes = [&one, &two].map(|f| f.metadata().unwrap().len());
            let mut head = [0; 10];
            two.read_exact_at(&mut head, 0).unwrap();
            (results, part == [7; 65_536], sizes, head)
        });
    });
}

/// Flags of linux/fs.h.
const NODUMP: i32 = 0x40;
const APPEND: i32 = 0x20;
const IMMUTABLE: i32 = 0x10;

/// Without the host's right to set them: refused, and the file stays what it is.
#[test]
fn flags_that_the_host_may_not_set() {
    let Some(pair) = Pair::plain() else { return };
    fs::write(pair.on("f"), "x").unwrap();
    let file = File::open(pair.on("f")).unwrap();
    let before = inode_flags(&file).unwrap();
    for flag in [APPEND, IMMUTABLE] {
        assert_eq!(set_inode_flags(&file, before | flag), Err(Errno::EPERM), "{flag:x}");
        assert_eq!(inode_flags(&file), Ok(before));
    }
    assert_eq!(set_inode_flags(&file, before | NODUMP), Ok(()));
    fs::write(pair.on("f"), "y").unwrap();
    fs::remove_file(pair.on("f")).unwrap();
}

/// lsattr(1) and chattr(1).
#[test]
fn flags_of_files() {
    let Some(setup) = Setup::new() else { return };
    // Without it immutable and append-only are refused (EPERM): the host does not have the right by default.
    let pair = setup.start(&["--modcaps=+linux_immutable", "--ask-open"], "");
    pair.same("FS_IOC_SETFLAGS", |dir| {
        let path = dir.join("f");
        fs::write(&path, "x").unwrap();
        let mut seen = Vec::new();
        for flag in [NODUMP, APPEND, IMMUTABLE, 0] {
            let file = File::open(&path).unwrap();
            let before = inode_flags(&file);
            let set = before.and_then(|b| set_inode_flags(&file, b & !(NODUMP | APPEND | IMMUTABLE) | flag));
            let now = inode_flags(&file).map(|f| f & (NODUMP | APPEND | IMMUTABLE));
            let tries = [
                fs::OpenOptions::new().write(true).open(&path).map(drop).map_err(|e| e.raw_os_error()),
                fs::OpenOptions::new().append(true).open(&path).map(drop).map_err(|e| e.raw_os_error()),
                fs::hard_link(&path, dir.join("g")).map_err(|e| e.raw_os_error()),
            ];
            let _ = fs::remove_file(dir.join("g"));
            seen.push((set, now, tries));
        }
        seen
    });
    // By a user that does not own it.
    pair.same("by others", |dir| {
        let file = File::open(dir.join("f")).unwrap();
        as_user(1000, 1000, &[], || set_inode_flags(&file, NODUMP))
    });
    pair.same("of a directory", |dir| {
        fs::create_dir(dir.join("d")).unwrap();
        let file = File::open(dir.join("d")).unwrap();
        let set = inode_flags(&file).and_then(|b| set_inode_flags(&file, b | NODUMP));
        (set, inode_flags(&file).map(|f| f & NODUMP))
    });
}

/// One file after the other, of which the host has many open for a while: and a program is executed at once.
#[test]
fn many_files_under_a_small_limit() {
    for cache in ["--cache=coherent", "--cache=always"] {
        let Some(setup) = Setup::new() else { return };
        let pair = setup.start(&["--rlimit-nofile=1000", cache], "");
        fs::create_dir(pair.on("d")).unwrap();
        fs::read_dir(pair.on("d")).unwrap();
        fs::write(pair.on("first"), "x").unwrap();
        fs::read(pair.on("first")).unwrap();
        for n in 0..3000 {
            let name = format!("d/{n}");
            fs::write(pair.on(&name), "x").unwrap_or_else(|e| panic!("{cache}: {name}: {e}"));
        }
        fs::create_dir(pair.on("e")).unwrap();
        assert_eq!(fs::read_dir(pair.behind("d")).unwrap().count(), 3000);
        fs::copy("/bin/true", pair.on("program")).unwrap();
        fs::set_permissions(pair.on("program"), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(std::process::Command::new(pair.behind("program")).status().unwrap().success(), "{cache}");
    }
}

/// Where the guest does not ask to open files, its kernel opens what it must not write to, and the write is refused.
#[test]
fn what_is_immutable_or_append_only_is_not_overwritten() {
    let Some(setup) = Setup::new() else { return };
    let pair = setup.start(&["--modcaps=+linux_immutable"], "");
    let path = pair.on("f");
    fs::write(&path, "x").unwrap();
    fs::read(&path).unwrap();
    let file = File::open(&path).unwrap();
    let flags = inode_flags(&file).unwrap();
    for (flag, appends) in [(APPEND, true), (IMMUTABLE, false)] {
        set_inode_flags(&file, flags | flag).unwrap();
        let write = |options: &mut fs::OpenOptions| options.open(&path).and_then(|mut file| file.write_all(b"y"));
        let refused = |result: std::io::Result<()>| result.is_err_and(|e| e.raw_os_error() == Some(libc::EPERM));
        assert!(refused(write(fs::OpenOptions::new().write(true))), "{flag:#x}");
        assert!(refused(write(fs::OpenOptions::new().write(true).truncate(true))), "{flag:#x}");
        assert_eq!(write(fs::OpenOptions::new().append(true)).is_ok(), appends, "{flag:#x}");
        set_inode_flags(&file, flags).unwrap();
    }
    assert_eq!(fs::read(pair.behind("f")).unwrap(), b"xy");
}

#[test]
fn files_without_names() {
    use crate::common::sys::{link_open, tmpfile};
    let Some(pair) = Pair::plain() else { return };
    let linked = pair.same_value("O_TMPFILE", |dir| {
        let file = tmpfile(dir, 0o640).map(File::from);
        let seen = file.as_ref().ok().map(|file| {
            file.write_all_at(b"content", 0).unwrap();
            let before = file.metadata().unwrap();
            let linked = link_open(file, &dir.join("named"));
            (before.nlink(), before.mode(), linked, fs::read(dir.join("named")).ok(), file.metadata().unwrap().nlink())
        });
        (file.map(drop), seen)
    });
    assert_eq!(linked.0, Ok(()), "natively");
}

/// A file on a network of any kind is no swap space.
#[test]
fn swap_files_are_refused() {
    let Some(pair) = Pair::plain() else { return };
    let (code, _) = shell(
        &pair.guest.point,
        "dd if=/dev/zero of=s bs=64k count=16 2>/dev/null && chmod 600 s && mkswap s >/dev/null && swapon s",
    );
    if code == Some(0) {
        let _ = shell(&pair.guest.point, "swapoff s");
    }
    assert_ne!(code, Some(0));
    assert_eq!(fs::read(pair.on("s")).unwrap().len(), 1 << 20);
}

/// Reading says so in a host's directory, or not, as the mount's options have it.
#[test]
fn syncs_of_every_kind() {
    for_each_way(|pair| {
        pair.same("sync", |dir| {
            let file = open(&dir.join("f"));
            file.write_all_at(&[1; 100_000], 0).unwrap();
            // SAFETY: no memory is touched.
            let range = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 100_000, libc::SYNC_FILE_RANGE_WRITE) };
            let all = [file.sync_data(), file.sync_all(), File::open(dir).unwrap().sync_all()];
            (range, all.map(|r| r.is_ok()), nix::unistd::syncfs(&file))
        });
        assert_eq!(fs::read(pair.behind("f")).unwrap().len(), 100_000);
    });
}
