//! FORGET and RELEASE: the kernel drops its references to inodes and handles. A later host has other numbers for them.

use super::pending::PendingQueue;
use super::request::PendingRequest;
use super::session::Session;
use crate::error::Error;
use crate::fuse::message::BODY;
use crate::reconnect::inodes::HostInode;
use tunnelfs_fuse_abi::opcode::*;

/// Bytes of `struct fuse_batch_forget_in`, and of each `struct fuse_forget_one` behind it.
const BATCH: usize = 8;
const FORGET_ONE: usize = 16;

/// What to send to the host for a FORGET or RELEASE of the kernel.
pub(super) enum ForgetAction {
    /// Nothing: the host does not have the inode or handle.
    Drop,
    /// The request itself. A RELEASE has the host's numbers now.
    Forward,
    /// A BATCH_FORGET of these inodes, in its place.
    InodeTable(Vec<HostInode>),
}

impl Session {
    /// Applies a FORGET, BATCH_FORGET, RELEASE or RELEASEDIR to the tables, once. `place` is its slot's memory.
    pub(super) fn apply_forget(&mut self, request: &mut PendingRequest, place: (*mut u8, usize)) -> ForgetAction {
        let going = |yes| if yes { ForgetAction::Forward } else { ForgetAction::Drop };
        if let Some(time) = request.forgotten_on {
            return going(time == self.host_id && !request.replay);
        }
        request.forgotten_on = Some(self.host_id);
        self.cache.release(&request.head);
        let mut tables = self.reconnect.tables.write();
        if matches!(request.opcode, RELEASE | RELEASEDIR) {
            if self.host_id == 0 {
                return going(tables.released(&request.head[..request.head_len]));
            }
            let mut theirs = request.head;
            let known = tables.translate(&mut theirs[..request.head_len]).is_none();
            let held = tables.released(&request.head[..request.head_len]);
            request.head = theirs;
            return going(known && held);
        }
        let known = tables.forget(&request.head, &forgotten(request, place));
        match self.host_id {
            0 => going(!known.is_empty()),
            _ => ForgetAction::InodeTable(known),
        }
    }
}

/// Returns a private copy of the body of a FORGET or BATCH_FORGET.
fn forgotten(request: &PendingRequest, (at, size): (*mut u8, usize)) -> Vec<u8> {
    let mut body = request.head[BODY..request.head_len.max(BODY)].to_vec();
    let (in_head, bytes) = (body.len(), size.min(request.payload_len as usize));
    body.resize(in_head + bytes, 0);
    // SAFETY: the slot is ours, and that large.
    unsafe { std::ptr::copy_nonoverlapping(at, body[in_head..].as_mut_ptr(), bytes) };
    body
}

impl PendingQueue {
    /// Has the host forget `known`. One request of the kernel and the pending forgets of the tables can be more than a
    /// slot holds. All parts but the last are sent here; the last replaces the request in `slot`. Returns `true` if
    /// that request must be submitted, `false` if `known` is empty.
    pub(super) fn forget(&mut self, slot: u32, known: Vec<HostInode>) -> Result<bool, Error> {
        let (at, size) = self.transport.slot(slot);
        let mut parts = known.chunks((size / FORGET_ONE).max(1)).peekable();
        while let Some(part) = parts.next() {
            let list: Vec<u8> =
                part.iter().flat_map(|one| [one.node, one.lookups]).flat_map(u64::to_ne_bytes).collect();
            assert!(list.len() <= size);
            // SAFETY: the slot is ours, and that large; the kernel's list in it has been copied.
            unsafe { std::ptr::copy_nonoverlapping(list.as_ptr(), at, list.len()) };
            let mut body = [0; BATCH];
            body[..4].copy_from_slice(&(part.len() as u32).to_ne_bytes());
            let head = self.own_head(slot, BATCH_FORGET, 0, &body, list.len());
            if parts.peek().is_some() {
                self.wait_for(slot, &head, list.len() as u32)?;
            } else if let Some(request) = &mut self.requests[slot as usize] {
                request.head[..head.len()].copy_from_slice(&head);
                (request.head_len, request.payload_len) = (head.len(), list.len() as u32);
            }
        }
        Ok(!known.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::message::tests::entry;
    use crate::fuse::message::{request, u64_at, Entry, OUT_HEADER, ROOT};
    use crate::reconnect::Reconnect;
    use crate::stats::QueueStats;
    use crate::transport::{Completion, Transport};
    use parking_lot::Mutex;
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
    use std::sync::Arc;
    use tunnelfs_ring::{Counters, Eventfd, CQE_INLINE_BYTES};

    /// A page a slot, as small as they come.
    const SLOT: usize = 4096;

    type Messages = Arc<Mutex<Vec<(Vec<u8>, Vec<u8>)>>>;

    /// A host that answers each request with nothing, and keeps what it was told.
    struct Listener {
        told: Messages,
        done: Vec<u32>,
        /// Takes and answers nothing.
        full: bool,
        slot: *mut u8,
        fd: OwnedFd,
    }

    // SAFETY: the slot is leaked memory that only this transport's user touches.
    unsafe impl Send for Listener {}

    impl Transport for Listener {
        fn name(&self) -> &'static str {
            "listener"
        }
        fn slots(&self) -> u32 {
            2
        }
        fn slot(&self, _slot: u32) -> (*mut u8, usize) {
            (self.slot, SLOT)
        }
        fn submit(&mut self, slot: u32, head: &[u8], payload_len: u32, _reply_max: u32) -> Result<bool, Error> {
            assert!(payload_len as usize <= SLOT);
            if self.full {
                return Ok(false);
            }
            // SAFETY: the slot has that many bytes.
            let payload = unsafe { std::slice::from_raw_parts(self.slot, payload_len as usize) };
            self.told.lock().push((head.to_vec(), payload.to_vec()));
            self.done.push(slot);
            Ok(true)
        }
        fn reap(&mut self) -> Result<Option<Completion>, Error> {
            let done = self.done.pop();
            Ok(done.map(|slot| Completion { slot, head: [0; CQE_INLINE_BYTES], head_len: OUT_HEADER, payload_len: 0 }))
        }
        fn spin(&mut self, _other: &mut dyn FnMut() -> bool) -> bool {
            true
        }
        fn announce_sleep(&mut self) -> bool {
            false
        }
        fn awake(&mut self) {}
        fn fd(&self) -> BorrowedFd<'_> {
            self.fd.as_fd()
        }
        fn hangup_fd(&self) -> BorrowedFd<'_> {
            self.fd.as_fd()
        }
        fn wait_counters(&self) -> Counters {
            Counters::default()
        }
        fn copied(&self) -> u64 {
            0
        }
    }

    fn listener(told: &Messages) -> Box<Listener> {
        let slot = Box::leak(vec![0u64; SLOT / 8].into_boxed_slice()).as_mut_ptr().cast();
        Box::new(Listener { told: told.clone(), done: Vec::new(), full: false, slot, fd: Eventfd::new().unwrap() })
    }

    /// A queue of the host of `time`.
    fn queue(host: Box<Listener>, reconnect: &Arc<Reconnect>, time: u64) -> PendingQueue {
        let mut session = Session::new(reconnect.clone(), 0, 2, None);
        session.host_id = time;
        PendingQueue::new(host, Arc::new(QueueStats::new(2)), Some(session), Arc::default())
    }

    /// An INTERRUPT that a host had no room for is answered when the host dies, and the next host does not get it.
    #[test]
    fn an_interrupt_ends_with_its_host() {
        let told = Messages::default();
        let reconnect = Arc::new(Reconnect::new(1).unwrap());
        let mut host = listener(&told);
        host.full = true;
        let mut queue = queue(host, &reconnect, 0);
        queue.submit(0, &request(GETATTR, ROOT, 6, &[0; 16], 0), 0).unwrap();
        queue.submit(1, &request(INTERRUPT, 0, 9, &8u64.to_ne_bytes(), 0), 0).unwrap();
        assert!(queue.reap().unwrap().is_none());
        reconnect.host_lost();
        queue.detach_host().unwrap();
        let reply = queue.reap().unwrap().expect("the INTERRUPT's slot comes back");
        assert!(reply.slot == 1 && reply.expects_no_reply());
        reconnect.handover.host_ready(1, vec![listener(&told)]);
        while queue.reap().unwrap().is_none() {}
        let opcodes: Vec<_> = told.lock().iter().map(|(head, _)| crate::fuse::message::request_opcode(head)).collect();
        assert!(opcodes.contains(&GETATTR) && !opcodes.contains(&INTERRUPT), "{opcodes:?}");
    }

    /// It rested while there was no host, and takes the next one: when that one goes it is waited for.
    #[test]
    fn a_queue_that_is_back_without_a_host_is_not_at_rest() {
        let (reconnect, told) = (Arc::new(Reconnect::new(1).unwrap()), Messages::default());
        let mut queue = queue(listener(&told), &reconnect, 0);
        reconnect.host_lost();
        queue.detach_host().unwrap();
        queue.enter_idle();
        assert!(reconnect.handover.all_detached());
        queue.leave_idle().unwrap();
        reconnect.handover.host_ready(1, vec![listener(&told)]);
        assert!(queue.reap().unwrap().is_none());
        reconnect.host_lost();
        assert!(!reconnect.handover.all_detached());
    }

    #[test]
    fn what_one_slot_does_not_hold_is_forgotten_too() {
        // More than two slots of nodes, which this host has all looked up.
        let count = 600;
        let reconnect = Arc::new(Reconnect::new(1).unwrap());
        {
            let mut tables = reconnect.tables.write();
            tables.nodes.next_host(true);
            for node in 0..count {
                let found = Entry::read(&entry(1_000 + node, 5_000 + node, libc::S_IFREG, 1)).unwrap();
                tables.nodes.insert(ROOT, Some(format!("f{node}").as_bytes()), &found);
            }
        }
        let numbers: Vec<_> = (0..count)
            .map(|node| reconnect.tables.read().nodes.child(ROOT, format!("f{node}").as_bytes()).unwrap())
            .collect();
        let told = Messages::default();
        let host = listener(&told);
        let slot = host.slot;
        let mut queue = queue(host, &reconnect, 1);
        // What one request brings, and what the tables owe beside it, as for directories that only held names.
        let known = reconnect.tables.write().forget(&request(FORGET, numbers[0], 1, &[], 0), &1u64.to_ne_bytes());
        assert_eq!(known.len(), 1);
        let mut known = known;
        for &number in &numbers[1..] {
            known.extend(reconnect.tables.write().nodes.forget(number, 1));
        }
        assert_eq!(known.len(), count as usize);
        let head = request(BATCH_FORGET, 0, 1, &[0; BATCH], 0);
        queue.requests[0] = Some(PendingRequest::new(&head, 0));
        assert!(queue.forget(0, known).unwrap());
        // The last part is the request's own.
        let request = queue.requests[0].as_ref().unwrap();
        let last = (request.head[..request.head_len].to_vec(), request.payload_len as usize);
        // SAFETY: the slot has that many bytes.
        let last_list = unsafe { std::slice::from_raw_parts(slot, last.1) }.to_vec();
        let mut all = told.lock().clone();
        all.push((last.0, last_list));
        let mut forgotten = Vec::new();
        for (head, list) in all {
            assert_eq!(u64_at(&head, BODY) as usize * FORGET_ONE, list.len());
            assert_eq!(u64_at(&head, 0) as u32 as usize, head.len() + list.len());
            forgotten.extend(list.chunks(FORGET_ONE).map(|one| u64_at(one, 0)));
        }
        forgotten.sort_unstable();
        assert_eq!(forgotten, (1_000..1_000 + count).collect::<Vec<_>>());
    }
}
