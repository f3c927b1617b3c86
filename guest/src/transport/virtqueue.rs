//! Driver side of a plain split virtqueue. The descriptors point at the same
//! slots as the ring's entries do; the headers lie beside the queue.

use super::ring::slot_of;
use super::{Completion, Transport};
use crate::link::local::Link;
use crate::message::{reply_header, OUT_HEADER};
use crate::Error;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;
use tunnelfs_ring::{WaitConfig, WaitStats, Waiter, CQE_HEAD_BYTES, SQE_HEAD_BYTES};
use virtio_driver::{iovec, virtqueue::Virtqueue};

/// A request's headers, in memory that the host reads and writes.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Headers {
    out_header: [u8; OUT_HEADER],
    head: [u8; SQE_HEAD_BYTES],
}

/// `fuse_out_header` of a reply without anything: 16 bytes long, no error.
const NO_ANSWER: [u8; OUT_HEADER] = (OUT_HEADER as u128).to_le_bytes();

/// A request queue over a virtqueue.
pub struct Driver {
    queue: Virtqueue<'static, Headers>,
    /// What was submitted, privately: slot and reply room by chain.
    in_flight: Vec<Option<(u32, u32)>>,
    waiter: Waiter,
    link: Arc<Link>,
    index: usize,
    call: Arc<virtio_driver::EventFd>,
    kick: Box<dyn virtio_driver::QueueNotifier>,
}

impl Driver {
    /// Takes over virtqueue `index` of a link.
    ///
    /// # Errors
    /// When its doorbell cannot be made non-blocking.
    pub fn new(
        link: Arc<Link>,
        queue: Virtqueue<'static, Headers>,
        index: usize,
        wait: WaitConfig,
    ) -> Result<Self, Error> {
        let (call, kick) = (link.call_fd(index)?, link.notifier(index));
        let in_flight = vec![None; queue.queue_size() as usize];
        Ok(Driver { queue, in_flight, waiter: Waiter::new(wait), link, index, call, kick })
    }

    pub(super) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    pub(super) fn index(&self) -> usize {
        self.index
    }
}

impl Transport for Driver {
    fn name(&self) -> &'static str {
        "virtqueue"
    }

    fn slots(&self) -> u32 {
        self.link.geometry(self.index).slots.min(u32::from(self.queue.queue_size()) / 4)
    }

    fn slot(&self, slot: u32) -> (*mut u8, usize) {
        slot_of(&self.link, self.index, slot)
    }

    fn submit(&mut self, slot: u32, head: &[u8], payload_len: u32, reply_max: u32) -> Result<bool, Error> {
        if head.len() > SQE_HEAD_BYTES {
            return Err(Error::Protocol("header too long"));
        }
        let (ptr, _) = self.slot(slot);
        let id = self.queue.add_request(|req, add| {
            req.head[..head.len()].copy_from_slice(head);
            // What stays when the host does not answer (FORGET).
            req.out_header = NO_ANSWER;
            add(iovec { iov_base: req.head.as_mut_ptr().cast(), iov_len: head.len() }, false)?;
            if payload_len > 0 {
                add(iovec { iov_base: ptr.cast(), iov_len: payload_len as usize }, false)?;
            }
            add(iovec { iov_base: req.out_header.as_mut_ptr().cast(), iov_len: OUT_HEADER }, true)?;
            if reply_max > 0 {
                add(iovec { iov_base: ptr.cast(), iov_len: reply_max as usize }, true)?;
            }
            Ok(())
        });
        let Ok(id) = id else { return Ok(false) };
        self.in_flight[id as usize] = Some((slot, reply_max));
        if self.queue.avail_notif_needed() {
            self.kick.notify()?;
        }
        Ok(true)
    }

    fn reap(&mut self) -> Result<Option<Completion>, Error> {
        let Some(done) = self.queue.completions().next() else { return Ok(None) };
        let known = self.in_flight.get_mut(done.id as usize).and_then(Option::take);
        let (slot, room) = known.ok_or(Error::Protocol("completion of a request that was not made"))?;
        let mut head = [0; CQE_HEAD_BYTES];
        head[..OUT_HEADER].copy_from_slice(&done.req.out_header);
        let payload_len = reply_header(&head).0.saturating_sub(OUT_HEADER);
        if payload_len > room as usize {
            return Err(Error::Protocol("reply longer than its room"));
        }
        Ok(Some(Completion { slot, head, head_len: OUT_HEADER, payload_len }))
    }

    fn spin(&mut self, other: &mut dyn FnMut() -> bool) -> bool {
        let queue = &mut self.queue;
        self.waiter.spin(|| queue.completions().has_next() || other())
    }

    fn announce_sleep(&mut self) -> bool {
        self.queue.set_used_notif_enabled(true);
        // Pairs with the device's fence between the used index and its look at our wish to be called.
        fence(Ordering::SeqCst);
        !self.queue.completions().has_next()
    }

    fn awake(&mut self) {
        self.queue.set_used_notif_enabled(false);
        self.waiter.awake();
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    fn alive(&self) -> BorrowedFd<'_> {
        self.link.alive()
    }

    fn wait_stats(&self) -> WaitStats {
        self.waiter.stats
    }

    fn copied(&self) -> u64 {
        0
    }
}
