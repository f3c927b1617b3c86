//! The shared directory as a file system: virtiofsd's pass-through, by its own options.

use crate::sandbox::list;
use std::fs::File;
use std::io;
use std::time::Duration;
use tunnelfs_settings::{Cache, FileHandles, Host, Offer};
use virtiofsd::passthrough::read_only::PassthroughFsRo;
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs};
use virtiofsd::soft_idmap::cmdline::IdMap;

/// Open files that are kept back from the guest, for the host's own needs.
const OWN_FILES: u64 = 640;

/// The shared directory as this process sees it, perhaps from a sandbox.
#[derive(Debug)]
pub struct View {
    /// Its path.
    pub root_dir: String,
    /// What to strip from paths of `/proc/self/mountinfo`.
    pub mountinfo_prefix: Option<String>,
    /// `/proc/self/fd`, where there is no `/proc`.
    pub descriptors: Option<File>,
    /// `/proc/self/mountinfo`, where there is no `/proc`.
    pub mounts: Option<File>,
}

impl View {
    /// Without a sandbox.
    ///
    /// # Errors
    /// What is wrong with the directory.
    pub fn whole(host: &Host) -> io::Result<View> {
        Ok(View { root_dir: root_dir(host)?, mountinfo_prefix: None, descriptors: None, mounts: None })
    }
}

/// The file system that `host` shares.
///
/// # Errors
/// What cannot be opened or is not understood; names the option.
pub fn open(host: &Host) -> io::Result<PassthroughFs> {
    open_in(host, View::whole(host)?)
}

/// The same, perhaps in a sandbox.
///
/// # Errors
/// As [`open`].
pub fn open_in(host: &Host, view: View) -> io::Result<PassthroughFs> {
    let fs = PassthroughFs::new(config(host, view)?)?;
    fs.open_root_node()?;
    Ok(fs)
}

/// The same, where nothing can be changed.
///
/// # Errors
/// As [`open`].
pub fn open_read_only(host: &Host, view: View) -> io::Result<PassthroughFsRo> {
    PassthroughFsRo::new(config(host, view)?)
}

fn config(host: &Host, view: View) -> io::Result<Config> {
    let (uid_map, gid_map) = (
        list::<IdMap>("host.translate_uid", &host.translate_uid)?,
        list::<IdMap>("host.translate_gid", &host.translate_gid)?,
    );
    if host.posix_acl != Offer::Never && !(uid_map.is_empty() && gid_map.is_empty()) {
        return Err(wrong(
            "host.translate_uid, host.translate_gid: ACLs would not be translated: posix_acl = \"never\"".into(),
        ));
    }
    let xattrmap = match host.xattrmap.as_str() {
        "" => None,
        rules => Some(XattrMap::try_from(rules).map_err(|e| wrong(format!("host.xattrmap = {rules}: {e}")))?),
    };
    let timeout = timeout(host.cache);
    Ok(Config {
        entry_timeout: timeout,
        attr_timeout: timeout,
        cache_policy: cache_policy(host.cache),
        root_dir: view.root_dir,
        mountinfo_prefix: view.mountinfo_prefix,
        proc_sfd_rawfd: view.descriptors,
        proc_mountinfo_rawfd: view.mounts,
        uid_map: Some(uid_map),
        gid_map: Some(gid_map),
        xattr: host.xattr || xattrmap.is_some() || host.posix_acl != Offer::Never,
        xattrmap,
        posix_acl: match host.posix_acl {
            Offer::Never => NegotiationMode::Never,
            Offer::Auto => NegotiationMode::Auto,
            Offer::Always => NegotiationMode::Always,
        },
        announce_submounts: host.announce_submounts,
        inode_file_handles: match host.inode_file_handles {
            FileHandles::Never => InodeFileHandlesMode::Never,
            FileHandles::Prefer => InodeFileHandlesMode::Prefer,
            FileHandles::Mandatory => InodeFileHandlesMode::Mandatory,
        },
        readdirplus: host.readdirplus && host.cache != Cache::Never,
        writeback: host.writeback,
        allow_direct_io: host.allow_direct_io,
        allow_mmap: host.allow_mmap,
        killpriv_v2: host.killpriv_v2,
        clean_noatime: !host.preserve_noatime,
        guest_fd_limit: guest_files(host)?,
        ..Default::default()
    })
}

fn wrong(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

fn root_dir(host: &Host) -> io::Result<String> {
    let dir = &host.shared_dir;
    if dir.as_os_str().is_empty() {
        return Err(wrong("no directory to share: give --shared-dir, or host.shared_dir in tunnelfs.toml".into()));
    }
    let told = |e: io::Error| io::Error::new(e.kind(), format!("shared directory {}: {e}", dir.display()));
    let root = std::fs::canonicalize(dir).map_err(told)?;
    if !root.is_dir() {
        return Err(told(io::ErrorKind::NotADirectory.into()));
    }
    root.into_os_string().into_string().map_err(|_| told(wrong("its path is not UTF-8".into())))
}

/// As virtiofsd has them.
fn timeout(cache: Cache) -> Duration {
    const DAY: Duration = Duration::from_secs(86_400);
    match cache {
        Cache::Never => Duration::ZERO,
        Cache::Auto => Duration::from_secs(1),
        Cache::Metadata | Cache::Always => DAY,
    }
}

fn cache_policy(cache: Cache) -> CachePolicy {
    match cache {
        Cache::Never => CachePolicy::Never,
        Cache::Metadata => CachePolicy::Metadata,
        Cache::Auto => CachePolicy::Auto,
        Cache::Always => CachePolicy::Always,
    }
}

/// Sets the process's limit of open files; how many of them the guest may have.
fn guest_files(host: &Host) -> io::Result<u64> {
    use nix::sys::resource::{getrlimit, setrlimit, Resource::RLIMIT_NOFILE};
    let (soft, hard) = getrlimit(RLIMIT_NOFILE)?;
    let wanted = if host.rlimit_nofile == 0 { soft } else { host.rlimit_nofile };
    let set = |limit, hard| if limit == soft { Ok(()) } else { setrlimit(RLIMIT_NOFILE, limit, hard) };
    let limit = match set(wanted, hard.max(wanted)) {
        Ok(()) => wanted,
        // Without privilege the hard limit is all that can be had.
        Err(e) => {
            tracing::info!("host.rlimit_nofile = {wanted}: {e}; going on with the hard limit, {hard} open files");
            setrlimit(RLIMIT_NOFILE, hard, hard)?;
            hard
        }
    };
    limit
        .checked_sub(OWN_FILES)
        .ok_or_else(|| wrong(format!("host.rlimit_nofile = {limit}: must be more than {OWN_FILES}")))
}
