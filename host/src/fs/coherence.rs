//! How long a guest may keep what it is told (`cache = "coherent"`): for as long as it likes, if it is told of
//! changes, else for as long as the other modes say. All decisions about it are here.

use super::change_queue::ChangeQueue;
use super::changes::ChangeSink;
use super::cover::Watch;
use super::inodes::{Held, Inode, Inodes, Key, Pin};
use super::leases::{Leases, Reading};
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
use tunnelfs_fuse_abi::changes::kind;

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
    /// Whether the guest need not ask to open files once it listens.
    by_number: AtomicBool,
    /// Whether it has not asked while it did not listen: another host has answered it before.
    was_by_number: AtomicBool,
    /// See [`Coherence::unheard`].
    unheard: AtomicBool,
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
        Coherence {
            inodes,
            descriptors,
            timeout,
            missing_timeout,
            budget,
            by_number: AtomicBool::new(false),
            was_by_number: AtomicBool::new(false),
            unheard: AtomicBool::new(false),
            listens: AtomicBool::new(false),
            running: RwLock::default(),
            failed: Mutex::new(false),
        }
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
    pub fn attributes(&self, inode: &Arc<Inode>, links: u32) -> Duration {
        // Without OPEN and OPENDIR, data and listings that are not watched are as good as the attributes are new.
        let asks_each_time = |by_number| if by_number { Duration::ZERO } else { self.timeout };
        let Some(guest) = self.listener() else { return asks_each_time(self.was_by_number.load(Relaxed)) };
        let by_number = self.by_number.load(Relaxed) && (inode.is_file() || inode.is_dir());
        let short = asks_each_time(by_number);
        if links > 1 && !inode.is_dir() {
            inode.cover.set_linked();
        }
        let watched = inode.cover.own().is_some() || !inode.is_dir() && inode.cover.by_parent();
        if !watched || guest.leases.is_late() || by_number && !self.may_lease(inode) {
            return short;
        }
        if !by_number || !inode.is_file() {
            return LASTING;
        }
        let (reading, tell) = guest.leases.covers(inode.id, || self.hold_for_lease(inode));
        if tell {
            guest.drop_part(inode.id, kind::CLEAN);
        }
        guest.make_room();
        match reading {
            Reading::Leased => return LASTING,
            Reading::Written => {}
            Reading::Uncovered => guest.drop_part(inode.id, kind::MODIFIED),
        }
        short
    }

    /// A lease keeps a descriptor: on another mount than the share's, that could not be unmounted then.
    fn may_lease(&self, inode: &Inode) -> bool {
        inode.is_dir() || self.inodes.is_of_share(inode)
    }

    /// A descriptor for a lease. A second open file: if it were the guest's own, the guest's locks would not end when it
    /// closes that.
    fn hold_for_lease(&self, inode: &Arc<Inode>) -> io::Result<Held> {
        self.inodes.hold_reading(inode, |pin| {
            let name = FdName::new(pin);
            sys::open_at(self.descriptors.as_fd(), name.as_c_str(), libc::O_RDONLY | libc::O_NONBLOCK, 0)
        })
    }

    /// The guest need not ask to open files once it listens, or must.
    pub fn set_by_number(&self, by_number: bool) {
        self.by_number.store(by_number && self.budget.is_some(), Relaxed);
        self.was_by_number.store(false, Relaxed);
    }

    /// Whether all that the guest reads without having opened it is known here.
    pub fn listens(&self) -> bool {
        self.listens.load(Acquire)
    }

    /// The guest reads a file that it has not asked to open: call it before the data is read.
    pub fn reads(&self, inode: &Arc<Inode>, pin: &Pin) {
        let Some(guest) = self.listener() else {
            self.was_by_number.store(self.budget.is_some(), Relaxed);
            return self.unheard();
        };
        if !self.may_lease(inode) || !guest.watches.reports(&inode.key, pin.as_fd()) {
            return guest.drop_part(inode.id, kind::MODIFIED);
        }
        let (reading, tell) = guest.leases.reads(inode.id, || self.hold_for_lease(inode));
        guest.make_room();
        if tell {
            guest.drop_part(inode.id, kind::EXPIRE);
        }
        if reading != Reading::Leased {
            guest.leases.wait_until_expired(inode.id);
        }
        if reading == Reading::Uncovered {
            // When the guest's kernel has the answer to this.
            guest.drop_part(inode.id, kind::MODIFIED);
        }
    }

    /// The guest has read or opened something before it listens: it may have data that no lease covers.
    fn unheard(&self) {
        if self.budget.is_some() && !self.unheard.load(Relaxed) {
            self.unheard.store(true, Release);
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
    pub fn opened(&self, inode: &Arc<Inode>, pin: &Pin, fh: u64) -> bool {
        let Some(guest) = self.listener() else {
            self.unheard();
            return false;
        };
        self.may_lease(inode)
            && guest.watches.reports(&inode.key, pin.as_fd())
            && guest.leases.opened(inode.id, fh, || self.hold_for_lease(inode))
    }

    /// The guest has closed a file.
    pub fn closed(&self, node: u64, fh: u64) {
        if let Some(guest) = self.listener() {
            guest.leases.closed(node, fh);
        }
    }

    /// The guest is about to write to a file, or to truncate it, itself.
    pub fn will_write(&self, node: u64) {
        match self.listener() {
            Some(guest) => guest.leases.will_write(node, self.by_number.load(Relaxed)),
            None => self.unheard(),
        }
    }

    /// The guest writes to a file that it has not asked to open, or `from_cache`: without a lease its kernel has to ask for
    /// the attributes, as data from the cache stays there.
    pub fn writes(&self, inode: &Arc<Inode>, pin: &Pin, from_cache: bool) {
        let Some(guest) = self.listener() else { return self.unheard() };
        if from_cache {
            self.reads(inode, pin);
        } else {
            guest.leases.written(inode.id);
        }
    }

    /// The guest has one more writer of a file, or, with -1, one less: after [`will_write`](Coherence::will_write).
    pub fn count_writer(&self, node: u64, change: i32) {
        if let Some(guest) = self.listener() {
            guest.leases.count_writer(node, change);
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

    /// The same of one inode, wherever its names are.
    pub fn tell_of(&self, kind: u32, inode: Key) {
        self.tell(&Happening { kind, node: Some(inode), ..Happening::default() });
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
        self.listens.store(true, SeqCst);
        if self.by_number.load(Relaxed) && self.unheard.swap(false, SeqCst) {
            listener.queue.overflow();
        }
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
        self.unheard.store(false, Release);
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
