//! Serves one queue: its virtqueue, and its ring once the guest has asked for one.

use crate::backend::Device;
use crate::handler::{Handler, Outcome};
use crate::placement::{Decision, Placement};
use crate::request::interrupted_unique;
use crate::shared::serve_for;
use crate::takeover::{Duty, Lane};
use crate::transport::ring::{Call, RingDevice, Served};
use crate::transport::virtqueue::{self, Next};
use crate::vring::Vring;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_ring::{allowed_cpus, set_affinity, Error, Parker, PeerCpu, RingSetup, SpinMode, WaitConfig};
use vhost_user_backend::VringT;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

/// Submissions served in one go before the virtqueue gets its turn.
const BATCH: u32 = 256;
/// Pause after an error of the queue, before it is looked at again: a guest that has broken it may make errors for ever.
const ERROR_PAUSE: Duration = Duration::from_millis(10);

/// What the thread of a queue owns.
pub struct Queue<H: Handler> {
    device: Arc<Device<H>>,
    number: usize,
    vring: Vring,
    ring: Option<RingDevice>,
    parker: Parker,
    placement: Option<Placement>,
    /// Whose ring it is.
    driver: u32,
    /// Errors have been told once.
    told: bool,
}

/// A queue that its thread still has, and something else; `None`: another thread has taken it over.
type Kept<H, T> = Option<(Box<Queue<H>>, T)>;

impl<H: Handler> Duty for Queue<H> {
    fn run(self: Box<Self>, lane: &Lane<Self>) {
        lane.set_number(self.number);
        let pinned = self.take_place();
        let mut queue = self;
        while !queue.device.is_stopping() {
            match queue.serve(lane) {
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

impl<H: Handler> Queue<H> {
    pub fn new(device: Arc<Device<H>>, number: usize, vring: Vring, wait: WaitConfig) -> Self {
        let mut parker = Parker::new(wait);
        parker.set_mode(SpinMode::Yield);
        Queue { device, number, vring, ring: None, parker, placement: None, driver: 0, told: false }
    }

    /// Moves the calling thread to the queue's CPU, if it has one.
    fn take_place(&self) -> bool {
        if let Some(cpu) = self.device.cpu(self.number) {
            set_affinity(&[cpu]).unwrap_or_else(|e| tracing::warn!("host.cpus: {e}"));
            return true;
        }
        self.placement.iter().for_each(Placement::take_over);
        self.device.may_place()
    }

    /// Serves until there has been nothing to do for as long as the policy spins, then sleeps.
    fn serve(mut self: Box<Self>, lane: &Lane<Self>) -> Kept<H, ()> {
        let served;
        (self, served) = self.serve_all(lane)?;
        if let Err(e) = served {
            if !std::mem::replace(&mut self.told, true) {
                tracing::warn!("queue {}: {e}; it is tried again with each kick", self.number);
            }
            std::thread::sleep(ERROR_PAUSE);
        }
        if !self.device.is_stopping() {
            self.vring.sleep();
        }
        Some((self, ()))
    }

    /// Until nothing is left, and the driver knows that it must kick.
    fn serve_all(mut self: Box<Self>, lane: &Lane<Self>) -> Kept<H, io::Result<()>> {
        self.awake();
        let done;
        if self.ring.is_none() {
            (self, done) = self.run_virtqueue(lane)?;
        } else {
            let more;
            (self, more) = self.serve_ring(lane)?;
            if more {
                return self.run_ring(lane).map(|(queue, ())| (queue, Ok(())));
            }
            // Beside a ring the virtqueue is only looked at when a kick was not for the ring.
            let served;
            (self, served) = self.serve_virtqueue(lane)?;
            done = served.map(|_| ());
        }
        if done.is_err() {
            return Some((self, done));
        }
        self.run_ring(lane).map(|(queue, ())| (queue, Ok(())))
    }

    fn run_virtqueue(mut self: Box<Self>, lane: &Lane<Self>) -> Kept<H, io::Result<()>> {
        self.ask_for_kicks(false);
        while !self.device.is_stopping() && self.ring.is_none() {
            let served;
            (self, served) = self.serve_virtqueue(lane)?;
            match served {
                Ok(true) => continue,
                Ok(false) => {}
                Err(e) => {
                    self.ask_for_kicks(true);
                    return Some((self, Err(e)));
                }
            }
            let (vring, memory) = (&self.vring, &self.device.memory);
            let ready = || vring.gate().is_closing() || virtqueue::ready(vring, memory);
            if self.parker.spin(ready) && !self.vring.gate().is_closing() {
                continue;
            }
            if !self.ask_for_kicks(true) {
                return Some((self, Ok(())));
            }
            self.awake();
            self.ask_for_kicks(false);
        }
        if self.ask_for_kicks(true) {
            let served;
            (self, served) = self.serve_virtqueue(lane)?;
            return Some((self, served.map(|_| ())));
        }
        Some((self, Ok(())))
    }

    /// Whether the driver is to kick from now on; returns whether there is something to serve already.
    fn ask_for_kicks(&self, wanted: bool) -> bool {
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

    fn run_ring(mut self: Box<Self>, lane: &Lane<Self>) -> Kept<H, ()> {
        while self.ring.is_some() && !self.device.is_stopping() {
            if !self.spin() {
                let Some(pass) = self.vring.gate().enter() else { break };
                self.meet(pass.driver);
                let sleep = self.ring.is_some() && !self.announce_sleep();
                self.vring.gate().leave();
                if sleep {
                    break;
                }
                self.awake();
            }
            let served;
            (self, served) = self.serve_ring(lane)?;
            if !served && self.vring.gate().is_closing() {
                break;
            }
        }
        Some((self, ()))
    }

    /// Whether there was anything to serve.
    fn serve_ring(mut self: Box<Self>, lane: &Lane<Self>) -> Kept<H, bool> {
        let Some(pass) = self.vring.gate().enter() else { return Some((self, false)) };
        self.meet(pass.driver);
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
            lane.lend(self, unique);
            let outcome = device.outcome(request.head(), || done.handle(&request, device.handler(), helper.as_deref()));
            match lane.reclaim() {
                Some(queue) => self = queue,
                None => {
                    let deliver = move || {
                        done.complete(&request, outcome).unwrap_or_else(close);
                    };
                    vring.gate().finish_late(pass, deliver);
                    lane.leave();
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

    /// Whether there was anything to serve.
    fn serve_virtqueue(mut self: Box<Self>, lane: &Lane<Self>) -> Kept<H, io::Result<bool>> {
        let Some(pass) = self.vring.gate().enter() else { return Some((self, Ok(false))) };
        self.meet(pass.driver);
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
                        lane.lend(self, unique(request.head()));
                        let outcome = device.outcome(request.head(), || request.handle(device.handler()));
                        match lane.reclaim() {
                            Some(queue) => self = queue,
                            None => {
                                let its = vring.clone();
                                vring.gate().finish_late(pass, move || request.complete(&its, outcome));
                                lane.leave();
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

    /// Takes over the ring that the guest asks for.
    fn start_ring(&mut self, setup: &RingSetup, memory: Arc<GuestMemoryMmap>) -> io::Result<()> {
        if !self.device.rings {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let bell = self.vring.clone();
        let call: Call = Arc::new(move || {
            let _ = bell.signal_used_queue();
        });
        let ring = RingDevice::new(setup, memory, call).map_err(|e| {
            tracing::warn!("queue {}: a guest's ring is refused: {e}", self.number);
            io::Error::other(e)
        })?;
        let (wait, decision) = (self.parker.config(), self.device.placing.as_ref());
        self.placement = ring
            .guest_cpu
            .zip(decision)
            .and_then(|(cpu, d): (usize, &Arc<Decision>)| Placement::new(cpu, d.clone(), wait));
        self.ring = Some(ring);
        self.publish_cpu();
        Ok(())
    }

    /// A new driver has set up everything anew: its predecessor's memory is not ours any more.
    fn meet(&mut self, driver: u32) {
        if driver != self.driver {
            self.driver = driver;
            (self.ring, self.placement) = (None, None);
            self.publish_cpu();
        }
    }

    /// Spins for the ring as the policy says.
    fn spin(&mut self) -> bool {
        let Some(ring) = &self.ring else { return false };
        let gate = self.vring.gate();
        self.parker.spin(|| ring.ready() || gate.is_closing())
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
        if self.ring.is_none() {
            return;
        }
        if let Some(pass) = self.vring.gate().enter() {
            self.meet(pass.driver);
            self.ring.iter().for_each(|ring| ring.own_wakeup().clear());
            self.vring.gate().leave();
        }
    }
}

/// FUSE's number of a request.
fn unique(head: &[u8]) -> u64 {
    head.get(8..16).map_or(0, |bytes| u64::from_ne_bytes(bytes.try_into().expect("eight bytes")))
}

impl<H: Handler> Device<H> {
    /// Handles a request; INTERRUPT is this module's own.
    fn outcome(&self, head: &[u8], handle: impl FnOnce() -> Outcome) -> Outcome {
        match interrupted_unique(head) {
            Some(unique) => {
                self.crew.interrupt(unique);
                Outcome::NoReply
            }
            None => handle(),
        }
    }
}
