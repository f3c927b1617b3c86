//! Before a guest is served, the process gives up what serving does not need:
//! the rest of the file system, its network, its capabilities, its system calls.
//!
//! Namespaces, mounts and id maps are virtiofsd's own code.

use crate::{seccomp, vring};
use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs::File;
use std::io;
use std::str::FromStr;
use tunnelfs_settings::{Cache, FileHandles, Host, Sandbox as Mode};
use vhost::vhost_user::Listener;
use virtiofsd::sandbox::{Error as Refused, Sandbox, SandboxMode};

/// What a file server for guests of many users needs, as virtiofsd has it.
const CAPABILITIES: [&str; 8] = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "SETGID", "SETUID", "MKNOD", "SETFCAP"];

/// The shared directory as this process sees it, perhaps from a sandbox.
#[derive(Debug)]
pub struct SharedDir {
    /// Its path.
    pub root_dir: String,
    /// What to strip from paths of `/proc/self/mountinfo`.
    pub mountinfo_prefix: Option<String>,
    /// `/proc/self/fd`, where there is no `/proc`.
    pub descriptors: Option<File>,
    /// `/proc/self/mountinfo`, where there is no `/proc`.
    pub mounts: Option<File>,
    /// Inodes that this process may watch by fanotify (`fs.fanotify.max_user_marks`), its part of them.
    pub marks: usize,
}

/// Marks of one host at most: each keeps an inode, of about 1 KiB, in the kernel's memory.
const MOST_MARKS: usize = 1 << 16;

/// A quarter of what this user's programs may have in all.
fn marks() -> usize {
    let limit = std::fs::read_to_string("/proc/sys/fs/fanotify/max_user_marks");
    let limit = limit.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(MOST_MARKS);
    (limit / 4).min(MOST_MARKS)
}

impl SharedDir {
    /// Without a sandbox.
    ///
    /// # Errors
    /// What is wrong with the directory.
    pub fn unconfined(host: &Host) -> io::Result<SharedDir> {
        let (root_dir, marks) = (root_dir(host)?, marks());
        Ok(SharedDir { root_dir, mountinfo_prefix: None, descriptors: None, mounts: None, marks })
    }
}

fn root_dir(host: &Host) -> io::Result<String> {
    let dir = &host.shared_dir;
    if dir.as_os_str().is_empty() {
        return Err(invalid("no directory to share: give --shared-dir, or host.shared_dir in tunnelfs.toml".into()));
    }
    let told = |e: io::Error| io::Error::new(e.kind(), format!("shared directory {}: {e}", dir.display()));
    let root = std::fs::canonicalize(dir).map_err(told)?;
    if !root.is_dir() {
        return Err(told(io::ErrorKind::NotADirectory.into()));
    }
    // Said here: a sandbox would fail for it with a message of its own.
    let access = nix::unistd::AccessFlags::R_OK | nix::unistd::AccessFlags::X_OK;
    nix::unistd::access(&root, access).map_err(|e| {
        let user = nix::unistd::geteuid();
        invalid(format!(
            "shared directory {}: user {user} may not read it: {e}; change its mode or owner",
            dir.display()
        ))
    })?;
    root.into_os_string().into_string().map_err(|_| told(invalid("its path is not UTF-8".into())))
}

pub(crate) fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// Moves the process into its sandbox, before it has a second thread; the shared directory as it is seen from there.
/// With namespaces the caller goes on in a child process, and the first one only waits for it.
///
/// # Errors
/// What the system refuses, and what may be done about it.
pub fn enter(host: &Host, listener: Listener) -> io::Result<(Listener, SharedDir)> {
    let mode = match host.sandbox {
        Mode::Namespace => SandboxMode::Namespace,
        Mode::Chroot => SandboxMode::Chroot,
        Mode::None => SandboxMode::None,
    };
    let unconfined = SharedDir::unconfined(host)?;
    let (uid_map, gid_map) = (parse_list("host.uid_map", &host.uid_map)?, parse_list("host.gid_map", &host.gid_map)?);
    let mut sandbox = Sandbox::new(unconfined.root_dir.clone(), mode, uid_map, gid_map);
    let mountinfo_prefix = sandbox.get_mountinfo_prefix()?;
    let root = nix::unistd::geteuid().is_root();
    let listener = sandbox.enter(listener).map_err(|e| io::Error::other(explain(&e, host.sandbox, root)))?;
    let descriptors = sandbox.get_proc_self_fd();
    if let Some(directory) = &descriptors {
        vring::set_proc_self_fd(directory.try_clone()?);
    }
    let root_dir = sandbox.get_root_dir();
    let (mounts, marks) = (sandbox.get_mountinfo_fd(), unconfined.marks);
    Ok((listener, SharedDir { root_dir, mountinfo_prefix, descriptors, mounts, marks }))
}

/// Why the sandbox cannot be had, and what may be done about it.
fn explain(e: &Refused, mode: Mode, root: bool) -> String {
    use Refused::*;
    let why = match e {
        SandboxModeInvalidUID => "it needs root".into(),
        SandboxModeInvalidUidMap | SandboxModeInvalidGidMap => {
            return "host.uid_map and host.gid_map are only for users other than root, with host.sandbox = namespace"
                .into()
        }
        WriteUidMap(text) | WriteGidMap(text) => format!("host.uid_map or host.gid_map: {text}"),
        Unshare(e) => format!("namespaces cannot be made: {e}"),
        Fork(e) => format!("no process is left: {e}"),
        OpenNewRoot(e) | StatNewRoot(e) | ChdirNewRoot(e) | ChrootChdir(e) | Chroot(e) => {
            format!("the shared directory cannot become the root: {e}")
        }
        WriteSetGroups(e) | DropSupplementalGroups(e) | GetSupplementalGroups(e) => {
            format!("groups cannot be dropped: {e}")
        }
        CreateTempDir(e) | RmdirTempDir(e) => format!("no temporary directory can be made: {e}"),
        OpenProcSelf(e) | OpenProcSelfFd(e) | OpenMountinfo(e) | MountProc(e) => {
            format!("/proc must be mounted, and is not to be had: {e}")
        }
        BindMountProcSelfFd(e)
        | BindMountSharedDir(e)
        | MountBind(e)
        | MountOldRoot(e)
        | MountNewRoot(e)
        | MountTarget(e)
        | CleanMount(e)
        | PivotRoot(e)
        | UmountOldRoot(e)
        | UmountTempDir(e)
        | ChdirOldRoot(e)
        | OpenOldRoot(e)
        | StatOldRoot(e) => format!("it cannot mount what it needs: {e}"),
    };
    let (name, instead) = match mode {
        Mode::Chroot if !root => ("chroot", "--sandbox namespace needs no root"),
        Mode::Namespace if root => ("namespace", "--sandbox chroot needs less of the system"),
        Mode::Namespace => {
            ("namespace", "without user namespaces only root, or --sandbox none, which isolates nothing, is left")
        }
        _ => ("chroot", "--sandbox none isolates nothing"),
    };
    format!("no sandbox {name}: {why}; `tunnelfs-host doctor` tells more; {instead}")
}

/// Drops capabilities and system calls; all threads that are started from now on inherit it.
///
/// # Errors
/// A setting that is not understood, or what the system refuses.
pub fn drop_privileges(host: &Host) -> io::Result<()> {
    let kept = capabilities(host)?;
    // Whoever is not root has none, unless by a namespace of its own, where it is root too.
    let root = nix::unistd::geteuid().is_root();
    seccomp::enable(host.seccomp)?;
    if root {
        capng::clear(capng::Set::BOTH);
        let kinds = capng::Type::PERMITTED | capng::Type::EFFECTIVE;
        capng::updatev(capng::Action::ADD, kinds, kept.iter().map(String::as_str).collect()).map_err(refused)?;
        capng::apply(capng::Set::BOTH).map_err(refused)?;
    }
    Ok(())
}

fn refused(e: impl Display) -> io::Error {
    io::Error::other(format!("cannot drop capabilities: {e}"))
}

/// The names of the capabilities to keep: `host.modcaps` has virtiofsd's notation, `+name:-name`.
fn capabilities(host: &Host) -> io::Result<BTreeSet<String>> {
    let mut kept: BTreeSet<String> = CAPABILITIES.map(String::from).into();
    if host.inode_file_handles != FileHandles::Never {
        kept.insert("DAC_READ_SEARCH".into());
    }
    if host.cache == Cache::Coherent {
        // For files of other users.
        kept.insert("LEASE".into());
    }
    for change in host.modcaps.split(':').filter(|change| !change.is_empty()) {
        let wrong = |why: &str| {
            let text =
                format!("host.modcaps = {}: `{change}` {why}; it should be like +sys_admin:-chown", host.modcaps);
            io::Error::new(io::ErrorKind::InvalidInput, text)
        };
        let (sign, name) = change.split_at_checked(1).ok_or_else(|| wrong("is no change"))?;
        let name = name.to_uppercase();
        capng::name_to_capability(&name).map_err(|_| wrong("is no capability"))?;
        match sign {
            "+" => kept.insert(name),
            "-" if name == "DAC_READ_SEARCH" && host.inode_file_handles != FileHandles::Never => {
                return Err(wrong("cannot be dropped with file handles (--inode-file-handles never)"));
            }
            "-" => kept.remove(&name),
            _ => return Err(wrong("starts with neither + nor -")),
        };
    }
    Ok(kept)
}

/// Several maps, separated by commas.
pub(crate) fn parse_list<T: FromStr>(key: &str, text: &str) -> io::Result<Vec<T>>
where
    T::Err: Display,
{
    let parse = |one: &str| {
        one.trim().parse().map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, format!("{key} = {one}: {e}")))
    };
    text.split(',').filter(|one| !one.trim().is_empty()).map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No message is Rust's own, and none names what is tried already.
    #[test]
    fn a_sandbox_that_cannot_be_had_is_explained() {
        let denied = || io::Error::from_raw_os_error(libc::EPERM);
        for (mode, root, name) in [(Mode::Chroot, false, "chroot"), (Mode::Namespace, true, "namespace")] {
            for e in [Refused::ChdirNewRoot(denied()), Refused::Unshare(denied()), Refused::SandboxModeInvalidUID] {
                let text = explain(&e, mode, root);
                assert!(text.starts_with(&format!("no sandbox {name}")) && !text.contains("Os {"), "{text}");
                assert!(!text.contains(&format!("--sandbox {name}")), "{text}");
            }
        }
    }
}
