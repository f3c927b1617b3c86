//! A host as a part of a program that is something else: a VMM with a virtio-fs device of its own, or a benchmark.
//!
//! The program stays as it is: no signal handler is installed and no signal sent, no limit, umask or working directory
//! of the process changes, and no descriptor is touched that this has not opened or been given. Threads of the host have
//! a working directory and a umask of their own, and become the guest's users for calls that create something.

use crate::backend::{start_queues, stop_queues, VIRTIO_FEATURES};
use crate::fs::Passthrough;
use crate::fs_builder::FsBuilder;
use crate::handler::Handler;
use crate::in_process_memory::{self, Regions};
use crate::live::Live;
use crate::queue_thread::DeviceContext;
use crate::sandbox::{invalid, SharedDir};
use crate::server::Server;
use crate::takeover::WorkerPool;
use crate::vring::{Vring, MAX_QUEUE_SIZE};
use parking_lot::Mutex;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU64;
use std::sync::Arc;
use tunnelfs_settings::Settings;
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};

pub use crate::in_process_memory::MemoryRegion;

/// The feature bits that a [`Device`] has, for the VMM to offer to its guest.
pub const FEATURES: u64 = VIRTIO_FEATURES;

/// A share inside another program.
#[derive(Debug)]
pub struct Host {
    settings: Settings,
    builder: FsBuilder,
}

/// A virtqueue as the guest's driver has set it up, and how both sides are notified.
#[derive(Debug)]
pub struct Queue {
    /// Entries.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Whether the driver has taken `VIRTIO_RING_F_EVENT_IDX`.
    pub event_idx: bool,
    /// Eventfd that is signalled when the guest notifies the device.
    pub kick: OwnedFd,
    /// Eventfd that the device signals for an interrupt.
    pub call: OwnedFd,
    /// Where the device goes on: 0 for a driver that has just set the queue up, what [`Device::stop_queue`] returned for
    /// one that was only paused.
    pub next: u16,
}

impl Host {
    /// Shares `settings.host.shared_dir` from inside this program. Sandbox, seccomp and capability settings do nothing
    /// here: they are the process's.
    ///
    /// # Errors
    /// What is wrong with the directory or a setting.
    pub fn in_process(settings: &Settings) -> io::Result<Host> {
        let dir = SharedDir::unconfined(&settings.host)?;
        Ok(Host { settings: settings.clone(), builder: FsBuilder::in_process(&settings.host, dir)? })
    }

    /// A server for one guest, to be called as a function. The thread that calls it becomes one that serves: it gets a
    /// working directory and a umask of its own. So call it from threads that do nothing else with relative paths.
    ///
    /// # Errors
    /// What cannot be opened.
    pub fn server(&self) -> io::Result<Server<Passthrough>> {
        self.builder.build(1).map(Server::new)
    }

    /// A device for one guest, served by threads of its own.
    ///
    /// # Safety
    /// As [`Device::new`].
    ///
    /// # Errors
    /// What cannot be opened, or as [`Device::new`].
    pub unsafe fn device(&self, memory: &[MemoryRegion]) -> io::Result<Device<Server<Passthrough>>> {
        // SAFETY: by this function's own contract.
        unsafe { Device::new(&self.settings, self.server()?, memory) }
    }
}

/// A virtio-fs device without a transport of its own: the program hands it the guest's memory and queues. Queue 0 is the
/// high-priority one. Its threads end when it is dropped.
pub struct Device<H: Handler> {
    context: Arc<DeviceContext<H>>,
    vrings: Vec<Vring>,
    live: Live,
    /// Start, stop and reset come one at a time.
    changes: Mutex<()>,
}

impl<H: Handler> Device<H> {
    /// A device over a handler of one's own. `settings` has the number of queues (`transport.queues`), whether a guest
    /// may have rings (`transport.kind`), and how to wait.
    ///
    /// # Safety
    /// All of `memory` must stay mapped, readable and writable, until the device has been dropped.
    ///
    /// # Errors
    /// Regions that overlap, that are not whole pages or not shared memory (`MAP_SHARED`); or the system has no thread
    /// or descriptor left.
    pub unsafe fn new(settings: &Settings, handler: H, memory: &[MemoryRegion]) -> io::Result<Self> {
        // SAFETY: by this function's own contract.
        let mapped = unsafe { in_process_memory::map(memory)? };
        let regions = Regions::new(memory);
        let memory = GuestMemoryAtomic::new(mapped);
        let live = Live::new(settings);
        let pool = WorkerPool::without_signals(live.spares.clone())?;
        let context = Arc::new(DeviceContext::new(settings, live.clone(), memory.clone(), pool));
        // One more for the high-priority queue, number 0.
        let queue = |_| Vring::new(memory.clone(), MAX_QUEUE_SIZE as u16).map_err(io::Error::other);
        let vrings = (0..=settings.transport.queue_count()).map(queue).collect::<io::Result<Vec<_>>>()?;
        let device = Device { context, vrings, live, changes: Mutex::new(()) };
        let remap = move || regions.map_again(&memory);
        // The one guest of this device has always come.
        let (figures, guest) = (device.live.figures.clone(), Arc::new(AtomicU64::new(1)));
        let figures = move |queue| figures.add(&guest, queue);
        start_queues((&device.context, figures), handler, &device.vrings, remap)?;
        Ok(device)
    }

    /// How many queues there are: the high-priority one and the request queues.
    pub fn queues(&self) -> usize {
        self.vrings.len()
    }

    /// What may be changed while it serves.
    pub fn live(&self) -> Live {
        self.live.clone()
    }

    /// Starts a queue: the guest's driver has set it up.
    ///
    /// # Errors
    /// A queue that does not exist or runs, sizes or addresses that cannot be, or a descriptor that is no eventfd.
    pub fn start_queue(&self, number: usize, queue: Queue) -> io::Result<()> {
        let _alone = self.changes.lock();
        let vring = self.vring(number)?;
        if vring.get_ref().get_queue().ready() {
            return Err(invalid(format!("queue {number} runs already")));
        }
        let Queue { size, descriptors, available, used, event_idx, kick, call, next } = queue;
        if !size.is_power_of_two() || usize::from(size) > MAX_QUEUE_SIZE {
            return Err(invalid(format!("queue {number}: {size} entries; a power of two up to {MAX_QUEUE_SIZE}")));
        }
        vring.set_queue_size(size);
        let wrong = |e| invalid(format!("queue {number}: {e}"));
        vring.set_queue_info(descriptors, available, used).map_err(wrong)?;
        vring.set_queue_next_avail(next);
        vring.set_queue_event_idx(event_idx);
        vring.set_call(Some(File::from(call)));
        vring.set_kick(Some(File::from(kick)));
        if vring.get_ref().get_kick().is_none() {
            return Err(invalid(format!("queue {number}: the kick is not an eventfd")));
        }
        vring.set_queue_ready(true);
        let inside = vring.get_ref().get_queue().is_valid(&*self.context.memory.memory());
        // Only read once it is known to be there.
        let used = if inside { vring.queue_used_idx().ok() } else { None };
        let Some(used) = used else {
            vring.set_queue_ready(false);
            vring.set_kick(None);
            vring.set_call(None);
            return Err(invalid(format!("queue {number} lies outside of the guest's memory")));
        };
        vring.set_queue_next_used(used);
        vring.set_enabled(true);
        Ok(())
    }

    /// Stops a queue, and waits for its requests in flight, 5 seconds at the most: late replies come after the next
    /// start, if it is the same driver's. Returns where the device would go on ([`Queue::next`]).
    ///
    /// # Errors
    /// A queue that does not exist.
    pub fn stop_queue(&self, number: usize) -> io::Result<u16> {
        let _alone = self.changes.lock();
        let vring = self.vring(number)?;
        vring.set_enabled(false);
        vring.set_queue_ready(false);
        vring.set_kick(None);
        vring.set_call(None);
        Ok(vring.queue_next_avail())
    }

    /// The guest has reset the device, or has rebooted: stops all queues, and forgets all that it had open.
    pub fn reset(&self) {
        for number in 0..self.vrings.len() {
            let _ = self.stop_queue(number);
        }
        self.vrings.iter().for_each(|vring| vring.gate().new_driver());
        // Also ends what waits for a lock or for changes: no signal does.
        self.context.reset_handler();
    }

    fn vring(&self, number: usize) -> io::Result<&Vring> {
        let of = self.vrings.len();
        self.vrings.get(number).ok_or_else(|| invalid(format!("no queue {number}: there are {of}")))
    }
}

impl<H: Handler> Drop for Device<H> {
    fn drop(&mut self) {
        self.reset();
        stop_queues(&self.context, &self.vrings);
    }
}
