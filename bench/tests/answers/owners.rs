//! A host that an ordinary user runs, and a guest's root: owners are kept in some other way than the file system's.

use crate::common::pair::{known, make_dir, shell};
use crate::rig::{is_listening, soon, Guest, Host, Scratch};
use std::fs;
use std::os::unix::fs::{chown, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tunnelfs_bench::session::sibling;

/// The user that runs the host.
const HOST_USER: u32 = 1000;
/// Owners of guests are kept in an extended attribute of each file.
const KEPT: &[&str] = &["--owners=xattr"];

struct Served {
    guest: Guest,
    _host: Host,
    scratch: Scratch,
}

/// A host without privilege, in a sandbox of its own.
fn served() -> Option<Served> {
    let scratch = Scratch::new()?;
    for dir in ["share", "", "twin"] {
        make_dir(&scratch.path(dir));
        chown(scratch.path(dir), Some(HOST_USER), Some(HOST_USER)).unwrap();
    }
    chown(scratch.path("twin"), Some(0), Some(0)).unwrap();
    let (socket, program) = (scratch.path("socket"), reachable(&scratch));
    let mut command = Command::new("setpriv");
    command.args(["--reuid=1000", "--regid=1000", "--clear-groups", "--inh-caps=-all"]).arg(program);
    command.arg("--socket-path").arg(&socket).arg("--shared-dir").arg(scratch.path("share"));
    command.args(["--sandbox=none", "--xattr", "--num-request-queues=2"]).args(known(KEPT)).stdin(Stdio::null());
    let child = command.spawn().unwrap();
    let host = Host::of(child, socket.clone(), scratch.path("share"));
    soon("the host listens", || is_listening(&socket).then_some(()));
    let guest = Guest::mount(&scratch, &host, "");
    Some(Served { guest, _host: host, scratch })
}

/// The host's program where every user may run it.
fn reachable(scratch: &Scratch) -> PathBuf {
    let copy = scratch.path("tunnelfs-host");
    let program = sibling("tunnelfs-host").unwrap();
    if fs::hard_link(&program, &copy).is_err() {
        fs::copy(&program, &copy).unwrap();
    }
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    copy
}

impl Served {
    /// The same in the mount, and by root in a local directory.
    fn same(&self, script: &str) {
        let native = shell(&self.scratch.path("twin"), script);
        let mounted = shell(&self.guest.point, script);
        assert_eq!(mounted, native, "{script}: the mount (left) and a local directory (right)");
    }
}

#[test]
fn owners_are_kept() {
    let Some(served) = served() else { return };
    for script in [
        "touch f && stat -c '%u %g %a' f",
        "chown 999:998 f && stat -c '%u %g %a' f",
        "chmod 4755 f && stat -c '%u %g %a' f",
        "chown 1000:1000 f && stat -c '%u %g %a' f",
        "mkdir -m 2775 d && chgrp 77 d && stat -c '%u %g %a' d && touch d/f && stat -c '%u %g %a' d/f",
        "setpriv --reuid 999 --regid 999 --clear-groups touch f d/x; echo $?",
        "chown 999 d && setpriv --reuid 999 --regid 999 --clear-groups touch d/mine && stat -c '%u %g' d/mine",
        "setpriv --reuid 999 --regid 999 --clear-groups chown 5 d/mine; echo $?; stat -c %u d/mine",
        // Symbolic links cannot have user.* attributes: they keep the host's owner (docs/mount.md).
        "ln -s f l && stat -c '%F' l",
        "ln f g && chown 3 g && stat -c %u f",
        "mv f h && stat -c '%u %g %a' h",
        "touch n && chmod 000 n && cat n && echo x > n && cat n",
        "mkdir -m 000 z && touch z/f && ls z && rm -r z",
        "mkdir p && chmod 555 p && mkdir p/x && rmdir p/x && rmdir p; echo $?",
    ] {
        served.same(script);
    }
    // To the host they are its user's, so that it can go on with them.
    for entry in fs::read_dir(served.scratch.path("share")).unwrap().map(Result::unwrap) {
        assert_eq!(entry.metadata().unwrap().uid(), HOST_USER, "{:?}", entry.path());
    }
}

#[test]
fn archives_keep_their_owners() {
    let Some(served) = served() else { return };
    let archive = served.scratch.path("tar");
    let source = served.scratch.path("source");
    make_dir(&source);
    let script =
        "mkdir a && touch a/f a/g && chown 33:34 a/f && chown 0:5 a && chmod 2750 a && chmod 6711 a/g && ln a/f a/h";
    assert_eq!(shell(&source, script).0, Some(0));
    assert_eq!(shell(&source, &format!("tar cf {} a", archive.display())).0, Some(0));
    served.same(&format!("tar xpf {} && stat -c '%n %u %g %a %h' a a/*", archive.display()));
    served.same("cp -a a b && stat -c '%n %u %g %a %h' b b/*");
    served.same("rm -r a b && ls");
}

#[test]
fn git_works_as_root() {
    let Some(served) = served() else { return };
    let identity = "git -c user.name=x -c user.email=x@example.org";
    for script in [
        "git init -q g && git -C g status --short; echo $?".to_string(),
        format!(
            "cd g && echo x > f && git add f && {identity} commit -qm one && git log --format=%s && git status --short"
        ),
        "git clone -q g h && cat h/f && git -C h fsck 2>/dev/null; echo $?".into(),
    ] {
        served.same(&script);
    }
}

/// What an image of a system has: the host's user could not make devices, nor give the others away.
#[test]
fn special_files() {
    let Some(served) = served() else { return };
    for script in [
        "mkfifo -m 640 p && chown 5:6 p && stat -c '%F %u %g %a %h %s' p",
        "mknod -m 600 c c 1 3 && mknod b b 8 17 && chown 0:6 b && stat -c '%F %u %g %a %t %T' c b",
        "mknod big c 4095 1048575 && stat -c '%F %t %T' big && rm big",
        "setpriv --reuid 999 --regid 998 --clear-groups mkfifo p2 2>/dev/null; echo $?",
        "mkdir -m 777 d && setpriv --reuid 999 --regid 998 --clear-groups mkfifo d/p && stat -c '%F %u %g' d/p",
        "chmod 4755 p && chown 7 p && stat -c '%F %u %a' p",
        "ln p p3 && stat -c '%F %h' p p3 && mv c c2 && stat -c '%F %t %T' c2 && mkfifo c2 2>/dev/null; echo $?",
        "echo through > p & cat p3; wait; stat -c %s p",
        "rm p3 && find . -type p | sort && find . -type c && find . -type b && find . -type f",
        "mkdir t && tar cf t/a p c2 b && mkdir u && tar xpf t/a -C u && stat -c '%F %u %g %a %t %T' u/*",
        "rm -r t u d && touch f && chmod 1777 f && mkdir -m 1777 t && stat -c '%a' f t",
    ] {
        served.same(script);
    }
    for dir in [served.guest.point.clone(), served.scratch.path("twin")] {
        let listener = std::os::unix::net::UnixListener::bind(dir.join("socket")).unwrap();
        assert_eq!(shell(&dir, "chown 5 socket && stat -c '%F %u' socket"), (Some(0), "socket 5".into()));
        std::os::unix::net::UnixStream::connect(dir.join("socket")).unwrap();
        drop(listener);
    }
    let kinds = |dir: &Path| shell(dir, "stat -c '%n %F %a' *; find . -printf '%y %p\\n' | sort");
    assert_eq!(kinds(&served.guest.point), kinds(&served.scratch.path("twin")));
    // Here they are their user's, and nothing that could do something.
    for name in ["p", "c2", "b", "socket"] {
        let there = fs::symlink_metadata(served.scratch.path("share").join(name)).unwrap();
        assert!(there.is_file() && there.uid() == HOST_USER && there.len() == 0, "{name}: {there:?}");
    }
}

/// A host that comes later finds what the first one has kept.
#[test]
fn owners_outlive_the_host() {
    let Some(served) = served() else { return };
    served.same("mkdir d && touch d/f && chown 999:998 d/f && chmod 4711 d/f && stat -c '%u %g %a' d/f");
    served.same("mknod d/c c 1 3 && chown 5:6 d/c");
    let Served { guest, _host, scratch } = served;
    guest.unmount();
    drop(_host);
    let names = crate::common::sys::list_xattr(&scratch.path("share/d/f")).unwrap();
    assert!(names.iter().any(|n| n.starts_with("user.")), "kept in the file: {names:?}");
    // As podman reads it.
    let kept = crate::common::sys::get_xattr(&scratch.path("share/d/c"), "user.containers.override_stat");
    assert_eq!(kept.unwrap(), b"5:6:0644:char-1-3");
}
