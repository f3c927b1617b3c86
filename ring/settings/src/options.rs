//! The settings' names on a command line and in `mount -o`, and their one-line descriptions.

/// How a setting is written on a command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ArgKind {
    /// `--name VALUE`.
    Value(&'static str),
    /// `--name A:B:C` (or with commas), numbers.
    List(&'static str),
    /// `--name`, which means this.
    Switch(bool),
}

use ArgKind::{List, Switch, Value};

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct OptionSpec {
    /// Its table and key in `tunnelfs.toml`.
    pub key: &'static str,
    /// Its command-line option, without the dashes.
    pub option: &'static str,
    pub(crate) form: ArgKind,
    /// One line for people.
    pub help: &'static str,
}

impl OptionSpec {
    /// Whether `mount -o` means this one by `name`.
    pub(crate) fn is(&self, name: &str) -> bool {
        let key = self.form != Switch(false) && self.key.ends_with(&format!(".{name}"));
        key || self.option == name.replace('_', "-")
    }
}

const fn option(key: &'static str, option: &'static str, form: ArgKind, help: &'static str) -> OptionSpec {
    OptionSpec { key, option, form, help }
}

/// All of them.
pub const OPTIONS: &[OptionSpec] = &[
    option("transport.kind", "transport", Value("KIND"), "What carries the messages: ring, virtqueue or socket"),
    option("transport.socket_path", "socket-path", Value("PATH"), "UNIX socket between guest and host"),
    option("transport.queues", "num-request-queues", Value("N"), "Request queues, 0 for one on each CPU"),
    option("transport.entries", "entries", Value("N"), "Entries of each ring, a power of two"),
    option("transport.slots", "slots", Value("N"), "Payload slots of each queue, at most `entries`"),
    option(
        "transport.slot_size",
        "slot-size",
        Value("SIZE"),
        "Bytes of a slot, also as 64k or 1M: the largest READ or WRITE",
    ),
    option("transport.huge_pages", "huge-pages", Switch(true), "Back the shared memory with 2 MiB pages"),
    option("wait.policy", "wait", Value("POLICY"), "How to wait for the other side: auto, spin or park"),
    option("wait.goal", "wait-goal", Value("GOAL"), "What `auto` is to save: latency, balanced or cpu"),
    option("wait.spin_us", "spin-us", Value("US"), "How long `spin` spins before it sleeps, microseconds"),
    option("wait.auto_us", "auto-us", Value("US"), "How long `auto` spins at the most, microseconds"),
    option("host.shared_dir", "shared-dir", Value("DIR"), "Directory to share"),
    option("host.tag", "tag", Value("TAG"), "virtio-fs tag, at most 36 bytes"),
    option("host.thread_pool_size", "thread-pool-size", Value("N"), "Threads for operations that block"),
    option("host.cpus", "cpus", List("CPUS"), "CPUs of the queues' threads, in order (none: by measurement)"),
    option("host.readonly", "readonly", Switch(true), "The guest may change nothing"),
    option("host.cache", "cache", Value("MODE"), "What the guest may cache: never, metadata, auto, always or coherent"),
    option("host.writeback", "writeback", Switch(true), "Let the guest cache writes"),
    option("host.xattr", "xattr", Switch(true), "Extended attributes"),
    option(
        "host.xattrmap",
        "xattrmap",
        Value("RULES"),
        "Rules for names of extended attributes, as virtiofsd has them",
    ),
    option("host.posix_acl", "posix-acl", Value("WHEN"), "POSIX ACLs (implies xattr): never, auto or always"),
    option("host.announce_submounts", "announce-submounts", Switch(true), "Tell the guest of mount points [default]"),
    option("host.announce_submounts", "no-announce-submounts", Switch(false), "Do not tell the guest of mount points"),
    option("host.locks", "locks", Value("SCOPE"), "Where the guest's locks hold: guest or shared"),
    option("host.owners", "owners", Value("HOW"), "Where owners and modes are kept: real or xattr"),
    option("host.map_owner", "map-owner", Value("UID:GID"), "Whose the host's own files are in the guest"),
    option("host.inode_file_handles", "inode-file-handles", Value("WHEN"), "File handles: never, prefer or mandatory"),
    option("host.readdirplus", "no-readdirplus", Switch(false), "No READDIRPLUS"),
    option("host.allow_direct_io", "allow-direct-io", Switch(true), "Honour O_DIRECT of the guest's programs"),
    option(
        "host.allow_mmap",
        "allow-mmap",
        Switch(true),
        "Shared mappings although cache is never or metadata [default]",
    ),
    option("host.allow_mmap", "no-allow-mmap", Switch(false), "No shared mappings where cache is never or metadata"),
    option("host.killpriv_v2", "killpriv-v2", Switch(true), "Drop setuid bits on writes and truncation [default]"),
    option("host.killpriv_v2", "no-killpriv-v2", Switch(false), "Leave setuid bits to the guest's kernel"),
    option("host.preserve_noatime", "preserve-noatime", Switch(true), "Pass O_NOATIME on"),
    option("host.ask_open", "ask-open", Switch(true), "Have the guest ask to open each file, whatever the cache mode"),
    option("host.rlimit_nofile", "rlimit-nofile", Value("N"), "Most open files, 0 to leave the limit as it is"),
    option("host.sandbox", "sandbox", Value("MODE"), "Isolation of the process: namespace, chroot or none"),
    option("host.seccomp", "seccomp", Value("ACTION"), "On a system call that is not needed: kill, log, trap or none"),
    option("host.modcaps", "modcaps", Value("LIST"), "Capabilities to keep or drop, for example +sys_admin:-chown"),
    option("host.uid_map", "uid-map", Value("MAPS"), "Users of the sandbox: :INSIDE:OUTSIDE:COUNT:, more after commas"),
    option(
        "host.gid_map",
        "gid-map",
        Value("MAPS"),
        "Groups of the sandbox: :INSIDE:OUTSIDE:COUNT:, more after commas",
    ),
    option(
        "host.translate_uid",
        "translate-uid",
        Value("MAPS"),
        "Users of the guest: TYPE:FROM:TO:COUNT, more after commas",
    ),
    option(
        "host.translate_gid",
        "translate-gid",
        Value("MAPS"),
        "Groups of the guest: TYPE:FROM:TO:COUNT, more after commas",
    ),
    option("host.metrics", "metrics", Value("ADDR"), "Port, or address and port, where Prometheus reads the figures"),
    option("mount.metrics", "metrics", Value("ADDR"), "Port, or address and port, where Prometheus reads the figures"),
    option("mount.pci", "pci", Value("ADDRESS"), "In a VM: PCI address of the virtio-fs device, such as 0000:00:03.0"),
    option("mount.tag", "tag", Value("TAG"), "In a VM: tag of the virtio-fs device"),
    option("mount.pci_driver", "pci-driver", Value("DRIVER"), "Kernel driver for that device: auto, uio or vfio"),
    option("mount.channel", "channel", Value("CHANNEL"), "Channel to the kernel: auto, uring or fuse"),
    option("mount.cpus", "cpus", List("CPUS"), "CPUs of the queues' threads, in order (none: one each)"),
    option("mount.allow_other", "allow-other", Switch(true), "Other users may enter [default]"),
    option("mount.allow_other", "noallow-other", Switch(false), "Only this user may enter"),
    option("mount.default_permissions", "default-permissions", Switch(true), "The kernel checks permissions [default]"),
    option("mount.default_permissions", "nodefault-permissions", Switch(false), "The host alone checks permissions"),
    option("mount.writeback", "writeback", Switch(true), "Cache writes in the kernel"),
    option("mount.timeout", "timeout", Value("SECONDS"), "How long the host may take for an answer, 0 for ever"),
    option("mount.reconnect", "reconnect", Switch(true), "Go on with another host when this one has gone [default]"),
    option("mount.reconnect", "noreconnect", Switch(false), "End with errors when the host has gone"),
    option("mount.reconnect_timeout", "reconnect-timeout", Value("SECONDS"), "How long to wait for another host"),
    option("mount.log_file", "log-file", Value("FILE"), "A daemon's log and statistics [default: the system's log]"),
    option("log.level", "log-level", Value("LEVEL"), "What is logged: off, error, warn, info, debug or trace"),
];

/// The settings of some tables, or single ones of them.
pub(crate) fn of(sections: &'static [&'static str]) -> impl Iterator<Item = &'static OptionSpec> {
    OPTIONS.iter().filter(move |w| sections.iter().any(|s| w.key == *s || w.key.split('.').next() == Some(s)))
}
