//! Interrupts of a device: a call eventfd for each queue, and a descriptor that hangs up when the device is gone.

use super::function::{FileRegion, Function, IrqSource, INTX_OFF};
use super::registers::Registers;
use crate::error::Error;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{fence, AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use tunnelfs_ring::Eventfd;

/// The call eventfds and the interrupt thread. Must be dropped before the device is stopped, as the thread writes the
/// command register too.
pub struct Interrupts {
    calls: Arc<Vec<CallFd>>,
    vectors: bool,
    alive: UnixStream,
    stop: Arc<OwnedFd>,
    watcher: Option<JoinHandle<()>>,
}

struct CallFd {
    fd: OwnedFd,
    /// Whether a thread sleeps on it.
    asleep: AtomicBool,
}

impl Interrupts {
    /// Sets up the interrupts of `count` queues. `isr` is the device's interrupt status register.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Ring`] if the system refuses a descriptor or the thread.
    pub fn new(function: &Function, count: usize, isr: Registers) -> Result<Self, Error> {
        let (alive, life) = UnixStream::pair()?;
        let stop = Arc::new(Eventfd::new()?);
        let fds = (0..count).map(|_| Eventfd::new()).collect::<Result<Vec<_>, _>>()?;
        let (watched, line) = match &function.interrupts {
            IrqSource::Uio(file) => {
                // Unmask INTx: a guest that was killed may have left it masked.
                function.config.command(0, INTX_OFF)?;
                let line = IntxLine { isr, config: function.config.clone(), file: file.clone() };
                (file.try_clone()?.into(), Some(line))
            }
            IrqSource::Vfio(vectors) => {
                let request = Eventfd::new()?;
                vectors.route(&fds, &request)?;
                (request, None)
            }
        };
        let vectors = line.is_none();
        let calls = fds.into_iter().map(|fd| CallFd { fd, asleep: AtomicBool::new(false) });
        let calls = Arc::new(calls.collect::<Vec<_>>());
        let watcher = Watcher { watched, line, calls: calls.clone(), stop: stop.clone(), life };
        let watcher = tunnelfs_program::thread::spawn("interrupts", move || watcher.run())?;
        Ok(Interrupts { calls, vectors, alive, stop, watcher: Some(watcher) })
    }

    /// Returns the MSI-X vector of a virtqueue; `None` if all queues share the INTx line.
    pub fn vector(&self, queue: usize) -> Option<u16> {
        self.vectors.then_some(queue as u16)
    }

    /// Returns a queue's call eventfd.
    pub fn call_fd(&self, queue: usize) -> BorrowedFd<'_> {
        self.calls[queue].fd.as_fd()
    }

    /// Returns the descriptor that hangs up when the device is gone.
    pub fn hangup_fd(&self) -> BorrowedFd<'_> {
        self.alive.as_fd()
    }

    /// Sets whether a thread sleeps on a queue's call eventfd.
    pub fn set_waiting(&self, queue: usize, asleep: bool) {
        // The caller's full fence follows: see `Link::set_waiting`.
        self.calls[queue].asleep.store(asleep, Ordering::Relaxed);
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
struct IntxLine {
    isr: Registers,
    config: FileRegion,
    file: Arc<File>,
}

/// The interrupt thread. With INTx it waits for the shared line; with a vector per queue, only for the device's
/// removal.
///
/// Why INTx needs a thread: reading the status register lowers the line, and also clears the interrupts of other queues
/// since then. So only one thread may read it, and must then signal the call eventfd of every sleeping queue.
struct Watcher {
    /// The uio device, or the vfio eventfd for the device's removal.
    watched: OwnedFd,
    line: Option<IntxLine>,
    calls: Arc<Vec<CallFd>>,
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
                // The device is gone, or vfio wants it back.
                _ => break,
            }
        }
        let _ = self.life.shutdown(Shutdown::Both);
    }

    /// Signals the sleeping queues, and unmasks the line.
    fn ring(&self) {
        // Pairs with the sleeper's fence in `announce_sleep`: orders the read of the status before those of the flags.
        fence(Ordering::SeqCst);
        for call in self.calls.iter().filter(|call| call.asleep.load(Ordering::Relaxed)) {
            Eventfd::signal(&call.fd);
        }
        if let Some(line) = &self.line {
            line.unmask();
        }
    }
}

impl IntxLine {
    /// Takes an interrupt, and lowers the line. Fails if the driver has been unbound.
    fn take(&self) -> nix::Result<()> {
        match nix::unistd::read(&*self.file, &mut [0; 4]) {
            Ok(_) => {}
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(()),
            Err(e) => return Err(e),
        }
        self.isr.read::<u8>(0);
        Ok(())
    }

    /// Unmasks the line; the kernel masks it with each interrupt.
    fn unmask(&self) {
        if let Err(e) = self.config.command(0, INTX_OFF) {
            tracing::warn!("the device's interrupt cannot be unmasked: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::MmapOptions;
    use std::io::Write;

    /// The device, and with it all mappings but the watcher's own, may go first.
    #[test]
    fn the_watcher_keeps_the_register_page() {
        let page = tempfile::tempfile().unwrap();
        page.set_len(4096).unwrap();
        let isr = Registers::new(Arc::new(MmapOptions::new().map_raw(&page).unwrap()), 64, 1);
        let space = tempfile::tempfile().unwrap();
        space.set_len(256).unwrap();
        let config = FileRegion { file: Arc::new(space), offset: 0, bytes: 256 };
        let (line, raise) = nix::unistd::pipe().unwrap();
        let uio = IrqSource::Uio(Arc::new(File::from(line)));
        let function = Function { config, bars: Vec::new(), interrupts: uio };
        let interrupts = Interrupts::new(&function, 1, isr).unwrap();
        drop(function);
        interrupts.set_waiting(0, true);
        for _ in 0..3 {
            File::from(raise.try_clone().unwrap()).write_all(&[1, 0, 0, 0]).unwrap();
            let mut bell = [PollFd::new(interrupts.call_fd(0), PollFlags::POLLIN)];
            assert_eq!(poll(&mut bell, PollTimeout::from(20_000u16)).unwrap(), 1, "an interrupt rings the sleeper");
            tunnelfs_ring::Eventfd::drain(interrupts.call_fd(0));
        }
        drop(interrupts);
    }
}
