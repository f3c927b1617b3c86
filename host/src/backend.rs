//! The vhost-user-fs back end: one thread a queue, which waits for its kick
//! and does the work itself (a hand-over to another thread costs a wake).

use crate::memory::Tables;
use crate::placement::{Decision, Placement};
use crate::pool::Pool;
use crate::server::Server;
use crate::transport::ring::{Call, RingDevice, Served};
use crate::transport::virtqueue;
use crate::vring::{Vring, MAX_QUEUE_SIZE};
use parking_lot::Mutex;
use std::cell::OnceCell;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_ring::{set_affinity, Error, Parker, PeerCpu, Policy, RingSetup, SpinMode, WaitConfig};
use tunnelfs_settings::{Kind, Settings};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtiofsd::filesystem::FileSystem;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{new_event_consumer_and_notifier, EventConsumer, EventFlag, EventNotifier};

/// Bytes of a virtio-fs tag (`struct virtio_fs_config`, linux/virtio_fs.h).
const TAG_BYTES: usize = 36;
/// Submissions served in one go before the virtqueue gets its turn.
const BATCH: u32 = 256;
/// How long a queue's thread may take to notice that it must stop.
const STOPPING: Duration = Duration::from_secs(1);
/// How often the thread of a queue that was stopped at work looks whether it goes on.
const PAUSED: Duration = Duration::from_millis(5);

/// What one queue's thread owns.
struct QueueState {
    ring: Option<RingDevice>,
    parker: Parker,
    placement: Option<Placement>,
    /// Whose ring it is.
    driver: u32,
}

impl QueueState {
    fn new(wait: WaitConfig) -> Self {
        let mut parker = Parker::new(wait);
        parker.set_mode(SpinMode::Yield);
        QueueState { ring: None, parker, placement: None, driver: 0 }
    }

    /// Takes over the ring that the guest asks for; `decision`: look for the best core too.
    fn start_ring(
        &mut self,
        setup: &RingSetup,
        memory: Arc<GuestMemoryMmap>,
        vring: &Vring,
        decision: Option<&Arc<Decision>>,
    ) -> Result<(), Error> {
        let bell = vring.clone();
        let call: Call = Arc::new(move || {
            let _ = bell.signal_used_queue();
        });
        let ring = RingDevice::new(setup, memory, call, &vring.handed_over)?;
        let wait = self.parker.config();
        self.placement = ring.guest_cpu.zip(decision).and_then(|(cpu, d)| Placement::new(cpu, d.clone(), wait));
        self.ring = Some(ring);
        self.publish_cpu();
        Ok(())
    }

    /// A new driver has set up everything anew: its predecessor's memory is not ours any more.
    fn meet(&mut self, driver: u32) {
        if driver != self.driver {
            self.driver = driver;
            self.stop_ring();
        }
    }

    fn stop_ring(&mut self) {
        (self.ring, self.placement) = (None, None);
        self.publish_cpu();
    }

    /// Spins for the ring as the policy says.
    fn spin(&mut self) -> bool {
        let Some(ring) = &self.ring else { return false };
        self.parker.spin(|| ring.ready())
    }

    /// Tells the guest where this thread runs, and waits accordingly: a guest whose CPU is unknown may need this core.
    fn publish_cpu(&mut self) {
        let Some(ring) = &self.ring else { return self.parker.set_mode(SpinMode::Yield) };
        let cpu = self.placement.as_ref().map_or(PeerCpu::Unknown, |placement| placement.place().peer_cpu());
        ring.own_wakeup().set_peer_cpu(cpu);
        self.parker.set_mode(match cpu {
            PeerCpu::Same => SpinMode::Handoff,
            _ if ring.guest_cpu.is_some() => SpinMode::Busy,
            _ => SpinMode::Yield,
        });
    }

    /// Asks the guest to ring from now on; whether there is something to serve already.
    fn announce_sleep(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| {
            ring.own_wakeup().set();
            ring.ready()
        })
    }

    fn awake(&mut self) {
        self.parker.unparked();
        if let Some(ring) = &self.ring {
            ring.own_wakeup().clear();
        }
    }
}

thread_local! {
    static SETTLED: OnceCell<()> = const { OnceCell::new() };
}

/// What ends a thread: made beforehand, since a thread that had none could not be ended.
struct Exit {
    unused: Option<(EventConsumer, EventNotifier)>,
    /// The consumer's descriptor, which its user never closes.
    descriptor: Option<OwnedFd>,
}

impl Exit {
    fn new() -> io::Result<Self> {
        let unused = Some(new_event_consumer_and_notifier(EventFlag::NONBLOCK)?);
        Ok(Exit { unused, descriptor: None })
    }

    fn hand_out(&mut self) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) = self.unused.take()?;
        // SAFETY: vhost-user-backend turns the consumer into a bare number, and never closes it.
        self.descriptor = Some(unsafe { OwnedFd::from_raw_fd(consumer.as_raw_fd()) });
        Some((consumer, notifier))
    }
}

/// One guest's device.
pub struct Backend<F> {
    server: Arc<Server<F>>,
    memory: virtqueue::Memory,
    pool: Pool,
    queues: Vec<Mutex<QueueState>>,
    config_space: Vec<u8>,
    /// Whether guests may have rings.
    rings: bool,
    /// Where queue threads run, in order and over again; if empty, it may be looked for.
    cpus: Vec<usize>,
    /// Finds where queue threads run best.
    placing: Option<Arc<Decision>>,
    stopping: AtomicBool,
    /// How many resets wait for the queues to pause.
    resetting: AtomicU32,
    exits: Mutex<Vec<Exit>>,
    tables: Tables,
    /// Of each thread that has served.
    vrings: Mutex<Vec<Vring>>,
}

impl<F: FileSystem + Send + Sync + 'static> Backend<F> {
    /// The device for the next guest.
    ///
    /// # Errors
    /// When the system has no threads or descriptors left.
    pub fn new(settings: &Settings, server: Arc<Server<F>>, memory: virtqueue::Memory) -> io::Result<Self> {
        let (wait, queues) = (settings.wait, settings.transport.queue_count());
        // struct virtio_fs_config: the tag, zero-padded, then the number of request queues.
        let mut config_space = settings.host.tag.clone().into_bytes();
        config_space.resize(TAG_BYTES, 0);
        config_space.extend_from_slice(&(queues as u32).to_le_bytes());
        let exits = (0..=queues).map(|_| Exit::new()).collect::<io::Result<_>>()?;
        Ok(Backend {
            server,
            memory,
            pool: Pool::new(settings.host.thread_pool_size)?,
            // One more for the high-priority queue, number 0.
            queues: (0..=queues).map(|_| Mutex::new(QueueState::new(wait))).collect(),
            config_space,
            rings: settings.transport.kind == Kind::Ring,
            cpus: settings.host.cpus.clone(),
            placing: (wait.policy == Policy::Auto && settings.host.cpus.is_empty()).then(|| Arc::new(Decision::new())),
            stopping: AtomicBool::new(false),
            resetting: AtomicU32::new(0),
            exits: Mutex::new(exits),
            tables: Tables::default(),
            vrings: Mutex::default(),
        })
    }

    /// Ends all threads of the guest's device: its connection has gone.
    pub fn end(self: Arc<Self>, daemon: VhostUserDaemon<Arc<Self>>) {
        self.stopping.store(true, Ordering::Release);
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Without a thread for it, a hostile guest can hold up the next one.
            let watcher = std::thread::Builder::new().spawn_scoped(scope, || {
                std::thread::park_timeout(STOPPING);
                while !ended.load(Ordering::Acquire) {
                    self.vrings.lock().iter().for_each(Vring::release);
                    std::thread::park_timeout(STOPPING / 100);
                }
            });
            drop(daemon);
            self.pool.end();
            ended.store(true, Ordering::Release);
            if let Ok(watcher) = watcher {
                watcher.thread().unpark();
            }
        });
    }

    /// The first time: keeps the calling thread on the CPU that the settings have for it.
    fn settle(&self, thread: usize, vring: &Vring) {
        SETTLED.with(|settled| {
            settled.get_or_init(|| {
                self.vrings.lock().push(vring.clone());
                // Thread 0 has the control queue.
                let cpu = thread.checked_sub(1).and_then(|queue| self.cpus.get(queue % self.cpus.len().max(1)));
                if let Some(&cpu) = cpu {
                    set_affinity(&[cpu]).unwrap_or_else(|e| tracing::warn!("host.cpus: {e}"));
                }
            });
        });
    }

    /// Whether the queues must pause.
    fn halted(&self) -> bool {
        self.stopping.load(Ordering::Acquire) || self.resetting.load(Ordering::Acquire) > 0
    }

    /// Serves a queue until there has been nothing to do for as long as the policy spins. One that its driver stops
    /// before that is waited for: going on, the driver would not know that its kick is wanted again.
    fn run_queue(&self, vring: &Vring, queue: &mut QueueState) -> io::Result<()> {
        while let Some(stops) = self.begin(vring, queue) {
            self.run_once(vring, queue)?;
            if vring.stops() == stops {
                break;
            }
        }
        Ok(())
    }

    /// Waits until the queue is running; how often it has been stopped by then.
    fn begin(&self, vring: &Vring, queue: &mut QueueState) -> Option<u32> {
        while !self.halted() {
            if let Some(_running) = vring.serving() {
                queue.meet(vring.driver());
                queue.awake();
                return Some(vring.stops());
            }
            std::thread::sleep(PAUSED);
        }
        None
    }

    fn run_once(&self, vring: &Vring, queue: &mut QueueState) -> io::Result<()> {
        if queue.ring.is_none() {
            self.run_virtqueue(vring, queue)?;
        } else if !self.serve_ring(vring, queue) {
            // Beside a ring the virtqueue is only looked at when a kick was not for the ring.
            self.serve_virtqueue(vring, queue)?;
        }
        self.run_ring(vring, queue);
        Ok(())
    }

    fn run_virtqueue(&self, vring: &Vring, queue: &mut QueueState) -> io::Result<()> {
        let _ = vring.disable_notification();
        while !self.halted() && queue.ring.is_none() {
            let ready = || virtqueue::ready(vring, &self.memory);
            if self.serve_virtqueue(vring, queue)? || queue.parker.spin(ready) && vring.serving().is_some() {
                continue;
            }
            if !vring.enable_notification().unwrap_or(false) {
                return Ok(());
            }
            queue.awake();
            let _ = vring.disable_notification();
        }
        let more = vring.enable_notification().unwrap_or(false);
        if more {
            self.serve_virtqueue(vring, queue)?;
        }
        Ok(())
    }

    fn run_ring(&self, vring: &Vring, queue: &mut QueueState) {
        while queue.ring.is_some() && !self.halted() {
            if !queue.spin() {
                let Some(_running) = vring.serving() else { return };
                queue.meet(vring.driver());
                if queue.ring.is_some() && !queue.announce_sleep() {
                    return;
                }
                queue.awake();
            }
            if !self.serve_ring(vring, queue) && vring.serving().is_none() {
                return;
            }
        }
    }

    /// Whether there was anything to serve.
    fn serve_ring(&self, vring: &Vring, queue: &mut QueueState) -> bool {
        let Some(_running) = vring.serving() else { return false };
        queue.meet(vring.driver());
        let Some(ring) = &mut queue.ring else { return false };
        let helper = queue.placement.as_ref().and_then(Placement::helper);
        let served = ring.serve(&self.server, &self.pool, helper, BATCH).unwrap_or_else(|e| {
            tracing::warn!("closing a ring: {e}");
            Served::default()
        });
        if queue.placement.as_mut().is_some_and(|p| p.served(served)) {
            queue.publish_cpu();
        }
        served.requests > 0
    }

    fn serve_virtqueue(&self, vring: &Vring, queue: &mut QueueState) -> io::Result<bool> {
        let Some(_running) = vring.serving() else { return Ok(false) };
        queue.meet(vring.driver());
        let mut setup = |wanted: RingSetup| {
            if !self.rings {
                return Err(io::ErrorKind::Unsupported.into());
            }
            let memory = self.memory.memory().clone().into_inner();
            queue.start_ring(&wanted, memory, vring, self.placing.as_ref()).map_err(io::Error::other)
        };
        virtqueue::serve(vring, &self.memory, &self.server, &self.pool, &mut setup)
    }
}

impl<F: FileSystem + Send + Sync + 'static> VhostUserBackend for Backend<F> {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queues.len()
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
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

    fn reset_device(&self) {
        self.resetting.fetch_add(1, Ordering::AcqRel);
        for queue in &self.queues {
            match queue.try_lock_for(STOPPING) {
                Some(mut queue) => queue.stop_ring(),
                None => tracing::warn!("a queue does not come to rest: it is not reset"),
            }
        }
        self.resetting.fetch_sub(1, Ordering::AcqRel);
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.tables.add(memory.memory().clone().into_inner())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues.len()).map(|i| 1 << i).collect()
    }

    fn exit_event(&self, thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.exits.lock().get_mut(thread)?.hand_out()
    }

    fn handle_event(&self, _event: u16, _set: EventSet, vrings: &[Self::Vring], thread: usize) -> io::Result<()> {
        self.settle(thread, &vrings[0]);
        self.run_queue(&vrings[0], &mut self.queues[thread].lock())
    }
}
