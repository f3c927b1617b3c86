//! Listens, and serves one guest after the other. Whatever one guest does, the next one is served.

use crate::backend::Backend;
use crate::fs::FileSystem;
use crate::handler::Handler;
use crate::memory;
use crate::sandbox;
use crate::server::Server;
use crate::share::{Share, View};
use crate::transport::socket;
use parking_lot::Mutex;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_settings::{Kind, Settings};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use virtiofsd::oslib::ScopedUmask;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Only the owner may connect: whoever can is a guest.
const SOCKET_UMASK: libc::mode_t = 0o177;
/// Pause before the next try when the system refuses descriptors, threads or connections.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves what `settings` share until the process is told to stop (or, with
/// `once`, until the first guest leaves), as a part of a program that keeps its rights.
///
/// # Errors
/// An error that names what could not be opened, listened on or served.
pub fn serve(settings: &Settings, once: bool) -> io::Result<()> {
    let listener = listen(settings)?;
    open_and_serve(settings, once, listener, View::whole(&settings.host)?, || Ok(()))
}

/// The same as a program of its own, that first gives up what it does not need
/// ([`sandbox`]), on a socket that a manager has left it, if it did ([`inherited`]). The process must have a single thread.
///
/// # Errors
/// As [`serve`], or that the sandbox cannot be had.
pub fn serve_confined(settings: &Settings, once: bool, socket: Option<OwnedFd>) -> io::Result<()> {
    let listener = match socket {
        // SAFETY: it owns the descriptor from now on.
        Some(socket) => unsafe { Listener::from_raw_fd(socket.into_raw_fd()) },
        None => listen(settings)?,
    };
    tell_ready();
    let (listener, view) = sandbox::enter(&settings.host, listener)?;
    open_and_serve(settings, once, listener, view, || sandbox::confine(&settings.host))
}

fn open_and_serve(
    settings: &Settings,
    once: bool,
    listener: Listener,
    view: View,
    confine: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let share = Share::new(&settings.host, view)?;
    confine()?;
    serve_fs(settings, once, listener, share.file_system(1)?)
}

fn serve_fs<F: FileSystem>(settings: &Settings, once: bool, listener: Listener, fs: F) -> io::Result<()> {
    let server = Arc::new(Server::new(fs));
    match settings.transport.kind {
        Kind::Socket => serve_socket(settings, once, listener, &server),
        Kind::Ring | Kind::Virtqueue => serve_vhost_user(settings, once, listener, &server),
    }
}

/// The listening UNIX socket with this number, which this process has been started with (virtiofsd's `--fd`).
///
/// # Errors
/// When it is none.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    use nix::sys::socket::{getsockname, getsockopt, sockopt::AcceptConn, UnixAddr};
    let told = |e: nix::Error| io::Error::other(format!("--fd {number}: {e}; it must be a listening UNIX socket"));
    // SAFETY: only looked at, until it is known to be one.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    if number < 0 || !getsockopt(&borrowed, AcceptConn).map_err(told)? {
        return Err(told(nix::Error::ENOTSOCK));
    }
    getsockname::<UnixAddr>(number).map_err(told)?;
    nix::fcntl::fcntl(borrowed, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC)).map_err(told)?;
    // SAFETY: it was made for this process by who started it, and nobody else here knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn listen(settings: &Settings) -> io::Result<Listener> {
    let path = &settings.transport.socket_path;
    let _umask = ScopedUmask::new(SOCKET_UMASK);
    Listener::new(path, true).map_err(|e| io::Error::other(format!("cannot listen on {}: {e}", path.display())))
}

/// Tells a service manager that guests may connect, as sd_notify(3) has it; before the sandbox hides its socket.
fn tell_ready() {
    if let (Some(path), Ok(socket)) = (std::env::var_os("NOTIFY_SOCKET"), UnixDatagram::unbound()) {
        if let Err(e) = socket.send_to(b"READY=1", &path) {
            tracing::warn!("NOTIFY_SOCKET={}: {e}", path.to_string_lossy());
        }
    }
}

fn serve_vhost_user<H>(settings: &Settings, once: bool, mut listener: Listener, server: &Arc<H>) -> io::Result<()>
where
    H: Handler,
{
    memory::survive_loss()?;
    serve_guest(settings, server, &mut listener)?;
    if once {
        return Ok(());
    }
    loop {
        if let Err(e) = serve_guest(settings, server, &mut listener) {
            tracing::warn!("waiting for the next guest: {e}");
            std::thread::sleep(PAUSE);
        }
    }
}

/// Waits for a guest, and serves it until it leaves.
fn serve_guest<H>(settings: &Settings, server: &Arc<H>, listener: &mut Listener) -> io::Result<()>
where
    H: Handler,
{
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let backend = Arc::new(Backend::new(settings, server.clone(), memory.clone())?);
    let mut daemon = VhostUserDaemon::new("tunnelfs".into(), backend.clone(), memory).map_err(other)?;
    let started = daemon.start(listener).map_err(other);
    if started.is_ok() {
        if let Err(e) = daemon.wait() {
            tracing::info!("guest's connection: {e}");
        }
    }
    backend.end(daemon);
    server.reset();
    started
}

fn other(e: impl std::fmt::Display) -> io::Error {
    io::Error::other(e.to_string())
}

fn serve_socket<H>(settings: &Settings, once: bool, listener: Listener, server: &Arc<H>) -> io::Result<()>
where
    H: Handler,
{
    // SAFETY: `listener` lives to the end, and takes the socket's name away then.
    let borrowed = unsafe { BorrowedFd::borrow_raw(listener.as_raw_fd()) };
    let accepting = UnixListener::from(borrowed.try_clone_to_owned()?);
    // One connection a queue, and the control queue's.
    let of_one_guest = settings.transport.queue_count() + 1;
    let most = if once { of_one_guest } else { 4 * of_one_guest };
    let (mut threads, connections) = (Vec::new(), Arc::new(Mutex::new(0)));
    for stream in accepting.incoming() {
        threads.retain(|t: &std::thread::JoinHandle<()>| once || !t.is_finished());
        let started = stream.and_then(|stream| {
            if threads.len() == most {
                return Err(io::Error::other(format!("more than {most} connections: refused")));
            }
            serve_stream(stream, server, settings, &connections)
        });
        match started {
            Ok(thread) => threads.push(thread),
            Err(e) => {
                tracing::warn!("a guest's connection: {e}");
                std::thread::sleep(PAUSE);
            }
        }
        if once && threads.len() == most {
            break;
        }
    }
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

/// Serves a connection on a thread of its own; the last one to end forgets what was open.
fn serve_stream<H>(
    stream: UnixStream,
    server: &Arc<H>,
    settings: &Settings,
    connections: &Arc<Mutex<usize>>,
) -> io::Result<std::thread::JoinHandle<()>>
where
    H: Handler,
{
    let (server, wait, connections) = (server.clone(), settings.wait, connections.clone());
    *connections.lock() += 1;
    let counted = connections.clone();
    let thread = std::thread::Builder::new().name("connection".into()).spawn(move || {
        if let Err(e) = socket::serve(stream, &*server, wait) {
            tracing::info!("guest's socket: {e}");
        }
        let mut count = connections.lock();
        *count -= 1;
        if *count == 0 {
            server.reset();
        }
    });
    thread.inspect_err(|_| *counted.lock() -= 1)
}
