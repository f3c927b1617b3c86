//! Builds file systems from settings: a [`Passthrough`] of the shared directory for each guest.

use crate::fs::{Budget, Config, Ids, Owners, Passthrough, Xattrs};
use crate::sandbox::{invalid, parse_list, SharedDir};
use std::fs::File;
use std::io;
use std::time::Duration;
use tunnelfs_settings::{Cache, Host, KeepOwners, LockScope, Negotiation};
use virtiofsd::passthrough::xattrmap::{self, XattrMap};
use virtiofsd::soft_idmap::cmdline::IdMap;

/// Open files that are kept back from guests, for the host's own needs: this many, or a quarter of a small limit.
const OWN_FILES: u64 = 640;
/// The smallest limit of open files that a host works with.
const MIN_FILES: u64 = 256;

/// What is wrong with rules for attributes' names.
fn explain_rule(e: &xattrmap::Error) -> String {
    use xattrmap::ErrorKind::*;
    let why = match &e.cause {
        InvalidScope { got, expected } | InvalidType { got, expected } => {
            format!("`{got}` should be one of {expected}")
        }
        InvalidDelimiter => "it does not end with the delimiter that it begins with".into(),
        IncompleteRule => "it is not complete: a rule is :TYPE:SCOPE:KEY:PREPEND:".into(),
        _ => "the rules as a whole cannot be: end them with one that catches all, such as :bad:all:::".into(),
    };
    match e.rule {
        Some(number) => format!("rule {number}: {why}"),
        None => why,
    }
}

/// Builds the file systems of all guests.
#[derive(Debug)]
pub struct FsBuilder {
    host: Host,
    dir: SharedDir,
    /// Descriptors that guests may have in all.
    files: u64,
    exact_times: bool,
}

impl FsBuilder {
    /// Checks the settings and sets up this process: call it before the process drops its privileges.
    ///
    /// # Errors
    /// A setting that is not understood; names the option.
    pub fn new(host: &Host, dir: SharedDir) -> io::Result<FsBuilder> {
        crate::fs::keep_capabilities();
        Self::with_files(host, dir, guest_files(host)?)
    }

    /// As [`FsBuilder::new`], but leaves the process as it is: `host.rlimit_nofile` is how many of the process's open
    /// files are for guests, half of what it may have now if that is 0.
    ///
    /// # Errors
    /// As [`FsBuilder::new`].
    pub fn in_process(host: &Host, dir: SharedDir) -> io::Result<FsBuilder> {
        use nix::sys::resource::{getrlimit, Resource::RLIMIT_NOFILE};
        let (soft, _) = getrlimit(RLIMIT_NOFILE)?;
        let files = if host.rlimit_nofile == 0 { soft / 2 } else { host.rlimit_nofile.min(soft) };
        if files < MIN_FILES {
            let text = format!("the process may have {soft} open files, and {files} for guests: at least {MIN_FILES}");
            return Err(invalid(text));
        }
        Self::with_files(host, dir, files)
    }

    fn with_files(host: &Host, dir: SharedDir, files: u64) -> io::Result<FsBuilder> {
        let builder = FsBuilder { host: host.clone(), dir, files, exact_times: crate::fs::has_exact_times() };
        builder.ids()?;
        builder.rules()?;
        builder.warn_of_writeback();
        Ok(builder)
    }

    /// A file system for one of `guests`, which share the descriptors: call it after the process has dropped its privileges.
    ///
    /// # Errors
    /// What cannot be opened or is not understood; names the option.
    pub fn build(&self, guests: u64) -> io::Result<Passthrough> {
        let (host, files) = (&self.host, self.files / guests.max(1));
        let rules = self.rules()?;
        let wants_xattrs = host.xattr || rules.is_some() || self.posix_acl() != Negotiation::Never;
        let timeout = timeout(host.cache);
        let coherent = host.cache == Cache::Coherent;
        // Each lease keeps an inode's descriptor. A quarter more of these may be there for a while (see `Inodes`), so that
        // the parts are the whole.
        let (inodes, opened, leases) = if coherent { (11, 6, 8) } else { (8, 10, 0) };
        let part = |twentieths: u64| (files * twentieths / 20) as usize;
        // With these modes nobody else changes the directory.
        let alone = matches!(host.cache, Cache::Metadata | Cache::Always);
        Passthrough::new(Config {
            root: self.dir.root_dir.clone().into(),
            descriptors: self.dir.descriptors.as_ref().map(File::try_clone).transpose()?,
            cache: host.cache,
            timeout,
            missing_timeout: if alone { timeout } else { Duration::ZERO },
            readonly: host.readonly,
            writeback: self.writeback(),
            readdirplus: host.readdirplus && host.cache != Cache::Never,
            announce_submounts: host.announce_submounts,
            direct_io: host.allow_direct_io,
            mmap: host.allow_mmap,
            killpriv: host.killpriv_v2,
            keep_noatime: host.preserve_noatime,
            ask_open: host.ask_open,
            posix_acl: self.posix_acl(),
            shared_locks: host.locks == LockScope::Shared,
            handles: host.inode_file_handles,
            xattrs: wants_xattrs.then(|| Xattrs::new(rules)),
            ids: self.ids()?,
            exact_times: self.exact_times,
            inodes: part(inodes),
            files: part(opened),
            coherence: coherent.then(|| self.coherence(guests, part(leases))),
        })
    }

    /// What a guest may take to be told of changes.
    fn coherence(&self, guests: u64, leases: usize) -> Budget {
        let mounts = match &self.dir.mounts {
            Some(file) => file.try_clone(),
            None => File::open("/proc/self/mountinfo"),
        };
        let mounts = mounts
            .inspect_err(|e| tracing::warn!("mounts below the shared directory are not seen when they come: {e}"))
            .ok()
            .map(|file| (file, self.dir.root_dir.clone()));
        Budget { marks: self.dir.marks / guests.max(1) as usize, leases, mounts }
    }

    /// Whether the guest's kernel may cache writes. It then keeps its own size and times of each file, whatever the host
    /// says: with several writers data would be lost.
    fn writeback(&self) -> bool {
        self.host.writeback && !matches!(self.host.cache, Cache::Coherent | Cache::Never)
    }

    fn warn_of_writeback(&self) {
        let cache = self.host.cache;
        if self.host.writeback && !self.writeback() {
            tracing::warn!(
                "host.writeback has no effect with cache = \"{}\": the guest's kernel would not see how others change a file's \
                 size; where nobody else changes the directory, set cache = \"always\"",
                format!("{cache:?}").to_lowercase()
            );
        } else if self.host.writeback && cache == Cache::Auto {
            tracing::warn!(
                "host.writeback with cache = \"auto\": a guest does not see how others change a file's size and times, and may \
                 overwrite what they append; it is for directories that nobody else changes"
            );
        }
    }

    /// POSIX ACLs as asked for; owners in an attribute are not linked with them.
    fn posix_acl(&self) -> Negotiation {
        if self.host.owners == KeepOwners::Xattr {
            Negotiation::Never
        } else {
            self.host.posix_acl
        }
    }

    fn rules(&self) -> io::Result<Option<XattrMap>> {
        match self.host.xattrmap.as_str() {
            "" => Ok(None),
            rules => match XattrMap::try_from(rules) {
                Ok(map) => Ok(Some(map)),
                Err(e) => Err(invalid(format!("host.xattrmap = {rules}: {}", explain_rule(&e)))),
            },
        }
    }

    fn ids(&self) -> io::Result<Ids> {
        let host = &self.host;
        let uids = parse_list::<IdMap>("host.translate_uid", &host.translate_uid)?;
        let gids = parse_list::<IdMap>("host.translate_gid", &host.translate_gid)?;
        let mapped = !(uids.is_empty() && gids.is_empty());
        if host.posix_acl != Negotiation::Never && mapped {
            return Err(invalid(
                "host.translate_uid, host.translate_gid: ACLs would not be translated: posix_acl = \"never\"".into(),
            ));
        }
        if host.posix_acl == Negotiation::Always && host.owners == KeepOwners::Xattr {
            return Err(invalid(
                "host.posix_acl = \"always\": not with owners = \"xattr\", whose modes are not linked with ACLs; \"auto\" or \
                 \"never\" goes on without"
                    .into(),
            ));
        }
        let owners = match (host.owners, parse_owner(&host.map_owner)?) {
            (KeepOwners::Real, None) => Owners::Real,
            (KeepOwners::Real, Some((uid, gid))) => Owners::Mapped { uid, gid },
            (KeepOwners::Xattr, None) => Owners::Attribute,
            (KeepOwners::Xattr, Some(_)) => {
                return Err(invalid("host.map_owner: not with owners = \"xattr\", which keeps them".into()));
            }
        };
        if owners != Owners::Real && mapped {
            return Err(invalid(
                "host.translate_uid, host.translate_gid: not with host.owners or host.map_owner".into(),
            ));
        }
        Ok(Ids::new(owners, uids.try_into()?, gids.try_into()?, mapped))
    }
}

/// `UID:GID`.
fn parse_owner(text: &str) -> io::Result<Option<(u32, u32)>> {
    if text.is_empty() {
        return Ok(None);
    }
    let parse = || {
        let (uid, gid) = text.split_once(':')?;
        Some((uid.parse().ok()?, gid.parse().ok()?))
    };
    parse().map(Some).ok_or_else(|| invalid(format!("host.map_owner = {text}: should be like 0:0, a user and a group")))
}

/// A file system that `host` shares with one guest, without a sandbox.
///
/// # Errors
/// As [`FsBuilder::build`].
pub fn open(host: &Host) -> io::Result<Passthrough> {
    FsBuilder::new(host, SharedDir::unconfined(host)?)?.build(1)
}

/// How long the guest's kernel may cache names and attributes: virtiofsd's values.
fn timeout(cache: Cache) -> Duration {
    const DAY: Duration = Duration::from_secs(86_400);
    match cache {
        Cache::Never => Duration::ZERO,
        // Until the guest listens, and where nothing tells of changes.
        Cache::Auto | Cache::Coherent => Duration::from_secs(1),
        Cache::Metadata | Cache::Always => DAY,
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
            static SAID: std::sync::Once = std::sync::Once::new();
            SAID.call_once(|| {
                let why = e.desc();
                tracing::warn!(
                    "host.rlimit_nofile = {wanted}: {why}; going on with {hard} open files (raise the hard limit, or set \
                     rlimit_nofile = 0)"
                );
            });
            setrlimit(RLIMIT_NOFILE, hard, hard)?;
            hard
        }
    };
    if limit < MIN_FILES {
        return Err(invalid(format!("host.rlimit_nofile = {limit}: must be at least {MIN_FILES}")));
    }
    Ok(limit - OWN_FILES.min(limit / 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No message is Rust's own.
    #[test]
    fn wrong_rules_are_explained() {
        for rules in [":bad", ":nothing:all:::", ":ok:nobody:::"] {
            let Err(e) = XattrMap::try_from(rules) else { panic!("{rules} is good") };
            let text = explain_rule(&e);
            assert!(!text.contains('{') && text.contains(' '), "{rules}: {text}");
        }
    }
}
