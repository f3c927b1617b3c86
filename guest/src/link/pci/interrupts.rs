//! The bells of a device's queues, and word of the device's end.

use super::function::{Function, Window, Wiring, INTX_OFF};
use crate::Error;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{fence, AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use tunnelfs_ring::Eventfd;

/// The bells; the device must not interrupt any more when this is dropped.
pub struct Interrupts {
    bells: Arc<Vec<Bell>>,
    vectors: bool,
    alive: UnixStream,
    stop: Arc<OwnedFd>,
    watcher: Option<JoinHandle<()>>,
}

struct Bell {
    rings: OwnedFd,
    /// Whether somebody waits for it.
    asleep: AtomicBool,
}

impl Interrupts {
    /// Wires `count` queues up; `isr` is the device's interrupt status register.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new(function: &Function, count: usize, isr: *const u8) -> Result<Self, Error> {
        let (alive, life) = UnixStream::pair()?;
        let stop = Arc::new(Eventfd::new()?);
        let rings = (0..count).map(|_| Eventfd::new()).collect::<Result<Vec<_>, _>>()?;
        let (watched, line) = match &function.interrupts {
            Wiring::Uio(file) => {
                // A killed predecessor may have left it masked.
                function.config.command(0, INTX_OFF)?;
                let line = CacheLine { isr, config: function.config.clone(), file: file.clone() };
                (file.try_clone()?.into(), Some(line))
            }
            Wiring::Vfio(vectors) => {
                let request = Eventfd::new()?;
                vectors.route(&rings, &request)?;
                (request, None)
            }
        };
        let vectors = line.is_none();
        let bells = rings.into_iter().map(|rings| Bell { rings, asleep: AtomicBool::new(false) });
        let bells = Arc::new(bells.collect::<Vec<_>>());
        let watcher = Watcher { watched, line, bells: bells.clone(), stop: stop.clone(), life };
        let watcher = std::thread::Builder::new().name("interrupts".into()).spawn(move || watcher.run())?;
        Ok(Interrupts { bells, vectors, alive, stop, watcher: Some(watcher) })
    }

    /// The MSI-X vector of a virtqueue; none with a shared line.
    pub fn vector(&self, queue: usize) -> Option<u16> {
        self.vectors.then_some(queue as u16)
    }

    /// A queue's bell.
    pub fn bell(&self, queue: usize) -> BorrowedFd<'_> {
        self.bells[queue].rings.as_fd()
    }

    /// Hangs up when the device has gone.
    pub fn alive(&self) -> BorrowedFd<'_> {
        self.alive.as_fd()
    }

    /// Whether somebody waits for a bell.
    pub fn sleeps(&self, queue: usize, asleep: bool) {
        // The sleeper's fence follows: see `Link::sleeps`.
        self.bells[queue].asleep.store(asleep, Ordering::Relaxed);
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        Eventfd::signal(&*self.stop);
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
    }
}

/// The INTx line, which all queues share.
struct CacheLine {
    isr: *const u8,
    config: Window,
    file: Arc<File>,
}

// SAFETY: `isr` is a register that any thread may read; it stays mapped while the device is in use.
unsafe impl Send for CacheLine {}

/// Waits for the line, or where each queue has a vector of its own only for the device's end.
///
/// Why the line has a thread: reading the status register, which lowers the
/// line, also swallows what another queue has got since. So whoever reads it
/// must ring every sleeper afterwards, and only one may.
struct Watcher {
    watched: OwnedFd,
    line: Option<CacheLine>,
    bells: Arc<Vec<Bell>>,
    stop: Arc<OwnedFd>,
    life: UnixStream,
}

impl Watcher {
    fn run(self) {
        loop {
            let mut fds = [self.watched.as_fd(), self.stop.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) if fds[1].any() == Some(true) => return,
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(_) => break,
            }
            match &self.line {
                Some(line) if line.take().is_ok() => self.ring(),
                // The device has gone, or is wanted back.
                _ => break,
            }
        }
        let _ = self.life.shutdown(Shutdown::Both);
    }

    fn ring(&self) {
        // Pairs with the sleeper's fence: the status was read before its flag is.
        fence(Ordering::SeqCst);
        for bell in self.bells.iter().filter(|bell| bell.asleep.load(Ordering::Relaxed)) {
            Eventfd::signal(&bell.rings);
        }
        if let Some(line) = &self.line {
            line.unmask();
        }
    }
}

impl CacheLine {
    /// Takes an interrupt; fails when the driver has been unbound.
    fn take(&self) -> nix::Result<()> {
        match nix::unistd::read(&*self.file, &mut [0; 4]) {
            Ok(_) => {}
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(()),
            Err(e) => return Err(e),
        }
        // SAFETY: a mapped register.
        unsafe { self.isr.read_volatile() };
        Ok(())
    }

    /// The kernel masks the line with each interrupt.
    fn unmask(&self) {
        if let Err(e) = self.config.command(0, INTX_OFF) {
            tracing::warn!("the device's interrupt cannot be unmasked: {e}");
        }
    }
}
