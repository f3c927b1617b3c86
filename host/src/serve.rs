//! Listens, and serves guests: each has a device, threads and a file system of its own. Whatever one guest does, the
//! others are served.

use crate::backend::Backend;
use crate::handler::Handler;
use crate::listen::{self, SocketFile};
use crate::memory;
use crate::sandbox;
use crate::server::Server;
use crate::share::{Share, View};
use crate::streams;
use crate::vring::Vring;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_settings::{Kind, Sandbox, Settings};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Guests at a time. One more is refused: its connection is closed, and both sides tell.
pub const MAX_GUESTS: usize = 64;
/// The part of the process's descriptors that the first guest may have, and each other one: a half, a sixteenth.
const FIRST_GUEST: u64 = 2;
const OTHER_GUESTS: u64 = 16;
/// Pause before the next try when the system refuses descriptors, threads or connections.
pub const PAUSE: Duration = Duration::from_millis(100);

/// How a host of its own starts.
#[derive(Debug, Default)]
pub struct Start {
    /// Serve one guest, then return.
    pub once: bool,
    /// Take the socket's path from a host that listens there.
    pub replace: bool,
    /// A listening socket that a manager has left ([`inherited`]).
    pub socket: Option<OwnedFd>,
}

/// Serves what `settings` share until the process is told to stop (or, with
/// `once`, until the first guest leaves), as a part of a program that keeps its rights.
///
/// # Errors
/// An error that names what could not be opened, listened on or served.
pub fn serve(settings: &Settings, once: bool) -> io::Result<()> {
    let view = View::whole(&settings.host)?;
    let (listener, file) = listen::bind(&settings.transport.socket_path, false)?;
    open_and_serve(settings, once, (listener.into(), Some(file)), view, || Ok(()))
}

/// The same as a program of its own, that first gives up what it does not need
/// ([`sandbox`]). The process must have a single thread.
///
/// # Errors
/// As [`serve`], or that the sandbox cannot be had.
pub fn serve_confined(settings: &Settings, start: Start) -> io::Result<()> {
    // Before anybody can see the socket, and take the host for one that is there.
    listen::handle_signals();
    let listener = match start.socket {
        // SAFETY: it owns the descriptor from now on.
        Some(socket) => unsafe { Listener::from_raw_fd(socket.into_raw_fd()) },
        None => {
            let (listener, file) = listen::bind(&settings.transport.socket_path, start.replace)?;
            file.remove_at_exit();
            listener.into()
        }
    };
    tell_ready();
    if settings.host.sandbox == Sandbox::Chroot {
        listen::fork_remover(listener.as_raw_fd())?;
    }
    let (listener, view) = sandbox::enter(&settings.host, listener)?;
    if settings.host.sandbox != Sandbox::None {
        listen::disown();
    }
    open_and_serve(settings, start.once, (listener, None), view, || sandbox::confine(&settings.host))
}

/// A listening socket, and its file if this process is to remove it.
type Socket = (Listener, Option<SocketFile>);

fn open_and_serve(
    settings: &Settings,
    once: bool,
    socket: Socket,
    view: View,
    confine: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let share = Share::new(&settings.host, view)?;
    confine()?;
    let first = Server::new(share.file_system(FIRST_GUEST)?);
    serve_with(settings, once, socket, first, move || Ok(Server::new(share.file_system(OTHER_GUESTS)?)))
}

/// Serves guests: `first` the first one; `open` makes what serves each other one, in the sandbox.
fn serve_with<H: Handler>(
    settings: &Settings,
    once: bool,
    (listener, file): Socket,
    first: H,
    open: impl Fn() -> io::Result<H> + Send + Sync + 'static,
) -> io::Result<()> {
    match settings.transport.kind {
        Kind::Socket => streams::serve(settings, once, (listener, file), first, open),
        Kind::Ring | Kind::Virtqueue => serve_vhost_user(settings, once, (listener, file), first, open),
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

/// Tells a service manager that guests may connect, as sd_notify(3) has it; before the sandbox hides its socket.
fn tell_ready() {
    if let (Some(path), Ok(socket)) = (std::env::var_os("NOTIFY_SOCKET"), UnixDatagram::unbound()) {
        if let Err(e) = socket.send_to(b"READY=1", &path) {
            tracing::warn!("NOTIFY_SOCKET={}: {e}", path.to_string_lossy());
        }
    }
}

/// How many are there, of so many at the most.
#[derive(Clone)]
pub struct Guests {
    count: Arc<AtomicUsize>,
    most: usize,
}

/// One guest's place.
pub struct Seat(Arc<AtomicUsize>);

impl Guests {
    pub fn new(most: usize) -> Self {
        Guests { count: Arc::default(), most }
    }

    /// A place for one more, if there is one.
    pub fn admit(&self) -> Option<Seat> {
        let more = |count| (count < self.most).then_some(count + 1);
        let admitted = self.count.fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        admitted.ok().map(|_| Seat(self.count.clone()))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Another descriptor of the listening socket, to accept what is refused.
fn accepting(listener: &Listener) -> io::Result<UnixListener> {
    // SAFETY: open as long as `listener` is borrowed.
    Ok(unsafe { BorrowedFd::borrow_raw(listener.as_raw_fd()) }.try_clone_to_owned()?.into())
}

fn serve_vhost_user<H: Handler>(
    settings: &Settings,
    once: bool,
    (mut listener, file): Socket,
    first: H,
    open: impl Fn() -> io::Result<H> + Send + Sync + 'static,
) -> io::Result<()> {
    memory::survive_loss()?;
    let guests = Guests::new(MAX_GUESTS);
    let mut next = Some(Guest::new(settings, first)?);
    loop {
        let started = next.take().map_or_else(|| open().and_then(|handler| Guest::new(settings, handler)), Ok);
        let guest = match started.and_then(|guest| guest.accept(&mut listener)) {
            Ok(guest) => guest,
            Err(e) => {
                tracing::warn!("waiting for the next guest: {e}");
                std::thread::sleep(PAUSE);
                continue;
            }
        };
        let (seat, backend) = (guests.admit(), guest.backend.clone());
        let thread = std::thread::Builder::new().name("guest".into()).spawn(move || {
            let _seat = seat;
            guest.serve();
        });
        match thread {
            // One that only looks whether somebody listens is no guest.
            Ok(thread) if once && backend.meet() => {
                // The next one is refused at once.
                drop((listener, file));
                let _ = thread.join();
                return Ok(());
            }
            Ok(_) => {}
            Err(e) => tracing::warn!("a guest is refused: {e}"),
        }
        refuse_beyond(&guests, &listener);
    }
}

/// Closes connections as long as there are as many guests as there may be.
fn refuse_beyond(guests: &Guests, listener: &Listener) {
    while guests.admit().is_none() {
        match accepting(listener).and_then(|listener| refuse_next(&listener)) {
            Ok(()) => {}
            Err(e) => {
                tracing::warn!("a guest cannot be refused: {e}");
                std::thread::sleep(PAUSE);
            }
        }
    }
}

fn refuse_next(listener: &UnixListener) -> io::Result<()> {
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    if poll(&mut fds, PollTimeout::from(200u8))? > 0 {
        drop(listener.accept()?);
        tracing::warn!("a guest is refused: {MAX_GUESTS} are there");
    }
    Ok(())
}

/// One guest over vhost-user.
struct Guest<H: Handler> {
    backend: Arc<Backend<H>>,
    daemon: VhostUserDaemon<Arc<Backend<H>>>,
}

impl<H: Handler> Guest<H> {
    /// A device for the next guest, with its threads.
    fn new(settings: &Settings, handler: H) -> io::Result<Self> {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let backend = Arc::new(Backend::new(settings, memory.clone())?);
        let (daemon, vrings) =
            Vring::collect(|| VhostUserDaemon::new("vhost-user".into(), backend.clone(), memory).map_err(other));
        let guest = Guest { daemon: daemon?, backend };
        if let Err(e) = guest.backend.start(handler, vrings) {
            guest.backend.end(guest.daemon);
            return Err(e);
        }
        Ok(guest)
    }

    /// Waits for the guest.
    fn accept(mut self, listener: &mut Listener) -> io::Result<Self> {
        if let Err(e) = self.daemon.start(listener) {
            self.backend.end(self.daemon);
            return Err(other(e));
        }
        Ok(self)
    }

    /// Serves until the guest leaves.
    fn serve(mut self) {
        if let Err(e) = self.daemon.wait() {
            tracing::info!("guest's connection: {e}");
        }
        self.backend.gone();
        self.backend.end(self.daemon);
    }
}

fn other(e: impl std::fmt::Display) -> io::Error {
    io::Error::other(e.to_string())
}
