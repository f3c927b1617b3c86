//! Checks of attributes, permissions, extended attributes and locks.

use crate::files::open;
use crate::rig::{as_user, errno, Place};
use crate::sys::acl;
use crate::Check;
use nix::fcntl::{fcntl, AtFlags, FcntlArg, Flock, FlockArg, AT_FDCWD};
use nix::sys::stat::{utimensat, UtimensatFlags};
use nix::sys::time::TimeSpec;
use nix::unistd::{fchownat, Gid, Uid};
use std::ffi::CString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{chown, symlink, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

pub const CHECKS: &[Check] = &[
    ("modes", modes_and_owners),
    ("times", times_to_the_nanosecond),
    ("others", other_users_are_kept_out),
    ("sticky", sticky_directories),
    ("setgid", setgid_directories_and_groups),
    ("privileges", writing_drops_setuid),
    ("xattrs", extended_attributes),
    ("acls", access_control_lists),
    ("flock", whole_file_locks),
    ("fcntl", range_locks),
];

/// Nobody in particular.
const USER: u32 = 12345;
const GROUP: u32 = 23456;

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

fn modes_and_owners(p: &Place) {
    let file = open(&p.path("f"));
    for wanted in [0o000, 0o644, 0o4755, 0o1777, 0o600] {
        set_mode(&p.path("f"), wanted);
        assert_eq!(mode(&p.path("f")), wanted);
        assert_eq!(mode(&p.behind.join("f")), wanted);
    }
    file.set_permissions(Permissions::from_mode(0o640)).unwrap();
    chown(p.path("f"), Some(USER), None).unwrap();
    nix::unistd::fchown(&file, None, Some(Gid::from_raw(GROUP))).unwrap();
    let meta = fs::metadata(p.behind.join("f")).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o640, USER, GROUP));
    symlink("f", p.path("l")).unwrap();
    let (nobody, link) = (Some(Uid::from_raw(1)), AtFlags::AT_SYMLINK_NOFOLLOW);
    fchownat(AT_FDCWD, &p.path("l"), nobody, None, link).unwrap();
    assert_eq!(fs::symlink_metadata(p.path("l")).unwrap().uid(), 1);
    assert_eq!(fs::metadata(p.path("f")).unwrap().uid(), USER);
}

fn times_to_the_nanosecond(p: &Place) {
    fs::write(p.path("f"), "x").unwrap();
    let set = |a, m| utimensat(AT_FDCWD, &p.path("f"), &a, &m, UtimensatFlags::FollowSymlink).unwrap();
    let get = || {
        let meta = fs::metadata(p.path("f")).unwrap();
        ((meta.atime(), meta.atime_nsec()), (meta.mtime(), meta.mtime_nsec()))
    };
    set(TimeSpec::new(1_000_000_007, 123_456_789), TimeSpec::new(2_000_000_003, 987_654_321));
    assert_eq!(get(), ((1_000_000_007, 123_456_789), (2_000_000_003, 987_654_321)));
    set(TimeSpec::UTIME_OMIT, TimeSpec::new(5, 6));
    assert_eq!(get(), ((1_000_000_007, 123_456_789), (5, 6)));
    set(TimeSpec::UTIME_NOW, TimeSpec::UTIME_OMIT);
    assert!(get().0 .0 > 1_700_000_000 && get().1 == (5, 6));
    fs::write(p.path("f"), "y").unwrap();
    assert!(get().1 .0 > 1_700_000_000, "a write is a modification");
}

fn other_users_are_kept_out(p: &Place) {
    fs::write(p.path("secret"), "x").unwrap();
    set_mode(&p.path("secret"), 0o600);
    fs::create_dir(p.path("closed")).unwrap();
    fs::write(p.path("closed/f"), "x").unwrap();
    set_mode(&p.path("closed"), 0o700);
    as_user(USER, GROUP, &[], || {
        assert_eq!(errno(File::open(p.path("secret"))), libc::EACCES);
        assert_eq!(errno(fs::metadata(p.path("closed/f"))), libc::EACCES);
        assert_eq!(errno(fs::read_dir(p.path("closed"))), libc::EACCES);
        assert_eq!(errno(File::create(p.path("new"))), libc::EACCES);
        assert_eq!(errno(fs::remove_file(p.path("secret"))), libc::EACCES);
        assert_eq!(errno(fs::set_permissions(p.path("secret"), Permissions::from_mode(0o666))), libc::EPERM);
        assert_eq!(errno(chown(p.path("secret"), Some(USER), None)), libc::EPERM);
    });
    chown(p.path("secret"), Some(USER), None).unwrap();
    as_user(USER, GROUP, &[], || assert_eq!(fs::read(p.path("secret")).unwrap(), b"x"));
    chown(p.path("secret"), Some(1), Some(GROUP)).unwrap();
    set_mode(&p.path("secret"), 0o640);
    as_user(USER, USER, &[GROUP], || assert_eq!(fs::read(p.path("secret")).unwrap(), b"x"));
    as_user(USER, USER, &[], || assert_eq!(errno(File::open(p.path("secret"))), libc::EACCES));
}

fn sticky_directories(p: &Place) {
    set_mode(&p.dir, 0o1777);
    as_user(USER, GROUP, &[], || {
        fs::write(p.path("f"), "x").unwrap();
        fs::create_dir(p.path("d")).unwrap();
        symlink("f", p.path("l")).unwrap();
    });
    for name in ["f", "d", "l"] {
        let meta = fs::symlink_metadata(p.behind.join(name)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (USER, GROUP), "{name}");
    }
    as_user(USER + 1, GROUP, &[], || {
        assert_eq!(errno(fs::remove_file(p.path("f"))), libc::EPERM);
        assert_eq!(errno(fs::rename(p.path("f"), p.path("g"))), libc::EPERM);
    });
    as_user(USER, GROUP, &[], || fs::remove_file(p.path("f")).unwrap());
}

/// A member of the directory's group by a supplementary group may create there,
/// and keeps the setgid bit of what it makes.
fn setgid_directories_and_groups(p: &Place) {
    chown(&p.dir, None, Some(GROUP)).unwrap();
    set_mode(&p.dir, 0o2770);
    as_user(USER, USER, &[GROUP + 1, GROUP, GROUP + 2], || {
        OpenOptions::new().write(true).create_new(true).mode(0o2775).open(p.path("f")).unwrap();
        fs::create_dir(p.path("d")).unwrap();
        fs::create_dir(p.path("d/e")).unwrap();
        symlink("f", p.path("l")).unwrap();
        nix::unistd::mkfifo(&p.path("p"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    });
    for name in ["f", "d", "d/e", "l", "p"] {
        assert_eq!(fs::symlink_metadata(p.path(name)).unwrap().gid(), GROUP, "{name}");
    }
    for name in ["f", "d", "d/e"] {
        assert_eq!(mode(&p.behind.join(name)) & 0o2000, 0o2000, "{name}");
    }
    as_user(USER, USER, &[], || assert_eq!(errno(File::create(p.path("g"))), libc::EACCES));
}

fn writing_drops_setuid(p: &Place) {
    type Change = fn(&Path) -> io::Result<()>;
    let changes: [Change; 3] = [
        |path| OpenOptions::new().write(true).open(path)?.write_at(b"y", 0).map(drop),
        |path| OpenOptions::new().write(true).open(path)?.set_len(1),
        |path| OpenOptions::new().write(true).truncate(true).open(path).map(drop),
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let path = p.path(&format!("{i}"));
        fs::write(&path, "xxx").unwrap();
        set_mode(&path, 0o6777);
        as_user(USER, GROUP, &[], || change(&path).unwrap());
        assert_eq!(mode(&path), 0o777, "change {i}");
    }
}

fn c_string(path: &Path) -> CString {
    CString::new(path.as_os_str().as_encoded_bytes()).unwrap()
}

fn set_xattr(path: &Path, name: &str, value: &[u8], flags: i32) -> io::Result<()> {
    let (path, name) = (c_string(path), CString::new(name).unwrap());
    // SAFETY: NUL-ended strings, and a value of the length that is told.
    let n = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) };
    if n == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn get_xattr(path: &Path, name: &str, room: usize) -> io::Result<Vec<u8>> {
    let (path, name) = (c_string(path), CString::new(name).unwrap());
    let mut value = vec![0; room];
    // SAFETY: NUL-ended strings, and as much room as is told.
    let n = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), room) };
    value.truncate(usize::try_from(n).map_err(|_| io::Error::last_os_error())?);
    Ok(value)
}

fn list_xattrs(path: &Path) -> Vec<String> {
    let path = c_string(path);
    let mut names = vec![0u8; 4096];
    // SAFETY: a NUL-ended string, and as much room as is told.
    let n = unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(usize::try_from(n).unwrap());
    let names = names.split(|&b| b == 0).filter(|n| !n.is_empty());
    names.map(|n| String::from_utf8(n.into()).unwrap()).filter(|n| n.starts_with("user.")).collect()
}

fn remove_xattr(path: &Path, name: &str) -> io::Result<()> {
    let (path, name) = (c_string(path), CString::new(name).unwrap());
    // SAFETY: NUL-ended strings.
    let n = unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) };
    if n == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn extended_attributes(p: &Place) {
    fs::create_dir(p.path("d")).unwrap();
    fs::write(p.path("f"), "").unwrap();
    for path in [p.path("f"), p.path("d")] {
        set_xattr(&path, "user.a", b"value", 0).unwrap();
        set_xattr(&path, "user.b", &[0, 1, 255].repeat(700), 0).unwrap();
        assert_eq!(get_xattr(&path, "user.a", 100).unwrap(), b"value");
        assert_eq!(get_xattr(&path, "user.b", 4096).unwrap(), [0, 1, 255].repeat(700));
        assert_eq!(errno(get_xattr(&path, "user.a", 3)), libc::ERANGE);
        assert_eq!(errno(get_xattr(&path, "user.c", 100)), libc::ENODATA);
        assert_eq!(errno(set_xattr(&path, "user.a", b"", libc::XATTR_CREATE)), libc::EEXIST);
        assert_eq!(errno(set_xattr(&path, "user.c", b"", libc::XATTR_REPLACE)), libc::ENODATA);
        let mut names = list_xattrs(&path);
        names.sort();
        assert_eq!(names, ["user.a", "user.b"]);
        remove_xattr(&path, "user.a").unwrap();
        assert_eq!(errno(remove_xattr(&path, "user.a")), libc::ENODATA);
        assert_eq!(list_xattrs(&path), ["user.b"]);
    }
    assert_eq!(get_xattr(&p.behind.join("f"), "user.b", 4096).unwrap().len(), 2100);
    // Many at once: the host changes its working directory for each.
    std::thread::scope(|s| {
        for thread in 0..4 {
            s.spawn(move || {
                let path = p.path(&format!("t{thread}"));
                fs::write(&path, "").unwrap();
                for i in 0..100 {
                    set_xattr(&path, "user.n", format!("{thread}-{i}").as_bytes(), 0).unwrap();
                    assert_eq!(get_xattr(&path, "user.n", 100).unwrap(), format!("{thread}-{i}").as_bytes());
                }
            });
        }
    });
}

fn access_control_lists(p: &Place) {
    const NONE: u32 = u32::MAX;
    // Owner, one user, the group, the mask, others.
    let with = |user: u16| acl(&[(1, 7, NONE), (2, user, USER), (4, 0, NONE), (0x10, 7, NONE), (0x20, 0, NONE)]);
    fs::write(p.path("f"), "x").unwrap();
    set_mode(&p.path("f"), 0o600);
    set_xattr(&p.path("f"), "system.posix_acl_access", &with(4), 0).unwrap();
    assert_eq!(mode(&p.path("f")), 0o770, "the mask shows as the group's bits");
    as_user(USER, GROUP, &[], || {
        assert_eq!(fs::read(p.path("f")).unwrap(), b"x");
        assert_eq!(errno(OpenOptions::new().write(true).open(p.path("f"))), libc::EACCES);
    });
    as_user(USER + 1, GROUP, &[], || assert_eq!(errno(File::open(p.path("f"))), libc::EACCES));
    set_mode(&p.path("f"), 0o600);
    as_user(USER, GROUP, &[], || assert_eq!(errno(File::open(p.path("f"))), libc::EACCES));

    fs::create_dir(p.path("d")).unwrap();
    set_mode(&p.path("d"), 0o755);
    set_xattr(&p.path("d"), "system.posix_acl_default", &with(6), 0).unwrap();
    OpenOptions::new().write(true).create_new(true).mode(0o666).open(p.path("d/f")).unwrap();
    fs::create_dir(p.path("d/e")).unwrap();
    assert_eq!(mode(&p.behind.join("d/f")), 0o660);
    assert_eq!(get_xattr(&p.path("d/e"), "system.posix_acl_default", 100).unwrap(), with(6));
    as_user(USER, GROUP, &[], || OpenOptions::new().write(true).open(p.path("d/f")).map(drop)).unwrap();
}

fn whole_file_locks(p: &Place) {
    let lock = |kind| Flock::lock(open(&p.path("f")), kind).map_err(|(_, e)| e);
    let shared = lock(FlockArg::LockSharedNonblock).unwrap();
    let second = lock(FlockArg::LockSharedNonblock).unwrap();
    assert_eq!(lock(FlockArg::LockExclusiveNonblock).err(), Some(nix::Error::EWOULDBLOCK));
    drop((shared, second));
    let alone = lock(FlockArg::LockExclusiveNonblock).unwrap();
    assert_eq!(lock(FlockArg::LockSharedNonblock).err(), Some(nix::Error::EWOULDBLOCK));
    std::thread::scope(|s| {
        let parker = s.spawn(|| lock(FlockArg::LockExclusive).map(drop));
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!parker.is_finished());
        drop(alone);
        parker.join().unwrap().unwrap();
    });
}

fn range_locks(p: &Place) {
    let range = |kind: i32, start: i64, len: i64| libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    let (one, two) = (open(&p.path("f")), open(&p.path("f")));
    let set = |file: &File, lock: libc::flock| fcntl(file, FcntlArg::F_OFD_SETLK(&lock));
    set(&one, range(libc::F_WRLCK, 0, 100)).unwrap();
    set(&two, range(libc::F_WRLCK, 100, 100)).unwrap();
    assert_eq!(set(&two, range(libc::F_RDLCK, 50, 10)), Err(nix::Error::EAGAIN));
    let mut question = range(libc::F_RDLCK, 50, 10);
    fcntl(&two, FcntlArg::F_OFD_GETLK(&mut question)).unwrap();
    assert_eq!((question.l_type as i32, question.l_start, question.l_len), (libc::F_WRLCK, 0, 100));
    set(&one, range(libc::F_UNLCK, 40, 30)).unwrap();
    set(&two, range(libc::F_RDLCK, 50, 10)).unwrap();
    assert_eq!(set(&one, range(libc::F_WRLCK, 0, 60)), Err(nix::Error::EAGAIN));
    drop(two);
    set(&one, range(libc::F_WRLCK, 0, 0)).unwrap();
}
