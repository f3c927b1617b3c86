//! overlayfs with its upper and work directories on the mount, as container engines use it.

use crate::common::pair::{make_dir, shell, Pair, Setup};
use crate::rig::Unmounted;
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use std::path::{Path, PathBuf};

/// An overlay of `dir`'s upper and work directories over a native lower one.
fn overlay(pair: &Pair, dir: &Path, name: &str, options: &str) -> Result<(PathBuf, Unmounted), nix::Error> {
    let (point, lower) = (pair.setup.path(name), pair.setup.path("lower"));
    for dir in [&point, &lower, &dir.join("upper"), &dir.join("work")] {
        make_dir(dir);
    }
    let script = "mkdir -p d/e x && echo f > f && echo g > d/g && echo h > d/e/h && echo k > x/k && ln -sf f l";
    assert_eq!(shell(&lower, script).0, Some(0));
    let (lower, dir) = (lower.display(), dir.display());
    let data = format!("lowerdir={lower},upperdir={dir}/upper,workdir={dir}/work{options}");
    mount(Some("overlay"), &point, Some("overlay"), MsFlags::empty(), Some(data.as_str()))?;
    Ok((point.clone(), Unmounted(point)))
}

/// What containers do with their layer.
const WORK: &[&str] = &[
    "cat f d/g d/e/h && ls -R .",
    "echo new > n && echo more >> f && cat f n",
    "rm d/g && ls d && echo again > d/g && cat d/g",
    "rm -r x && ls && mkdir x && ls -A x",
    "mkdir x/y && touch x/y/z && ls -R x",
    "mv f f2 && ls && cat f2",
    "mkdir moved && mv moved moved2 && ls -d moved*",
    "mv d/e d/e2; echo $?",
    // Not the other way round: an overlay asks FUSE again for the name by which it has met the inode, and gives ESTALE.
    "ln n n2 && stat -c %h n n2 && rm n2 && cat n && ln n n2 && rm n2",
    "ln -s n s && readlink s l && cat s",
    "chmod 4711 f2 && chown 5:6 f2 && stat -c '%a %u %g' f2",
    "mkfifo p && mknod c c 1 3 && stat -c '%F %t' p c",
    "dd if=/dev/zero of=big bs=64k count=40 2>/dev/null && stat -c %s big && truncate -s 100 big && cksum big",
    "cp -a . ../copy-$(basename $PWD) && rm -r ../copy-$(basename $PWD); echo $?",
    "find . | sort; rm -rf *; ls -A; echo $?",
];

fn assert_overlays(host: &[&str], options: &str) {
    let Some(setup) = Setup::new() else { return };
    let pair = setup.start(host, "");
    let native = overlay(&pair, &pair.native(""), "native-overlay", options);
    let (native, _native) = match native {
        Ok(mounted) => mounted,
        Err(e) => return crate::skip::unsupported(format_args!("no overlays here: {e}")),
    };
    let (point, mounted) = overlay(&pair, &pair.guest.point, "overlay", options).expect("overlay on the mount");
    for script in WORK {
        assert_eq!(shell(&point, script), shell(&native, script), "{script}");
    }
    // The same layer, mounted once more.
    assert_eq!(shell(&point, "echo kept > k && rm -rf d && mkdir d && echo o > d/o").0, Some(0));
    umount2(&point, MntFlags::empty()).unwrap();
    drop(mounted);
    let (point, _mounted) = overlay(&pair, &pair.guest.point, "overlay", options).expect("once more");
    assert_eq!(shell(&point, "cat k d/o; ls d").1, "kept\no\no");
}

/// As root, with `trusted.*` attributes.
#[test]
fn layers_with_trusted_attributes() {
    assert_overlays(&["--modcaps=+sys_admin"], "");
}

/// With the option that needs no privilege.
#[test]
fn layers_with_user_attributes() {
    assert_overlays(&[], ",userxattr");
}

#[test]
fn layers_without_caches() {
    assert_overlays(&["--modcaps=+sys_admin", "--cache=never", "--allow-mmap"], "");
}
