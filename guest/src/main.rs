//! `tunnelfs-guest`: mounts a host's directory; also `mount.tunnelfs` for mount(8).

mod abort_when_killed;
mod cli;
mod doctor;
mod status;

use cli::{Again, MountCommand, Request};
use nix::fcntl::OFlag;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{fork, ForkResult};
use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::ExitCode;
use tunnelfs_guest::config::wait_config;
use tunnelfs_guest::fuse::device;
use tunnelfs_guest::mount::{Mount, MountConfig};
use tunnelfs_guest::Error;
use tunnelfs_program::control::What;
use tunnelfs_program::reload::Reloader;
use tunnelfs_program::{log, metrics, top};

fn main() -> ExitCode {
    let done = cli::request().and_then(|request| match request {
        Request::Mount(command) => run(&command).map(|()| true),
        Request::Status(point) => {
            print!("{}", status::ask(&point, What::Status)?);
            Ok(true)
        }
        Request::Top(point, options) => {
            let title = format!("{} by tunnelfs-guest", point.display());
            top::run(&title, options, || status::ask(&point, What::Metrics))?;
            Ok(true)
        }
        Request::Doctor(settings) => Ok(doctor::examine(&settings).print(&mut std::io::stdout())?),
        Request::AbortWhenKilled(mounted) => Ok(abort_when_killed::run(&mounted).map(|()| true)?),
        Request::Nothing => Ok(true),
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("tunnelfs-guest: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &MountCommand) -> Result<(), Error> {
    let MountCommand { config, log_level, foreground, log_file, fake, remount, .. } = command;
    let log = log::start(*log_level, *foreground);
    let reload = Reload { again: command.again.clone(), reloader: command.again.reloader(log) };
    if *fake {
        return Ok(());
    }
    if *remount {
        return device::remount(&config.point, config.options.flags);
    }
    if *foreground {
        return serve(config, reload, |mount| println!("{}", mount.describe()));
    }
    let log = open_log(log_file)?;
    let (told, tell) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(std::io::Error::from)?;
    // SAFETY: this process has one thread so far.
    match unsafe { fork() }.map_err(std::io::Error::from)? {
        ForkResult::Parent { .. } => {
            drop(tell);
            await_daemon(File::from(told))
        }
        ForkResult::Child => {
            drop(told);
            daemon((config, reload), log, File::from(tell))
        }
    }
}

/// Waits for the daemon's message: `ok`, or an error.
fn await_daemon(mut told: File) -> Result<(), Error> {
    let mut word = String::new();
    told.read_to_string(&mut word)?;
    match word.as_str() {
        "ok" => Ok(()),
        "" => Err(Error::Setup("the daemon died before it had mounted".into())),
        error => Err(Error::Setup(error.into())),
    }
}

fn daemon((config, reload): (&MountConfig, Reload), log: Option<OwnedFd>, mut tell: File) -> Result<(), Error> {
    nix::unistd::setsid().map_err(std::io::Error::from)?;
    let mut told = false;
    let result = serve(config, reload, |_| {
        told = tell.write_all(b"ok").is_ok();
        leave_terminal(log);
        // Close the pipe: the parent reads to its end.
        drop(std::mem::replace(&mut tell, File::open("/dev/null").expect("/dev/null can be opened")));
    });
    if let (Err(e), false) = (&result, told) {
        let _ = tell.write_all(e.to_string().as_bytes());
        std::process::exit(1);
    }
    result
}

/// A daemon's log file on a machine without a system log, if no file is named.
const LOG_FILE: &str = "/var/log/tunnelfs-guest.log";

/// Opens the daemon's log: `file`, otherwise the system's log, a socket that takes each write as a message, otherwise
/// `LOG_FILE`. `None` if none of them can be opened.
fn open_log(file: &Path) -> Result<Option<OwnedFd>, Error> {
    if !file.as_os_str().is_empty() {
        let opened = File::options().append(true).create(true).open(file);
        let opened = opened.map_err(|e| Error::Setup(format!("mount.log_file = {}: {e}", file.display())));
        return Ok(Some(opened?.into()));
    }
    let log = UnixDatagram::unbound()?;
    // A blocked log must not block the file system.
    log.set_nonblocking(true)?;
    if log.connect("/dev/log").is_ok() {
        return Ok(Some(log.into()));
    }
    let file = File::options().append(true).create(true).open(LOG_FILE);
    let lost =
        |e: &std::io::Error| eprintln!("tunnelfs-guest: no log: no /dev/log, and {LOG_FILE}: {e}; give --log-file");
    Ok(file.inspect_err(lost).ok().map(OwnedFd::from))
}

/// Leaves the current directory and the terminal; stderr goes to the log.
fn leave_terminal(log: Option<OwnedFd>) {
    let _ = std::env::set_current_dir("/");
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdin(&null);
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(log.as_ref().map_or(null.as_fd(), AsFd::as_fd));
    }
}

/// Reloads the settings, for SIGHUP.
struct Reload {
    again: Again,
    reloader: Reloader,
}

impl Reload {
    fn reload(&mut self, mount: &Mount) {
        let Reload { again, reloader } = self;
        if let Some(settings) = reloader.reload(|loader| again.finish(loader)) {
            mount.wait().set(wait_config(settings));
        }
    }
}

/// Whether this process was started on a terminal. SIGHUP ends it if that terminal is gone.
#[derive(Clone, Copy)]
struct Terminal(bool);

impl Terminal {
    fn is_gone(self) -> bool {
        self.0 && !std::io::stdin().is_terminal()
    }
}

/// Returns a mount's status and statistics, as text.
fn tell(mount: &Mount) -> String {
    let host = if mount.is_host_away() { "gone, waiting for another one" } else { "there" };
    format!("{}\nhost: {host}\n{}", mount.describe(), mount.statistics())
}

/// Mounts, then serves until the file system is unmounted or a signal ends it.
fn serve(config: &MountConfig, mut reload: Reload, ready: impl FnOnce(&Mount)) -> Result<(), Error> {
    let mut wanted = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2] {
        wanted.add(signal);
    }
    let terminal = Terminal(std::io::stdin().is_terminal());
    // Before any thread starts, so that all threads inherit the mask.
    wanted.thread_block().map_err(std::io::Error::from)?;
    let signals = SignalFd::with_flags(&wanted, SfdFlags::SFD_CLOEXEC).map_err(std::io::Error::from)?;
    let address = &reload.again.settings().mount.metrics;
    let scrapers = (!address.is_empty()).then(|| metrics::listen(address)).transpose()?;
    let mount = Mount::new(config)?;
    if let Some(connection) = mount.needs_abort_when_killed() {
        let started = abort_when_killed::start(connection, &config.point);
        started.unwrap_or_else(|e| tracing::warn!("a second process for this mount cannot be started: {e}"));
    }
    let figures = mount.figures();
    let others = status::listen(&config.point, What::Metrics).map(|socket| {
        let figures = figures.clone();
        let text: Box<dyn Fn() -> String + Send> = Box::new(move || figures.metrics());
        vec![(socket, text)]
    });
    let others =
        others.inspect_err(|e| tracing::warn!("`tunnelfs-guest top` will not answer: {e}")).unwrap_or_default();
    metrics::serve(scrapers, others, move || figures.metrics())?;
    let status = status::listen(&config.point, What::Status);
    let status = status.inspect_err(|e| tracing::warn!("`tunnelfs-guest status` will not answer: {e}")).ok();
    // Only now: a program that sees the mount may ask for its status at once.
    ready(&mount);
    tracing::info!("{}", mount.describe());
    let mut unmounted = false;
    loop {
        let mut fds =
            vec![PollFd::new(mount.exit_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        fds.extend(status.as_ref().map(|status| PollFd::new(status.fd(), PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(nix::Error::EINTR) => continue,
            Err(e) => return Err(std::io::Error::from(e).into()),
        }
        if fds[0].any() == Some(true) {
            return mount.finish();
        }
        if fds.get(2).and_then(PollFd::any) == Some(true) {
            status.iter().for_each(|status| status.answer(|| tell(&mount)));
        }
        if fds[1].any() != Some(true) {
            continue;
        }
        match signals.read_signal() {
            Ok(Some(s)) if s.ssi_signo == Signal::SIGUSR1 as u32 => eprint!("{}", tell(&mount)),
            Ok(Some(s)) if s.ssi_signo == Signal::SIGUSR2 as u32 => {
                mount.record().unwrap_or_else(|e| tracing::warn!("the recording cannot be written: {e}"));
            }
            Ok(Some(s)) if s.ssi_signo == Signal::SIGHUP as u32 && !terminal.is_gone() => reload.reload(&mount),
            // A second signal: do not wait for the last user. The kernel ends the connection when this process exits.
            Ok(Some(_)) if unmounted => return Ok(()),
            Ok(Some(_)) => {
                mount.unmount()?;
                unmounted = true;
            }
            _ => {}
        }
    }
}
