//! A virtqueue's state as the vhost-user crates keep it, with doorbells that
//! no front end can make us wait on for ever: only eventfds are accepted, the
//! kick is read without waiting, and no lock is held while the call is written.

use crate::pool::Budget;
use crate::transport::virtqueue::Memory;
use parking_lot::Mutex;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock};
use std::time::Duration;
use tunnelfs_ring::Eventfd;
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error, QueueT};

/// Largest virtqueue that is accepted, entries.
pub const MAX_QUEUE_SIZE: usize = 1024;
/// How long a front end that stops a queue waits for the requests under way, at the most.
const DRAINING: Duration = Duration::from_secs(5);

/// One virtqueue of a guest.
#[derive(Clone)]
pub struct Vring {
    state: VringMutex<Memory>,
    call: Arc<Mutex<Option<Arc<OwnedFd>>>>,
    /// Calls that a thread may still be writing to.
    calls: Arc<Mutex<Vec<Arc<OwnedFd>>>>,
    /// Whether the driver has the queue running; held while it is served.
    running: Arc<Mutex<bool>>,
    /// How often it has been stopped.
    stops: Arc<AtomicU32>,
    /// How many drivers the queue has had.
    drivers: Arc<AtomicU32>,
    /// Its requests that the pool has.
    pub handed_over: Budget,
}

impl Vring {
    /// Takes the rings off all calls, so that whoever waits in writing one goes on: a guest that has filled a call's
    /// counter, and made it blocking again behind our back, holds up no more than its own thread.
    pub fn release(&self) {
        for call in self.calls.lock().iter() {
            let _ = read_now(call.as_raw_fd());
        }
    }

    /// Serves the queue, unless its driver has stopped it: that is answered only after what is returned here has been
    /// dropped, and then the guest's memory may be anything.
    pub fn serving(&self) -> Option<parking_lot::MutexGuard<'_, bool>> {
        Some(self.running.lock()).filter(|running| **running)
    }

    /// How often the queue has been stopped so far.
    pub fn stops(&self) -> u32 {
        self.stops.load(Ordering::Acquire)
    }

    /// The number of the present driver: one that goes on after a pause of its VM is still the same.
    pub fn driver(&self) -> u32 {
        self.drivers.load(Ordering::Acquire)
    }

    /// Before a stop is answered, what is being served must be done: by the queue's own thread, and in the pool.
    /// Requests that take longer hold up the front end no further.
    fn stop(&self) {
        match self.running.try_lock_for(DRAINING) {
            Some(mut running) => {
                *running = false;
                self.stops.fetch_add(1, Ordering::AcqRel);
            }
            None => tracing::warn!("a queue does not come to rest"),
        }
        if !self.handed_over.wait(DRAINING) {
            tracing::warn!("a queue is stopped before its requests have ended: the shared directory is too slow");
        }
    }

    /// Starts, if the queue is both ready and enabled.
    fn start(&self) {
        let startable = {
            let state = self.get_ref();
            state.get_queue().ready() && state.is_enabled()
        };
        if startable {
            if let Some(mut running) = self.running.try_lock_for(DRAINING) {
                *running = true;
            }
        }
    }

    fn accept(file: Option<File>, what: &str) -> Option<File> {
        let file = file?;
        if !is_eventfd(file.as_raw_fd()) {
            tracing::warn!("a {what} that is no eventfd: refused");
            return None;
        }
        // SAFETY: a flag of our own descriptor's file; a guest that takes it off again hurts itself.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_RDWR | libc::O_NONBLOCK) };
        Some(file)
    }
}

/// `/proc/self/fd`, opened before a sandbox has no `/proc`.
static DESCRIPTORS: OnceLock<File> = OnceLock::new();

/// Keeps a directory of this process's descriptors, to tell their kinds.
pub fn know_descriptors(directory: File) {
    let _ = DESCRIPTORS.set(directory);
}

fn is_eventfd(fd: RawFd) -> bool {
    let open = || File::open("/proc/self/fd");
    let directory = match DESCRIPTORS.get() {
        Some(directory) => directory,
        None => match open() {
            Ok(directory) => DESCRIPTORS.get_or_init(|| directory),
            Err(_) => return false,
        },
    };
    nix::fcntl::readlinkat(directory, fd.to_string().as_str()).is_ok_and(|kind| kind == "anon_inode:[eventfd]")
}

/// Takes the rings off an eventfd, whatever its flags are.
fn read_now(fd: RawFd) -> io::Result<()> {
    let mut count = 0u64;
    let part = libc::iovec { iov_base: (&raw mut count).cast(), iov_len: size_of::<u64>() };
    // SAFETY: eight bytes of room, as the iovec says.
    match unsafe { libc::preadv2(fd, &part, 1, -1, libc::RWF_NOWAIT) } {
        0.. => Ok(()),
        _ => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            e => Err(e),
        },
    }
}

impl<'a> VringStateGuard<'a, Memory> for Vring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl<'a> VringStateMutGuard<'a, Memory> for Vring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl VringT<Memory> for Vring {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, Error> {
        Ok(Vring {
            state: VringMutex::new(memory, max_queue_size)?,
            call: Arc::default(),
            calls: Arc::default(),
            running: Arc::default(),
            stops: Arc::default(),
            drivers: Arc::default(),
            handed_over: Budget::new(MAX_QUEUE_SIZE as u32),
        })
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState<Memory>> {
        self.state.get_ref()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState<Memory>> {
        self.state.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.state.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        let call = self.call.lock().clone();
        if let Some(call) = call {
            Eventfd::signal(&*call);
        }
        Ok(())
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        match self.serving() {
            Some(_running) => self.state.enable_notification(),
            None => Ok(false),
        }
    }

    fn disable_notification(&self) -> Result<(), Error> {
        match self.serving() {
            Some(_running) => self.state.disable_notification(),
            None => Ok(()),
        }
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.state.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        if !enabled {
            self.stop();
        }
        self.state.set_enabled(enabled);
        self.start();
    }

    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), Error> {
        self.state.set_queue_info(desc_table, avail_ring, used_ring)
    }

    fn queue_next_avail(&self) -> u16 {
        self.state.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        // The first driver's word on a queue is its set-up: who has said it goes on behind it.
        if base == 0 {
            self.drivers.fetch_add(1, Ordering::AcqRel);
        }
        self.state.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.state.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.state.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.state.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.state.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        if !ready {
            self.stop();
        }
        self.state.set_queue_ready(ready);
        self.start();
    }

    fn set_kick(&self, file: Option<File>) {
        self.state.set_kick(Self::accept(file, "kick"));
    }

    fn read_kick(&self) -> io::Result<bool> {
        let state = self.get_ref();
        if let Some(kick) = state.get_kick() {
            read_now(kick.as_raw_fd())?;
        }
        Ok(state.is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        let new = Self::accept(file, "call").map(|file| Arc::new(OwnedFd::from(file)));
        let mut calls = self.calls.lock();
        *self.call.lock() = new.clone();
        // Two owners: this list and whoever is writing.
        calls.retain(|call| Arc::strong_count(call) > 1);
        calls.extend(new);
    }

    // Nothing is ever written to it.
    fn set_err(&self, _file: Option<File>) {}
}
