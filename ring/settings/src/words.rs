//! The settings' names on a command line and in `mount -o`, and their one-line descriptions.

/// How a setting is written on a command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// `--name VALUE`.
    Value(&'static str),
    /// `--name A:B:C` (or with commas), numbers.
    List(&'static str),
    /// `--name`, which means this.
    Switch(bool),
}

use Form::{List, Switch, Value};

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Word {
    /// Its table and key in `tunnelfs.toml`.
    pub key: &'static str,
    /// Its command-line option, without the dashes.
    pub option: &'static str,
    pub(crate) form: Form,
    /// One line for people.
    pub help: &'static str,
}

impl Word {
    /// Whether `mount -o` means this one by `name`.
    pub(crate) fn is(&self, name: &str) -> bool {
        let key = self.form != Switch(false) && self.key.ends_with(&format!(".{name}"));
        key || self.option == name.replace('_', "-")
    }
}

const fn word(key: &'static str, option: &'static str, form: Form, help: &'static str) -> Word {
    Word { key, option, form, help }
}

/// All of them.
pub const WORDS: &[Word] = &[
    word("transport.kind", "transport", Value("KIND"), "What carries the messages: ring, virtqueue or socket"),
    word("transport.socket_path", "socket-path", Value("PATH"), "UNIX socket between guest and host"),
    word("transport.queues", "num-request-queues", Value("N"), "Request queues, 0 for one on each CPU"),
    word("transport.entries", "entries", Value("N"), "Entries of each ring, a power of two"),
    word("transport.slots", "slots", Value("N"), "Payload slots of each queue, at most `entries`"),
    word(
        "transport.slot_size",
        "slot-size",
        Value("SIZE"),
        "Bytes of a slot, also as 64k or 1M: the largest READ or WRITE",
    ),
    word("transport.huge_pages", "huge-pages", Switch(true), "Back the shared memory with 2 MiB pages"),
    word("wait.policy", "wait", Value("POLICY"), "How to wait for the other side: auto, spin or park"),
    word("wait.spin_us", "spin-us", Value("US"), "How long `spin` spins before it sleeps, microseconds"),
    word("wait.auto_us", "auto-us", Value("US"), "How long `auto` spins at the most, microseconds"),
    word("host.shared_dir", "shared-dir", Value("DIR"), "Directory to share"),
    word("host.tag", "tag", Value("TAG"), "virtio-fs tag, at most 36 bytes"),
    word("host.thread_pool_size", "thread-pool-size", Value("N"), "Threads for operations that block"),
    word("host.cpus", "cpus", List("CPUS"), "CPUs of the queues' threads, in order (none: by measurement)"),
    word("host.readonly", "readonly", Switch(true), "The guest may change nothing"),
    word("host.cache", "cache", Value("MODE"), "What the guest may cache: never, metadata, auto or always"),
    word("host.writeback", "writeback", Switch(true), "Let the guest cache writes"),
    word("host.xattr", "xattr", Switch(true), "Extended attributes"),
    word("host.xattrmap", "xattrmap", Value("RULES"), "Rules for names of extended attributes, as virtiofsd has them"),
    word("host.posix_acl", "posix-acl", Value("WHEN"), "POSIX ACLs (implies xattr): never, auto or always"),
    word("host.announce_submounts", "announce-submounts", Switch(true), "Tell the guest of mount points [default]"),
    word("host.announce_submounts", "no-announce-submounts", Switch(false), "Do not tell the guest of mount points"),
    word("host.locks", "locks", Value("SCOPE"), "Where the guest's locks hold: guest or shared"),
    word("host.owners", "owners", Value("HOW"), "Where owners and modes are kept: real or xattr"),
    word("host.map_owner", "map-owner", Value("UID:GID"), "Whose the host's own files are in the guest"),
    word("host.inode_file_handles", "inode-file-handles", Value("WHEN"), "File handles: never, prefer or mandatory"),
    word("host.readdirplus", "no-readdirplus", Switch(false), "No READDIRPLUS"),
    word("host.allow_direct_io", "allow-direct-io", Switch(true), "Honour O_DIRECT of the guest's programs"),
    word(
        "host.allow_mmap",
        "allow-mmap",
        Switch(true),
        "Shared mappings although cache is never or metadata [default]",
    ),
    word("host.allow_mmap", "no-allow-mmap", Switch(false), "No shared mappings where cache is never or metadata"),
    word("host.killpriv_v2", "killpriv-v2", Switch(true), "Drop setuid bits on writes and truncation [default]"),
    word("host.killpriv_v2", "no-killpriv-v2", Switch(false), "Leave setuid bits to the guest's kernel"),
    word("host.preserve_noatime", "preserve-noatime", Switch(true), "Pass O_NOATIME on"),
    word("host.rlimit_nofile", "rlimit-nofile", Value("N"), "Most open files, 0 to leave the limit as it is"),
    word("host.sandbox", "sandbox", Value("MODE"), "Isolation of the process: namespace, chroot or none"),
    word("host.seccomp", "seccomp", Value("ACTION"), "On a system call that is not needed: kill, log, trap or none"),
    word("host.modcaps", "modcaps", Value("LIST"), "Capabilities to keep or drop, for example +sys_admin:-chown"),
    word("host.uid_map", "uid-map", Value("MAPS"), "Users of the sandbox: :INSIDE:OUTSIDE:COUNT:, more after commas"),
    word("host.gid_map", "gid-map", Value("MAPS"), "Groups of the sandbox: :INSIDE:OUTSIDE:COUNT:, more after commas"),
    word(
        "host.translate_uid",
        "translate-uid",
        Value("MAPS"),
        "Users of the guest: TYPE:FROM:TO:COUNT, more after commas",
    ),
    word(
        "host.translate_gid",
        "translate-gid",
        Value("MAPS"),
        "Groups of the guest: TYPE:FROM:TO:COUNT, more after commas",
    ),
    word("mount.pci", "pci", Value("ADDRESS"), "In a VM: PCI address of the virtio-fs device, such as 0000:00:03.0"),
    word("mount.tag", "tag", Value("TAG"), "In a VM: tag of the virtio-fs device"),
    word("mount.pci_driver", "pci-driver", Value("DRIVER"), "Kernel driver for that device: auto, uio or vfio"),
    word("mount.channel", "channel", Value("CHANNEL"), "Channel to the kernel: auto, uring or fuse"),
    word("mount.cpus", "cpus", List("CPUS"), "CPUs of the queues' threads, in order (none: one each)"),
    word("mount.allow_other", "allow-other", Switch(true), "Other users may enter [default]"),
    word("mount.allow_other", "noallow-other", Switch(false), "Only this user may enter"),
    word("mount.default_permissions", "default-permissions", Switch(true), "The kernel checks permissions [default]"),
    word("mount.default_permissions", "nodefault-permissions", Switch(false), "The host alone checks permissions"),
    word("mount.writeback", "writeback", Switch(true), "Cache writes in the kernel"),
    word("mount.timeout", "timeout", Value("SECONDS"), "How long the host may take for an answer, 0 for ever"),
    word("mount.reconnect", "reconnect", Switch(true), "Go on with another host when this one has gone [default]"),
    word("mount.reconnect", "noreconnect", Switch(false), "End with errors when the host has gone"),
    word("mount.reconnect_timeout", "reconnect-timeout", Value("SECONDS"), "How long to wait for another host"),
    word("mount.log_file", "log-file", Value("FILE"), "A daemon's log and statistics [default: the system's log]"),
];

/// The settings of some tables, or single ones of them.
pub(crate) fn of(sections: &'static [&'static str]) -> impl Iterator<Item = &'static Word> {
    WORDS.iter().filter(move |w| sections.iter().any(|s| w.key == *s || w.key.split('.').next() == Some(s)))
}
