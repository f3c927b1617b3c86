//! A virtqueue's state as the vhost-user crates keep it, with kicks and calls that cannot block the host for ever: only
//! eventfds are accepted, the kick is read without waiting, and no lock is held while the call is written.

use crate::gate::Gate;
use crate::memory::Memory;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use parking_lot::Mutex;
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, MutexGuard, OnceLock};
use tunnelfs_ring::Eventfd;
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error, QueueT};

/// Largest virtqueue that is accepted, entries.
pub const MAX_QUEUE_SIZE: usize = 1024;

/// What the queue's thread sleeps on: the kick, and an eventfd of the host's own.
struct Sleep {
    epoll: Epoll,
    /// Wakes the thread when the queue starts, stops or ends.
    wakeup: OwnedFd,
    /// The kick that `epoll` has.
    kick: Mutex<Option<RawFd>>,
}

impl Sleep {
    fn new() -> io::Result<Self> {
        let (epoll, wakeup) = (Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, Eventfd::new().map_err(io::Error::other)?);
        epoll.add(&wakeup, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        Ok(Sleep { epoll, wakeup, kick: Mutex::new(None) })
    }

    /// Replaces the kick that `epoll` has.
    fn set_kick(&self, kick: Option<RawFd>) {
        let mut known = self.kick.lock();
        if *known == kick {
            return;
        }
        if let Some(old) = known.take() {
            // SAFETY: the queue's state closes it only after this call.
            let _ = self.epoll.delete(unsafe { BorrowedFd::borrow_raw(old) });
        }
        if let Some(new) = kick {
            // SAFETY: the queue's state has it open.
            let new = unsafe { BorrowedFd::borrow_raw(new) };
            match self.epoll.add(new, EpollEvent::new(EpollFlags::EPOLLIN, 1)) {
                Ok(()) => *known = kick,
                Err(e) => tracing::warn!("cannot wait for a queue's kick: {e}"),
            }
        }
    }
}

/// One virtqueue of a guest.
#[derive(Clone)]
pub struct Vring(Arc<Inner>);

struct Inner {
    state: VringMutex<Memory>,
    call: Mutex<Option<Arc<OwnedFd>>>,
    /// Calls that a thread may still be writing to.
    calls: Mutex<Vec<Arc<OwnedFd>>>,
    gate: Gate,
    sleep: Sleep,
}

thread_local! {
    /// The queues that this thread has made.
    static MADE: RefCell<Vec<Vring>> = const { RefCell::new(Vec::new()) };
}

impl Vring {
    /// Runs `make`, which makes a device; its queues, in order.
    pub fn collect<R>(make: impl FnOnce() -> R) -> (R, Vec<Vring>) {
        MADE.take();
        let made = make();
        (made, MADE.take())
    }

    /// Whether the queue runs, and what is under way in it.
    pub fn gate(&self) -> &Gate {
        &self.0.gate
    }

    /// Sleeps until the driver kicks, or [`Vring::wake`].
    pub fn sleep(&self) {
        let mut events = [EpollEvent::empty(); 2];
        match self.0.sleep.epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(n) => {
                for event in &events[..n] {
                    if event.data() == 0 {
                        Eventfd::drain(&self.0.sleep.wakeup);
                    } else {
                        let _ = self.read_kick();
                    }
                }
            }
            Err(nix::Error::EINTR) => {}
            Err(e) => {
                tracing::warn!("waiting for a kick: {e}");
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    }

    /// Wakes the queue's thread.
    pub fn wake(&self) {
        Eventfd::signal(&self.0.sleep.wakeup);
    }

    /// Empties the counters of all calls, so that threads that wait in writing one go on. A guest can fill the counter of
    /// its call and clear O_NONBLOCK: that blocks only the guest's own queue.
    pub fn unblock_calls(&self) {
        for call in self.0.calls.lock().iter() {
            let _ = read_now(call.as_raw_fd());
        }
    }

    fn stop(&self) {
        self.0.sleep.set_kick(None);
        self.0.gate.stop();
    }

    /// Starts, if the queue is both ready and enabled.
    fn start(&self) {
        let kick = {
            let state = self.get_ref();
            let startable = state.get_queue().ready() && state.is_enabled();
            startable.then(|| state.get_kick().as_ref().map(AsRawFd::as_raw_fd))
        };
        if let Some(kick) = kick {
            self.0.sleep.set_kick(kick);
            self.0.gate.start();
            // The driver may have added requests before.
            self.wake();
        }
    }

    fn accept(file: Option<File>, what: &str) -> Option<File> {
        let file = file?;
        if !is_eventfd(file.as_raw_fd()) {
            tracing::warn!("{what} fd is not an eventfd: ignored");
            return None;
        }
        // SAFETY: a flag of our own descriptor's file; a guest that takes it off again hurts itself.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_RDWR | libc::O_NONBLOCK) };
        Some(file)
    }
}

/// `/proc/self/fd`, opened before the sandbox hides `/proc`.
static PROC_SELF_FD: OnceLock<File> = OnceLock::new();

/// Sets the directory of this process's descriptors, by which eventfds are recognized.
pub fn set_proc_self_fd(directory: File) {
    let _ = PROC_SELF_FD.set(directory);
}

fn is_eventfd(fd: RawFd) -> bool {
    // By readlinkat(2) in both cases: the system call filter has no readlink(2).
    let name = match PROC_SELF_FD.get() {
        Some(directory) => nix::fcntl::readlinkat(directory, fd.to_string().as_str()),
        None => nix::fcntl::readlinkat(nix::fcntl::AT_FDCWD, format!("/proc/self/fd/{fd}").as_str()),
    };
    name.is_ok_and(|kind| kind == "anon_inode:[eventfd]")
}

/// Empties the counter of an eventfd without waiting, whatever its flags are.
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
        let sleep = Sleep::new().map_err(|e| {
            tracing::warn!("cannot create a queue: {e}");
            Error::QueueNotReady
        })?;
        let vring = Vring(Arc::new(Inner {
            state: VringMutex::new(memory, max_queue_size)?,
            call: Mutex::default(),
            calls: Mutex::default(),
            gate: Gate::default(),
            sleep,
        }));
        MADE.with_borrow_mut(|made| made.push(vring.clone()));
        Ok(vring)
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState<Memory>> {
        self.0.state.get_ref()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState<Memory>> {
        self.0.state.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.0.state.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        let call = self.0.call.lock().clone();
        if let Some(call) = call {
            Eventfd::signal(call.as_fd());
        }
        Ok(())
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.0.state.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.0.state.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.0.state.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        if !enabled {
            self.stop();
        }
        self.0.state.set_enabled(enabled);
        self.start();
    }

    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), Error> {
        self.0.state.set_queue_info(desc_table, avail_ring, used_ring)
    }

    fn queue_next_avail(&self) -> u16 {
        self.0.state.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        // A driver that starts at 0 is a new one; the same driver goes on behind 0 after a pause.
        if base == 0 {
            self.0.gate.new_driver();
        }
        self.0.state.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.0.state.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.0.state.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.0.state.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.0.state.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        if !ready {
            self.stop();
        }
        self.0.state.set_queue_ready(ready);
        self.start();
    }

    fn set_kick(&self, file: Option<File>) {
        // Before the old one is closed.
        self.0.sleep.set_kick(None);
        self.0.state.set_kick(Self::accept(file, "kick"));
        self.start();
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
        let mut calls = self.0.calls.lock();
        *self.0.call.lock() = new.clone();
        // Two owners: this list and a thread that writes.
        calls.retain(|call| Arc::strong_count(call) > 1);
        calls.extend(new);
    }

    // Nothing is ever written to it.
    fn set_err(&self, _file: Option<File>) {}
}
