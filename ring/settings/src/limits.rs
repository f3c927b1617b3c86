//! What the values may be. A value that is accepted here neither panics nor means something else later.

use crate::schema::{Settings, TransportKind, MAX_QUEUES};
use std::ops::RangeInclusive;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use tunnelfs_ring::{first_unusable_cpu, Region, MAX_SLOT_SIZE, PAGE};

/// Longest path of a UNIX socket, bytes: `sun_path` of `struct sockaddr_un`, less the NUL at its end.
pub(crate) const MAX_SOCKET_PATH: usize = 107;
/// Longest virtio-fs tag, bytes (`struct virtio_fs_config`).
const MAX_TAG: usize = 36;
/// Longest time limit, seconds: a year.
const MAX_SECONDS: u64 = 31_536_000;
/// Smallest payload slot, bytes: FUSE's own least read buffer (`FUSE_MIN_READ_BUFFER`).
const MIN_SLOT_SIZE: u32 = 8192;
/// Longest spin, microseconds. A thread that spins does not see that its queue was stopped.
const MAX_SPIN: u64 = 1_000_000;
/// Most threads of the pool: more than any disk answers at a time.
const MAX_POOL: u64 = 1024;
/// `host.rlimit_nofile`'s default: must be accepted although `fs.nr_open` is lower.
const USUAL_FILES: u64 = 1_000_000;

/// A value that cannot be.
pub(crate) struct Refusal {
    /// Table and key.
    pub key: String,
    /// What would be accepted.
    pub allowed: String,
}

type Checked = Result<(), Refusal>;

fn refuse(key: &str, allowed: String) -> Checked {
    Err(Refusal { key: key.into(), allowed })
}

/// One number: its key, the value, what it may be, its unit.
type Number = (&'static str, fn(&Settings) -> u64, RangeInclusive<u64>, &'static str);

const NUMBERS: &[Number] = &[
    ("transport.queues", |s| s.transport.queues.into(), 0..=MAX_QUEUES as u64, ""),
    ("wait.spin_us", |s| s.wait.spin_us.into(), 0..=MAX_SPIN, " microseconds"),
    ("wait.auto_us", |s| s.wait.auto_us.into(), 0..=MAX_SPIN, " microseconds"),
    ("host.thread_pool_size", |s| s.host.thread_pool_size as u64, 0..=MAX_POOL, " threads"),
    ("mount.timeout", |s| s.mount.timeout, 0..=MAX_SECONDS, " seconds"),
    ("mount.reconnect_timeout", |s| s.mount.reconnect_timeout, 0..=MAX_SECONDS, " seconds"),
];

/// What a key's value may be, for `--help`: `0 to 62`. `None` where the description tells.
pub(crate) fn range(key: &str) -> Option<String> {
    match key {
        "transport.slot_size" => Some(format!("{}k to {}M", MIN_SLOT_SIZE >> 10, MAX_SLOT_SIZE >> 20)),
        "transport.entries" => Some(format!("2 to {}", tunnelfs_ring::MAX_ENTRIES)),
        _ => {
            let (_, _, range, _) = NUMBERS.iter().find(|(known, ..)| *known == key)?;
            Some(format!("{} to {}", range.start(), range.end()))
        }
    }
}

/// Checks what is true on every machine.
pub(crate) fn check(s: &Settings) -> Checked {
    let size = s.transport.slot_size;
    if !(MIN_SLOT_SIZE..=MAX_SLOT_SIZE).contains(&size) || size as usize % PAGE != 0 {
        let allowed = format!("must be a multiple of {PAGE} from {MIN_SLOT_SIZE} to {MAX_SLOT_SIZE} bytes");
        return refuse("transport.slot_size", allowed);
    }
    if let Err(tunnelfs_ring::Error::Geometry { key, allowed, .. }) = s.transport.geometry().check() {
        return refuse(&format!("transport.{key}"), allowed);
    }
    for (key, value, range, unit) in NUMBERS {
        if !range.contains(&value(s)) {
            return refuse(key, format!("must be from {} to {}{unit}", range.start(), range.end()));
        }
    }
    if !(1..=MAX_TAG).contains(&s.host.tag.len()) {
        return refuse("host.tag", format!("must have 1 to {MAX_TAG} bytes"));
    }
    if s.mount.tag.len() > MAX_TAG {
        return refuse("mount.tag", format!("must have at most {MAX_TAG} bytes"));
    }
    socket_path(&s.transport.socket_path, "")
}

/// Checks the length of a socket's path; `which` ends the refusal.
pub(crate) fn socket_path(path: &Path, which: &str) -> Checked {
    let allowed = match path.as_os_str().len() {
        0 => "must be the path of a UNIX socket".into(),
        1..=MAX_SOCKET_PATH => return Ok(()),
        len => format!("a UNIX socket's path may have {MAX_SOCKET_PATH} bytes, and this one has {len}{which}"),
    };
    refuse("transport.socket_path", allowed)
}

/// Checks that no text in the table holds a NUL, with which no path or system call could end.
pub(crate) fn no_nul(table: &toml::Table) -> Checked {
    for (section, keys) in table {
        for (name, value) in keys.as_table().into_iter().flatten() {
            if value.as_str().is_some_and(|text| text.contains('\0')) {
                return refuse(&format!("{section}.{name}"), "must not contain a NUL byte".into());
            }
        }
    }
    Ok(())
}

/// Checks against this machine what a program uses here. `used` tells whether it uses a key: one file may
/// serve a host and a guest, which have not the same CPUs.
pub(crate) fn check_here(s: &Settings, used: impl Fn(&str) -> bool) -> Checked {
    for (key, cpus) in [("host.cpus", &s.host.cpus), ("mount.cpus", &s.mount.cpus)] {
        if used(key) {
            cpus_exist(key, cpus)?;
        }
    }
    if used("host.rlimit_nofile") {
        open_files(s.host.rlimit_nofile)?;
    }
    if used("transport.socket_path") && is_directory(&s.transport.socket_path) {
        return refuse("transport.socket_path", "is a directory: name a socket in it".into());
    }
    Ok(())
}

/// Checks that this process can run on each CPU.
fn cpus_exist(key: &str, cpus: &[usize]) -> Checked {
    match first_unusable_cpu(cpus) {
        None => Ok(()),
        Some(cpu) => refuse(key, format!("this process cannot run on CPU {cpu}; it can on {}", usable())),
    }
}

/// The CPUs of this process, for a message.
fn usable() -> String {
    tunnelfs_ring::allowed_cpus().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn open_files(wanted: u64) -> Checked {
    let text = std::fs::read_to_string("/proc/sys/fs/nr_open").unwrap_or_default();
    let most = text.trim().parse::<u64>().unwrap_or(u64::MAX).max(USUAL_FILES);
    if wanted > most {
        return refuse("host.rlimit_nofile", format!("must be at most {most} (sysctl fs.nr_open)"));
    }
    Ok(())
}

/// Checks that the shared memory can be had.
pub(crate) fn memory(s: &Settings) -> Checked {
    let t = &s.transport;
    if t.kind == TransportKind::Socket || t.geometry().check().is_err() {
        return Ok(());
    }
    let wanted = t.queue_count() * t.geometry().bytes();
    let Some(free) = Region::available(t.huge_pages).filter(|&free| wanted > free) else { return Ok(()) };
    let what = if t.huge_pages { "free 2 MiB pages" } else { "available memory" };
    let remedy = if t.huge_pages {
        let more = (wanted - free).div_ceil(2 << 20);
        format!(", or sysctl vm.nr_hugepages=$(($(sysctl -n vm.nr_hugepages) + {more}))")
    } else {
        String::new()
    };
    let allowed = format!(
        "{} queues of {} slots need {} MiB of shared memory, and this machine has {} MiB of {what}: \
         fewer queues, fewer slots or smaller ones{remedy}",
        t.queue_count(),
        t.slots,
        wanted >> 20,
        free >> 20,
    );
    refuse("transport.slot_size", allowed)
}

/// A socket's path from the root: a daemon leaves the directory that it was started in.
pub(crate) fn from_root(s: &mut Settings) -> Checked {
    let path = &s.transport.socket_path;
    if path.is_absolute() || path.as_os_str().as_bytes().contains(&0) {
        return Ok(());
    }
    let Ok(absolute) = std::path::absolute(path) else { return Ok(()) };
    socket_path(&absolute, &format!(" from the root: {}", absolute.display()))?;
    s.transport.socket_path = absolute;
    Ok(())
}

/// Whether a directory is there, and not a symbolic link to one: what a link is refused for is another reason.
fn is_directory(path: &std::path::Path) -> bool {
    path.symlink_metadata().is_ok_and(|found| found.is_dir())
}
