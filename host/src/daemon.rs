//! Listens, and serves guests one beside the other: each has a device, threads and a handler of its own. Whatever one
//! guest does, the others are served.

use crate::admission::{Semaphore, MAX_GUESTS, RETRY_PAUSE};
use crate::backend::Backend;
use crate::handler::Handler;
use crate::listen::{self, SocketFile};
use crate::live::Live;
use crate::memory;
use crate::stop::Stopper;
use crate::streams;
use crate::vring::Vring;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;
use std::thread::JoinHandle;
use tunnelfs_settings::{Settings, TransportKind};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// How many guests a daemon serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Guests {
    /// One; it returns when that has left.
    One,
    /// All that come, until the process ends or [`Stopper::stop`].
    #[default]
    Forever,
}

/// A listening socket, and its file if this process is to remove it.
type Socket = (Listener, Option<SocketFile>);

/// Serves guests that connect to a socket, whatever handles their requests:
///
/// ```no_run
/// use tunnelfs_host::{fs::FileSystem, Daemon, Guests, Server};
///
/// /// Answers each operation by `ENOSYS`.
/// struct Empty;
/// impl FileSystem for Empty {}
///
/// let mut settings = tunnelfs_settings::Settings::default();
/// settings.transport.socket_path = "/run/empty.sock".into();
/// Daemon::bind(&settings)?.run(|| Ok(Server::new(Empty)), Guests::Forever)?;
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Daemon {
    settings: Settings,
    live: Live,
    socket: Socket,
    stopping: Arc<AtomicBool>,
}

impl Daemon {
    /// Listens on `transport.socket_path`. The socket's file is removed when the daemon ends.
    ///
    /// # Errors
    /// Something else is at the path, a host listens there, or the system refuses.
    pub fn bind(settings: &Settings) -> io::Result<Daemon> {
        let (listener, file) = listen::bind(&settings.transport.socket_path, false)?;
        Ok(Daemon::new(settings, listener.into(), Some(file)))
    }

    /// Uses a listening socket ([`listener_from_fd`]).
    pub fn from_fd(settings: &Settings, socket: OwnedFd) -> Daemon {
        // SAFETY: the listener owns the descriptor from now on.
        Daemon::new(settings, unsafe { Listener::from_raw_fd(socket.into_raw_fd()) }, None)
    }

    pub(crate) fn new(settings: &Settings, listener: Listener, file: Option<SocketFile>) -> Daemon {
        Daemon {
            settings: settings.clone(),
            live: Live::new(settings),
            socket: (listener, file),
            stopping: Arc::default(),
        }
    }

    /// What may be changed while it serves.
    pub fn live(&self) -> Live {
        self.live.clone()
    }

    /// Returns what stops this daemon from another thread.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn stopper(&self) -> io::Result<Stopper> {
        // SAFETY: open as long as `self` is borrowed.
        let listener = unsafe { BorrowedFd::borrow_raw(self.socket.0.as_raw_fd()) };
        Stopper::new(self.stopping.clone(), listener)
    }

    /// Serves guests: `open` makes the handler of each one. It is called once before the first guest comes. Returns when
    /// the one guest has left, or after [`Stopper::stop`].
    ///
    /// # Errors
    /// That of the first `open`, or the listening socket's at the start.
    pub fn run<H, O>(self, open: O, guests: Guests) -> io::Result<()>
    where
        H: Handler,
        O: Fn() -> io::Result<H> + Send + Sync + 'static,
    {
        let (settings, first, stopper) = (&self.settings, open()?, self.stopper()?);
        match settings.transport.kind {
            TransportKind::Socket => {
                streams::serve(self.live, guests == Guests::One, self.socket, stopper, (first, open))
            }
            TransportKind::Ring | TransportKind::Virtqueue => {
                serve_vhost_user((settings, &self.live), guests, self.socket, stopper, (first, open))
            }
        }
    }
}

/// The listening UNIX socket with this number, which this process has been started with (virtiofsd's `--fd`).
///
/// # Errors
/// When it is none.
pub fn listener_from_fd(number: RawFd) -> io::Result<OwnedFd> {
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

/// Another descriptor of the listening socket, to accept what is refused.
fn accepting(listener: &Listener) -> io::Result<UnixListener> {
    // SAFETY: open as long as `listener` is borrowed.
    Ok(unsafe { BorrowedFd::borrow_raw(listener.as_raw_fd()) }.try_clone_to_owned()?.into())
}

fn serve_vhost_user<H: Handler>(
    config: (&Settings, &Live),
    guests: Guests,
    (mut listener, file): Socket,
    stopper: Stopper,
    (first, open): (H, impl Fn() -> io::Result<H>),
) -> io::Result<()> {
    memory::install_sigbus_handler()?;
    let (permits, mut threads) = (Semaphore::new(MAX_GUESTS), Vec::<JoinHandle<()>>::new());
    let mut next = Some(Guest::new(config, first)?);
    let mut logged = String::new();
    while !stopper.is_stopping() {
        let started = next.take().map_or_else(|| open().and_then(|handler| Guest::new(config, handler)), Ok);
        let guest = match started.and_then(|guest| guest.accept(&mut listener)) {
            Ok(guest) => guest,
            Err(_) if stopper.is_stopping() => break,
            Err(e) => {
                // Not ten times a second.
                let told = e.to_string();
                if told != logged {
                    tracing::warn!("waiting for the next guest: {told}; trying again");
                    logged = told;
                }
                std::thread::sleep(RETRY_PAUSE);
                continue;
            }
        };
        logged.clear();
        let (permit, backend) = (permits.try_acquire(), guest.backend.clone());
        let thread = tunnelfs_program::thread::spawn("guest", move || {
            let _permit = permit;
            guest.serve();
        });
        if stopper.is_stopping() {
            stopper.end_connections()?;
        }
        match thread {
            // One that only looks whether somebody listens is no guest.
            Ok(thread) if guests == Guests::One && backend.wait_for_front_end() => {
                // The next one is refused at once.
                drop((listener, file, stopper));
                let _ = thread.join();
                return Ok(());
            }
            Ok(thread) => threads.push(thread),
            Err(e) => tracing::warn!("a guest is refused: {e}"),
        }
        threads.retain(|thread| !thread.is_finished());
        refuse_beyond(&permits, &listener, &stopper);
    }
    stopper.end_connections()?;
    threads.into_iter().for_each(|thread| drop(thread.join()));
    Ok(())
}

/// Closes connections as long as there are as many guests as there may be.
fn refuse_beyond(permits: &Semaphore, listener: &Listener, stopper: &Stopper) {
    while permits.try_acquire().is_none() && !stopper.is_stopping() {
        match accepting(listener).and_then(|listener| refuse_next(&listener)) {
            Ok(()) => {}
            Err(_) if stopper.is_stopping() => {}
            Err(e) => {
                tracing::warn!("a guest cannot be refused: {e}");
                std::thread::sleep(RETRY_PAUSE);
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
    fn new((settings, live): (&Settings, &Live), handler: H) -> io::Result<Self> {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let backend = Arc::new(Backend::new(settings, live, memory.clone())?);
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
            return Err(match e {
                vhost_user_backend::Error::StartDaemon(e) => tunnelfs_program::thread::refused("vhost-user", &e),
                e => other(e),
            });
        }
        Ok(self)
    }

    /// Serves until the guest leaves.
    fn serve(mut self) {
        let ended = self.daemon.wait();
        // One that only looks whether somebody listens is no guest.
        if let Some(number) = self.backend.gone() {
            match ended.as_ref().err().and_then(remedy) {
                None => tracing::info!("guest {number} has gone"),
                Some(remedy) => {
                    let why = ended.as_ref().err().map_or_else(String::new, ToString::to_string);
                    tracing::warn!("guest {number} is refused: {why}: {remedy}");
                }
            }
        }
        self.backend.end(self.daemon);
    }
}

/// What may be done about a front end that this back end cannot serve. `None`: it has only closed the connection.
fn remedy(e: &vhost_user_backend::Error) -> Option<&'static str> {
    use vhost::vhost_user::Error as Protocol;
    use vhost_user_backend::Error;
    match e {
        Error::HandleRequest(Protocol::Disconnected | Protocol::SocketBroken(_) | Protocol::SocketError(_)) => None,
        Error::HandleRequest(Protocol::ReqHandlerError(_) | Protocol::InvalidParam | Protocol::IncorrectFds) => Some(
            "a VM's memory must be shared (-object memory-backend-memfd,id=mem,size=...,share=on -numa node,memdev=mem), \
             and have at most transport.queues request queues",
        ),
        Error::HandleRequest(_) => Some("it does not speak vhost-user as this host does"),
        _ => None,
    }
}

fn other(e: impl std::fmt::Display) -> io::Error {
    io::Error::other(e.to_string())
}
