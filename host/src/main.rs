//! `tunnelfs-host`: shares a directory.

mod compat;

use clap::{CommandFactory, FromArgMatches, Parser};
use std::process::ExitCode;
use tunnelfs_host::Guests;
use tunnelfs_settings::{args, load};

/// The settings that a host's command line has.
const SECTIONS: &[&str] = &["transport.kind", "transport.socket_path", "transport.queues", "wait", "host"];

/// Share a directory with a guest over shared-memory rings, virtqueues or a socket.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  tunnelfs-host --socket-path /run/tfs.sock --shared-dir /srv/data
  tunnelfs-host --config tunnelfs.toml --cache never --readonly

Beside a VM the socket is QEMU's (-chardev socket,path=...); without one, tunnelfs-guest's."
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
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let matches = Args::command().args(args(SECTIONS)).get_matches();
    let args = Args::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    if args.print_capabilities {
        println!("{{\n  \"type\": \"fs\",\n  \"features\": [\"separate-options\"]\n}}");
        return ExitCode::SUCCESS;
    }
    match run(&matches, &args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("tunnelfs-host: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(matches: &clap::ArgMatches, args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    let mut loader = load(SECTIONS, matches)?;
    for word in args.options.iter().filter_map(|word| compat::setting(word)) {
        if !loader.mount_word(SECTIONS, &word)? {
            return Err(format!("-o {word}: no option of virtiofsd's that is known here").into());
        }
    }
    let settings = loader.finish()?;
    let socket = args.fd.map(tunnelfs_host::listener_from_fd).transpose()?;
    let guests = if args.once { Guests::One } else { Guests::Forever };
    let start = tunnelfs_host::Start { guests, replace: args.replace, socket };
    tunnelfs_host::serve_confined(&settings, start)?;
    Ok(())
}
