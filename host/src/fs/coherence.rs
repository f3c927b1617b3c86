//! How long a guest may keep what it is told (`cache = "coherent"`): for as long as it likes, if it is told of
//! changes, else for as long as the other modes say. All decisions about it are here.

use super::change_queue::ChangeQueue;
use super::changes::ChangeSink;
use super::cover::Watch;
use super::inodes::{Inode, Inodes, Pin};
use super::leases::Leases;
use super::listener::{receive_signals, Happening, Listener};
use super::mount_changes::MountChanges;
use super::peers;
use super::sys::{self, errno, FdName};
use super::watch::Watches;
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::{Mutex, RwLock};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::{mpsc, Arc};
use std::thread::JoinHandle;
use std::time::Duration;

/// Without a limit, nearly: what the guest is told of, it may keep.
pub const LASTING: Duration = Duration::from_secs(86_400);

/// What a coherent guest may have.
#[derive(Debug)]
pub struct Budget {
    /// Marks of directories and files.
    pub marks: usize,
    /// Leases, each of which has a descriptor.
    pub leases: usize,
    /// `/proc/self/mountinfo`, and the shared directory's path in it; `None`: mounts are not looked at.
    pub mounts: Option<(File, String)>,
}

struct Running {
    listener: Arc<Listener>,
    thread: JoinHandle<()>,
}

/// The decisions for one guest.
pub struct Coherence {
    inodes: Arc<Inodes>,
    /// `/proc/self/fd`.
    descriptors: OwnedFd,
    /// How long names and attributes are good, and a missing name is, without coherence.
    timeout: Duration,
    missing_timeout: Duration,
    /// `None`: another mode.
    budget: Option<Budget>,
    listens: AtomicBool,
    running: RwLock<Option<Running>>,
    /// Held while the guest begins to listen; whether that has failed.
    failed: Mutex<bool>,
}

impl Coherence {
    /// For a guest that does not listen yet.
    pub fn new(
        inodes: Arc<Inodes>,
        descriptors: OwnedFd,
        (timeout, missing_timeout): (Duration, Duration),
        budget: Option<Budget>,
    ) -> Coherence {
        let (listens, running, failed) = (AtomicBool::new(false), RwLock::default(), Mutex::new(false));
        Coherence { inodes, descriptors, timeout, missing_timeout, budget, listens, running, failed }
    }

    fn listener(&self) -> Option<Arc<Listener>> {
        if !self.listens.load(Acquire) {
            return None;
        }
        self.running.read().as_ref().map(|running| running.listener.clone())
    }

    /// Watches an inode, which `pin` has open: call it before that is looked at whose answer may last.
    pub fn watch(&self, inode: &Arc<Inode>, pin: BorrowedFd<'_>) -> Option<Arc<Watch>> {
        self.listener()?.watches.watch(inode, pin)
    }

    /// Whether what was found in a directory that is watched like this may be kept.
    pub fn lasts(&self, watch: Option<&Arc<Watch>>) -> bool {
        watch.is_some_and(|watch| watch.is_alive()) && self.listener().is_some_and(|guest| !guest.leases.is_late())
    }

    /// How long a name is good in a directory that is watched like this.
    pub fn entry(&self, parent: Option<&Arc<Watch>>) -> Duration {
        if self.lasts(parent) {
            LASTING
        } else {
            self.timeout
        }
    }

    /// How long it is good that a name is missing; zero: not at all.
    pub fn missing(&self, parent: Option<&Arc<Watch>>) -> Duration {
        if self.lasts(parent) {
            LASTING
        } else {
            self.missing_timeout
        }
    }

    /// How long an inode's attributes are good, with so many names.
    pub fn attributes(&self, inode: &Inode, links: u32) -> Duration {
        let Some(guest) = self.listener() else { return self.timeout };
        if links > 1 && !inode.is_dir() {
            inode.cover.set_linked();
        }
        let watched = inode.cover.own().is_some() || !inode.is_dir() && inode.cover.by_parent();
        if watched && !guest.leases.is_late() {
            LASTING
        } else {
            self.timeout
        }
    }

    /// An inode has been found, in a directory that is watched like this. Whether what is known of it must be looked
    /// at once more: it is watched on its own from now on.
    pub fn found(&self, inode: &Arc<Inode>, links: u32, parent: Option<Arc<Watch>>) -> bool {
        let Some(guest) = self.listener() else { return false };
        inode.cover.found_in(parent);
        if links > 1 && !inode.is_dir() {
            inode.cover.set_linked();
        }
        let alone = inode.is_dir() || inode.cover.is_linked();
        if !alone || inode.cover.own().is_some() {
            return false;
        }
        self.inodes.pin(inode).is_ok_and(|pin| guest.watches.watch(inode, pin.as_fd()).is_some())
    }

    /// The guest has a file open for reading: whether it may keep the data that it has.
    pub fn opened(&self, inode: &Inode, pin: &Pin, fh: u64) -> bool {
        let Some(guest) = self.listener() else { return false };
        let name = FdName::new(pin.as_fd());
        let open = || sys::open_at(self.descriptors.as_fd(), name.as_c_str(), libc::O_RDONLY | libc::O_NONBLOCK, 0);
        guest.watches.reports(&inode.key, pin.as_fd()) && guest.leases.opened(inode.id, fh, open)
    }

    /// The guest has closed a file.
    pub fn closed(&self, node: u64, fh: u64) {
        if let Some(guest) = self.listener() {
            guest.leases.closed(node, fh);
        }
    }

    /// The guest is about to write to a file, or to truncate it, itself.
    pub fn will_write(&self, node: u64) {
        if let Some(guest) = self.listener() {
            guest.leases.give_up(node);
        }
    }

    /// The guest has dropped a file's data, as it was told to.
    pub fn dropped(&self, node: u64) {
        if let Some(guest) = self.listener() {
            guest.leases.dropped(node);
        }
    }

    /// The guest has forgotten an inode.
    pub fn forgotten(&self, inode: &Arc<Inode>) {
        if let Some(guest) = self.listener() {
            guest.watches.forget(inode);
            guest.leases.forget(inode.id);
        }
    }

    /// Whether other guests of this process are to be told of what this one does.
    pub fn has_peers(&self) -> bool {
        peers::are_there(self.listens.load(Acquire))
    }

    /// Tells the other guests of this process what this one has done.
    pub fn tell(&self, what: &Happening<'_>) {
        if self.has_peers() {
            peers::tell(self.listener().as_ref(), what);
        }
    }

    /// Gives changes to `sink`: the guest listens from the first call on.
    ///
    /// # Errors
    /// `ENOSYS`: changes cannot be seen; `EINTR`: interrupted, or the guest has gone.
    pub fn changes(&self, sink: &mut ChangeSink<'_>) -> io::Result<()> {
        let guest = match self.listener() {
            Some(guest) => guest,
            None => self.begin()?,
        };
        guest.queue.wait(sink)
    }

    fn begin(&self) -> io::Result<Arc<Listener>> {
        let budget = self.budget.as_ref().ok_or_else(|| errno(libc::ENOSYS))?;
        let mut failed = self.failed.lock();
        if let Some(guest) = self.listener() {
            return Ok(guest);
        }
        if *failed {
            return Err(errno(libc::ENOSYS));
        }
        let running = self.start(budget).map_err(|e| {
            *failed = true;
            tracing::warn!("cache = \"coherent\" cannot be had, going on as with \"auto\": watching for changes: {e}");
            errno(libc::ENOSYS)
        })?;
        let listener = running.listener.clone();
        *self.running.write() = Some(running);
        peers::add(&listener);
        self.listens.store(true, Release);
        Ok(listener)
    }

    fn start(&self, budget: &Budget) -> io::Result<Running> {
        let queue = Arc::new(ChangeQueue::new()?);
        let watches = Watches::new(self.inodes.clone(), queue.clone(), self.descriptors.as_fd(), budget.marks)?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        let mounts = budget.mounts.as_ref().and_then(|(file, under)| self.mounts(file, under));
        let (said, ready) = mpsc::channel();
        let (give, given) = mpsc::channel::<Arc<Listener>>();
        let thread = tunnelfs_program::thread::spawn("watch", move || {
            let signals = match receive_signals() {
                Ok(signals) => signals,
                Err(e) => return drop(said.send(Err(e))),
            };
            let _ = said.send(Ok(nix::unistd::gettid().as_raw()));
            if let Ok(listener) = given.recv() {
                listener.run(&signals, mounts);
            }
        })?;
        let id = ready.recv().map_err(|_| errno(libc::EIO))??;
        let leases = Leases::new(budget.leases, id);
        let listener = Arc::new(Listener::new(self.inodes.clone(), queue, watches, leases, stop));
        let _ = give.send(listener.clone());
        Ok(Running { listener, thread })
    }

    /// Mounts are looked at by a file of one's own: each reader is told once.
    fn mounts(&self, file: &File, under: &str) -> Option<MountChanges> {
        let own = sys::open_at(self.descriptors.as_fd(), FdName::new(file.as_fd()).as_c_str(), libc::O_RDONLY, 0);
        own.and_then(|own| MountChanges::new(own.into(), under))
            .inspect_err(|e| tracing::warn!("mounts below the shared directory are not seen when they come: {e}"))
            .ok()
    }

    /// Whether the guest listens.
    #[cfg(test)]
    pub fn listens(&self) -> bool {
        self.listener().is_some()
    }

    /// Marks at present.
    #[cfg(test)]
    pub fn marks(&self) -> usize {
        self.listener().map_or(0, |guest| guest.watches.len())
    }

    /// Leases at present.
    #[cfg(test)]
    pub fn leases(&self) -> usize {
        self.listener().map_or(0, |guest| guest.leases.len())
    }

    /// Whether the guest owes an answer.
    #[cfg(test)]
    pub fn is_late(&self) -> bool {
        self.listener().is_some_and(|guest| guest.leases.is_late())
    }

    /// Events as the kernel writes them.
    #[cfg(test)]
    pub fn on_events(&self, bytes: &[u8]) {
        self.listener().unwrap().on_events(bytes);
    }

    /// The guest has gone: its marks and leases end.
    pub fn clear(&self) {
        let mut failed = self.failed.lock();
        self.listens.store(false, Release);
        *failed = false;
        let Some(Running { listener, thread }) = self.running.write().take() else { return };
        peers::remove(&listener);
        listener.queue.close();
        let _ = listener.stop.write(1);
        let _ = thread.join();
        listener.watches.end_all();
        listener.leases.clear();
    }
}

impl Drop for Coherence {
    fn drop(&mut self) {
        self.clear();
    }
}
