//! The command line of a mount, and mount(8)'s `-o` words.

use clap::Parser;
use std::path::PathBuf;
use tunnelfs_guest::fuse::device::MountOptions;
use tunnelfs_guest::mount::{possible_cpus, Channel, MountConfig};
use tunnelfs_guest::{Error, GuestConfig, Wanted};
use tunnelfs_ring::{Geometry, Policy, WaitConfig};

/// `tunnelfs-guest mount`.
#[derive(Parser, Debug)]
#[command(after_help = "Examples:
  tunnelfs-guest mount --socket-path /run/tfs.sock /mnt
  tunnelfs-guest mount --socket-path /run/tfs.sock /mnt -f -o ro,channel=fuse
  mount -t tunnelfs /run/tfs.sock /mnt -o nosuid,queues=2
  umount /mnt

Words for -o beside mount(8)'s own: transport=ring|virtqueue|socket, channel=auto|uring|fuse,
queues=N, entries=N, slots=N, slot_size=BYTES, huge_pages, wait=auto|spin|park, spin_us=N,
auto_us=N, cpus=A:B:.., writeback, allow_other, noallow_other, default_permissions,
nodefault_permissions.

SIGUSR1 prints statistics, SIGTERM and SIGINT unmount.")]
pub struct MountArgs {
    /// The host's UNIX socket
    #[arg(long, value_name = "PATH")]
    pub socket_path: PathBuf,
    /// Where to mount
    pub mount_point: PathBuf,
    /// Options, comma-separated
    #[arg(short = 'o', value_name = "OPTIONS", value_delimiter = ',')]
    pub options: Vec<String>,
    /// Stay in the foreground
    #[arg(short, long)]
    pub foreground: bool,
}

/// What mount(8) calls: `mount.tunnelfs SOCKET DIR [-sfnv] [-o OPTIONS]`.
#[derive(Parser, Debug)]
pub struct HelperArgs {
    socket_path: PathBuf,
    mount_point: PathBuf,
    #[arg(short = 'o', value_delimiter = ',')]
    options: Vec<String>,
    /// Tolerate unknown options
    #[arg(short)]
    sloppy: bool,
    /// Do everything but mount
    #[arg(short = 'f')]
    fake: bool,
    /// Do not write /etc/mtab: nobody does
    #[arg(short = 'n')]
    no_mtab: bool,
    #[arg(short = 'v')]
    verbose: bool,
    /// The type's name
    #[arg(short = 't')]
    kind: Option<String>,
}

impl From<HelperArgs> for MountArgs {
    fn from(a: HelperArgs) -> Self {
        MountArgs { socket_path: a.socket_path, mount_point: a.mount_point, options: a.options, foreground: false }
    }
}

impl MountArgs {
    /// What is to be mounted.
    ///
    /// # Errors
    /// [`Error::Setup`] names the word that is not understood.
    pub fn config(&self) -> Result<MountConfig, Error> {
        let root = nix::unistd::geteuid().is_root();
        let point = std::path::absolute(&self.mount_point)?;
        let mut config = MountConfig {
            guest: GuestConfig {
                socket_path: self.socket_path.clone(),
                transport: Wanted::Ring,
                queues: std::thread::available_parallelism().map_or(1, usize::from),
                geometry: Geometry { entries: 64, slots: 32, slot_size: 1 << 20 },
                huge_pages: false,
                wait: WaitConfig { policy: Policy::Auto, spin_us: 10_000, auto_us: 200 },
                cpus: Vec::new(),
            },
            point,
            options: MountOptions {
                allow_other: root,
                default_permissions: true,
                source: self.socket_path.display().to_string(),
                ..Default::default()
            },
            channel: Channel::Auto,
            writeback: false,
        };
        for word in &self.options {
            apply(&mut config, word)?;
        }
        if config.guest.cpus.is_empty() && config.channel != Channel::Classic {
            config.guest.cpus = one_a_cpu(config.guest.queues);
        }
        Ok(config)
    }
}

/// FUSE-over-io_uring has a queue for each CPU: where we have as many, each stays on its own.
fn one_a_cpu(queues: usize) -> Vec<usize> {
    if queues == possible_cpus() {
        (0..queues).collect()
    } else {
        Vec::new()
    }
}

fn apply(config: &mut MountConfig, word: &str) -> Result<(), Error> {
    let (key, value) = word.split_once('=').unwrap_or((word, ""));
    let wrong = |allowed: &str| Error::Setup(format!("-o {word}: {key} must be {allowed}"));
    let number = || value.parse::<u32>().map_err(|_| wrong("a number"));
    let guest = &mut config.guest;
    match key {
        "transport" => {
            guest.transport = match value {
                "ring" => Wanted::Ring,
                "virtqueue" => Wanted::Virtqueue,
                "socket" => Wanted::Socket,
                _ => return Err(wrong("ring, virtqueue or socket")),
            }
        }
        "channel" => {
            config.channel = match value {
                "auto" => Channel::Auto,
                "uring" => Channel::Uring,
                "fuse" => Channel::Classic,
                _ => return Err(wrong("auto, uring or fuse")),
            }
        }
        "queues" => guest.queues = number()?.clamp(1, 62) as usize,
        "entries" => guest.geometry.entries = number()?,
        "slots" => guest.geometry.slots = number()?,
        "slot_size" => guest.geometry.slot_size = number()?,
        "huge_pages" => guest.huge_pages = true,
        "wait" => guest.wait.policy = value.parse().map_err(|_| wrong("auto, spin or park"))?,
        "spin_us" => guest.wait.spin_us = number()?,
        "auto_us" => guest.wait.auto_us = number()?,
        "cpus" => {
            let cpus = value.split(':').map(str::parse).collect::<Result<_, _>>();
            guest.cpus = cpus.map_err(|_| wrong("CPU numbers with colons between them"))?;
        }
        "writeback" => config.writeback = true,
        "allow_other" => config.options.allow_other = true,
        "noallow_other" => config.options.allow_other = false,
        "default_permissions" => config.options.default_permissions = true,
        "nodefault_permissions" => config.options.default_permissions = false,
        "ro" => config.options.read_only = true,
        "rw" => config.options.read_only = false,
        // mount(8)'s and systemd's own, which say nothing to a file system.
        "" | "defaults" | "auto" | "noauto" | "nofail" | "_netdev" | "user" | "nouser" | "users" | "suid" | "dev"
        | "exec" | "atime" | "async" => {}
        _ if key.starts_with("x-") || key.starts_with("comment") => {}
        other => config.options.flags.push(other.into()),
    }
    Ok(())
}
