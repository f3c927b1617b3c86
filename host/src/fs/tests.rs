//! The file system of a directory, called as the server calls it.

use super::*;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use tempfile::TempDir;
use tunnelfs_fuse_abi::flags::{fattr, fopen, init};
use tunnelfs_fuse_abi::*;
use tunnelfs_settings::{Cache, FileHandles, Negotiation};
use virtiofsd::soft_idmap::IdMap;

pub(super) const ROOT: Context = Context { uid: 0, gid: 0, pid: 1, unique: 0 };
const USER: Context = Context { uid: 1000, gid: 1000, pid: 1, unique: 0 };

pub(super) fn config(dir: &Path) -> Config {
    Config {
        root: dir.into(),
        descriptors: None,
        cache: Cache::Auto,
        timeout: std::time::Duration::from_secs(1),
        missing_timeout: std::time::Duration::ZERO,
        readonly: false,
        writeback: false,
        readdirplus: true,
        announce_submounts: true,
        direct_io: false,
        mmap: true,
        killpriv: true,
        keep_noatime: false,
        ask_open: false,
        posix_acl: Negotiation::Never,
        shared_locks: false,
        exact_times: false,
        handles: FileHandles::Prefer,
        xattrs: None,
        ids: Ids::new(Owners::Real, IdMap::empty(), IdMap::empty(), false),
        inodes: 100,
        files: 100,
        coherence: None,
    }
}

/// Serves a new directory on a thread of its own, which changes its working directory; needs root.
fn serve(change: impl FnOnce(&mut Config), test: impl FnOnce(&Passthrough, &Path) + Send) {
    if !credentials::acts_for_others() {
        return println!("skipped: needs root");
    }
    let dir = TempDir::new().unwrap();
    let share = dir.path().join("share");
    fs::create_dir(&share).unwrap();
    let mut config = config(&share);
    change(&mut config);
    let served = Passthrough::new(config).unwrap();
    std::thread::scope(|scope| {
        let work = || {
            served.prepare_thread();
            FileSystem::init(&served, !(init::SUBMOUNTS | init::WRITEBACK_CACHE)).unwrap();
            test(&served, &share);
        };
        scope.spawn(work).join().unwrap();
    });
}

/// By the trait, not by the file system's own functions.
fn fs_of(served: &Passthrough) -> &impl FileSystem {
    served
}

fn error<T>(result: io::Result<T>) -> i32 {
    result.err().and_then(|e| e.raw_os_error()).unwrap_or(0)
}

fn set(valid: u32, change: impl FnOnce(&mut SetattrIn)) -> SetattrIn {
    let mut set = SetattrIn { valid, ..SetattrIn::default() };
    change(&mut set);
    set
}

fn open(served: &Passthrough, node: u64, flags: i32) -> u64 {
    fs_of(served).open(&ROOT, node, &OpenIn { flags: flags as u32, open_flags: 0 }).unwrap().fh
}

fn release(served: &Passthrough, node: u64, fh: u64) {
    fs_of(served).release(&ROOT, node, &ReleaseIn { fh, ..ReleaseIn::default() }).unwrap();
}

/// The flags of an OPEN for reading, and of a CREATE.
fn open_flags(served: &Passthrough) -> [u32; 2] {
    let fs = fs_of(served);
    let args = CreateIn { flags: (libc::O_WRONLY | libc::O_CREAT) as u32, mode: 0o644, umask: 0, open_flags: 0 };
    let made = fs.create(&ROOT, ROOT_ID, c"f", &args, &Extensions::default()).unwrap();
    let opened = fs.open(&ROOT, made.entry.nodeid, &OpenIn::default()).unwrap();
    [opened.open_flags, made.open.open_flags]
}

#[test]
fn closing_asks_only_where_it_does_something() {
    let asks = |served: &Passthrough| open_flags(served).map(|flags| flags & fopen::NOFLUSH == 0);
    serve(
        |_| (),
        |served, share| {
            // A file system that is not known may report errors to writers.
            use nix::sys::statfs::*;
            let kind = statfs(share).unwrap().filesystem_type();
            let silent = [TMPFS_MAGIC, EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC].contains(&kind);
            assert_eq!(asks(served), [false, !silent]);
        },
    );
    serve(|config| config.shared_locks = true, |served, _| assert_eq!(asks(served), [true, true], "locks"));
    serve(
        |config| config.writeback = true,
        |served, _| {
            FileSystem::init(served, init::WRITEBACK_CACHE).unwrap();
            assert_eq!(asks(served), [true, true], "writeback");
        },
    );
}

#[test]
fn what_is_created_is_the_callers() {
    serve(
        |_| (),
        |served, share| {
            let fs = fs_of(served);
            fs::set_permissions(share, fs::Permissions::from_mode(0o555)).unwrap();
            let none = Extensions::default();
            let args = CreateIn { flags: libc::O_RDWR as u32, mode: 0o666, umask: 0o027, open_flags: 0 };
            let made = fs.create(&USER, ROOT_ID, c"f", &args, &none).unwrap();
            let dir = fs.mkdir(&USER, ROOT_ID, c"d", &MkdirIn { mode: 0o777, umask: 0o022 }, &none).unwrap();
            let link = fs.symlink(&USER, ROOT_ID, c"l", c"../anywhere", &none).unwrap();
            let fifo = MknodIn { mode: libc::S_IFIFO | 0o644, ..MknodIn::default() };
            let fifo = fs.mknod(&USER, ROOT_ID, c"p", &fifo, &none).unwrap();
            let modes = [made.entry, dir, link, fifo].map(|e| e.attr.mode);
            assert_eq!(modes, [0o100_640, 0o40_755, 0o120_777, 0o10_644]);
            for entry in [made.entry, dir, link, fifo] {
                assert_eq!((entry.attr.uid, entry.attr.gid), (1000, 1000));
            }
            assert_eq!(fs.readlink(&ROOT, link.nodeid).unwrap(), b"../anywhere");
            assert_eq!(error(fs.create(&USER, ROOT_ID, c"l", &args, &none)), libc::ELOOP, "a link is not followed");
            assert_eq!(error(fs.open(&ROOT, fifo.nodeid, &OpenIn::default())), libc::ENXIO);
            let born = fs.statx(&ROOT, made.entry.nodeid, None, 0, 0).unwrap().stat;
            assert!(born.btime.tv_sec > 0 && born.mask & libc::STATX_BTIME != 0);
            release(served, made.entry.nodeid, made.open.fh);
        },
    );
}

#[test]
fn a_setgid_directory_and_a_group_of_the_callers() {
    serve(
        |_| (),
        |served, share| {
            let fs = fs_of(served);
            fs::set_permissions(share, fs::Permissions::from_mode(0o2777)).unwrap();
            std::os::unix::fs::chown(share, None, Some(50)).unwrap();
            let args = CreateIn { flags: libc::O_RDWR as u32, mode: 0o2775, ..CreateIn::default() };
            let made = fs.create(&USER, ROOT_ID, c"f", &args, &Extensions::default()).unwrap();
            assert_eq!((made.entry.attr.gid, made.entry.attr.mode & 0o7777), (50, 0o2775));
            let dir = fs.mkdir(&USER, ROOT_ID, c"d", &MkdirIn { mode: 0o755, umask: 0 }, &Extensions::default());
            assert_eq!(dir.unwrap().attr.mode & 0o7777, 0o2755);
        },
    );
}

#[test]
fn changes_clear_setuid_bits_for_who_is_not_root() {
    serve(
        |_| (),
        |served, share| {
            let fs = fs_of(served);
            let path = share.join("program");
            for (ctx, left) in [(USER, 0o755), (ROOT, 0o6755)] {
                for how in 0..4 {
                    fs::write(&path, vec![1; 9000]).unwrap();
                    fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
                    let entry = fs.lookup(&ROOT, ROOT_ID, c"program").unwrap();
                    assert_eq!((entry.attr_valid, entry.attr_valid_nsec), (0, 0), "the mode may change unseen");
                    let (node, fh) = (entry.nodeid, open(served, entry.nodeid, libc::O_RDWR));
                    match how {
                        0 => fs
                            .fallocate(&ctx, node, &FallocateIn { fh, length: 99999, ..FallocateIn::default() })
                            .unwrap(),
                        1 => {
                            let mode = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
                            fs.fallocate(&ctx, node, &FallocateIn { fh, length: 4096, mode, ..FallocateIn::default() })
                                .unwrap();
                        }
                        2 => {
                            let args = CopyFileRangeIn {
                                fh_in: fh,
                                nodeid_out: node,
                                fh_out: fh,
                                off_out: 8192,
                                len: 100,
                                ..CopyFileRangeIn::default()
                            };
                            assert_eq!(fs.copy_file_range(&ctx, node, &args).unwrap(), 100);
                        }
                        _ => {
                            let kill = if ctx == USER { fattr::KILL_SUIDGID } else { 0 };
                            let set = set(fattr::SIZE | kill, |set| set.size = 7);
                            let mode = fs.setattr(&ctx, node, &set).unwrap().attr.mode & 0o7777;
                            // Natively truncation takes the bits whoever does it.
                            assert!(mode == left || ctx == ROOT && mode & 0o4000 == 0, "{mode:o}");
                            release(served, node, fh);
                            continue;
                        }
                    }
                    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, left, "{ctx:?}, {how}");
                    release(served, node, fh);
                }
            }
            // A bit without group execution is no program's.
            fs::set_permissions(&path, fs::Permissions::from_mode(0o2764)).unwrap();
            let node = fs.lookup(&ROOT, ROOT_ID, c"program").unwrap().nodeid;
            let set = set(fattr::SIZE | fattr::KILL_SUIDGID, |set| set.size = 3);
            assert_eq!(fs.setattr(&USER, node, &set).unwrap().attr.mode & 0o7777, 0o2764);
        },
    );
}

#[test]
fn up_does_not_lead_out_of_the_share() {
    serve(
        |_| (),
        |served, share| {
            let fs = fs_of(served);
            fs::create_dir_all(share.join("a/b")).unwrap();
            let a = fs.lookup(&ROOT, ROOT_ID, c"a").unwrap().nodeid;
            let b = fs.lookup(&ROOT, a, c"b").unwrap().nodeid;
            assert_eq!(fs.lookup(&ROOT, b, c"..").unwrap().nodeid, a);
            assert_eq!(fs.lookup(&ROOT, a, c"..").unwrap().nodeid, ROOT_ID);
            assert_eq!(fs.lookup(&ROOT, ROOT_ID, c"..").unwrap().nodeid, ROOT_ID);
            fs::rename(share.join("a/b"), share.parent().unwrap().join("b")).unwrap();
            assert_eq!(error(fs.lookup(&ROOT, b, c"..")), libc::ESTALE);
        },
    );
}

#[test]
fn a_forgotten_node_is_found_by_its_number() {
    serve(
        |_| (),
        |served, share| {
            let fs = fs_of(served);
            fs::write(share.join("f"), "x").unwrap();
            let node = fs.lookup(&ROOT, ROOT_ID, c"f").unwrap().nodeid;
            fs.forget(node, 1);
            assert_eq!(error(fs.getattr(&ROOT, node, None)), libc::EBADF);
            let again = fs.lookup(&ROOT, node, c".").unwrap();
            assert_eq!((again.nodeid, again.attr.size), (node, 1));
            assert_eq!(fs.lookup(&ROOT, ROOT_ID, c"f").unwrap().nodeid, node);
            assert_eq!(error(fs.lookup(&ROOT, 1 << 40, c".")), libc::ESTALE);
        },
    );
}

fn list(served: &Passthrough, node: u64, each: usize, plus: bool) -> Vec<String> {
    let fs = fs_of(served);
    let fh = fs.opendir(&ROOT, node, &OpenIn::default()).unwrap().fh;
    let (mut names, mut offset) = (Vec::new(), 0);
    loop {
        let (mut taken, before) = (0, names.len());
        let args = ReadIn { fh, offset, size: 4096, ..ReadIn::default() };
        let mut sink = |entry: &DirEntry<'_>, known: Option<&EntryOut>| {
            if taken == each {
                return Ok(false);
            }
            let dots = entry.name == c"." || entry.name == c"..";
            assert_eq!(known.is_some(), plus && !dots);
            if let Some(known) = known {
                assert_eq!(known.attr.ino, entry.ino);
            }
            (taken, offset) = (taken + 1, entry.offset);
            names.push(entry.name.to_str().unwrap().to_owned());
            Ok(true)
        };
        fs.readdir(&ROOT, node, &args, plus, &mut sink).unwrap();
        if names.len() == before {
            break;
        }
    }
    fs.releasedir(&ROOT, node, &ReleaseIn { fh, ..ReleaseIn::default() }).unwrap();
    names
}

#[test]
fn listings_have_each_name_once() {
    serve(
        |_| (),
        |served, share| {
            let mut expected: BTreeSet<String> = (0..300).map(|n| format!("{n:0>40}")).collect();
            expected.iter().for_each(|name| fs::write(share.join(name), "").unwrap());
            expected.extend([".".into(), "..".into()]);
            for (each, plus) in [(1000, false), (1000, true), (7, false), (7, true), (1, false)] {
                let names = list(served, ROOT_ID, each, plus);
                assert_eq!((names.len(), names.into_iter().collect::<BTreeSet<_>>()), (302, expected.clone()));
            }
            // What did not fit was forgotten: three listings with look-ups, and nothing else.
            assert_eq!(served.inodes.len(), 300);
        },
    );
}

#[test]
fn nothing_changes_on_a_share_that_is_read_only() {
    serve(
        |config| config.readonly = true,
        |served, share| {
            let (fs, none) = (fs_of(served), Extensions::default());
            fs::write(share.join("f"), "x").unwrap();
            let node = fs.lookup(&ROOT, ROOT_ID, c"f").unwrap().nodeid;
            let write = OpenIn { flags: libc::O_WRONLY as u32, open_flags: 0 };
            let all = [
                error(fs.open(&ROOT, node, &write)),
                error(fs.create(&ROOT, ROOT_ID, c"g", &CreateIn::default(), &none)),
                error(fs.mkdir(&ROOT, ROOT_ID, c"g", &MkdirIn::default(), &none)),
                error(fs.unlink(&ROOT, ROOT_ID, c"f")),
                error(fs.link(&ROOT, node, ROOT_ID, c"g")),
                error(fs.rename(&ROOT, ROOT_ID, c"f", ROOT_ID, c"g", 0)),
                error(fs.setattr(&ROOT, node, &set(fattr::MODE, |_| ()))),
                error(fs.setxattr(&ROOT, node, c"user.a", b"", 0, 0)),
                error(fs.access(&ROOT, node, libc::W_OK as u32)),
            ];
            assert_eq!(all, [libc::EROFS; 9]);
            assert_eq!(error(fs.access(&ROOT, node, libc::R_OK as u32)), 0);
        },
    );
}

#[test]
fn owners_are_kept_in_an_attribute() {
    serve(
        |config| config.ids = Ids::new(Owners::Attribute, IdMap::empty(), IdMap::empty(), false),
        |served, share| {
            let (fs, none) = (fs_of(served), Extensions::default());
            let args = CreateIn { flags: libc::O_RDWR as u32, mode: 0o4711, ..CreateIn::default() };
            let made = fs.create(&USER, ROOT_ID, c"f", &args, &none).unwrap();
            let node = made.entry.nodeid;
            let seen = |attr: Attr| (attr.uid, attr.gid, attr.mode & 0o7777);
            assert_eq!(seen(made.entry.attr), (1000, 1000, 0o4711));
            let real = fs::metadata(share.join("f")).unwrap();
            assert_eq!((real.uid(), real.mode() & 0o7777), (0, 0o711), "no setuid program of this process's user");
            let owner = set(fattr::UID | fattr::GID, |set| (set.uid, set.gid) = (999, 5));
            assert_eq!(seen(fs.setattr(&ROOT, node, &owner).unwrap().attr), (999, 5, 0o711));
            assert_eq!(
                seen(fs.setattr(&ROOT, node, &set(fattr::MODE, |set| set.mode = 0o4000)).unwrap().attr),
                (999, 5, 0o4000)
            );
            assert_eq!(fs::metadata(share.join("f")).unwrap().mode() & 0o7777, 0o600);
            let length = FallocateIn { fh: made.open.fh, length: 10, ..FallocateIn::default() };
            fs.fallocate(&USER, node, &length).unwrap();
            assert_eq!(seen(fs.getattr(&ROOT, node, None).unwrap().attr), (999, 5, 0));
            assert_eq!(seen(fs.lookup(&ROOT, ROOT_ID, c"f").unwrap().attr), (999, 5, 0));
        },
    );
}

#[test]
fn special_files_are_kept_as_regular_ones() {
    serve(
        |config| config.ids = Ids::new(Owners::Attribute, IdMap::empty(), IdMap::empty(), false),
        |served, share| {
            let (fs, none) = (fs_of(served), Extensions::default());
            // Minor 0x12345, major 8: as Linux's new_encode_dev has them.
            let args = MknodIn { mode: libc::S_IFBLK | 0o640, rdev: 0x1230_0845, ..MknodIn::default() };
            let made = fs.mknod(&USER, ROOT_ID, c"b", &args, &none).unwrap();
            let seen = |attr: Attr| (attr.uid, attr.mode, attr.rdev);
            assert_eq!(seen(made.attr), (1000, libc::S_IFBLK | 0o640, 0x1230_0845));
            assert!(fs::symlink_metadata(share.join("b")).unwrap().is_file());
            let mode = set(fattr::MODE, |set| set.mode = 0o4711);
            let changed = fs.setattr(&ROOT, made.nodeid, &mode).unwrap().attr;
            assert_eq!(seen(changed), (1000, libc::S_IFBLK | 0o4711, 0x1230_0845));
            let stat = fs.statx(&ROOT, made.nodeid, None, 0, 0).unwrap().stat;
            assert_eq!((stat.rdev_major, stat.rdev_minor), (8, 0x12345));
            // Only CREATE of a regular file opens one.
            let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, ..CreateIn::default() };
            assert_eq!(error(fs.create(&ROOT, ROOT_ID, c"b", &create, &none)), libc::ESTALE);
        },
    );
}

#[test]
fn a_mapped_owner_stays_the_owner() {
    serve(
        |config| config.ids = Ids::new(Owners::Mapped { uid: 7, gid: 8 }, IdMap::empty(), IdMap::empty(), false),
        |served, _| {
            let fs = fs_of(served);
            let args = CreateIn { flags: libc::O_RDWR as u32, mode: 0o644, ..CreateIn::default() };
            let made = fs.create(&USER, ROOT_ID, c"f", &args, &Extensions::default()).unwrap().entry;
            assert_eq!((made.attr.uid, made.attr.gid), (7, 8));
            let owner = |uid, gid| set(fattr::UID | fattr::GID, |set| (set.uid, set.gid) = (uid, gid));
            assert_eq!(error(fs.setattr(&ROOT, made.nodeid, &owner(7, 8))), 0);
            assert_eq!(error(fs.setattr(&ROOT, made.nodeid, &owner(9, 8))), libc::EPERM);
        },
    );
}

#[test]
fn files_without_names() {
    serve(
        |_| (),
        |served, share| {
            let fs = fs_of(served);
            let args = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, ..CreateIn::default() };
            let made = fs.tmpfile(&USER, ROOT_ID, &args, &Extensions::default()).unwrap();
            assert_eq!((made.entry.attr.uid, made.entry.attr.nlink), (1000, 0));
            let linked = fs.link(&ROOT, made.entry.nodeid, ROOT_ID, c"named").unwrap();
            assert_eq!((linked.nodeid, linked.attr.nlink), (made.entry.nodeid, 1));
            assert!(share.join("named").exists());
        },
    );
}

#[test]
fn a_guest_that_opens_without_end() {
    serve(
        |config| config.files = 10,
        |served, share| {
            let fs = fs_of(served);
            fs::write(share.join("f"), "x").unwrap();
            let node = fs.lookup(&ROOT, ROOT_ID, c"f").unwrap().nodeid;
            let all: Vec<u64> = (0..10).map(|_| open(served, node, libc::O_RDONLY)).collect();
            assert_eq!(error(fs.open(&ROOT, node, &OpenIn::default())), libc::ENFILE);
            assert_eq!(error(fs.opendir(&ROOT, ROOT_ID, &OpenIn::default())), libc::ENFILE);
            release(served, node, all[3]);
            assert_eq!(error(fs.release(&ROOT, node, &ReleaseIn { fh: all[3], ..ReleaseIn::default() })), libc::EBADF);
            assert_eq!(
                error(fs.release(&ROOT, ROOT_ID, &ReleaseIn { fh: all[4], ..ReleaseIn::default() })),
                libc::EBADF
            );
            open(served, node, libc::O_RDONLY);
        },
    );
}
