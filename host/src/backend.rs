//! The vhost-user-fs back end: one guest's device. Its queues are served by threads of its own (see
//! [`crate::queue_thread`]), which wait for their kicks themselves: a hand-over to another thread costs a wake.

use crate::admission::next_guest;
use crate::figures::{Figures, QueueFigures};
use crate::handler::Handler;
use crate::live::Live;
use crate::memory::{self, GuestTables, Memory};
use crate::queue_thread::{DeviceContext, QueueThread};
use crate::takeover::WorkerPool;
use crate::vring::{Vring, MAX_QUEUE_SIZE};
use parking_lot::{Condvar, Mutex};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tunnelfs_settings::Settings;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

/// Bytes of a virtio-fs tag (`struct virtio_fs_config`, linux/virtio_fs.h).
const TAG_BYTES: usize = 36;
/// A queue's thread that has not ended after this time may wait in writing a call: calls are emptied then.
const STOPPING: Duration = Duration::from_secs(1);
/// Pause between two checks whether all threads have ended.
const ENDING: Duration = Duration::from_millis(10);
/// Requests of a guest that has left may take this long before a warning is logged.
const SLOW_END: Duration = Duration::from_secs(10);

/// What each device can do, with any driver.
pub const VIRTIO_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// One guest's device.
pub struct Backend<H: Handler> {
    device: Arc<DeviceContext<H>>,
    config_space: Vec<u8>,
    queues: usize,
    tables: Arc<GuestTables>,
    /// One of each queue.
    vrings: OnceLock<Vec<Vring>>,
    front_end: Mutex<FrontEnd>,
    front_end_changed: Condvar,
    /// The guest's number in the log.
    number: Arc<AtomicU64>,
    figures: Figures,
}

/// Whether the front end has sent a message, or has left without one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FrontEnd {
    Silent,
    Talking,
    Gone,
}

impl<H: Handler> Backend<H> {
    /// The device for the next guest.
    ///
    /// # Errors
    /// When the system has no threads or descriptors left.
    pub fn new(settings: &Settings, live: &Live, memory: Memory) -> io::Result<Self> {
        let queues = settings.transport.queue_count();
        // struct virtio_fs_config: the tag, zero-padded, then the number of request queues.
        let mut config_space = settings.host.tag.clone().into_bytes();
        config_space.resize(TAG_BYTES, 0);
        config_space.extend_from_slice(&(queues as u32).to_le_bytes());
        let pool = WorkerPool::new(live.spares.clone())?;
        let device = DeviceContext::new(settings, live.clone(), memory, pool);
        Ok(Backend {
            device: Arc::new(device),
            config_space,
            // One more for the high-priority queue, number 0, and one at the end that a guest may have for the request
            // that waits for changes.
            queues: queues + 2,
            tables: Arc::default(),
            vrings: OnceLock::new(),
            front_end: Mutex::new(FrontEnd::Silent),
            front_end_changed: Condvar::new(),
            number: Arc::default(),
            figures: live.figures.clone(),
        })
    }

    /// A guest has connected: `handler` serves it, by `vrings`.
    ///
    /// # Errors
    /// When the system has no threads left.
    pub fn start(&self, handler: H, vrings: Vec<Vring>) -> io::Result<()> {
        let (memory, tables) = (self.device.memory.clone(), self.tables.clone());
        let remap = move || {
            if let Err(e) = memory::remap(&memory, &tables) {
                tracing::warn!("{e}: a new driver of this guest must set its memory table");
            }
        };
        let figures = |queue| self.figures.add(&self.number, queue);
        start_queues((&self.device, figures), handler, self.vrings.get_or_init(|| vrings), remap)
    }

    /// Waits for the front end's first message; `false`: it has left without one.
    pub fn wait_for_front_end(&self) -> bool {
        let mut front_end = self.front_end.lock();
        while *front_end == FrontEnd::Silent {
            self.front_end_changed.wait(&mut front_end);
        }
        *front_end == FrontEnd::Talking
    }

    /// Records the front end's first message, or its end.
    fn set_front_end(&self, what: FrontEnd) {
        let mut front_end = self.front_end.lock();
        if *front_end == FrontEnd::Silent {
            if what == FrontEnd::Talking {
                let number = next_guest();
                self.number.store(number, Ordering::Relaxed);
                tracing::info!("guest {number} has come");
            }
            *front_end = what;
            self.front_end_changed.notify_all();
        }
    }

    /// The front end has closed its connection. Returns the guest's number; `None`: it had sent no message.
    pub fn gone(&self) -> Option<u64> {
        self.set_front_end(FrontEnd::Gone);
        (*self.front_end.lock() == FrontEnd::Talking).then(|| self.number.load(Ordering::Relaxed))
    }

    /// Ends all threads of the device after its connection has ended. Waits for requests in flight.
    pub fn end(self: Arc<Self>, daemon: VhostUserDaemon<Arc<Self>>) {
        drop(daemon);
        stop_queues(&self.device, self.vrings.get().map_or(&[][..], Vec::as_slice));
    }
}

/// Gives each queue of a device a thread. `remap` maps the guest's memory once more, as for [`Gate::on_detached`].
///
/// [`Gate::on_detached`]: crate::gate::Gate::on_detached
///
/// # Errors
/// When the system has no threads left.
pub fn start_queues<H: Handler>(
    (device, figures): (&Arc<DeviceContext<H>>, impl Fn(usize) -> Arc<QueueFigures>),
    handler: H,
    vrings: &[Vring],
    remap: impl Fn() + Clone + Send + Sync + 'static,
) -> io::Result<()> {
    device.set_handler(handler);
    for (number, vring) in vrings.iter().enumerate() {
        let pool = device.pool.clone();
        vring.gate().on_stuck(move || pool.force_takeover(number));
        vring.gate().on_detached(remap.clone());
        device.pool.start(QueueThread::new(device.clone(), number, vring.clone(), figures(number)))?;
    }
    Ok(())
}

/// Ends all threads of a device, which nobody drives any more. Waits for requests in flight.
pub fn stop_queues<H: Handler>(device: &DeviceContext<H>, vrings: &[Vring]) {
    device.stop();
    device.pool.stop();
    for vring in vrings {
        vring.wake();
        // Threads that wait for this driver go on.
        vring.gate().new_driver();
    }
    let (start, mut logged) = (Instant::now(), false);
    while !device.pool.join(ENDING) {
        if start.elapsed() > STOPPING {
            vrings.iter().for_each(Vring::unblock_calls);
        }
        if start.elapsed() > SLOW_END && !std::mem::replace(&mut logged, true) {
            tracing::warn!("a guest has left, and its requests have not ended after {SLOW_END:?}");
        }
    }
    device.reset_handler();
}

impl<H: Handler> VhostUserBackend for Backend<H> {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queues
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        self.set_front_end(FrontEnd::Talking);
        VIRTIO_FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let from = (offset as usize).min(self.config_space.len());
        let to = from.saturating_add(size as usize).min(self.config_space.len());
        self.config_space[from..to].to_vec()
    }

    /// The queues have been stopped before. The next start is another driver's.
    fn reset_device(&self) {
        self.device.end_waiting();
        self.vrings.get().into_iter().flatten().for_each(|vring| vring.gate().new_driver());
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.tables.add(memory.memory().clone().into_inner())
    }

    /// None: the queues have threads of their own, which may block.
    fn queues_per_thread(&self) -> Vec<u64> {
        Vec::new()
    }

    fn handle_event(&self, _: u16, _: EventSet, _: &[Self::Vring], _: usize) -> io::Result<()> {
        Ok(())
    }
}
