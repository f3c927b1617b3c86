//! Device side of the ring: entries in, file I/O in place, completions out.

use crate::copy_helper::CopyHelper;
use crate::guest_buf::GuestBuf;
use crate::handler::{Handler, Outcome, Reply};
use crossbeam_utils::CachePadded;
use libc::iovec;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use tunnelfs_ring::{
    Consumer, Cqe, DeviceQueue, Error, NeedWakeup, Producer, RingSetup, SlotTable, Sqe, CPU_UNKNOWN, CQE_INLINE_BYTES,
};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap};

/// Signals the guest's call eventfd.
pub type Notifier = Arc<dyn Fn() + Send + Sync>;

/// The completion queue, shared with the threads of late requests.
pub struct Completions {
    cq: CachePadded<Mutex<Producer<Cqe>>>,
    driver_wakeup: NeedWakeup,
    call: Notifier,
    /// The guest broke the protocol: no more submissions are taken.
    broken: CachePadded<AtomicBool>,
    /// Keeps the guest's memory mapped while a request is in flight.
    _memory: Arc<GuestMemoryMmap>,
}

/// One ring that a guest set up.
pub struct RingDevice {
    sq: Consumer<Sqe>,
    slots: SlotTable,
    own_wakeup: NeedWakeup,
    done: Arc<Completions>,
    /// The CPU that the guest's thread stays on.
    pub guest_cpu: Option<usize>,
}

impl RingDevice {
    /// Checks a guest's set-up message and maps its ring.
    ///
    /// # Errors
    /// [`Error`] when the message or the memory that it names is not acceptable.
    pub fn new(setup: &RingSetup, memory: Arc<GuestMemoryMmap>, call: Notifier) -> Result<Self, Error> {
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
            cq: CachePadded::new(Mutex::new(cq)),
            driver_wakeup: peer_wakeup,
            call,
            broken: CachePadded::new(AtomicBool::new(false)),
            _memory: memory,
        });
        Ok(RingDevice { sq, slots, own_wakeup, done, guest_cpu })
    }

    /// Whether a submission waits, and the ring is not closed.
    pub fn ready(&self) -> bool {
        !self.broken() && self.sq.ready()
    }

    fn broken(&self) -> bool {
        self.done.broken.load(Ordering::Relaxed)
    }

    /// The completion queue.
    pub fn completions(&self) -> &Arc<Completions> {
        &self.done
    }

    /// The flag that asks the guest to kick.
    pub fn own_wakeup(&self) -> &NeedWakeup {
        &self.own_wakeup
    }

    /// Copies the next submission out, and checks its slot; `None`: there is none.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the guest broke the protocol; the ring then stays closed.
    pub fn pop(&mut self) -> Result<Option<Submission>, Error> {
        if self.broken() {
            return Ok(None);
        }
        let Some(sqe) = self.sq.pop() else { return Ok(None) };
        let slot = self.slots.get(&sqe).inspect_err(|_| self.done.close())?;
        Ok(Some(Submission { sqe, slot }))
    }
}

/// One request: the private copy of its SQE, and its slot.
pub struct Submission {
    sqe: Sqe,
    slot: *mut u8,
}

// SAFETY: the slot is only touched by raw copies and system calls, which may run on any thread; `Completions` keeps it
// mapped.
unsafe impl Send for Submission {}

impl Submission {
    /// The request's first bytes.
    pub fn head(&self) -> &[u8] {
        &self.sqe.inline[..self.sqe.inline_len as usize]
    }
}

impl Completions {
    /// Closes the ring: no more submissions are taken.
    pub fn close(&self) {
        self.broken.store(true, Ordering::Relaxed);
    }

    /// Handles a request of this ring, large READs together with `helper`.
    pub fn handle<H: Handler>(&self, request: &Submission, handler: &H, helper: Option<&CopyHelper>) -> Outcome {
        let part = |len: u32| [iovec { iov_base: request.slot.cast(), iov_len: len as usize }];
        let (input, output) = (part(request.sqe.payload_len), part(request.sqe.reply_max));
        // SAFETY: `RingDevice::pop` has checked that both lie in the slot, which this keeps mapped.
        let (input, output) = unsafe { (GuestBuf::new(&input), GuestBuf::new(&output)) };
        handler.handle(request.head(), input, output, helper)
    }

    /// Publishes the completion, also for a request without a reply: it returns the slot to the guest.
    ///
    /// Returns the payload bytes that the request has moved.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the guest broke the protocol; the ring then stays closed.
    pub fn complete(&self, request: &Submission, outcome: Outcome) -> Result<u64, Error> {
        let sqe = &request.sqe;
        let output = [iovec { iov_base: request.slot.cast(), iov_len: sqe.reply_max as usize }];
        // SAFETY: as in `handle`.
        let out = unsafe { GuestBuf::new(&output) };
        let mut cqe = Cqe { user_data: sqe.user_data, payload_len: 0, inline_len: 0, inline: [0; CQE_INLINE_BYTES] };
        if let Outcome::Reply(reply) = outcome {
            write_reply(&mut cqe, sqe, reply, out);
        }
        // There is a CQE for each slot, and a slot is reused only after its completion has been reaped. So a full
        // ring means that the guest has broken the protocol.
        let room = self.cq.lock().push(&cqe).inspect_err(|_| self.close())?;
        if !room {
            self.close();
            return Err(Error::Corrupt("more requests than completions fit"));
        }
        if self.driver_wakeup.take() {
            (self.call)();
        }
        Ok(u64::from(sqe.payload_len) + u64::from(cqe.payload_len))
    }
}

/// Writes `fuse_out_header`, then the reply's structure: into the CQE where it fits, else into the slot.
fn write_reply(cqe: &mut Cqe, sqe: &Sqe, mut reply: Reply, out: GuestBuf<'_>) {
    const HEADER: usize = 16;
    if reply.body().len() > CQE_INLINE_BYTES - HEADER {
        match out.write(0, reply.body()) {
            Ok(()) => cqe.payload_len = reply.body().len() as u32,
            Err(e) => reply = Reply::error(&e),
        }
    }
    cqe.inline_len = HEADER as u32;
    if cqe.payload_len == 0 {
        let body = reply.body();
        cqe.inline[HEADER..HEADER + body.len()].copy_from_slice(body);
        cqe.inline_len += body.len() as u32;
        cqe.payload_len = reply.payload_len as u32;
    }
    cqe.inline[..4].copy_from_slice(&(cqe.inline_len + cqe.payload_len).to_ne_bytes());
    cqe.inline[4..8].copy_from_slice(&reply.error.to_ne_bytes());
    // The request's `unique`, bytes 8 to 16 of both headers.
    cqe.inline[8..16].copy_from_slice(&sqe.inline[8..16]);
}
