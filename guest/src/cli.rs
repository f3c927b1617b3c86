//! The command line of a mount, and mount(8)'s `-o` options.

use crate::abort_when_killed::{self, Mounted};
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use std::path::{Path, PathBuf};
use tunnelfs_guest::fuse::device::MountOptions;
use tunnelfs_guest::mount::MountConfig;
use tunnelfs_guest::Error;
use tunnelfs_program::log::Control;
use tunnelfs_program::reload::{Reloader, SettingsFile};
use tunnelfs_program::{shell, top};
use tunnelfs_settings::{args, load, Loader, LogLevel, Settings};

/// The sections of the settings that a mount's command line has.
const SECTIONS: &[&str] = &["transport", "wait", "mount", "log"];

/// Mount a directory that tunnelfs-host shares.
#[derive(Parser)]
#[command(name = "tunnelfs-guest", version)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Mount a host's directory on a mount point
    Mount(MountArgs),
    /// Tell how a mount is: its channel, transport and host, and its statistics
    Status {
        /// Where it is mounted
        mount_point: PathBuf,
    },
    /// Watch a mount: requests, latencies, slots in use and kicks
    Top {
        /// Where it is mounted
        mount_point: PathBuf,
        #[command(flatten)]
        options: top::Options,
    },
    /// Look at what this machine gives a mount with these settings, and say what to do about what is missing
    Doctor,
    #[command(name = abort_when_killed::COMMAND, hide = true)]
    AbortWhenKilled(Mounted),
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

SIGTERM and SIGINT unmount, SIGHUP reads the settings file again (wait policy and
budgets, log level), SIGUSR1 logs what `tunnelfs-guest status` prints,
SIGUSR2 starts and ends a recording for tunnelfs-bench record.")]
struct MountArgs {
    /// Where to mount
    mount_point: PathBuf,
    /// Options, comma-separated
    #[arg(short = 'o', value_name = "OPTIONS", value_delimiter = ',')]
    options: Vec<String>,
    /// Stay in the foreground
    #[arg(short, long)]
    foreground: bool,
    /// Print the settings, each with where it comes from, and exit
    #[arg(long)]
    print_config: bool,
    /// Check the settings, and exit
    #[arg(long)]
    check_config: bool,
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

/// The command to run.
pub enum Request {
    Mount(Box<MountCommand>),
    /// The status of the mount on this mount point.
    Status(PathBuf),
    Top(PathBuf, top::Options),
    Doctor(Box<Settings>),
    AbortWhenKilled(Mounted),
    /// None: the command line was only to print something.
    Nothing,
}

/// The `mount` command.
pub struct MountCommand {
    pub config: MountConfig,
    pub log_level: LogLevel,
    pub foreground: bool,
    /// Log file of a daemon; empty: the system's log.
    pub log_file: PathBuf,
    /// Whether to check the command line only, and not to mount.
    pub fake: bool,
    /// Whether to change the flags of the existing mount.
    pub remount: bool,
    /// The sources of the settings, which SIGHUP reads again.
    pub again: Again,
}

/// The sources of a mount's settings, to load them again.
#[derive(Clone, Debug, Default)]
pub struct Again {
    /// The file of `--config`; `None`: the default one.
    file: Option<PathBuf>,
    settings: Settings,
    /// The arguments of `tunnelfs-guest mount`; `None` for mount(8)'s helper.
    matches: Option<ArgMatches>,
    /// The options of `-o`.
    words: Vec<String>,
    sloppy: bool,
}

/// The keys that a reload applies to a mount in use.
const LIVE_KEYS: &[&str] = &["wait.policy", "wait.goal", "wait.spin_us", "wait.auto_us", "log.level"];

impl Again {
    /// Returns the settings of the mount.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Makes the reloader of the settings file.
    pub fn reloader(&self, log: Control) -> Reloader {
        let (file, settings) = (SettingsFile::new(self.file.as_deref()), self.settings.clone());
        Reloader { file, settings, sections: SECTIONS, live: LIVE_KEYS, restart: "a remount", log }
    }

    /// Applies the command line over the settings file in `loader`.
    ///
    /// # Errors
    /// Names the invalid setting.
    pub fn finish(&self, mut loader: Loader) -> Result<Settings, Error> {
        if let Some(matches) = &self.matches {
            loader.apply_args(SECTIONS, matches)?;
        }
        mount_options(&mut loader, &self.words, self.sloppy)?;
        Ok(loader.finish_again()?)
    }
}

/// Reads the command line.
///
/// # Errors
/// Names the invalid setting or option.
pub fn request() -> Result<Request, Error> {
    let name = std::env::args().next().unwrap_or_default();
    // mount(8) calls the second name for an existing mount: `mount -o remount`.
    if ["mount.tunnelfs", "mount.fuse.tunnelfs"].iter().any(|helper| Path::new(&name).ends_with(helper)) {
        helper(HelperArgs::parse()).map(|mount| Request::Mount(Box::new(mount)))
    } else {
        program()
    }
}

fn command() -> clap::Command {
    let with_settings = |command: clap::Command| command.args(args(SECTIONS));
    let command = Program::command().mut_subcommand("mount", with_settings);
    command.mut_subcommand("doctor", with_settings).subcommands(shell::subcommands())
}

fn program() -> Result<Request, Error> {
    let command = command();
    let matches = command.clone().get_matches();
    if shell::run(&command, &matches)? {
        return Ok(Request::Nothing);
    }
    let args = |name| matches.subcommand_matches(name).expect("it is what was asked for");
    match Program::from_arg_matches(&matches).unwrap_or_else(|e| e.exit()).command {
        Command::Mount(given) => mount(&given, args("mount")),
        Command::Status { mount_point } => Ok(Request::Status(mount_point)),
        Command::Top { mount_point, options } => Ok(Request::Top(mount_point, options)),
        Command::AbortWhenKilled(mounted) => Ok(Request::AbortWhenKilled(mounted)),
        Command::Doctor => Ok(Request::Doctor(Box::new(load(SECTIONS, args("doctor"))?.finish()?))),
    }
}

fn mount(args: &MountArgs, matches: &ArgMatches) -> Result<Request, Error> {
    let mut loader = load(SECTIONS, matches)?;
    let options = mount_options(&mut loader, &args.options, false)?;
    if args.print_config {
        print!("{}", loader.print());
        return Ok(Request::Nothing);
    }
    let command = mount_command(loader, &args.mount_point, options)?;
    if args.check_config {
        println!("tunnelfs-guest: the settings are good");
        return Ok(Request::Nothing);
    }
    let file = matches.get_one::<PathBuf>("config").map(std::path::absolute).transpose()?;
    let (matches, words) = (Some(matches.clone()), args.options.clone());
    let again = Again { file, matches, words, ..command.again };
    Ok(Request::Mount(Box::new(MountCommand { foreground: args.foreground, again, ..command })))
}

fn helper(args: HelperArgs) -> Result<MountCommand, Error> {
    let mut words = args.options;
    words.push(source_word(&args.source));
    let remount = words.iter().any(|w| w == "remount");
    // For a remount mount(8) passes all options of /proc/mounts, such as `user_id`. The kernel does not change these.
    let sloppy = args.sloppy || remount;
    let mut loader = Loader::new(None)?;
    let options = mount_options(&mut loader, &words, sloppy)?;
    let command = mount_command(loader, &args.mount_point, options)?;
    let again = Again { words, sloppy, ..command.again };
    Ok(MountCommand { fake: args.fake, remount, again, ..command })
}

/// Applies the options of `-o`: settings to `loader`, and mount(8)'s options to the result. With `sloppy`, ignores
/// unknown options.
fn mount_options(loader: &mut Loader, words: &[String], sloppy: bool) -> Result<MountOptions, Error> {
    let mut options = MountOptions::default();
    let mut setting = None;
    for word in words {
        if loader.mount_word(SECTIONS, word)? {
            setting = Some(word);
        } else if !options.mount_option(word) && !sloppy {
            return Err(Error::Setup(unknown(word, setting)));
        }
    }
    Ok(options)
}

/// Returns the message for an unknown option of `-o`. `before` is the setting before it: a number after it belongs to a
/// list with commas.
fn unknown(word: &str, before: Option<&String>) -> String {
    match before {
        Some(before) if !word.is_empty() && word.bytes().all(|c| c.is_ascii_digit()) => {
            format!("-o {before},{word}: commas separate options: write a list with colons, {before}:{word}")
        }
        _ => format!("-o {word}: neither a setting of TunnelFS nor an option of mount(8)"),
    }
}

fn mount_command(loader: Loader, point: &Path, mut options: MountOptions) -> Result<MountCommand, Error> {
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
    let log_level = settings.log.level;
    let again = Again { settings, ..Again::default() };
    Ok(MountCommand { config, log_level, foreground: false, log_file, fake: false, remount: false, again })
}

/// Turns mount(8)'s first argument into an option. A path is a host's socket; a PCI address or a tag is a VM's device.
fn source_word(source: &str) -> String {
    let address = source.contains(':') && source.chars().all(|c| c.is_ascii_hexdigit() || ":.".contains(c));
    let word = match source {
        path if path.starts_with('/') => "socket_path",
        _ if address => "pci",
        _ => "tag",
    };
    format!("{word}={source}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn a_list_with_commas_is_explained() {
        let words = ["cpus=0".to_string(), "1".to_string()];
        let mut loader = Loader::new(Some(Path::new("/dev/null"))).unwrap();
        let e = mount_options(&mut loader, &words, false).err().unwrap().to_string();
        assert!(e.contains("cpus=0:1"), "{e}");
        let e = mount_options(&mut loader, &["nonsense".into()], false).err().unwrap().to_string();
        assert!(e.contains("-o nonsense: neither"), "{e}");
    }
}
