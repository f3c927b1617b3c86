//! A mount and its native twin: a directory of the same file system, in which the same calls must have the same
//! results. What this machine's kernel lacks fails in both, and is no failure then.

use crate::rig::{Guest, Host, Peer, Scratch, Unmounted, FEATURES};
use nix::mount::{mount, MsFlags};
use std::fmt::Debug;
use std::fs::{self, Permissions};
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is to be shared, before anybody shares it.
pub struct Setup {
    /// What tests have mounted; goes last of all, in reverse.
    mounts: Vec<Unmounted>,
    scratch: Scratch,
}

impl Setup {
    /// In the machine's folder for temporary files; `None` where nothing can be mounted.
    pub fn new() -> Option<Setup> {
        let setup = Setup { mounts: Vec::new(), scratch: Scratch::new()? };
        make_dir(&setup.path("twin"));
        Some(setup)
    }

    /// In a tmpfs of at most so many bytes.
    pub fn in_memory(size: &str) -> Option<Setup> {
        let mut setup = Setup { mounts: Vec::new(), scratch: Scratch::new()? };
        let disk = setup.path("disk");
        make_dir(&disk);
        setup.mount_tmpfs(&disk, &format!("mode=755,size={size}"));
        fs::remove_dir(setup.path("share")).unwrap();
        for dir in ["share", "twin"] {
            make_dir(&disk.join(dir));
            symlink(disk.join(dir), setup.path(dir)).unwrap();
        }
        Some(setup)
    }

    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path(name)
    }

    pub fn mount_tmpfs(&mut self, on: &Path, options: &str) {
        mount(Some("none"), on, Some("tmpfs"), MsFlags::empty(), Some(options)).unwrap();
        self.unmount_later(on);
    }

    /// Unmounted at the end.
    pub fn unmount_later(&mut self, point: &Path) {
        self.mounts.push(Unmounted(point.into()));
    }

    /// A host with these options beside [`FEATURES`], and a guest.
    pub fn start(self, host: &[&str], mount: &str) -> Pair {
        let options = [FEATURES, &known(host)].concat();
        let host = Host::start_with(&self.scratch, Peer::Ours, &options);
        let guest = Guest::mount(&self.scratch, &host, mount);
        Pair { guest, host, setup: self }
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        while let Some(last) = self.mounts.pop() {
            drop(last);
        }
    }
}

/// The options that this host has; without the others its answers show what it lacks.
pub fn known<'a>(options: &[&'a str]) -> Vec<&'a str> {
    let program = tunnelfs_bench::session::sibling("tunnelfs-host").unwrap();
    let help = Command::new(program).arg("--help").output().unwrap();
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    let is_known = |option: &&&str| {
        let name = option.split('=').next().unwrap();
        let known = help.split([' ', '\n']).any(|word| word == name);
        if !known {
            println!("this host has no {name}");
        }
        known
    };
    options.iter().filter(is_known).copied().collect()
}

pub fn make_dir(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    fs::set_permissions(dir, Permissions::from_mode(0o755)).unwrap();
}

/// A mount and its twin.
pub struct Pair {
    pub guest: Guest,
    pub host: Host,
    pub setup: Setup,
}

impl Pair {
    /// With nothing special.
    pub fn plain() -> Option<Pair> {
        Some(Setup::new()?.start(&[], ""))
    }

    /// In the mount.
    pub fn on(&self, name: &str) -> PathBuf {
        self.guest.point.join(name)
    }

    /// The same place as the host has it.
    pub fn behind(&self, name: &str) -> PathBuf {
        self.setup.path("share").join(name)
    }

    /// In the twin.
    pub fn native(&self, name: &str) -> PathBuf {
        self.setup.path("twin").join(name)
    }

    /// Does the same in both, and wants the same of both.
    pub fn same<T: PartialEq + Debug>(&self, what: &str, work: impl Fn(&Path) -> T) {
        drop(self.same_value(what, work));
    }

    /// As [`Self::same`]; what it is natively.
    pub fn same_value<T: PartialEq + Debug>(&self, what: &str, work: impl Fn(&Path) -> T) -> T {
        let native = work(&self.setup.path("twin"));
        let mounted = work(&self.guest.point);
        assert!(mounted == native, "{what}:\nthe mount: {}\nnatively:  {}", clipped(&mounted), clipped(&native));
        native
    }

    /// The same by a shell's script, in the directory: its exit code and output.
    pub fn same_script(&self, script: &str) -> (Option<i32>, String) {
        self.same_value(script, |dir| shell(dir, script))
    }
}

/// What people can still read.
fn clipped(value: &impl Debug) -> String {
    let mut text = format!("{value:?}");
    if text.len() > 3000 {
        text = format!("{}...", text.chars().take(3000).collect::<String>());
    }
    text
}

/// Exit code and output of a script in a directory; it has a minute.
pub fn shell(dir: &Path, script: &str) -> (Option<i32>, String) {
    let output = Command::new("timeout").args(["60", "sh", "-c", script]).current_dir(dir).output().unwrap();
    if !output.stderr.is_empty() {
        println!("{}: {script}: {}", dir.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    (output.status.code(), String::from_utf8_lossy(&output.stdout).trim().into())
}
