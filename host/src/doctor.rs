//! `tunnelfs-host doctor`: can this machine share this directory so?

use nix::sys::statfs::statfs;
use nix::unistd::{access, geteuid, AccessFlags};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use tunnelfs_program::doctor::{parse, read, Report};
use tunnelfs_settings::{Cache, FileHandles, Sandbox, Settings};

/// File systems whose files others change without this kernel's knowledge: their `statfs` number and name.
const REMOTE: &[(i64, &str)] = &[
    (0x6969, "NFS"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x0102_1997, "9p"),
    (0x00c3_6400, "Ceph"),
    (0x6573_5546, "FUSE"),
    (0x0bd0_0bd0, "Lustre"),
    (0x0116_1970, "GFS2"),
    (0x7461_636f, "OCFS2"),
];

/// Looks at all that a host with these settings needs.
pub fn examine(settings: &Settings) -> Report {
    let mut report = Report::default();
    report.kernel((5, 10), (6, 1), "is the oldest that is tested");
    share(settings, &mut report);
    sandbox(settings, &mut report);
    socket(settings, &mut report);
    report.open_files(settings.host.rlimit_nofile);
    report
}

fn share(settings: &Settings, report: &mut Report) {
    let dir = &settings.host.shared_dir;
    if dir.as_os_str().is_empty() {
        return report.problem("no directory to share", "--shared-dir DIR, or host.shared_dir in the settings file");
    }
    let shown = dir.display();
    match std::fs::metadata(dir) {
        Err(e) => return report.problem(format!("shared directory {shown}: {e}"), "create it, or name another"),
        Ok(found) if !found.is_dir() => {
            return report.problem(format!("shared directory {shown}: not a directory"), "name a directory");
        }
        Ok(_) => {}
    }
    let (wanted, rights) = match settings.host.readonly {
        true => (AccessFlags::R_OK | AccessFlags::X_OK, "read and enter it"),
        false => (AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK, "read, change and enter it"),
    };
    match access(dir, wanted) {
        Ok(()) => report.fine(format!("shared directory {shown}: this user can {rights}")),
        Err(e) => report.problem(
            format!("shared directory {shown}: user {} cannot {rights}: {e}", geteuid()),
            "change its owner or mode, run as its owner, or share it --readonly",
        ),
    }
    file_system(settings, dir, report);
}

/// Which cache modes the file system below can keep.
fn file_system(settings: &Settings, dir: &Path, report: &mut Report) {
    let Ok(found) = statfs(dir) else { return };
    let number = found.filesystem_type().0 & 0xffff_ffff;
    match REMOTE.iter().find(|(remote, _)| *remote == number) {
        Some((_, name)) if matches!(settings.host.cache, Cache::Metadata | Cache::Always) => report.advice(
            format!("cache = {:?} on {name}: what other machines change is not seen", settings.host.cache),
            "--cache auto (a second late) or never, unless this host alone changes the files",
        ),
        Some((_, name)) => {
            report.fine(format!("{name} below: cache modes auto and never; others miss foreign changes"))
        }
        None => report.fine("file system below: local, all cache modes"),
    }
    if settings.host.inode_file_handles == FileHandles::Mandatory && !has_handles(dir) {
        report.problem("no file handles on the file system below", "--inode-file-handles prefer");
    }
}

fn has_handles(dir: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let Ok(path) = std::ffi::CString::new(dir.as_os_str().as_bytes()) else { return false };
    // struct file_handle: room for its bytes, none given: EOVERFLOW tells that there are handles.
    let (mut head, mut mount) = ([0u32; 2], 0i32);
    // SAFETY: a path that ends with NUL, the head of a handle without room behind it, and an int.
    let result = unsafe {
        libc::syscall(libc::SYS_name_to_handle_at, libc::AT_FDCWD, path.as_ptr(), head.as_mut_ptr(), &mut mount, 0)
    };
    result == 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EOVERFLOW)
}

fn sandbox(settings: &Settings, report: &mut Report) {
    let root = geteuid().is_root();
    match settings.host.sandbox {
        Sandbox::None => report.advice(
            "sandbox none: a fault in the host opens all that this user has",
            "--sandbox namespace where it can be had",
        ),
        Sandbox::Chroot if root => report.fine("sandbox chroot: as root"),
        Sandbox::Chroot => report.problem("sandbox chroot: not root", "--sandbox namespace, which needs no root"),
        Sandbox::Namespace => match can_unshare() {
            Ok(()) => report.fine("sandbox namespace: namespaces can be made"),
            Err(e) => report.problem(format!("sandbox namespace: {e}"), namespace_remedy(root)),
        },
    }
}

/// What keeps this process from making namespaces, in words.
fn namespace_remedy(root: bool) -> String {
    if parse::<u64>("/proc/sys/user/max_user_namespaces") == Some(0) {
        return "sysctl user.max_user_namespaces=10000".into();
    }
    if read("/proc/sys/kernel/unprivileged_userns_clone").as_deref() == Some("0") {
        return "sysctl kernel.unprivileged_userns_clone=1, or run as root".into();
    }
    if read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").as_deref() == Some("1") {
        return "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile with userns".into();
    }
    match root {
        true => "in a container: give it CAP_SYS_ADMIN, or use --sandbox chroot (CAP_SYS_CHROOT) or none".into(),
        false => {
            "in a container: allow user namespaces (its seccomp profile), run as root, or use --sandbox none".into()
        }
    }
}

/// Tries it in a child process.
fn can_unshare() -> io::Result<()> {
    let mut flags = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET;
    if !geteuid().is_root() {
        flags |= libc::CLONE_NEWUSER;
    }
    // SAFETY: the process has a single thread, and the child makes two system calls.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: no pointers; errno fits a status.
            unsafe {
                let refused = libc::unshare(flags) != 0;
                libc::_exit(if refused { *libc::__errno_location() } else { 0 })
            }
        }
        child => {
            let mut status = 0;
            // SAFETY: a child of this process, and an int.
            unsafe { libc::waitpid(child, &mut status, 0) };
            match libc::WEXITSTATUS(status) {
                0 if libc::WIFEXITED(status) => Ok(()),
                errno => Err(io::Error::from_raw_os_error(errno)),
            }
        }
    }
}

fn socket(settings: &Settings, report: &mut Report) {
    let path = &settings.transport.socket_path;
    let shown = path.display();
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if let Err(e) = access(dir, AccessFlags::W_OK | AccessFlags::X_OK) {
        let remedy = format!("create {} for this user, or give another --socket-path", dir.display());
        return report.problem(format!("socket {shown}: nothing can be created beside it: {e}"), remedy);
    }
    match UnixStream::connect(path) {
        Ok(_) => report.advice(
            format!("socket {shown}: another host listens there"),
            "stop it, or take the path over with --replace",
        ),
        Err(_) => report.fine(format!("socket {shown}: can be made")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tunnelfs_program::doctor::Grade;

    fn grades_about(report: &Report, word: &str) -> Vec<Grade> {
        report.0.iter().filter(|finding| finding.what.contains(word)).map(|finding| finding.grade).collect()
    }

    #[test]
    fn what_is_missing_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = Settings::default();
        settings.host.sandbox = Sandbox::None;
        settings.transport.socket_path = dir.path().join("no/socket");
        let report = examine(&settings);
        assert_eq!(grades_about(&report, "no directory to share"), [Grade::Problem]);
        assert_eq!(grades_about(&report, "beside it"), [Grade::Problem]);
        assert_eq!(grades_about(&report, "sandbox none"), [Grade::Advice]);
        assert!(report.0.iter().all(|found| found.remedy.is_empty() == (found.grade == Grade::Fine)), "{report:?}");

        settings.host.shared_dir = dir.path().into();
        settings.transport.socket_path = dir.path().join("socket");
        let report = examine(&settings);
        assert_eq!(grades_about(&report, "shared directory"), [Grade::Fine]);
        assert_eq!(grades_about(&report, "can be made"), [Grade::Fine]);
        let _listener = std::os::unix::net::UnixListener::bind(&settings.transport.socket_path).unwrap();
        assert_eq!(grades_about(&examine(&settings), "another host"), [Grade::Advice]);
        settings.host.shared_dir = settings.transport.socket_path.clone();
        assert_eq!(grades_about(&examine(&settings), "not a directory"), [Grade::Problem]);
    }
}
