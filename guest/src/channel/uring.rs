//! FUSE-over-io_uring: the kernel itself fills and drains the slots. Each slot is the payload buffer of one ring entry
//! until the unmount; the headers are in private memory.
//!
//! Source of the protocol: `struct fuse_uring_req_header`, `fuse_uring_ent_in_out`
//! and `fuse_uring_cmd_req` of linux/fuse.h 7.42, and the kernel's fs/fuse/dev_uring.c.

use super::pending::PendingQueue;
use super::request::Reply;
use crate::error::Error;
use crate::fuse::device::uring_hint;
use crate::fuse::message::{request_len, request_opcode, IN_HEADER, OUT_HEADER};
use io_uring::squeue::Entry128;
use io_uring::{cqueue, opcode, types, IoUring};
use libc::iovec;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_ring::{hand_off, LiveWait, Parker, SpinMode, SQE_INLINE_BYTES};

/// `enum fuse_uring_cmd`.
const REGISTER: u32 = 1;
const COMMIT_AND_FETCH: u32 = 2;
/// Offset of `len` in `struct io_uring_sqe` (linux/io_uring.h): the crate sets only `addr`.
const SQE_LEN_OFFSET: usize = 24;
/// Number of buffers of an entry: headers and payload.
const IOVECS: usize = 2;
/// `user_data` of polls; a ring entry's is its slot. The low 32 bits of the first two are the transport's number.
const POLL_CALL: u64 = 1 << 32;
const POLL_HANGUP: u64 = 2 << 32;
const POLL_REMOVE: u64 = 3 << 32;

/// `struct fuse_uring_req_header`: 128 + 128 + 32 bytes.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Headers {
    in_out: [u8; 128],
    op_in: [u8; 128],
    flags: u64,
    commit_id: u64,
    payload_sz: u32,
    padding: u32,
    reserved: u64,
}

const _: () = assert!(size_of::<Headers>() == 288 && size_of::<Entry128>() == 128);

/// Memory whose address the kernel has. It does not move, and is accessed by raw pointers only. (Not a `Box`: moving
/// one asserts that no other pointer to its content is in use.)
struct PinnedArray<T> {
    start: *mut T,
    count: usize,
}

impl<T: Copy> PinnedArray<T> {
    fn new(content: Vec<T>) -> Self {
        let count = content.len();
        PinnedArray { start: Box::into_raw(content.into_boxed_slice()).cast(), count }
    }

    fn at(&self, index: usize) -> *mut T {
        assert!(index < self.count);
        // SAFETY: the index was just checked.
        unsafe { self.start.add(index) }
    }
}

impl<T> Drop for PinnedArray<T> {
    fn drop(&mut self) {
        // SAFETY: `new` made the pointer and the length from a boxed slice.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(self.start, self.count)) });
    }
}

pub struct Channel {
    ring: IoUring<Entry128, cqueue::Entry>,
    device: Arc<OwnedFd>,
    queue: PendingQueue,
    /// The kernel queue of each slot's entry.
    qid: Vec<u16>,
    /// By slot; the kernel writes them.
    headers: PinnedArray<Headers>,
    /// By slot: its headers and payload; the kernel reads them.
    iovecs: PinnedArray<[iovec; IOVECS]>,
    /// Number of entries that the kernel has returned because of the unmount.
    ended: usize,
    /// Whether a poll of the call eventfd is armed.
    call_armed: bool,
    /// Number of the transport whose descriptors are polled.
    transport_id: u32,
    /// Spins for the kernel's next request; `None`: sleeps at once.
    kernel_parker: Option<Parker>,
}

impl Channel {
    /// Registers every slot with the kernel, as an entry of the `kernel_queues` in turn.
    ///
    /// # Errors
    /// [`Error::Setup`] if there are fewer slots than kernel queues.
    pub fn new(
        device: Arc<OwnedFd>,
        kernel_queues: Vec<u16>,
        kernel_wait: Option<LiveWait>,
        queue: PendingQueue,
    ) -> Result<Self, Error> {
        let count = queue.transport.slots() as usize;
        if count < kernel_queues.len() {
            return Err(Error::Setup(format!(
                "slots = {count}: FUSE-over-io_uring needs at least {} here, one a CPU",
                kernel_queues.len()
            )));
        }
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build((count as u32 + 4).next_power_of_two())?;
        // SAFETY: all-zero bytes are a valid `Headers`.
        let headers = PinnedArray::new(vec![unsafe { std::mem::zeroed::<Headers>() }; count]);
        let iovecs = (0..count).map(|slot| {
            let (payload, size) = queue.transport.slot(slot as u32);
            [
                iovec { iov_base: headers.at(slot).cast(), iov_len: size_of::<Headers>() },
                iovec { iov_base: payload.cast(), iov_len: size },
            ]
        });
        let iovecs = PinnedArray::new(iovecs.collect());
        let qid = kernel_queues.iter().copied().cycle().take(count).collect();
        let mut channel = Channel {
            ring,
            device,
            queue,
            qid,
            headers,
            iovecs,
            ended: 0,
            call_armed: false,
            transport_id: 0,
            // Yield: threads of other vCPUs may need this core.
            kernel_parker: kernel_wait.map(|wait| Parker::with_mode(wait, SpinMode::Yield)),
        };
        for slot in 0..count as u32 {
            channel.push(channel.command(REGISTER, slot, 0))?;
        }
        channel.poll_hangup()?;
        Ok(channel)
    }

    /// Serves until the file system is unmounted.
    pub fn run(mut self) -> Result<(), Error> {
        loop {
            self.process_cqes()?;
            // The other entries are with the host; after the unmount nobody waits for their replies.
            if self.ended > 0 && self.ended + self.queue.pending() >= self.qid.len() {
                return Ok(());
            }
            while let Some(answer) = self.queue.reap()? {
                self.commit(&answer)?;
            }
            if self.queue.has_undelivered() {
                self.flush()?;
                self.queue.delivered();
            }
            self.wait()?;
        }
    }

    /// Waits for the kernel, and for the host if requests are pending. Submits the committed replies first.
    fn wait(&mut self) -> Result<(), Error> {
        self.rearm_polls()?;
        if self.queue.pending() == 0 {
            return self.wait_for_kernel();
        }
        self.flush()?;
        let ring = &self.ring;
        if self.queue.transport.spin(&mut || has_events(ring)) && self.collect_events()? {
            return Ok(());
        }
        self.poll_call()?;
        let sleep = self.queue.transport.announce_sleep();
        // The multishot poll reports each signal of the call eventfd, not its level, so there is nothing to drain.
        let slept = self.enter(usize::from(sleep));
        self.queue.transport.awake();
        slept
    }

    fn wait_for_kernel(&mut self) -> Result<(), Error> {
        let shares = self.queue.transport.on_peer_core();
        if self.kernel_parker.is_none() && !shares {
            return self.enter(1);
        }
        self.flush()?;
        let ring = &self.ring;
        let found = match &mut self.kernel_parker {
            Some(parker) => parker.spin(|| has_events(ring)),
            None => hand_off(|| has_events(ring)),
        };
        if found && self.collect_events()? {
            return Ok(());
        }
        let slept = self.enter(1);
        self.kernel_parker.iter_mut().for_each(Parker::unparked);
        slept
    }

    /// Runs the kernel's pending task work, if there are no CQEs yet; this takes an io_uring_enter(2). Returns `false`
    /// if that made no CQE: the caller must sleep. The kernel sets IORING_SQ_TASKRUN only after it has added the work.
    /// If this thread has done the work by then, the flag stays set until there is more work, and spinning on it would
    /// not end. Returns `true` otherwise.
    fn collect_events(&mut self) -> Result<bool, Error> {
        if !self.ring.completion().is_empty() || !has_events(&self.ring) {
            return Ok(true);
        }
        self.enter(0)?;
        Ok(!self.ring.completion().is_empty())
    }

    /// Submits the pushed entries to the kernel.
    fn flush(&mut self) -> Result<(), Error> {
        if self.ring.submission().is_empty() {
            Ok(())
        } else {
            self.enter(0)
        }
    }

    /// Submits the pushed entries, and waits for `want` CQEs.
    fn enter(&mut self, want: usize) -> Result<(), Error> {
        use io_uring::EnterFlags;
        if let Some(limit) = self.queue.sleep_limit().filter(|_| want > 0) {
            return self.enter_within(want, limit);
        }
        let to_submit = self.ring.submission().len() as u32;
        // SAFETY: no extra argument is passed; every pushed entry's memory lives as long as the channel.
        let entered = unsafe {
            self.ring.submitter().enter::<libc::sigset_t>(to_submit, want as u32, EnterFlags::GETEVENTS.bits(), None)
        };
        match entered {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// As [`Self::enter`], for no longer than `limit`. Checks the callers of waiting requests if no CQE came.
    fn enter_within(&mut self, want: usize, limit: Duration) -> Result<(), Error> {
        let limit = types::Timespec::from(limit);
        match self.ring.submitter().submit_with_args(want, &types::SubmitArgs::new().timespec(&limit)) {
            Ok(_) => Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::ETIME) => {
                self.queue.check_callers();
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn process_cqes(&mut self) -> Result<(), Error> {
        loop {
            let Some(event) = self.ring.completion().next() else { return Ok(()) };
            match (event.user_data(), event.result()) {
                (POLL_CALL.., _) => self.on_poll(event.user_data(), cqueue::more(event.flags()))?,
                (slot, 0) => self.on_request(slot as u32)?,
                // Unmounted, or the connection was aborted.
                (_, e) if matches!(-e, libc::ENOTCONN | libc::ECONNABORTED | libc::ECANCELED) => self.ended += 1,
                (slot, e) if matches!(-e, libc::EINTR | libc::EAGAIN) => {
                    self.push(self.command(REGISTER, slot as u32, 0))?
                }
                (_, e) => {
                    let e = io::Error::from_raw_os_error(-e);
                    return Err(Error::Setup(format!("FUSE-over-io_uring: {e} ({})", uring_hint())));
                }
            }
        }
    }

    /// Handles the CQE of a poll. `what` is its `user_data`. Polls of an earlier transport are ignored.
    fn on_poll(&mut self, what: u64, more: bool) -> Result<(), Error> {
        match what.checked_sub(u64::from(self.transport_id)) {
            Some(POLL_CALL) => self.call_armed = more,
            Some(POLL_HANGUP) => self.queue.detach_host()?,
            _ => {}
        }
        Ok(())
    }

    /// Polls the new transport's descriptors, if the queue's transport has been replaced.
    fn rearm_polls(&mut self) -> Result<(), Error> {
        if self.transport_id == self.queue.transport_id() {
            return Ok(());
        }
        for old in [POLL_CALL, POLL_HANGUP] {
            let old = old + u64::from(self.transport_id);
            self.push(opcode::PollRemove::new(old).build().user_data(POLL_REMOVE).into())?;
        }
        self.transport_id = self.queue.transport_id();
        self.call_armed = false;
        self.poll_hangup()
    }

    /// Submits the request that the kernel has put into a slot to the host.
    fn on_request(&mut self, slot: u32) -> Result<(), Error> {
        // SAFETY: the entry is ours until it is committed; any bits are a valid `Headers`.
        let headers = unsafe { self.headers.at(slot as usize).read_volatile() };
        let payload_len = headers.payload_sz as usize;
        let (ptr, size) = self.queue.transport.slot(slot);
        let op_len = request_len(&headers.in_out).checked_sub(IN_HEADER + payload_len);
        let op_len = op_len.filter(|&n| n <= headers.op_in.len() && payload_len <= size);
        let op_len = op_len.ok_or(Error::Protocol("the kernel's request has another length than it says"))?;

        let mut head = [0; SQE_INLINE_BYTES];
        let fits = op_len.min(SQE_INLINE_BYTES - IN_HEADER);
        head[..IN_HEADER].copy_from_slice(&headers.in_out[..IN_HEADER]);
        head[IN_HEADER..IN_HEADER + fits].copy_from_slice(&headers.op_in[..fits]);
        let rest = &headers.op_in[fits..op_len];
        if !rest.is_empty() {
            // SETATTR: its structure is too long for the SQE, but is its whole body. The rest goes to the payload's
            // place.
            if payload_len > 0 {
                let name = tunnelfs_fuse_abi::opcode::name(request_opcode(&headers.in_out));
                return Err(Error::Setup(format!("{name}: its structure is too long for a ring entry")));
            }
            // SAFETY: a slot has at least `MIN_SLOT_SIZE` bytes, `rest` at most 128.
            unsafe { std::ptr::copy_nonoverlapping(rest.as_ptr(), ptr, rest.len()) };
        }
        self.queue.submit(slot, &head[..IN_HEADER + fits], (payload_len + rest.len()) as u32)
    }

    /// Queues a reply for the next io_uring_enter(2). The same command fetches the entry's next request.
    fn commit(&mut self, answer: &Reply) -> Result<(), Error> {
        let slot = answer.slot;
        let (ptr, size) = self.queue.transport.slot(slot);
        let inline = answer.inline();
        let mut header = answer.header;
        let mut payload_len = answer.payload_len();
        if !inline.is_empty() {
            // SAFETY: the slot is ours, and larger than an entry's inline bytes.
            unsafe { std::ptr::copy_nonoverlapping(inline.as_ptr(), ptr, inline.len()) };
            // The host may put a reply into the CQE or into the slot, not into both.
            if payload_len > 0 {
                header = answer.error_header(-libc::EIO);
            }
            payload_len = inline.len();
        }
        debug_assert!(payload_len <= size);
        let at = self.headers.at(slot as usize);
        // SAFETY: the entry is ours until it is committed.
        let commit_id = unsafe {
            (&raw mut (*at).in_out).cast::<[u8; OUT_HEADER]>().write_volatile(header);
            (&raw mut (*at).payload_sz).write_volatile(payload_len as u32);
            (&raw const (*at).commit_id).read_volatile()
        };
        self.push(self.command(COMMIT_AND_FETCH, slot, commit_id))
    }

    fn command(&self, op: u32, slot: u32, commit_id: u64) -> Entry128 {
        // struct fuse_uring_cmd_req: u64 flags, u64 commit_id, u16 qid, padding.
        let mut cmd = [0; 80];
        cmd[8..16].copy_from_slice(&commit_id.to_ne_bytes());
        cmd[16..18].copy_from_slice(&self.qid[slot as usize].to_ne_bytes());
        let iovecs = self.iovecs.at(slot as usize);
        let mut entry = opcode::UringCmd80::new(types::Fd(self.device.as_raw_fd()), op)
            .cmd(cmd)
            .addr(Some(iovecs as u64))
            .build()
            .user_data(slot.into());
        // SAFETY: an `Entry128` is the kernel's 128-byte structure (asserted above), `len` a u32 in it.
        unsafe { (&raw mut entry).cast::<u8>().add(SQE_LEN_OFFSET).cast::<u32>().write(IOVECS as u32) };
        entry
    }

    fn push(&mut self, entry: Entry128) -> Result<(), Error> {
        loop {
            // SAFETY: the memory that the entry points to lives as long as the channel.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            self.enter(0)?;
        }
    }

    /// Arms the poll of the call eventfd, unless it is armed.
    fn poll_call(&mut self) -> Result<(), Error> {
        if self.call_armed {
            return Ok(());
        }
        self.call_armed = true;
        let fd = types::Fd(self.queue.transport.fd().as_raw_fd());
        let user_data = POLL_CALL + u64::from(self.transport_id);
        self.push(opcode::PollAdd::new(fd, libc::POLLIN as u32).multi(true).build().user_data(user_data).into())
    }

    /// Polls for the host's hang-up. An empty event mask reports only POLLHUP and POLLERR.
    fn poll_hangup(&mut self) -> Result<(), Error> {
        let fd = types::Fd(self.queue.transport.hangup_fd().as_raw_fd());
        self.push(opcode::PollAdd::new(fd, 0).build().user_data(POLL_HANGUP + u64::from(self.transport_id)).into())
    }
}

/// Returns `true` if the kernel has a CQE or task work for this thread. The caller must be the only user of the ring,
/// and hold no other object of its queues now.
fn has_events(ring: &IoUring<Entry128, cqueue::Entry>) -> bool {
    // SAFETY: all callers borrow the channel, so no other thread uses the ring, and they hold no queue object of it.
    unsafe { ring.submission_shared().taskrun() || !ring.completion_shared().is_empty() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_memory_is_written_by_others_while_its_owner_moves() {
        let fixed = PinnedArray::new((0..4u64).collect());
        let others: Vec<_> = (0..4).map(|i| fixed.at(i)).collect();
        let moved = std::hint::black_box(fixed);
        for (i, at) in others.iter().enumerate() {
            // SAFETY: `moved` has the memory.
            unsafe { at.write_volatile(at.read_volatile() + 10) };
            // SAFETY: as above.
            assert_eq!(unsafe { moved.at(i).read_volatile() }, i as u64 + 10);
        }
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| moved.at(4))).is_err());
    }
}
