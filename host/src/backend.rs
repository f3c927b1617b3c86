//! The vhost-user-fs back end: one thread a queue, which waits for its kick
//! and does the work itself (a hand-over to another thread costs a wake).

use crate::placement::{Decision, Placement};
use crate::pool::Pool;
use crate::server::Server;
use crate::share;
use crate::transport::ring::{Call, RingDevice};
use crate::transport::{socket, virtqueue};
use parking_lot::Mutex;
use std::cell::OnceCell;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use tunnelfs_ring::{stay_on, Error, Policy, RingSetup, WaitConfig, Waiter};
use tunnelfs_settings::{Kind, Settings};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::Listener;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtiofsd::filesystem::FileSystem;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{new_event_consumer_and_notifier, EventConsumer, EventFlag, EventNotifier};

/// Bytes of a virtio-fs tag (`struct virtio_fs_config`, linux/virtio_fs.h).
const TAG_BYTES: usize = 36;
/// Largest virtqueue that is accepted, entries.
const MAX_QUEUE_SIZE: usize = 1024;
/// Submissions served in one go before the virtqueue gets its turn.
const BATCH: u32 = 256;

/// Serves what `settings` share until the process is told to stop (or, with
/// `once`, until the first guest leaves).
///
/// # Errors
/// An error that names what could not be opened, listened on or served.
pub fn serve(settings: &Settings, once: bool) -> io::Result<()> {
    if settings.host.readonly {
        serve_fs(settings, once, share::open_read_only(&settings.host)?)
    } else {
        serve_fs(settings, once, share::open(&settings.host)?)
    }
}

fn serve_fs<F: FileSystem + Send + Sync + 'static>(settings: &Settings, once: bool, fs: F) -> io::Result<()> {
    let server = Arc::new(Server::new(fs));
    match settings.transport.kind {
        Kind::Socket => serve_socket(settings, once, &server),
        Kind::Ring | Kind::Virtqueue => serve_vhost_user(settings, once, &server),
    }
}

fn listening(path: &Path, e: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("cannot listen on {}: {e}", path.display()))
}

fn serve_socket<F>(settings: &Settings, once: bool, server: &Arc<Server<F>>) -> io::Result<()>
where
    F: FileSystem + Send + Sync + 'static,
{
    let path = &settings.transport.socket_path;
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).map_err(|e| listening(path, e))?;
    // One connection a queue, and the control queue's.
    let connections = if once { settings.transport.queue_count() + 1 } else { usize::MAX };
    let mut threads = Vec::new();
    for stream in listener.incoming().take(connections) {
        let (stream, server, wait) = (stream?, server.clone(), settings.wait);
        threads.push(std::thread::spawn(move || {
            if let Err(e) = socket::serve(stream, &server, wait) {
                tracing::info!("guest's socket: {e}");
            }
        }));
        threads.retain(|t| !t.is_finished() || once);
    }
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

fn serve_vhost_user<F>(settings: &Settings, once: bool, server: &Arc<Server<F>>) -> io::Result<()>
where
    F: FileSystem + Send + Sync + 'static,
{
    let path = &settings.transport.socket_path;
    let mut listener = Listener::new(path, true).map_err(|e| listening(path, e))?;
    loop {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let backend = Arc::new(Backend::new(settings, server.clone(), memory.clone())?);
        let mut daemon = VhostUserDaemon::new("tunnelfs".into(), backend.clone(), memory).map_err(other)?;
        daemon.start(&mut listener).map_err(other)?;
        if let Err(e) = daemon.wait() {
            tracing::info!("guest's connection: {e}");
        }
        backend.stopping.store(true, Ordering::Release);
        for handler in daemon.get_epoll_handlers() {
            handler.send_exit_event();
        }
        drop(daemon);
        server.reset();
        if once {
            return Ok(());
        }
    }
}

fn other(e: impl std::fmt::Display) -> io::Error {
    io::Error::other(e.to_string())
}

/// What one queue's thread owns.
struct QueueState {
    ring: Option<RingDevice>,
    waiter: Waiter,
    placement: Option<Placement>,
}

impl QueueState {
    fn new(wait: WaitConfig) -> Self {
        QueueState { ring: None, waiter: Waiter::new(wait), placement: None }
    }

    /// Takes over the ring that the guest asks for; `decision`: look for the best core too.
    fn start_ring(
        &mut self,
        setup: &RingSetup,
        memory: Arc<GuestMemoryMmap>,
        call: Call,
        decision: Option<&Arc<Decision>>,
    ) -> Result<(), Error> {
        let ring = RingDevice::new(setup, memory, call)?;
        self.placement = ring.guest_cpu.zip(decision).and_then(|(cpu, d)| Placement::new(cpu, d.clone()));
        self.ring = Some(ring);
        self.tell_place();
        Ok(())
    }

    /// Both sides wait as the thread's place has it.
    fn tell_place(&mut self) {
        if let (Some(ring), Some(placement)) = (&self.ring, &self.placement) {
            let hint = placement.place().hint();
            ring.sleep_flag().give_hint(hint);
            self.waiter.advise(hint);
        }
    }

    /// Asks the guest to ring from now on; whether there is something to serve already.
    fn announce_sleep(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| {
            ring.sleep_flag().announce();
            ring.ready()
        })
    }

    fn awake(&mut self) {
        self.waiter.awake();
        if let Some(ring) = &self.ring {
            ring.sleep_flag().clear();
        }
    }
}

thread_local! {
    static SETTLED: OnceCell<()> = const { OnceCell::new() };
}

/// One guest's device.
struct Backend<F> {
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
}

impl<F: FileSystem + Send + Sync + 'static> Backend<F> {
    fn new(settings: &Settings, server: Arc<Server<F>>, memory: virtqueue::Memory) -> io::Result<Self> {
        let (wait, queues) = (settings.wait, settings.transport.queue_count());
        // struct virtio_fs_config: the tag, zero-padded, then the number of request queues.
        let mut config_space = settings.host.tag.clone().into_bytes();
        config_space.resize(TAG_BYTES, 0);
        config_space.extend_from_slice(&(queues as u32).to_le_bytes());
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
        })
    }

    /// The first time: keeps the calling thread on the CPU that the settings have for it.
    fn settle(&self, thread: usize) {
        // Thread 0 has the control queue.
        let cpu = thread.checked_sub(1).and_then(|queue| self.cpus.get(queue % self.cpus.len().max(1)));
        let Some(&cpu) = cpu else { return };
        SETTLED.with(|settled| {
            settled.get_or_init(|| stay_on(&[cpu]).unwrap_or_else(|e| tracing::warn!("host.cpus: {e}")));
        });
    }

    /// Serves a queue until there has been nothing to do for as long as the policy spins.
    fn run_queue(&self, vring: &VringMutex<virtqueue::Memory>, queue: &mut QueueState) -> io::Result<()> {
        queue.awake();
        if queue.ring.is_none() {
            self.run_virtqueue(vring, queue)?;
        } else if !self.serve_ring(queue) {
            // Beside a ring the virtqueue is only looked at when a kick was not for the ring.
            self.serve_virtqueue(vring, queue)?;
        }
        self.run_ring(queue);
        Ok(())
    }

    fn run_virtqueue(&self, vring: &VringMutex<virtqueue::Memory>, queue: &mut QueueState) -> io::Result<()> {
        let _ = vring.disable_notification();
        while !self.stopping.load(Ordering::Acquire) && queue.ring.is_none() {
            if self.serve_virtqueue(vring, queue)? || queue.waiter.spin(|| virtqueue::ready(vring, &self.memory)) {
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

    fn run_ring(&self, queue: &mut QueueState) {
        while queue.ring.is_some() && !self.stopping.load(Ordering::Acquire) {
            let ready = || queue.ring.as_ref().is_some_and(RingDevice::ready);
            if !queue.waiter.spin(ready) {
                if !queue.announce_sleep() {
                    return;
                }
                queue.awake();
            }
            self.serve_ring(queue);
        }
    }

    /// Whether there was anything to serve.
    fn serve_ring(&self, queue: &mut QueueState) -> bool {
        let Some(ring) = &mut queue.ring else { return false };
        let served = ring.serve(&self.server, &self.pool, BATCH).unwrap_or_else(|e| {
            tracing::warn!("closing a ring: {e}");
            0
        });
        if queue.placement.as_mut().is_some_and(|p| p.served(served)) {
            queue.tell_place();
        }
        served > 0
    }

    fn serve_virtqueue(&self, vring: &VringMutex<virtqueue::Memory>, queue: &mut QueueState) -> io::Result<bool> {
        let mut setup = |wanted: RingSetup| {
            if !self.rings {
                return Err(io::ErrorKind::Unsupported.into());
            }
            let bell = vring.clone();
            let call: Call = Arc::new(move || {
                let _ = bell.signal_used_queue();
            });
            let memory = self.memory.memory().clone().into_inner();
            queue.start_ring(&wanted, memory, call, self.placing.as_ref()).map_err(io::Error::other)
        };
        virtqueue::serve(vring, &self.memory, &self.server, &self.pool, &mut setup)
    }
}

impl<F: FileSystem + Send + Sync + 'static> VhostUserBackend for Backend<F> {
    type Bitmap = ();
    type Vring = VringMutex<virtqueue::Memory>;

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
        for queue in &self.queues {
            let mut queue = queue.lock();
            (queue.ring, queue.placement) = (None, None);
        }
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, _memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues.len()).map(|i| 1 << i).collect()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(&self, _event: u16, _set: EventSet, vrings: &[Self::Vring], thread: usize) -> io::Result<()> {
        self.settle(thread);
        self.run_queue(&vrings[0], &mut self.queues[thread].lock())
    }
}
