//! What can be set, with its defaults: the tables of `tunnelfs.toml`.

use crate::numbers;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use tunnelfs_ring::{Geometry, WaitConfig};

/// Everything that `tunnelfs.toml` may say.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// What carries messages.
    pub transport: Transport,
    /// How both sides wait.
    pub wait: WaitConfig,
    /// What the host shares, and how.
    pub host: Host,
    /// How the guest mounts.
    pub mount: Mount,
    /// What the programs write to their logs.
    pub log: Log,
}

/// The table `[log]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// What is written.
    pub level: LogLevel,
}

/// What is worth a line in the log; each level has those before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What failed.
    Error,
    /// What is not as it should be.
    Warn,
    /// Starts, ends, guests that come and go.
    #[default]
    Info,
    /// For a search after faults.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            LogLevel::Off => "off",
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
            LogLevel::Trace => "trace",
        }
    }
}

/// What carries messages between guest and host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransportKind {
    /// Shared-memory rings; virtqueues with a peer that does not know them.
    #[default]
    Ring,
    /// Plain split virtqueues.
    Virtqueue,
    /// Messages streamed over a UNIX socket.
    Socket,
}

/// The table `[transport]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Transport {
    /// Which one.
    pub kind: TransportKind,
    /// The UNIX socket that a host listens on and a guest connects to.
    pub socket_path: PathBuf,
    /// Request queues, 0 for one on each CPU.
    #[serde(deserialize_with = "numbers::whole")]
    pub queues: u16,
    /// Entries of each ring.
    #[serde(deserialize_with = "numbers::whole")]
    pub entries: u32,
    /// Payload slots of each queue.
    #[serde(deserialize_with = "numbers::whole")]
    pub slots: u32,
    /// Bytes of a slot.
    #[serde(deserialize_with = "numbers::bytes")]
    pub slot_size: u32,
    /// Back the shared memory with 2 MiB pages.
    pub huge_pages: bool,
}

impl Default for Transport {
    fn default() -> Self {
        Transport {
            kind: TransportKind::Ring,
            socket_path: "/run/tunnelfs.sock".into(),
            queues: 0,
            entries: 64,
            slots: 32,
            slot_size: 1 << 20,
            huge_pages: false,
        }
    }
}

impl Transport {
    /// The sizes of one queue.
    pub fn geometry(&self) -> Geometry {
        Geometry { entries: self.entries, slots: self.slots, slot_size: self.slot_size }
    }

    /// How many request queues there are to be.
    pub fn queue_count(&self) -> usize {
        match self.queues {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(MAX_QUEUES.into()),
            queues => queues.into(),
        }
    }
}

/// Most request queues: a back end's threads are bits of a 64-bit mask, one of them the control queue's.
pub const MAX_QUEUES: u16 = 62;

/// How long a guest may keep what it has read (virtiofsd's `--cache`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Not at all.
    Never,
    /// Names and attributes for a day; data not at all.
    Metadata,
    /// Names and attributes for a second; data until the file changes or is opened again.
    Auto,
    /// Everything, as long as the guest likes: nobody else changes the directory.
    Always,
    /// Everything, as long as the guest likes: it is told of changes. Where it cannot be: as with `Auto`.
    #[default]
    Coherent,
}

/// When a file handle stands for an inode, rather than an open descriptor (virtiofsd's `--inode-file-handles`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileHandles {
    /// Never.
    Never,
    /// Where the file system below has handles.
    #[default]
    Prefer,
    /// Always, or an error.
    Mandatory,
}

/// Whose locks the guest's are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LockScope {
    /// They hold among the guest's programs.
    #[default]
    Guest,
    /// They hold among guests and the host's programs too.
    Shared,
}

/// Where owners are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeepOwners {
    /// As the file system has them.
    #[default]
    Real,
    /// In an extended attribute.
    Xattr,
}

/// Whether a feature is offered to the guest (virtiofsd's `--posix-acl`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Negotiation {
    /// No.
    #[default]
    Never,
    /// If the guest knows it.
    Auto,
    /// Yes; a guest that does not know it is refused.
    Always,
}

/// What keeps a host process apart from the rest of its machine (virtiofsd's `--sandbox`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sandbox {
    /// Namespaces of its own, with the shared directory as the root.
    #[default]
    Namespace,
    /// The shared directory is the root.
    Chroot,
    /// Nothing.
    None,
}

/// What happens to a system call that serving does not need (virtiofsd's `--seccomp`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Seccomp {
    /// It ends the process.
    #[default]
    Kill,
    /// It is logged.
    Log,
    /// It raises SIGSYS.
    Trap,
    /// It is allowed.
    None,
}

/// The table `[host]`: virtiofsd's options, by its names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs)] // Each is described where users see it, in `docs/tunnelfs.toml` and `--help`.
pub struct Host {
    pub shared_dir: PathBuf,
    pub tag: String,
    #[serde(deserialize_with = "numbers::whole")]
    pub thread_pool_size: usize,
    pub cpus: Vec<usize>,
    pub readonly: bool,
    pub cache: Cache,
    pub writeback: bool,
    pub xattr: bool,
    pub xattrmap: String,
    pub posix_acl: Negotiation,
    pub announce_submounts: bool,
    pub locks: LockScope,
    pub owners: KeepOwners,
    pub map_owner: String,
    pub inode_file_handles: FileHandles,
    pub readdirplus: bool,
    pub allow_direct_io: bool,
    pub allow_mmap: bool,
    pub killpriv_v2: bool,
    pub preserve_noatime: bool,
    pub ask_open: bool,
    #[serde(deserialize_with = "numbers::whole")]
    pub rlimit_nofile: u64,
    pub sandbox: Sandbox,
    pub seccomp: Seccomp,
    pub modcaps: String,
    pub uid_map: String,
    pub gid_map: String,
    pub metrics: String,
    pub translate_uid: String,
    pub translate_gid: String,
}

impl Default for Host {
    fn default() -> Self {
        Host {
            shared_dir: PathBuf::new(),
            tag: "tunnelfs".into(),
            thread_pool_size: 64,
            cpus: Vec::new(),
            readonly: false,
            cache: Cache::default(),
            writeback: false,
            xattr: false,
            xattrmap: String::new(),
            posix_acl: Negotiation::default(),
            announce_submounts: true,
            locks: LockScope::default(),
            owners: KeepOwners::default(),
            map_owner: String::new(),
            inode_file_handles: FileHandles::default(),
            readdirplus: true,
            allow_direct_io: false,
            allow_mmap: true,
            killpriv_v2: true,
            preserve_noatime: false,
            ask_open: false,
            rlimit_nofile: 1_000_000,
            sandbox: Sandbox::default(),
            seccomp: Seccomp::default(),
            modcaps: String::new(),
            uid_map: String::new(),
            gid_map: String::new(),
            metrics: String::new(),
            translate_uid: String::new(),
            translate_gid: String::new(),
        }
    }
}

/// Which channel to the kernel a mount uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Channel {
    /// io_uring where the kernel offers it.
    #[default]
    Auto,
    /// FUSE-over-io_uring, or an error.
    Uring,
    /// `/dev/fuse`.
    Fuse,
}

/// Which kernel driver opens a VM's device to user space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PciDriver {
    /// vfio-pci behind an IOMMU, uio_pci_generic without one.
    #[default]
    Auto,
    /// uio_pci_generic.
    Uio,
    /// vfio-pci.
    Vfio,
}

/// The table `[mount]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mount {
    /// The PCI address of the VM's virtio-fs device; with neither this nor a tag: the host's socket.
    pub pci: String,
    /// The tag of the VM's virtio-fs device.
    pub tag: String,
    /// The kernel driver for that device.
    pub pci_driver: PciDriver,
    /// The channel to the kernel.
    pub channel: Channel,
    /// The CPU of each queue's thread, in order; none: the program chooses.
    pub cpus: Vec<usize>,
    /// Other users may enter (only root may say so).
    pub allow_other: bool,
    /// The kernel checks modes and owners.
    pub default_permissions: bool,
    /// Cache writes in the guest's kernel.
    pub writeback: bool,
    /// Seconds that the host may take for an answer, 0: as long as it likes.
    #[serde(deserialize_with = "numbers::whole")]
    pub timeout: u64,
    /// Go on with another host on the same socket when this one has gone.
    pub reconnect: bool,
    /// Seconds to wait for one.
    #[serde(deserialize_with = "numbers::whole")]
    pub reconnect_timeout: u64,
    /// Where a daemon's log goes; if empty, to the system's log.
    pub log_file: PathBuf,
    /// Where Prometheus reads the mount's figures, a port or an address and a port; if empty, nowhere.
    pub metrics: String,
}

impl Default for Mount {
    fn default() -> Self {
        Mount {
            pci: String::new(),
            tag: String::new(),
            pci_driver: PciDriver::Auto,
            channel: Channel::Auto,
            cpus: Vec::new(),
            allow_other: true,
            default_permissions: true,
            writeback: false,
            timeout: 300,
            reconnect: true,
            reconnect_timeout: 60,
            log_file: PathBuf::new(),
            metrics: String::new(),
        }
    }
}
