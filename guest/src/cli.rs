//! The command line of a mount, and mount(8)'s `-o` words.

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use std::path::{Path, PathBuf};
use tunnelfs_guest::fuse::device::MountOptions;
use tunnelfs_guest::mount::MountConfig;
use tunnelfs_guest::Error;
use tunnelfs_settings::{args, load, Loader};

/// The settings that a mount's command line has.
const SECTIONS: &[&str] = &["transport", "wait", "mount"];

/// Mount a directory that tunnelfs-host shares.
#[derive(Parser)]
#[command(version)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Mount a host's directory on a mount point
    Mount(MountArgs),
}

/// `tunnelfs-guest mount`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  tunnelfs-guest mount --socket-path /run/tfs.sock /mnt
  tunnelfs-guest mount --socket-path /run/tfs.sock /mnt -f -o ro,channel=fuse
  mount -t tunnelfs /run/tfs.sock /mnt -o nosuid,queues=2
  tunnelfs-guest mount --tag myfs /mnt                 (in a VM with a virtio-fs device)
  mount -t tunnelfs 0000:00:03.0 /mnt -o pci_driver=uio
  umount /mnt

-o takes mount(8)'s own words, and all settings by their names in tunnelfs.toml or
above: slots=64, wait=spin, cpus=0:1, huge_pages.

SIGUSR1 prints statistics, SIGUSR2 starts and ends a recording for tunnelfs-bench record, SIGTERM and SIGINT unmount.")]
struct MountArgs {
    /// Where to mount
    mount_point: PathBuf,
    /// Options, comma-separated
    #[arg(short = 'o', value_name = "OPTIONS", value_delimiter = ',')]
    options: Vec<String>,
    /// Stay in the foreground
    #[arg(short, long)]
    foreground: bool,
}

/// What mount(8) calls: `mount.tunnelfs SOURCE DIR [-sfnv] [-o OPTIONS]`.
#[derive(Parser, Debug)]
#[command(version)]
struct HelperArgs {
    /// A host's socket, or in a VM the address or tag of the virtio-fs device
    source: String,
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

/// What is asked for.
pub struct MountCommand {
    pub config: MountConfig,
    pub foreground: bool,
    /// Of a daemon; if empty, the system's log.
    pub log_file: PathBuf,
    /// Only look whether it could be.
    pub fake: bool,
    /// Change the flags of what is mounted there.
    pub remount: bool,
}

/// Reads the command line.
///
/// # Errors
/// Names the setting or word that cannot be.
pub fn request() -> Result<MountCommand, Error> {
    let name = std::env::args().next().unwrap_or_default();
    // The second one is looked for when something is mounted already: `mount -o remount`.
    if ["mount.tunnelfs", "mount.fuse.tunnelfs"].iter().any(|helper| Path::new(&name).ends_with(helper)) {
        helper(HelperArgs::parse())
    } else {
        program()
    }
}

fn program() -> Result<MountCommand, Error> {
    let command = Program::command().mut_subcommand("mount", |mount| mount.args(args(SECTIONS)));
    let matches = command.get_matches();
    let Command::Mount(args) = Program::from_arg_matches(&matches).unwrap_or_else(|e| e.exit()).command;
    let matches = matches.subcommand_matches("mount").expect("there is no other");
    let request = request_for(load(SECTIONS, matches)?, &args.mount_point, &args.options, false)?;
    Ok(MountCommand { foreground: args.foreground, ..request })
}

fn helper(args: HelperArgs) -> Result<MountCommand, Error> {
    let mut words = args.options;
    words.push(source_word(&args.source));
    let remount = words.iter().any(|w| w == "remount");
    // mount(8) passes all that it finds in /proc/mounts, `user_id` and the like, which the kernel leaves as it is.
    let sloppy = args.sloppy || remount;
    let request = request_for(Loader::new(None)?, &args.mount_point, &words, sloppy)?;
    Ok(MountCommand { fake: args.fake, remount, ..request })
}

fn request_for(mut loader: Loader, point: &Path, words: &[String], sloppy: bool) -> Result<MountCommand, Error> {
    let mut options = MountOptions::default();
    for word in words {
        if !loader.mount_word(SECTIONS, word)? && !options.mount_option(word) && !sloppy {
            return Err(Error::Setup(format!("-o {word}: neither a setting of TunnelFS nor an option of mount(8)")));
        }
    }
    let settings = loader.finish_with_memory()?;
    options.allow_other = settings.mount.allow_other;
    options.default_permissions = settings.mount.default_permissions;
    let point = std::path::absolute(point)?;
    let mut config = MountConfig::new(&settings, &point, options);
    config.options.source = match &config.guest.pci {
        Some(target) => target.which.to_string(),
        None => config.guest.socket_path.display().to_string(),
    };
    let log_file = match &settings.mount.log_file {
        none if none.as_os_str().is_empty() => none.clone(),
        file => std::path::absolute(file)?,
    };
    Ok(MountCommand { config, foreground: false, log_file, fake: false, remount: false })
}

/// What mount(8)'s first argument means: a path is a host's socket, a PCI address or a tag a VM's device.
fn source_word(source: &str) -> String {
    let address = source.contains(':') && source.chars().all(|c| c.is_ascii_hexdigit() || ":.".contains(c));
    let word = match source {
        path if path.starts_with('/') => "socket_path",
        _ if address => "pci",
        _ => "tag",
    };
    format!("{word}={source}")
}
