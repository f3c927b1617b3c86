//! Device side of the ring: entries in, file I/O in place, completions out.

use crate::pool::{Budget, Pool};
use crate::server::{Caller, Helper, Outcome, Reply, Server};
use crate::shared::Shared;
use libc::iovec;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use tunnelfs_ring::{
    Consumer, Cqe, DeviceQueue, Error, NeedWakeup, Producer, RingSetup, SlotTable, Sqe, CPU_UNKNOWN, CQE_INLINE_BYTES,
};
use virtiofsd::filesystem::FileSystem;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap};

/// Rings the guest's doorbell.
pub type Call = Arc<dyn Fn() + Send + Sync>;

/// The completing half, shared with pool threads.
struct Completions {
    cq: Mutex<Producer<Cqe>>,
    driver_wakeup: NeedWakeup,
    call: Call,
    /// The guest broke the protocol: nothing is taken any more.
    broken: AtomicBool,
    /// Keeps the guest's memory mapped while a request is under way.
    _memory: Arc<GuestMemoryMmap>,
}

/// What a queue has served.
#[derive(Clone, Copy, Debug, Default)]
pub struct Served {
    /// Requests.
    pub requests: u32,
    /// Their payload bytes, both ways.
    pub bytes: u64,
}

impl std::ops::AddAssign for Served {
    fn add_assign(&mut self, more: Served) {
        self.requests += more.requests;
        self.bytes += more.bytes;
    }
}

/// One ring that a guest set up.
pub struct RingDevice {
    sq: Consumer<Sqe>,
    slots: SlotTable,
    own_wakeup: NeedWakeup,
    done: Arc<Completions>,
    /// Requests that the pool has.
    handed_over: Budget,
    /// The CPU that the guest's thread stays on.
    pub guest_cpu: Option<usize>,
}

impl RingDevice {
    /// Checks a guest's set-up message and takes the ring over; `pool`: the queue's requests there.
    ///
    /// # Errors
    /// [`Error`] when the message or the memory that it names is not acceptable.
    pub fn new(setup: &RingSetup, memory: Arc<GuestMemoryMmap>, call: Call, pool: &Budget) -> Result<Self, Error> {
        let mapped = |address: u64, bytes: usize| {
            let slice = memory.get_slice(GuestAddress(address), bytes);
            let start =
                slice.map_err(|_| Error::Corrupt("ring outside of the guest's memory"))?.ptr_guard_mut().as_ptr();
            if start as usize % tunnelfs_ring::PAGE != 0 {
                return Err(Error::Corrupt("ring not page-aligned"));
            }
            Ok(start)
        };
        let size = setup.geometry.slot_size;
        let mut slots = Vec::with_capacity(setup.geometry.slots as usize);
        for run in &setup.runs {
            let start = mapped(run.address, run.bytes(size) as usize)?;
            // The whole run is mapped: none of these leaves it.
            slots.extend((0..run.slots as usize).map(|i| start.wrapping_add(i * size as usize)));
        }
        let control = mapped(setup.control, setup.geometry.control_bytes())?;
        // SAFETY: `mapped` has checked all parts, and `Completions` keeps the mapping alive.
        let queue = unsafe { DeviceQueue::new(control, slots, setup.geometry)? };
        let DeviceQueue { sq, cq, peer_wakeup, own_wakeup, slots } = queue;
        let guest_cpu = (setup.cpu != CPU_UNKNOWN).then_some(setup.cpu as usize);
        let done = Arc::new(Completions {
            cq: Mutex::new(cq),
            driver_wakeup: peer_wakeup,
            call,
            broken: AtomicBool::new(false),
            _memory: memory,
        });
        let handed_over = pool.limited(setup.geometry.entries);
        Ok(RingDevice { sq, slots, own_wakeup, done, handed_over, guest_cpu })
    }

    /// Whether a submission waits that could be served.
    pub fn ready(&self) -> bool {
        !self.broken() && self.sq.ready()
    }

    fn broken(&self) -> bool {
        self.done.broken.load(Ordering::Relaxed)
    }

    /// The "host sleeps" flag.
    pub fn own_wakeup(&self) -> &NeedWakeup {
        &self.own_wakeup
    }

    /// Serves what has been submitted, at most `limit` requests, large READs together with `helper`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the guest broke the protocol; the ring then stays closed.
    pub fn serve<F>(
        &mut self,
        server: &Arc<Server<F>>,
        pool: &Pool,
        helper: Option<&Helper>,
        limit: u32,
    ) -> Result<Served, Error>
    where
        F: FileSystem + Send + Sync + 'static,
    {
        let mut served = Served::default();
        while served.requests < limit {
            if self.broken() {
                break;
            }
            let Some(sqe) = self.sq.pop() else { break };
            served.requests += 1;
            let moved = self.serve_one(sqe, server, pool, helper);
            served.bytes += moved.inspect_err(|_| self.done.broken.store(true, Ordering::Relaxed))?;
        }
        Ok(served)
    }

    /// Returns the payload bytes that were moved at once.
    fn serve_one<F>(
        &self,
        sqe: Sqe,
        server: &Arc<Server<F>>,
        pool: &Pool,
        helper: Option<&Helper>,
    ) -> Result<u64, Error>
    where
        F: FileSystem + Send + Sync + 'static,
    {
        let ptr = self.slots.get(&sqe)?;
        let input = [iovec { iov_base: ptr.cast(), iov_len: sqe.payload_len as usize }];
        let output = [iovec { iov_base: ptr.cast(), iov_len: sqe.reply_max as usize }];
        // SAFETY: `of` has checked that both lie in the slot.
        let (input, output) = unsafe { (Shared::new(&input), Shared::new(&output)) };
        match server.handle(&sqe.inline[..sqe.inline_len as usize], input, output, Caller::Queue(helper)) {
            Outcome::WouldBlock => {
                let share = self.handed_over.take().ok_or(Error::Corrupt("more requests than completions fit"))?;
                let (input, output) = (input.to_buf(), output.to_buf());
                let (done, server) = (self.done.clone(), server.clone());
                pool.run(Box::new(move || {
                    let (input, output, share) = (input, output, share);
                    if share.is_abandoned() {
                        return;
                    }
                    // SAFETY: still in the slot, whose mapping `done` keeps.
                    let (payload, out) = unsafe { (Shared::new(&input.0), Shared::new(&output.0)) };
                    let outcome = server.handle(&sqe.inline[..sqe.inline_len as usize], payload, out, Caller::Patient);
                    if share.is_abandoned() {
                        return;
                    }
                    if let Err(e) = done.complete(&sqe, outcome, out) {
                        tracing::warn!("closing a ring: {e}");
                        done.broken.store(true, Ordering::Relaxed);
                    }
                }));
                Ok(0)
            }
            outcome => self.done.complete(&sqe, outcome, output),
        }
    }
}

impl Completions {
    /// Publishes the completion, also of a request without a reply: the guest gets its slot back.
    ///
    /// Returns the payload bytes that the request has moved.
    fn complete(&self, sqe: &Sqe, outcome: Outcome, out: Shared<'_>) -> Result<u64, Error> {
        let mut cqe = Cqe { user_data: sqe.user_data, payload_len: 0, inline_len: 0, inline: [0; CQE_INLINE_BYTES] };
        if let Outcome::Reply(reply) = outcome {
            fill(&mut cqe, sqe, reply, out);
        }
        // A guest reuses a slot only after it has reaped, and has no more slots
        // than entries: one that lets the ring fill up has broken the protocol.
        if !self.cq.lock().push(&cqe)? {
            return Err(Error::Corrupt("more requests than completions fit"));
        }
        if self.driver_wakeup.take() {
            (self.call)();
        }
        Ok(u64::from(sqe.payload_len) + u64::from(cqe.payload_len))
    }
}

/// `fuse_out_header`, then the reply's structure: in the entry where it fits, else in the slot.
fn fill(cqe: &mut Cqe, sqe: &Sqe, mut reply: Reply, out: Shared<'_>) {
    const HEADER: usize = 16;
    if reply.fixed().len() > CQE_INLINE_BYTES - HEADER {
        match out.write(0, reply.fixed()) {
            Ok(()) => cqe.payload_len = reply.fixed().len() as u32,
            Err(e) => reply = Reply::error(&e),
        }
    }
    cqe.inline_len = HEADER as u32;
    if cqe.payload_len == 0 {
        let fixed = reply.fixed();
        cqe.inline[HEADER..HEADER + fixed.len()].copy_from_slice(fixed);
        cqe.inline_len += fixed.len() as u32;
        cqe.payload_len = reply.in_place as u32;
    }
    cqe.inline[..4].copy_from_slice(&(cqe.inline_len + cqe.payload_len).to_ne_bytes());
    cqe.inline[4..8].copy_from_slice(&reply.error.to_ne_bytes());
    // The request's `unique`, bytes 8 to 16 of both headers.
    cqe.inline[8..16].copy_from_slice(&sqe.inline[8..16]);
}
