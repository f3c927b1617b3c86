//! The vhost-user-fs back end: one guest's device. Its queues are served by threads of its own (see
//! [`crate::queue_thread`]), which wait for their kicks themselves: a hand-over to another thread costs a wake.

use crate::handler::Handler;
use crate::memory::Tables;
use crate::placement::Decision;
use crate::queue_thread::Queue;
use crate::takeover::Crew;
use crate::transport::virtqueue;
use crate::vring::{Vring, MAX_QUEUE_SIZE};
use parking_lot::{Condvar, Mutex};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tunnelfs_ring::Policy;
use tunnelfs_settings::{Kind, Settings};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

/// Bytes of a virtio-fs tag (`struct virtio_fs_config`, linux/virtio_fs.h).
const TAG_BYTES: usize = 36;
/// How long a queue's thread may take to notice that it must stop, before calls that it may wait in are emptied.
const STOPPING: Duration = Duration::from_secs(1);
/// Between two looks whether all threads have ended.
const ENDING: Duration = Duration::from_millis(10);
/// How long requests of a guest that has gone may take before that is told.
const SLOW_END: Duration = Duration::from_secs(10);

/// What the queues of one guest share.
pub struct Device<H: Handler> {
    handler: OnceLock<H>,
    pub memory: virtqueue::Memory,
    pub crew: Crew<Queue<H>>,
    /// Whether guests may have rings.
    pub rings: bool,
    /// Where queue threads run, in order and over again; if empty, it may be looked for.
    cpus: Vec<usize>,
    /// Finds where queue threads run best.
    pub placing: Option<Arc<Decision>>,
    stopping: AtomicBool,
}

impl<H: Handler> Device<H> {
    /// Who serves requests. Threads start after it is there.
    pub fn handler(&self) -> &H {
        self.handler.get().expect("set before the queues' threads start")
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// The CPU that the settings have for a queue. Queue 0 is the control queue, which has none.
    pub fn cpu(&self, queue: usize) -> Option<usize> {
        let request_queue = queue.checked_sub(1)?;
        self.cpus.get(request_queue % self.cpus.len().max(1)).copied()
    }

    /// Whether queues' threads may be moved.
    pub fn may_place(&self) -> bool {
        self.placing.is_some()
    }
}

/// One guest's device.
pub struct Backend<H: Handler> {
    device: Arc<Device<H>>,
    settings: Settings,
    config_space: Vec<u8>,
    queues: usize,
    tables: Tables,
    /// Of each queue.
    vrings: OnceLock<Vec<Vring>>,
    meeting: Mutex<Meeting>,
    met: Condvar,
}

/// Whether a front end has said anything, or has gone without a word.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Meeting {
    Silent,
    Met,
    Gone,
}

impl<H: Handler> Backend<H> {
    /// The device for the next guest.
    ///
    /// # Errors
    /// When the system has no threads or descriptors left.
    pub fn new(settings: &Settings, memory: virtqueue::Memory) -> io::Result<Self> {
        let (wait, queues) = (settings.wait, settings.transport.queue_count());
        // struct virtio_fs_config: the tag, zero-padded, then the number of request queues.
        let mut config_space = settings.host.tag.clone().into_bytes();
        config_space.resize(TAG_BYTES, 0);
        config_space.extend_from_slice(&(queues as u32).to_le_bytes());
        let device = Device {
            handler: OnceLock::new(),
            memory,
            crew: Crew::new(settings.host.thread_pool_size)?,
            rings: settings.transport.kind == Kind::Ring,
            cpus: settings.host.cpus.clone(),
            placing: (wait.policy == Policy::Auto && settings.host.cpus.is_empty()).then(|| Arc::new(Decision::new())),
            stopping: AtomicBool::new(false),
        };
        Ok(Backend {
            device: Arc::new(device),
            settings: settings.clone(),
            config_space,
            // One more for the high-priority queue, number 0.
            queues: queues + 1,
            tables: Tables::default(),
            vrings: OnceLock::new(),
            meeting: Mutex::new(Meeting::Silent),
            met: Condvar::new(),
        })
    }

    /// A guest has connected: `handler` serves it, by `vrings`.
    ///
    /// # Errors
    /// When the system has no threads left.
    pub fn start(&self, handler: H, vrings: Vec<Vring>) -> io::Result<()> {
        let _ = self.device.handler.set(handler);
        let vrings = self.vrings.get_or_init(|| vrings);
        for (number, vring) in vrings.iter().enumerate() {
            let crew = self.device.crew.clone();
            vring.gate().on_stuck(move || crew.force(number));
            self.device.crew.start(Queue::new(self.device.clone(), number, vring.clone(), self.settings.wait))?;
        }
        Ok(())
    }

    /// Waits until the front end has said something; `false`: it has gone without a word.
    pub fn meet(&self) -> bool {
        let mut meeting = self.meeting.lock();
        while *meeting == Meeting::Silent {
            self.met.wait(&mut meeting);
        }
        *meeting == Meeting::Met
    }

    /// The front end has said something, or has gone.
    fn note(&self, what: Meeting) {
        let mut meeting = self.meeting.lock();
        if *meeting == Meeting::Silent {
            *meeting = what;
            self.met.notify_all();
        }
    }

    /// The front end has closed its connection.
    pub fn gone(&self) {
        self.note(Meeting::Gone);
    }

    /// Ends all threads of the guest's device, whose connection has gone. Requests under way are waited for.
    pub fn end(self: Arc<Self>, daemon: VhostUserDaemon<Arc<Self>>) {
        drop(daemon);
        self.device.stopping.store(true, Ordering::Release);
        let vrings = self.vrings.get().map_or(&[][..], Vec::as_slice);
        self.device.crew.stop();
        for vring in vrings {
            vring.wake();
            // Whoever waits for this driver waits no more.
            vring.gate().new_driver();
        }
        let (start, mut told) = (Instant::now(), false);
        while !self.device.crew.join(ENDING) {
            if start.elapsed() > STOPPING {
                vrings.iter().for_each(Vring::release);
            }
            if start.elapsed() > SLOW_END && !std::mem::replace(&mut told, true) {
                tracing::warn!("a guest has gone, and requests of it have been under way for {SLOW_END:?}");
            }
        }
        if let Some(handler) = self.device.handler.get() {
            handler.reset();
        }
    }
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
        self.note(Meeting::Met);
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
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

    /// The queues have been stopped before: whoever starts them is another driver.
    fn reset_device(&self) {
        self.vrings.get().into_iter().flatten().for_each(|vring| vring.gate().new_driver());
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.tables.add(memory.memory().clone().into_inner())
    }

    /// None: the queues have threads of their own, which can be held up.
    fn queues_per_thread(&self) -> Vec<u64> {
        Vec::new()
    }

    fn handle_event(&self, _: u16, _: EventSet, _: &[Self::Vring], _: usize) -> io::Result<()> {
        Ok(())
    }
}
