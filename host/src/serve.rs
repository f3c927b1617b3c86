//! Serves the shared directory: settings, sandbox, file systems and daemon are put together here.

use crate::asked::Asked;
use crate::daemon::{Daemon, Guests};
use crate::fs::Passthrough;
use crate::fs_builder::FsBuilder;
use crate::listen;
use crate::reload::{self, Reload};
use crate::sandbox::{self, SharedDir};
use crate::server::Server;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use tunnelfs_settings::{Cache, Host, LockScope, Sandbox, Settings};
use vhost::vhost_user::Listener;

/// The part of the process's descriptors that the first guest may have: a half.
const FIRST_GUEST: u64 = 2;
/// The part that each other guest may have: a sixteenth.
const OTHER_GUESTS: u64 = 16;

/// How a host starts that is a program of its own.
#[derive(Debug, Default)]
pub struct Start {
    /// How many guests are served.
    pub guests: Guests,
    /// Take the socket's path from a host that listens there.
    pub replace: bool,
    /// A listening socket that a manager has left ([`crate::listener_from_fd`]).
    pub socket: Option<OwnedFd>,
    /// What is done on SIGHUP.
    pub reload: Option<Reload>,
}

/// Serves what `settings` share, as a part of a program that keeps its rights.
///
/// # Errors
/// An error that names what could not be opened, listened on or served.
pub fn serve(settings: &Settings, guests: Guests) -> io::Result<()> {
    let dir = SharedDir::unconfined(&settings.host)?;
    let daemon = Daemon::bind(settings)?;
    daemon.run(servers(FsBuilder::new(&settings.host, dir)?), guests)
}

/// Serves what `settings` share, as a program of its own, which first gives up what it does not need ([`sandbox`]).
/// The process must have a single thread.
///
/// # Errors
/// As [`serve`], or that the sandbox cannot be had.
pub fn serve_confined(settings: &Settings, start: Start) -> io::Result<()> {
    // Said before the log says that it is shared.
    SharedDir::unconfined(&settings.host)?;
    // Before anybody can see the socket, and take the host for one that is there.
    listen::handle_signals();
    reload::handle_signal()?;
    let inherited = start.socket.as_ref().map(AsRawFd::as_raw_fd);
    let listener = match start.socket {
        // SAFETY: it owns the descriptor from now on.
        Some(socket) => unsafe { Listener::from_raw_fd(socket.into_raw_fd()) },
        None => {
            let (listener, file) = listen::bind(&settings.transport.socket_path, start.replace)?;
            file.remove_at_exit();
            listener.into()
        }
    };
    let host = &settings.host;
    let how = format!("{:?}, sandbox {:?}, cache {:?}", settings.transport.kind, host.sandbox, host.cache);
    tracing::info!(
        "listening on {}, sharing {} ({}{})",
        place(settings, inherited),
        host.shared_dir.display(),
        how.to_lowercase(),
        if host.readonly { ", read-only" } else { "" },
    );
    let asked = Asked::new(settings)?;
    if let Some(warning) = unshared_mappings(host) {
        tracing::warn!("{warning}");
    }
    notify_ready();
    if settings.host.sandbox == Sandbox::Chroot {
        listen::fork_remover(listener.as_raw_fd())?;
    }
    let (listener, dir) = sandbox::enter(&settings.host, listener)?;
    if settings.host.sandbox != Sandbox::None {
        listen::disown();
    }
    let builder = FsBuilder::new(&settings.host, dir)?;
    sandbox::drop_privileges(&settings.host)?;
    let daemon = Daemon::new(settings, listener, None);
    if let Some(reload) = start.reload {
        reload.start(daemon.live())?;
    }
    asked.serve(daemon.live().figures().clone())?;
    daemon.run(servers(builder), start.guests)
}

/// Where guests connect, for the log.
fn place(settings: &Settings, inherited: Option<i32>) -> String {
    match inherited {
        Some(number) => format!("descriptor {number}"),
        None => settings.transport.socket_path.display().to_string(),
    }
}

/// Opens a server for each guest; the first one may have more descriptors.
fn servers(builder: FsBuilder) -> impl Fn() -> io::Result<Server<Passthrough>> {
    let first = AtomicBool::new(true);
    move || {
        let part = if first.swap(false, Ordering::Relaxed) { FIRST_GUEST } else { OTHER_GUESTS };
        builder.build(part).map(Server::new)
    }
}

/// Tells a service manager that guests may connect, as sd_notify(3) has it; before the sandbox hides its socket.
fn notify_ready() {
    if let (Some(path), Ok(socket)) = (std::env::var_os("NOTIFY_SOCKET"), UnixDatagram::unbound()) {
        if let Err(e) = socket.send_to(b"READY=1", &path) {
            tracing::warn!("NOTIFY_SOCKET={}: {e}", path.to_string_lossy());
        }
    }
}

/// Locks hold between guests and the host's programs, but mapped memory does not: a program that keeps shared data in it, under
/// such locks, would damage it.
fn unshared_mappings(host: &Host) -> Option<&'static str> {
    let refused = matches!(host.cache, Cache::Never | Cache::Metadata) && !host.allow_mmap;
    (host.locks == LockScope::Shared && !refused).then_some(
        "host.locks = \"shared\": what programs map is not shared between guests and the host, and a database in SQLite's \
         WAL mode loses rows when both write to it; with cache = \"never\" and allow_mmap = false they are refused",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_with_shared_locks_says_what_is_not_shared() {
        let told = |locks, cache, allow_mmap| unshared_mappings(&Host { locks, cache, allow_mmap, ..Host::default() });
        assert!(told(LockScope::Shared, Cache::Never, true).is_some_and(|text| text.contains("WAL")));
        assert!(told(LockScope::Shared, Cache::Auto, false).is_some());
        assert!(told(LockScope::Shared, Cache::Never, false).is_none());
        assert!(told(LockScope::Guest, Cache::Never, true).is_none());
    }
}
