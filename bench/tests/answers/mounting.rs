//! The mount as others use it: options, read-only shares, mapped ids.

use crate::common::pair::{make_dir, shell, Pair, Setup};
use crate::common::sys::{c, told, Answer};
use crate::rig::{as_user, errno, Unmounted};
use nix::mount::{mount, MsFlags};
use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{chown, symlink, MetadataExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The options of the mount, and of its file system, as /proc/self/mountinfo has them.
fn options_of(point: &Path) -> String {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let point = format!(" {} ", point.display());
    let line = text.lines().find(|l| l.contains(&point)).expect("mounted");
    let fields: Vec<_> = line.split(' ').collect();
    format!(",{},{},", fields[5], fields.last().unwrap())
}

#[test]
fn options_of_mount() {
    for (words, wanted, not) in [
        ("strictatime", "", "relatime,noatime"),
        ("noatime,strictatime", "", "relatime,noatime"),
        ("noatime", "noatime", "relatime"),
        ("norelatime,diratime,loud,iversion,mand,nomand", "relatime", "nodiratime"),
        ("nodiratime,lazytime,silent", "nodiratime,lazytime", ""),
        ("nosymfollow", "nosymfollow", ""),
        ("owner", "nosuid,nodev", "noexec"),
        ("user,exec", "nosuid,nodev", "noexec"),
        ("group,suid", "nodev", "nosuid"),
        ("ro,defaults,_netdev,nofail,x-gvfs-show,noauto,nouser,nolazytime,noiversion,symfollow", "ro", "lazytime"),
    ] {
        let Some(setup) = Setup::new() else { return };
        let pair = setup.start(&[], words);
        let options = options_of(&pair.guest.point);
        for word in wanted.split(',').filter(|w| !w.is_empty()) {
            assert!(options.contains(&format!(",{word},")), "{words}: {options}");
        }
        for word in not.split(',').filter(|w| !w.is_empty()) {
            assert!(!options.contains(&format!(",{word},")), "{words}: {options}");
        }
        pair.guest.unmount();
    }
}

#[test]
fn links_that_are_not_followed() {
    let Some(setup) = Setup::new() else { return };
    symlink("f", setup.path("share/l")).unwrap();
    fs::write(setup.path("share/f"), "x").unwrap();
    let pair = setup.start(&[], "nosymfollow");
    assert_eq!(errno(File::open(pair.on("l"))), libc::ELOOP);
    assert_eq!(fs::read_link(pair.on("l")).unwrap(), Path::new("f"));
}

/// Reads by the guest leave the host's time of last access alone where the mount says so.
#[test]
fn access_times() {
    // The kernel does not tell a FUSE server of `noatime`: programs ask by O_NOATIME, hosts by --preserve-noatime.
    for (words, stays) in [("strictatime", false)] {
        let Some(setup) = Setup::new() else { return };
        let native = setup.path("twin/f");
        let pair = setup.start(&["--cache=never"], words);
        let then = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(5);
        let old = fs::FileTimes::new().set_accessed(then);
        for path in [pair.behind("f"), native.clone()] {
            fs::write(&path, "x").unwrap();
            File::options().write(true).open(&path).unwrap().set_times(old).unwrap();
        }
        fs::read(&native).unwrap();
        if fs::metadata(&native).unwrap().atime() == 5 {
            return crate::skip::unsupported("the file system below keeps no access times");
        }
        fs::read(pair.on("f")).unwrap();
        assert_eq!(fs::metadata(pair.behind("f")).unwrap().atime() == 5, stays, "{words}");
    }
}

/// As a read-only mount of the same directory.
#[test]
fn a_share_that_cannot_be_changed() {
    let Some(mut setup) = Setup::new() else { return };
    for dir in ["share", "twin"] {
        let dir = setup.path(dir);
        fs::write(dir.join("f"), "x").unwrap();
        fs::create_dir(dir.join("d")).unwrap();
        symlink("f", dir.join("l")).unwrap();
    }
    let twin = setup.path("twin");
    mount(Some(&twin), &twin, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    setup.unmount_later(&twin);
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, &twin, None::<&str>, flags, None::<&str>).unwrap();
    let pair = setup.start(&["--readonly"], "");
    for script in [
        "test -w f; echo $?",
        "test -w d; echo $?",
        "test -w .; echo $?; test -r f; echo $?",
        "cat f; cat l; ls",
        "echo y >> f; echo $?",
        "echo y > new; echo $?",
        "mkdir e; echo $?; rmdir d; echo $?; rm f; echo $?; mv f g; echo $?; ln f g; echo $?; ln -s f g; echo $?",
        "chmod 600 f; echo $?; chown 5 f; echo $?; touch f; echo $?; truncate -s 5 f; echo $?",
    ] {
        let (_, native) = shell(&twin, script);
        assert_eq!(shell(&pair.guest.point, script).1, native, "{script}");
    }
    assert_eq!(crate::common::sys::set_xattr(&pair.on("f"), "user.a", b"", 0), Err(nix::Error::EROFS));
    assert_eq!(crate::common::sys::tmpfile(&pair.guest.point, 0o600).err(), Some(nix::Error::EROFS));
}

/// A user namespace whose ids lie 100000 above.
struct Shifted(Child);

const SHIFT: u32 = 100_000;

impl Shifted {
    fn new() -> Shifted {
        let child = Command::new("unshare").args(["-U", "sleep", "60"]).stdin(Stdio::null()).spawn().unwrap();
        let shifted = Shifted(child);
        let proc = format!("/proc/{}", shifted.0.id());
        let own = fs::read_link("/proc/self/ns/user").unwrap();
        let inside = || fs::read_link(format!("{proc}/ns/user")).ok().filter(|ns| *ns != own);
        crate::rig::soon("the namespace is there", inside);
        for map in ["uid_map", "gid_map"] {
            fs::write(format!("{proc}/{map}"), format!("0 {SHIFT} 10000")).unwrap();
        }
        shifted
    }

    fn namespace(&self) -> File {
        File::open(format!("/proc/{}/ns/user", self.0.id())).unwrap()
    }
}

impl Drop for Shifted {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

/// A copy of the mount on `from`, with mapped ids, on `to`.
fn map_ids(from: &Path, to: &Path, namespace: &File) -> Answer<()> {
    const OPEN_TREE_CLONE: u32 = 1;
    const MOVE_MOUNT_F_EMPTY_PATH: u32 = 4;
    const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
    let (from, to, nothing) = (c(from), c(to), c(Path::new("")));
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as u32;
    // SAFETY: a NUL-ended string; a new descriptor.
    let tree = unsafe {
        let fd = told(libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, from.as_ptr(), flags))?;
        OwnedFd::from_raw_fd(fd as i32)
    };
    let attr = MountAttr { set: MOUNT_ATTR_IDMAP, clear: 0, propagation: 0, userns: namespace.as_raw_fd() as u64 };
    let (size, at) = (size_of::<MountAttr>(), libc::AT_EMPTY_PATH);
    let tree = tree.as_raw_fd();
    // SAFETY: NUL-ended strings, and the structure of the size that is told.
    unsafe {
        told(libc::syscall(libc::SYS_mount_setattr, tree, nothing.as_ptr(), at, &raw const attr, size))?;
        let flags = MOVE_MOUNT_F_EMPTY_PATH;
        told(libc::syscall(libc::SYS_move_mount, tree, nothing.as_ptr(), libc::AT_FDCWD, to.as_ptr(), flags))?;
    }
    Ok(())
}

/// What pods with user namespaces do with every volume.
#[test]
fn mapped_ids() {
    let Some(setup) = Setup::new() else { return };
    let pair = setup.start(&[], "");
    let (mapped, native) = (pair.setup.path("mapped"), pair.setup.path("mapped-twin"));
    let shifted = Shifted::new();
    let _unmounted = [&mapped, &native].map(|dir| {
        make_dir(dir);
        Unmounted(dir.clone())
    });
    let results = [(&pair.native(""), &native), (&pair.guest.point, &mapped)]
        .map(|(from, to)| map_ids(from, to, &shifted.namespace()));
    if results[0].is_err() {
        return crate::skip::unsupported(format_args!("the file system below has no mapped mounts: {:?}", results[0]));
    }
    assert_eq!(results[1], Ok(()), "mount_setattr(MOUNT_ATTR_IDMAP) on the mount");
    let work = |plain: &Path, mapped: &Path| {
        let mut seen = Vec::new();
        let mut look = |path: &Path| {
            let meta = fs::symlink_metadata(path).unwrap();
            seen.push((meta.uid(), meta.gid(), meta.mode()));
        };
        // What is on the disk as root's is the namespace's root's, and the other way round.
        fs::write(plain.join("f"), "x").unwrap();
        chown(plain.join("f"), Some(5), Some(6)).unwrap();
        look(&mapped.join("f"));
        fs::set_permissions(plain, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let as_inside = as_user(SHIFT, SHIFT, &[], || {
            (
                fs::write(mapped.join("g"), "y").map_err(|e| e.raw_os_error()),
                fs::create_dir(mapped.join("d")).map_err(|e| e.raw_os_error()),
                symlink("g", mapped.join("l")).map_err(|e| e.raw_os_error()),
                fs::rename(mapped.join("g"), mapped.join("d/h")).map_err(|e| e.raw_os_error()),
                fs::read(mapped.join("f")).map_err(|e| e.raw_os_error()),
            )
        });
        for name in ["d", "l", "d/h"].iter().filter(|n| plain.join(n).symlink_metadata().is_ok()) {
            look(&plain.join(name));
            look(&mapped.join(name));
        }
        let given = chown(mapped.join("f"), Some(SHIFT + 7), Some(SHIFT + 8)).map_err(|e| e.raw_os_error());
        look(&plain.join("f"));
        // Ids that the map does not have.
        let outside = chown(mapped.join("f"), Some(5), None).map_err(|e| e.raw_os_error());
        let by_outsider = as_user(5, 5, &[], || fs::write(mapped.join("no"), "").map_err(|e| e.raw_os_error()));
        (as_inside, given, outside, by_outsider, seen)
    };
    let wanted = work(&pair.native(""), &native);
    assert_eq!(work(&pair.guest.point, &mapped), wanted);
    drop(shifted);
}

/// Without the kernel's checks of permissions it refuses mapped ids: the mount works, without.
#[test]
fn mapped_ids_need_the_kernels_checks() {
    let Some(setup) = Setup::new() else { return };
    let pair = setup.start(&[], "nodefault_permissions");
    fs::write(pair.on("f"), "x").unwrap();
    assert_eq!(fs::read(pair.behind("f")).unwrap(), b"x");
}

/// A bind mount of a part, and a mount namespace of its own, see the same files.
#[test]
fn parts_of_the_mount_elsewhere() {
    let Some(pair) = Pair::plain() else { return };
    pair.same_script("mkdir -p d/e && echo x > d/e/f && unshare -m sh -c 'mount --bind d/e /mnt && cat /mnt/f && echo y > /mnt/g' && cat d/e/g");
    pair.same_script(
        "unshare -m sh -c 'mount --bind . /mnt && mount -o remount,bind,ro /mnt && touch /mnt/x; echo $?'; ls",
    );
    pair.same_script("mkdir m && unshare -m sh -c 'mount -t tmpfs t m && touch m/on-top && ls m'; ls m");
}
