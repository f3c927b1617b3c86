//! `tunnelfs-guest`: mounts a host's directory; also `mount.tunnelfs` for mount(8).

mod cli;

use cli::MountCommand;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{fork, ForkResult};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::ExitCode;
use tunnelfs_guest::fuse::device;
use tunnelfs_guest::mount::{Mount, MountConfig};
use tunnelfs_guest::Error;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::builder()
                .with_default_directive(tracing_subscriber::filter::LevelFilter::INFO.into())
                .from_env_lossy(),
        )
        .without_time()
        .with_target(false)
        .with_writer(std::io::stderr)
        .init();
    match cli::request().and_then(|request| run(&request)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("tunnelfs-guest: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(MountCommand { config, foreground, log_file, fake, remount }: &MountCommand) -> Result<(), Error> {
    if *fake {
        return Ok(());
    }
    if *remount {
        return device::remount(&config.point, config.options.flags);
    }
    if *foreground {
        return serve(config, |mount| println!("{}", mount.describe()));
    }
    let log = open_log(log_file)?;
    let (told, tell) = nix::unistd::pipe().map_err(std::io::Error::from)?;
    // SAFETY: this process has one thread so far.
    match unsafe { fork() }.map_err(std::io::Error::from)? {
        ForkResult::Parent { .. } => {
            drop(tell);
            await_daemon(File::from(told))
        }
        ForkResult::Child => {
            drop(told);
            daemon(config, log, File::from(tell))
        }
    }
}

/// Waits for the daemon's word: nothing but `ok`, or what went wrong.
fn await_daemon(mut told: File) -> Result<(), Error> {
    let mut word = String::new();
    told.read_to_string(&mut word)?;
    match word.as_str() {
        "ok" => Ok(()),
        "" => Err(Error::Setup("the daemon died before it had mounted".into())),
        error => Err(Error::Setup(error.into())),
    }
}

fn daemon(config: &MountConfig, log: Option<OwnedFd>, mut tell: File) -> Result<(), Error> {
    nix::unistd::setsid().map_err(std::io::Error::from)?;
    let mut told = false;
    let result = serve(config, |_| {
        told = tell.write_all(b"ok").is_ok();
        leave_terminal(log);
        // The parent waits for the end of the pipe.
        drop(std::mem::replace(&mut tell, File::open("/dev/null").expect("/dev/null can be opened")));
    });
    if let (Err(e), false) = (&result, told) {
        let _ = tell.write_all(e.to_string().as_bytes());
        std::process::exit(1);
    }
    result
}

/// The file, or the system's log if there is one: a socket that takes each write as a message.
fn open_log(file: &Path) -> Result<Option<OwnedFd>, Error> {
    if !file.as_os_str().is_empty() {
        let opened = File::options().append(true).create(true).open(file);
        let opened = opened.map_err(|e| Error::Setup(format!("mount.log_file = {}: {e}", file.display())));
        return Ok(Some(opened?.into()));
    }
    let log = UnixDatagram::unbound()?;
    // A log that is stuck must not hold up the file system.
    log.set_nonblocking(true)?;
    Ok(log.connect("/dev/log").is_ok().then_some(log.into()))
}

fn leave_terminal(log: Option<OwnedFd>) {
    let _ = std::env::set_current_dir("/");
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdin(&null);
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(log.as_ref().map_or(null.as_fd(), AsFd::as_fd));
    }
}

/// Mounts, then serves until the file system is unmounted or a signal ends it.
fn serve(config: &MountConfig, ready: impl FnOnce(&Mount)) -> Result<(), Error> {
    let mut wanted = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2] {
        wanted.add(signal);
    }
    // Before any thread starts, so that all inherit it.
    wanted.thread_block().map_err(std::io::Error::from)?;
    let signals = SignalFd::with_flags(&wanted, SfdFlags::SFD_CLOEXEC).map_err(std::io::Error::from)?;
    let mount = Mount::new(config)?;
    ready(&mount);
    let mut unmounted = false;
    loop {
        let mut fds =
            [PollFd::new(mount.exit_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(nix::Error::EINTR) => continue,
            Err(e) => return Err(std::io::Error::from(e).into()),
        }
        if fds[0].any() == Some(true) {
            return mount.finish();
        }
        match signals.read_signal() {
            Ok(Some(s)) if s.ssi_signo == Signal::SIGUSR1 as u32 => eprint!("{}", mount.statistics()),
            Ok(Some(s)) if s.ssi_signo == Signal::SIGUSR2 as u32 => {
                mount.record().unwrap_or_else(|e| tracing::warn!("the recording cannot be written: {e}"));
            }
            // Whoever insists is not kept waiting for the last user: without us the kernel ends the connection.
            Ok(Some(_)) if unmounted => return Ok(()),
            Ok(Some(_)) => {
                mount.unmount()?;
                unmounted = true;
            }
            _ => {}
        }
    }
}
