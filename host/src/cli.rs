//! The host's command line.

use crate::{compat, doctor};
use clap::{ArgMatches, Command, CommandFactory, FromArgMatches, Parser, Subcommand};
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use tunnelfs_host::asked;
use tunnelfs_host::{Guests, Reload, Start, LIVE_KEYS};
use tunnelfs_program::control::What;
use tunnelfs_program::reload::{Reloader, SettingsFile};
use tunnelfs_program::{log, shell, top};
use tunnelfs_settings::{args, load, Loader, Settings};

/// The settings that a host's command line has.
const SECTIONS: &[&str] = &["transport.kind", "transport.socket_path", "transport.queues", "wait", "host", "log"];

/// Those of `status` and `top`.
const SOCKET: &[&str] = &["transport.socket_path"];

/// Share a directory with a guest over shared-memory rings, virtqueues or a socket.
#[derive(Clone, Parser)]
#[command(
    name = "tunnelfs-host",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  tunnelfs-host --socket-path /run/tfs.sock --shared-dir /srv/data
  tunnelfs-host --config tunnelfs.toml --cache never --readonly
  tunnelfs-host doctor --shared-dir /srv/data

Beside a VM the socket is QEMU's (-chardev socket,path=...); without one, tunnelfs-guest's.

Signals: SIGTERM and SIGINT end the host; its socket's file goes with it. SIGHUP reads
the settings file again: wait policy and budgets, thread pool and log level change at once."
)]
struct Args {
    /// Serve one guest, then exit
    #[arg(long)]
    once: bool,
    /// Take the socket's path from a host that listens there; without this, a second host is refused
    #[arg(long)]
    replace: bool,
    /// Number of a listening socket that this process is started with, instead of --socket-path
    #[arg(long, value_name = "FD", conflicts_with = "socket-path")]
    fd: Option<i32>,
    /// virtiofsd's former options, comma-separated, as libvirt writes them: source=DIR, cache=none, xattr, ...
    #[arg(short = 'o', value_name = "OPTIONS", value_delimiter = ',')]
    options: Vec<String>,
    /// Print what this back end can do, as vhost-user's managers ask for it, and exit
    #[arg(long)]
    print_capabilities: bool,
    /// Print the settings, each with where it comes from, and exit
    #[arg(long)]
    print_config: bool,
    /// Check the settings, and exit
    #[arg(long)]
    check_config: bool,
    #[command(subcommand)]
    command: Option<Task>,
}

/// What else than serving there is to do.
#[derive(Clone, Subcommand)]
enum Task {
    /// Look at what this machine gives a host with these settings, and say what to do about what is missing
    Doctor,
    /// Tell how the host behind a socket is: its guests, and what their queues have done
    Status,
    /// Watch the host behind a socket: requests, kicks, spinning and sleeping
    Top {
        #[command(flatten)]
        options: top::Options,
    },
}

fn command() -> Command {
    let command = Args::command().args(args(SECTIONS));
    let command = command.mut_subcommand("doctor", |doctor| doctor.args(args(SECTIONS)));
    let command = command.mut_subcommand("status", |status| status.args(args(SOCKET)));
    command.mut_subcommand("top", |top| top.args(args(SOCKET))).subcommands(shell::subcommands())
}

/// Does what the command line says.
pub fn main() -> ExitCode {
    let command = command();
    let matches = command.clone().get_matches();
    match shell::run(&command, &matches) {
        Ok(false) => {}
        Ok(true) => return ExitCode::SUCCESS,
        Err(e) => return fail(&e),
    }
    if let Some(matches) = matches.subcommand_matches("doctor") {
        return diagnose(matches).unwrap_or_else(|e| fail(&*e));
    }
    if let Some((word @ ("status" | "top"), matches)) = matches.subcommand() {
        return ask(word, matches).map_or_else(|e| fail(&*e), |()| ExitCode::SUCCESS);
    }
    let args = Args::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    run(&matches, &args).map_or_else(|e| fail(&*e), |()| ExitCode::SUCCESS)
}

fn fail(e: &dyn Error) -> ExitCode {
    eprintln!("tunnelfs-host: {e}");
    ExitCode::FAILURE
}

/// `status` and `top`.
fn ask(word: &str, matches: &ArgMatches) -> Result<(), Box<dyn Error>> {
    let socket = load(SOCKET, matches)?.finish()?.transport.socket_path;
    if word == "status" {
        print!("{}", asked::ask(&socket, What::Status)?);
        return Ok(());
    }
    let title = format!("{} by tunnelfs-host", socket.display());
    Ok(top::run(&title, top::Options::from_arg_matches(matches)?, || asked::ask(&socket, What::Metrics))?)
}

fn diagnose(matches: &ArgMatches) -> Result<ExitCode, Box<dyn Error>> {
    let settings = load(SECTIONS, matches)?.finish()?;
    let good = doctor::examine(&settings).print(&mut std::io::stdout())?;
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run(matches: &ArgMatches, args: &Args) -> Result<(), Box<dyn Error>> {
    if args.print_capabilities {
        println!("{{\n  \"type\": \"fs\",\n  \"features\": [\"separate-options\"]\n}}");
        return Ok(());
    }
    let loader = loader(load(SECTIONS, matches)?, args)?;
    if args.print_config {
        print!("{}", loader.print());
        return Ok(());
    }
    let settings = loader.finish()?;
    if args.check_config {
        println!("tunnelfs-host: the settings are good");
        return Ok(());
    }
    let log = log::start(settings.log.level, true);
    let reload = reload(matches, args, settings.clone(), log)?;
    let socket = args.fd.or_else(activated).map(tunnelfs_host::listener_from_fd).transpose()?;
    let guests = if args.once { Guests::One } else { Guests::Forever };
    tunnelfs_host::serve_confined(&settings, Start { guests, replace: args.replace, socket, reload: Some(reload) })?;
    Ok(())
}

/// The socket that systemd has made for this process (sd_listen_fds(3)), if there is one.
fn activated() -> Option<i32> {
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    (number("LISTEN_PID") == Some(std::process::id()) && number("LISTEN_FDS") == Some(1)).then_some(3)
}

/// What is done on SIGHUP: what the file says is read again, and the command line goes before it again.
fn reload(matches: &ArgMatches, args: &Args, settings: Settings, log: log::Control) -> Result<Reload, Box<dyn Error>> {
    let named = matches.get_one::<PathBuf>("config").map(PathBuf::as_path);
    let file = SettingsFile::before_sandbox(named)?;
    let mut reloader = Reloader { file, settings, sections: SECTIONS, live: LIVE_KEYS, restart: "a restart", log };
    let (matches, args) = (matches.clone(), args.clone());
    Ok(Reload::new(move |live| {
        let finish = |mut again: Loader| {
            again.apply_args(SECTIONS, &matches)?;
            Ok::<_, Box<dyn Error>>(loader(again, &args)?.finish_again()?)
        };
        if let Some(settings) = reloader.reload(finish) {
            live.set(settings);
        }
    }))
}

fn loader(mut loader: Loader, args: &Args) -> Result<Loader, Box<dyn Error>> {
    for word in args.options.iter().filter_map(|word| compat::setting(word)) {
        if !loader.mount_word(SECTIONS, &word)? {
            return Err(format!("-o {word}: no option of virtiofsd's that is known here").into());
        }
    }
    Ok(loader)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
        let matches = command().get_matches_from(["tunnelfs-host", "doctor", "--shared-dir", "/x"]);
        assert!(matches.subcommand_matches("doctor").is_some());
    }
}
