//! FORGET and RELEASE: the kernel gives nodes and handles back, and a later host has other numbers for them.

use super::queue::{Flight, Queue};
use super::session::Session;
use crate::fuse::abi::opcode::*;
use crate::resume::nodes::Known;
use crate::resume::wire::BODY;
use crate::Error;

/// Bytes of `struct fuse_batch_forget_in`, and of each node behind it.
const BATCH: usize = 8;
const FORGET_ONE: usize = 16;

/// What the kernel's FORGET or RELEASE comes to.
pub(super) enum GivenBack {
    /// The host is not to hear of it.
    Nothing,
    /// The request goes to the host; it has the host's numbers.
    Request,
    /// The host is to forget these in its stead.
    Nodes(Vec<Known>),
}

impl Session {
    /// The kernel gives nodes or a handle back: takes them off the tables.
    pub(super) fn give_back(&mut self, flight: &mut Flight, place: (*mut u8, usize)) -> GivenBack {
        let going = |yes| if yes { GivenBack::Request } else { GivenBack::Nothing };
        if let Some(time) = flight.noted {
            return going(time == self.time && !flight.again);
        }
        flight.noted = Some(self.time);
        self.cache.release(&flight.head);
        let mut tables = self.resume.tables.write();
        if matches!(flight.opcode, RELEASE | RELEASEDIR) {
            if self.time == 0 {
                return going(tables.released(&flight.head[..flight.head_len]));
            }
            let mut theirs = flight.head;
            let known = tables.translate(&mut theirs[..flight.head_len]).is_none();
            let held = tables.released(&flight.head[..flight.head_len]);
            flight.head = theirs;
            return going(known && held);
        }
        let known = tables.forget(&flight.head, &forgotten(flight, place));
        match self.time {
            0 => going(!known.is_empty()),
            _ => GivenBack::Nodes(known),
        }
    }
}

/// The body of a FORGET or BATCH_FORGET, privately.
fn forgotten(flight: &Flight, (at, size): (*mut u8, usize)) -> Vec<u8> {
    let mut body = flight.head[BODY..flight.head_len.max(BODY)].to_vec();
    let (in_head, bytes) = (body.len(), size.min(flight.payload_len as usize));
    body.resize(in_head + bytes, 0);
    // SAFETY: the slot is ours, and that large.
    unsafe { std::ptr::copy_nonoverlapping(at, body[in_head..].as_mut_ptr(), bytes) };
    body
}

impl Queue {
    /// Has the host forget `known`. What the kernel forgets with one request, and what is owed beside that, can be more
    /// than a slot holds: all but the last part goes at once, the last in the request's stead. `false`: there is none.
    pub(super) fn forget(&mut self, slot: u32, known: Vec<Known>) -> Result<bool, Error> {
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
            } else if let Some(flight) = &mut self.flights[slot as usize] {
                flight.head[..head.len()].copy_from_slice(&head);
                (flight.head_len, flight.payload_len) = (head.len(), list.len() as u32);
            }
        }
        Ok(!known.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::Kept;
    use crate::message::{request, OUT_HEADER};
    use crate::resume::wire::tests::entry;
    use crate::resume::wire::{u64_at, Entry, ROOT};
    use crate::resume::Resume;
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
            1
        }
        fn slot(&self, _slot: u32) -> (*mut u8, usize) {
            (self.slot, SLOT)
        }
        fn submit(&mut self, slot: u32, head: &[u8], payload_len: u32, _reply_max: u32) -> Result<bool, Error> {
            assert!(payload_len as usize <= SLOT);
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
        fn alive(&self) -> BorrowedFd<'_> {
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
        Box::new(Listener { told: told.clone(), done: Vec::new(), slot, fd: Eventfd::new().unwrap() })
    }

    /// A queue of the host of `time`.
    fn queue(host: Box<Listener>, resume: &Arc<Resume>, time: u64) -> Queue {
        let mut session = Session::new(resume.clone(), 0, 1, Kept::Streamed(Vec::new()));
        session.time = time;
        Queue::new(host, Arc::new(QueueStats::new(1)), Some(session))
    }

    /// It rested while there was no host, and takes the next one: when that one goes it is waited for.
    #[test]
    fn a_queue_that_is_back_without_a_host_is_not_at_rest() {
        let (resume, told) = (Arc::new(Resume::new(1)), Messages::default());
        let mut queue = queue(listener(&told), &resume, 0);
        resume.handover.leave();
        queue.lose().unwrap();
        queue.rest();
        assert!(resume.handover.let_go());
        queue.rested().unwrap();
        resume.handover.arrive(1, vec![listener(&told)]);
        assert!(queue.reap().unwrap().is_none());
        resume.handover.leave();
        assert!(!resume.handover.let_go());
    }

    #[test]
    fn what_one_slot_does_not_hold_is_forgotten_too() {
        // More than two slots of nodes, which this host has all looked up.
        let count = 600;
        let resume = Arc::new(Resume::new(1));
        {
            let mut tables = resume.tables.write();
            tables.nodes.advance(true);
            for node in 0..count {
                let found = Entry::read(&entry(1_000 + node, 5_000 + node, libc::S_IFREG, 1)).unwrap();
                tables.nodes.arrive(ROOT, Some(format!("f{node}").as_bytes()), &found);
            }
        }
        let numbers: Vec<_> = (0..count)
            .map(|node| resume.tables.read().nodes.child(ROOT, format!("f{node}").as_bytes()).unwrap())
            .collect();
        let told = Messages::default();
        let host = listener(&told);
        let slot = host.slot;
        let mut queue = queue(host, &resume, 1);
        // What one request brings, and what the tables owe beside it, as for directories that only held names.
        let known = resume.tables.write().forget(&request(FORGET, numbers[0], 1, &[], 0), &1u64.to_ne_bytes());
        assert_eq!(known.len(), 1);
        let mut known = known;
        for &number in &numbers[1..] {
            known.extend(resume.tables.write().nodes.forget(number, 1));
        }
        assert_eq!(known.len(), count as usize);
        let head = request(BATCH_FORGET, 0, 1, &[0; BATCH], 0);
        queue.flights[0] = Some(Flight::new(&head, 0));
        assert!(queue.forget(0, known).unwrap());
        // The last part is the request's own.
        let flight = queue.flights[0].as_ref().unwrap();
        let last = (flight.head[..flight.head_len].to_vec(), flight.payload_len as usize);
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
