//! Serves one queue: its virtqueue, and its ring once the guest has asked for one.

use crate::guest_buf::{self, serve_for};
use crate::handler::{Handler, Outcome};
use crate::live::Live;
use crate::memory::Memory;
use crate::placement::{Placement, PlacementTuner, Served};
use crate::request::{interrupted_unique, unique, waits_for_changes};
use crate::takeover::{Task, Worker, WorkerPool};
use crate::transport::ring::{Notifier, RingDevice};
use crate::transport::virtqueue::{self, Next};
use crate::vring::Vring;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tunnelfs_ring::{allowed_cpus, set_affinity, Error, LiveWait, Parker, PeerCpu, Policy, RingSetup, SpinMode};
use tunnelfs_settings::{Settings, TransportKind};
use vhost_user_backend::VringT;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

/// Submissions served in one go before the virtqueue gets its turn.
const BATCH: u32 = 256;
/// Pause after an error, before the queue is served again. A guest that has broken its queue may cause errors for ever.
const ERROR_PAUSE: Duration = Duration::from_millis(10);

/// Shared by the queues of one guest.
pub struct DeviceContext<H: Handler> {
    handler: OnceLock<H>,
    wait: LiveWait,
    pub memory: Memory,
    pub pool: WorkerPool<QueueThread<H>>,
    /// Whether guests may have rings.
    pub rings: bool,
    /// CPUs for the queues' threads, in turn. Empty: `tuner` may choose.
    cpus: Vec<usize>,
    /// Finds the best CPUs, if threads may be moved.
    pub tuner: Option<Arc<PlacementTuner>>,
    stopping: AtomicBool,
    /// `unique` of the last request that waited for changes; 0 after its driver has gone.
    waiting: AtomicU64,
}

impl<H: Handler> DeviceContext<H> {
    /// The context of a new device, whose threads are `pool`'s.
    pub fn new(settings: &Settings, live: Live, memory: Memory, pool: WorkerPool<QueueThread<H>>) -> Self {
        let may_place = settings.wait.policy == Policy::Auto && settings.host.cpus.is_empty();
        DeviceContext {
            handler: OnceLock::new(),
            wait: live.wait,
            memory,
            pool,
            rings: settings.transport.kind == TransportKind::Ring,
            cpus: settings.host.cpus.clone(),
            tuner: may_place.then(|| Arc::new(PlacementTuner::new())),
            stopping: AtomicBool::new(false),
            waiting: AtomicU64::new(0),
        }
    }

    /// Sets what serves requests, before the queues' threads start.
    pub fn set_handler(&self, handler: H) {
        let _ = self.handler.set(handler);
    }

    /// Forgets all that the guest had open.
    pub fn reset_handler(&self) {
        self.handler.get().into_iter().for_each(Handler::reset);
    }

    /// Has the queues' threads end.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// What serves requests. The queues' threads start after it is set.
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
        self.tuner.is_some()
    }
}

/// Owned by the thread that serves the queue.
pub struct QueueThread<H: Handler> {
    device: Arc<DeviceContext<H>>,
    number: usize,
    vring: Vring,
    ring: Option<RingDevice>,
    parker: Parker,
    placement: Option<Placement>,
    /// The driver that set up the ring, as [`crate::gate::Pass`] numbers it.
    driver: u32,
    /// An error has been logged.
    logged: bool,
}

/// The queue, if this thread still has it, and a result. `None`: another thread has taken the queue over.
type Kept<H, T> = Option<(Box<QueueThread<H>>, T)>;

impl<H: Handler> Task for QueueThread<H> {
    fn run(self: Box<Self>, worker: &Worker<Self>) {
        worker.set_number(self.number);
        let pinned = self.take_place();
        let mut queue = self;
        while !queue.device.is_stopping() {
            match queue.serve(worker) {
                Some((next, ())) => queue = next,
                None => break,
            }
        }
        if pinned {
            let _ = set_affinity(&allowed_cpus());
        }
    }

    fn taken(&mut self) {
        self.vring.gate().taken_over();
    }
}

impl<H: Handler> QueueThread<H> {
    pub fn new(device: Arc<DeviceContext<H>>, number: usize, vring: Vring) -> Self {
        let parker = Parker::with_mode(&device.wait, SpinMode::Yield);
        QueueThread { device, number, vring, ring: None, parker, placement: None, driver: 0, logged: false }
    }

    /// Moves the calling thread to the queue's CPU, if it has one. Returns whether the thread may have moved.
    fn take_place(&self) -> bool {
        if let Some(cpu) = self.device.cpu(self.number) {
            set_affinity(&[cpu]).unwrap_or_else(|e| tracing::warn!("host.cpus: {e}"));
            return true;
        }
        self.placement.iter().for_each(Placement::take_over);
        self.device.may_place()
    }

    /// Serves the queue until it is empty and the policy says sleep. Then sleeps until the next kick.
    fn serve(mut self: Box<Self>, worker: &Worker<Self>) -> Kept<H, ()> {
        let served;
        (self, served) = self.serve_all(worker)?;
        if let Err(e) = served {
            if !std::mem::replace(&mut self.logged, true) {
                tracing::warn!("queue {}: {e}; trying again with each kick", self.number);
            }
            std::thread::sleep(ERROR_PAUSE);
        }
        if !self.device.is_stopping() {
            self.vring.sleep();
        }
        Some((self, ()))
    }

    /// Serves until the queue is empty and the driver has been told to kick.
    fn serve_all(mut self: Box<Self>, worker: &Worker<Self>) -> Kept<H, io::Result<()>> {
        self.disarm();
        let done;
        if self.ring.is_none() {
            (self, done) = self.run_virtqueue(worker)?;
        } else {
            let more;
            (self, more) = self.serve_ring(worker)?;
            if more {
                return self.run_ring(worker).map(|(queue, ())| (queue, Ok(())));
            }
            // With a ring, the virtqueue is served only after a kick that brought nothing into the ring.
            let served;
            (self, served) = self.serve_virtqueue(worker)?;
            done = served.map(|_| ());
        }
        if done.is_err() {
            return Some((self, done));
        }
        self.run_ring(worker).map(|(queue, ())| (queue, Ok(())))
    }

    fn run_virtqueue(mut self: Box<Self>, worker: &Worker<Self>) -> Kept<H, io::Result<()>> {
        self.set_notifications(false);
        while !self.device.is_stopping() && self.ring.is_none() {
            let served;
            (self, served) = self.serve_virtqueue(worker)?;
            match served {
                Ok(true) => continue,
                Ok(false) => {}
                Err(e) => {
                    self.set_notifications(true);
                    return Some((self, Err(e)));
                }
            }
            let (vring, memory) = (&self.vring, &self.device.memory);
            let ready = || vring.gate().is_closing() || virtqueue::ready(vring, memory);
            if self.parker.spin(ready) && !self.vring.gate().is_closing() {
                continue;
            }
            if !self.set_notifications(true) {
                return Some((self, Ok(())));
            }
            self.disarm();
            self.set_notifications(false);
        }
        if self.set_notifications(true) {
            let served;
            (self, served) = self.serve_virtqueue(worker)?;
            return Some((self, served.map(|_| ())));
        }
        Some((self, Ok(())))
    }

    /// Tells the driver whether to kick from now on. Returns whether the virtqueue has a request already.
    fn set_notifications(&self, wanted: bool) -> bool {
        let gate = self.vring.gate();
        if gate.enter().is_none() {
            return false;
        }
        let more = if wanted {
            self.vring.enable_notification().unwrap_or(false)
        } else {
            let _ = self.vring.disable_notification();
            false
        };
        gate.leave();
        more
    }

    fn run_ring(mut self: Box<Self>, worker: &Worker<Self>) -> Kept<H, ()> {
        while self.ring.is_some() && !self.device.is_stopping() {
            if !self.spin() {
                let Some(pass) = self.vring.gate().enter() else { break };
                self.check_driver(pass.driver);
                let sleep = self.ring.is_some() && !self.arm();
                self.vring.gate().leave();
                if sleep {
                    break;
                }
                self.disarm();
            }
            let served;
            (self, served) = self.serve_ring(worker)?;
            if !served && self.vring.gate().is_closing() {
                break;
            }
        }
        Some((self, ()))
    }

    /// Serves a batch. Returns whether there was a request.
    fn serve_ring(mut self: Box<Self>, worker: &Worker<Self>) -> Kept<H, bool> {
        let Some(pass) = self.vring.gate().enter() else { return Some((self, false)) };
        self.check_driver(pass.driver);
        let Some(ring) = &self.ring else {
            self.vring.gate().leave();
            return Some((self, false));
        };
        let vring = self.vring.clone();
        serve_for(&vring, pass);
        let (done, device) = (ring.completions().clone(), self.device.clone());
        let helper = self.placement.as_ref().and_then(Placement::helper).cloned();
        let mut served = Served::default();
        let close = |e: Error| {
            tracing::warn!("closing a ring: {e}");
            0
        };
        while served.requests < BATCH && !vring.gate().is_closing() {
            let popped = self.ring.as_mut().map_or(Ok(None), RingDevice::pop);
            let Some(request) = popped.unwrap_or_else(|e| {
                close(e);
                None
            }) else {
                break;
            };
            served.requests += 1;
            let unique = unique(request.head());
            worker.lend(self, unique);
            let outcome =
                device.outcome(worker, request.head(), || done.handle(&request, device.handler(), helper.as_deref()));
            match worker.reclaim() {
                Some(queue) => self = queue,
                None => {
                    let deliver = move || {
                        guest_buf::deliver();
                        done.complete(&request, outcome).unwrap_or_else(close);
                    };
                    vring.gate().finish_late(pass, deliver);
                    worker.leave();
                    return None;
                }
            }
            served.bytes += done.complete(&request, outcome).unwrap_or_else(close);
        }
        vring.gate().leave();
        if self.placement.as_mut().is_some_and(|p| p.served(served)) {
            self.publish_cpu();
        }
        Some((self, served.requests > 0))
    }

    /// Serves a batch. Returns whether there was a request.
    fn serve_virtqueue(mut self: Box<Self>, worker: &Worker<Self>) -> Kept<H, io::Result<bool>> {
        let Some(pass) = self.vring.gate().enter() else { return Some((self, Ok(false))) };
        self.check_driver(pass.driver);
        let (vring, device) = (self.vring.clone(), self.device.clone());
        serve_for(&vring, pass);
        let memory: Arc<GuestMemoryMmap> = device.memory.memory().clone().into_inner();
        let mut result = Ok(false);
        for _ in 0..virtqueue::lap(&vring) {
            if vring.gate().is_closing() {
                break;
            }
            match virtqueue::pop(&vring, &memory) {
                Ok(Next::Empty) => break,
                Ok(Next::Broken) => {}
                Ok(Next::Request(request)) => {
                    if let Some(setup) = request.setup() {
                        let accepted = setup.and_then(|setup| self.start_ring(&setup, memory.clone()));
                        request.accept(&vring, &accepted);
                    } else {
                        worker.lend(self, unique(request.head()));
                        let outcome = device.outcome(worker, request.head(), || request.handle(device.handler()));
                        match worker.reclaim() {
                            Some(queue) => self = queue,
                            None => {
                                let its = vring.clone();
                                vring.gate().finish_late(pass, move || {
                                    guest_buf::deliver();
                                    request.complete(&its, outcome);
                                });
                                worker.leave();
                                return None;
                            }
                        }
                        request.complete(&vring, outcome);
                    }
                }
                Err(e) => {
                    result = Err(e);
                    break;
                }
            }
            result = Ok(true);
        }
        vring.gate().leave();
        Some((self, result))
    }

    /// Sets up the ring that the guest asks for.
    fn start_ring(&mut self, setup: &RingSetup, memory: Arc<GuestMemoryMmap>) -> io::Result<()> {
        if !self.device.rings {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let vring = self.vring.clone();
        let call: Notifier = Arc::new(move || {
            let _ = vring.signal_used_queue();
        });
        let ring = RingDevice::new(setup, memory, call).map_err(|e| {
            tracing::warn!("queue {}: a guest's ring is refused: {e}", self.number);
            io::Error::other(e)
        })?;
        let (wait, tuner) = (self.parker.live().clone(), self.device.tuner.as_ref());
        self.placement = ring
            .guest_cpu
            .zip(tuner)
            .and_then(|(cpu, d): (usize, &Arc<PlacementTuner>)| Placement::new(cpu, d.clone(), wait));
        self.ring = Some(ring);
        self.publish_cpu();
        Ok(())
    }

    /// Drops the ring of a former driver: its memory may not be used any more.
    fn check_driver(&mut self, driver: u32) {
        if driver != self.driver {
            self.driver = driver;
            (self.ring, self.placement) = (None, None);
            self.publish_cpu();
        }
    }

    /// Spins as the policy says. Returns whether the ring has a request.
    fn spin(&mut self) -> bool {
        let Some(ring) = &self.ring else { return false };
        let gate = self.vring.gate();
        self.parker.spin(|| ring.ready() || gate.is_closing())
    }

    /// Tells the guest where this thread runs, and sets the way of spinning: a guest whose CPU is unknown may need this
    /// core.
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

    /// Tells the guest to kick for the ring. Returns whether the ring has a request already.
    fn arm(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| {
            ring.own_wakeup().set();
            ring.ready()
        })
    }

    fn disarm(&mut self) {
        self.parker.unparked();
        if self.ring.is_none() {
            return;
        }
        if let Some(pass) = self.vring.gate().enter() {
            self.check_driver(pass.driver);
            self.ring.iter().for_each(|ring| ring.own_wakeup().clear());
            self.vring.gate().leave();
        }
    }
}

impl<H: Handler> DeviceContext<H> {
    /// Handles a request. INTERRUPT also goes to the thread that serves the other request.
    fn outcome(&self, worker: &Worker<QueueThread<H>>, head: &[u8], handle: impl FnOnce() -> Outcome) -> Outcome {
        if waits_for_changes(head) {
            self.waiting.store(unique(head), Ordering::Relaxed);
            return self.pool.wait_apart(worker, handle);
        }
        if let Some(interrupted) = interrupted_unique(head) {
            self.pool.interrupt(interrupted);
        }
        handle()
    }

    /// Ends the request that waits for changes, if there is one: its driver has gone.
    pub fn end_waiting(&self) {
        let waiting = self.waiting.swap(0, Ordering::Relaxed);
        if waiting != 0 {
            self.pool.interrupt(waiting);
        }
    }
}
