//! `tunnelfs-host`: shares a directory.

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use tunnelfs_host::{serve, HostConfig, Transport};
use tunnelfs_ring::{Policy, WaitConfig};

/// Share a directory with a guest over shared-memory rings, virtqueues or a socket.
#[derive(Parser)]
#[command(version, after_help = "Example:\n  tunnelfs-host --socket-path /tmp/tfs.sock --shared-dir /srv/data")]
struct Args {
    /// UNIX socket to listen on
    #[arg(long)]
    socket_path: PathBuf,
    /// Directory to share
    #[arg(long)]
    shared_dir: PathBuf,
    /// virtio-fs tag, at most 36 bytes
    #[arg(long, default_value = "tunnelfs")]
    tag: String,
    /// Request queues
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=62))]
    num_request_queues: u16,
    /// Speak streamed FUSE messages instead of vhost-user
    #[arg(long)]
    stream: bool,
    /// How queue threads wait: spin, park or auto
    #[arg(long, default_value_t)]
    wait: Policy,
    /// How long `spin` spins before it sleeps, microseconds
    #[arg(long, default_value_t = 10_000)]
    spin_us: u32,
    /// How long `auto` spins at the most, microseconds
    #[arg(long, default_value_t = 200)]
    auto_us: u32,
    /// Threads for operations that block
    #[arg(long, default_value_t = 4)]
    thread_pool_size: usize,
    /// Serve one guest, then exit
    #[arg(long)]
    once: bool,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let args = Args::parse();
    let config = HostConfig {
        shared_dir: args.shared_dir,
        socket_path: args.socket_path,
        tag: args.tag,
        queues: args.num_request_queues.into(),
        transport: if args.stream { Transport::Socket } else { Transport::VhostUser },
        wait: WaitConfig { policy: args.wait, spin_us: args.spin_us, auto_us: args.auto_us },
        workers: args.thread_pool_size,
        once: args.once,
    };
    match serve(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("tunnelfs-host: {e}");
            ExitCode::FAILURE
        }
    }
}
