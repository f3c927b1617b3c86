//! The shared directory as a file system: virtiofsd's pass-through, by its own options.

use std::io;
use std::time::Duration;
use tunnelfs_settings::{Cache, FileHandles, Host, Offer};
use virtiofsd::passthrough::read_only::PassthroughFsRo;
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs};

/// Open files that are kept back from the guest, for the host's own needs.
const OWN_FILES: u64 = 640;

/// The file system that `host` shares.
///
/// # Errors
/// What cannot be opened or is not understood; names the option.
pub fn open(host: &Host) -> io::Result<PassthroughFs> {
    let fs = PassthroughFs::new(config(host)?)?;
    fs.open_root_node()?;
    Ok(fs)
}

/// The same, where nothing can be changed.
///
/// # Errors
/// As [`open`].
pub fn open_read_only(host: &Host) -> io::Result<PassthroughFsRo> {
    PassthroughFsRo::new(config(host)?)
}

fn config(host: &Host) -> io::Result<Config> {
    let xattrmap = match host.xattrmap.as_str() {
        "" => None,
        rules => Some(XattrMap::try_from(rules).map_err(|e| wrong(format!("host.xattrmap = {rules}: {e}")))?),
    };
    let timeout = timeout(host.cache);
    Ok(Config {
        entry_timeout: timeout,
        attr_timeout: timeout,
        cache_policy: cache_policy(host.cache),
        root_dir: root_dir(host)?,
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
    let limit = match setrlimit(RLIMIT_NOFILE, wanted, hard.max(wanted)) {
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
