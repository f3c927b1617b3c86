//! A transport with the bookkeeping that both channels need: pending requests, the backlog of requests that wait for
//! room or for another host, and the checks of a host's completions.

use super::request::{PendingRequest, Reply, CALLER_CHECK};
use super::session::{Prepared, Session};
use super::write_order::WriteOrder;
use crate::coherence::counters::Deliveries;
use crate::error::Error;
use crate::fuse::message::{has_reply, reply_capacity, reply_header, request_opcode, u64_at, BODY, OUT_HEADER};
use crate::reconnect::absent::Absent;
use crate::stats::QueueStats;
use crate::transport::{Completion, Transport};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::opcode;

/// One request queue to the host, and its pending requests.
pub struct PendingQueue {
    pub transport: Box<dyn Transport>,
    /// By slot.
    pub requests: Vec<Option<PendingRequest>>,
    /// Slots of the requests that wait for room or for a host, in the order of submission.
    backlog: VecDeque<u32>,
    /// Completions that arrived while `wait_for` waited for another one.
    pub stash: VecDeque<Completion>,
    /// Replies made here or drained from a dead host, which [`Self::reap`] has not returned yet.
    local_replies: VecDeque<Reply>,
    /// Number of requests whose reply [`Self::reap`] has not returned yet.
    pending: usize,
    stats: Arc<QueueStats>,
    /// Reconnect state; `None` for a mount that neither reconnects nor gets change reports.
    pub session: Option<Session>,
    /// Replies on their way to the kernel; `None` if the host has no queue for change reports.
    pub deliveries: Option<Deliveries>,
    write_order: Arc<WriteOrder>,
    transport_id: u32,
}

impl PendingQueue {
    pub fn new(
        transport: Box<dyn Transport>,
        stats: Arc<QueueStats>,
        session: Option<Session>,
        write_order: Arc<WriteOrder>,
    ) -> Self {
        PendingQueue {
            requests: (0..transport.slots()).map(|_| None).collect(),
            transport,
            backlog: VecDeque::new(),
            stash: VecDeque::new(),
            local_replies: VecDeque::new(),
            pending: 0,
            stats,
            session,
            deliveries: None,
            write_order,
            transport_id: 0,
        }
    }

    /// Number of requests whose reply [`Self::reap`] has not returned yet.
    pub fn pending(&self) -> usize {
        self.pending
    }

    /// Number of the transport. It grows whenever the transport is replaced; the descriptors are other ones then.
    pub fn transport_id(&self) -> u32 {
        self.transport_id
    }

    /// Records that the thread is about to wait for the kernel alone, without access to memory shared with the host.
    pub fn enter_idle(&self) {
        if let Some(session) = &self.session {
            session.reconnect.handover.enter_idle(session.queue_index);
        }
    }

    /// Records that the thread no longer waits for the kernel alone. Detaches if the host has died meanwhile.
    ///
    /// # Errors
    /// As [`Self::detach_host`].
    pub fn leave_idle(&mut self) -> Result<(), Error> {
        let Some(session) = &self.session else { return Ok(()) };
        // Also without a host: a queue that takes the next host must not count as idle when that host dies.
        let lost = session.reconnect.handover.leave_idle(session.queue_index, session.host_id);
        if lost && !session.away {
            self.detach_host()
        } else {
            Ok(())
        }
    }

    /// Submits the request in `slot`, now or as soon as there is room.
    ///
    /// # Errors
    /// The transport's.
    pub fn submit(&mut self, slot: u32, head: &[u8], payload_len: u32) -> Result<(), Error> {
        let mut request = PendingRequest::new(head, payload_len);
        self.stamp(&mut request);
        self.write_order.begin(head);
        if let Some(session) = &mut self.session {
            session.save(slot, &request, self.transport.slot(slot));
        }
        // Without a host no reply can be late: the watchdog must not count this time.
        if !self.is_away() {
            self.stats.begin(slot, request.start);
        }
        self.requests[slot as usize] = Some(request);
        self.pending += 1;
        if request_opcode(head) == opcode::INTERRUPT {
            return self.interrupt(slot, head);
        }
        self.submit_or_queue(slot)
    }

    fn submit_or_queue(&mut self, slot: u32) -> Result<(), Error> {
        let before = self.transport_id;
        if (!self.backlog.is_empty() || !self.try_submit(slot)?) && self.transport_id == before {
            self.backlog.push_back(slot);
        }
        Ok(())
    }

    /// Submits an INTERRUPT ahead of the requests that wait for room: they may wait for the request that it interrupts.
    fn interrupt(&mut self, slot: u32, head: &[u8]) -> Result<(), Error> {
        // `fuse_interrupt_in.unique`
        let target = u64_at(head, BODY);
        let unsent =
            |&&slot: &&u32| self.requests[slot as usize].as_ref().is_some_and(|request| request.unique == target);
        let unsent = self.backlog.iter().find(unsent).copied();
        // Without a host there is no request to interrupt.
        if self.is_away() || unsent.is_some_and(|target| self.end_if_killed(target)) {
            self.reply_locally(slot, 0);
            return Ok(());
        }
        let before = self.transport_id;
        match unsent {
            // The host must see the request first.
            Some(_) => self.backlog.push_back(slot),
            None if !self.try_submit(slot)? && self.transport_id == before => self.backlog.push_front(slot),
            None => {}
        }
        Ok(())
    }

    /// Returns how long the channel may sleep before it must call [`Self::check_callers`]; `None`: no limit.
    pub fn sleep_limit(&self) -> Option<Duration> {
        (!self.backlog.is_empty()).then_some(CALLER_CHECK)
    }

    /// Answers the requests in the backlog whose callers are being killed: the kernel cannot withdraw a request that
    /// was read.
    pub fn check_callers(&mut self) {
        let waiting: Vec<u32> = self.backlog.iter().copied().collect();
        waiting.into_iter().for_each(|slot| {
            self.end_if_killed(slot);
        });
    }

    /// Answers a request that the host does not have with EINTR, if its caller is being killed. Returns `true` if it
    /// did, `false` if the request still waits.
    fn end_if_killed(&mut self, slot: u32) -> bool {
        let killed = self.requests[slot as usize].as_ref().is_some_and(PendingRequest::caller_has_sigkill);
        if killed {
            self.backlog.retain(|&s| s != slot);
            self.reply_locally(slot, -libc::EINTR);
        }
        killed
    }

    /// Returns the `unique` of each request that the host has and whose caller has a pending signal. Returns each
    /// request only once.
    pub fn signalled(&mut self) -> Vec<u64> {
        let with_host = self.requests.iter_mut().flatten().filter(|request| request.sent && has_reply(request.opcode));
        let signalled = with_host.filter(|request| !request.interrupted && request.caller_has_signal());
        signalled
            .map(|request| {
                request.interrupted = true;
                request.unique
            })
            .collect()
    }

    /// Submits the request in `slot`. Returns `true` if the host has it or it is answered, `false` if it must wait. If
    /// `transport_id` has changed then, `detach_host` has already put it into the backlog.
    fn try_submit(&mut self, slot: u32) -> Result<bool, Error> {
        let Some(request) = &self.requests[slot as usize] else { return Ok(true) };
        let (mut head, mut payload_len) = (request.head, request.payload_len);
        let mut head_len = request.head_len;
        if let Some(session) = &self.session {
            if session.away {
                return Ok(false);
            }
            match self.prepare(slot, &mut head, &mut head_len, &mut payload_len) {
                Ok(Prepared::Submit) => {}
                Ok(Prepared::Reply(error)) => {
                    self.reply_locally(slot, error);
                    return Ok(true);
                }
                Err(Error::HostGone) => return self.detach_host().map(|()| false),
                Err(e) => return Err(e),
            }
        }
        let head = &head[..head_len];
        let room = reply_capacity(head, self.transport.slot(slot).1);
        match self.transport.submit(slot, head, payload_len, room) {
            Ok(sent) => {
                if let Some(request) = &mut self.requests[slot as usize] {
                    request.sent = sent;
                }
                Ok(sent)
            }
            Err(Error::HostGone) => self.detach_host().map(|()| false),
            Err(e) => Err(e),
        }
    }

    fn submit_backlog(&mut self) -> Result<(), Error> {
        while let Some(slot) = self.backlog.pop_front() {
            let before = self.transport_id;
            if !self.try_submit(slot)? {
                if self.transport_id == before {
                    self.backlog.push_front(slot);
                }
                break;
            }
        }
        Ok(())
    }

    /// Answers a request without the host; `error` is 0 or a negative errno.
    fn reply_locally(&mut self, slot: u32, error: i32) {
        if let Some(mut request) = self.requests[slot as usize].take() {
            self.stats.end(slot);
            self.write_order.end(&request.head, &mut request.repeats);
            self.local_replies.push_back(Reply::own(slot, &request, error));
        }
    }

    /// Takes one reply; `None` if there is none now.
    ///
    /// # Errors
    /// The transport's.
    pub fn reap(&mut self) -> Result<Option<Reply>, Error> {
        if self.is_away() {
            self.poll_for_host()?;
        }
        if self.local_replies.is_empty() {
            match self.next_reply() {
                Ok(reply) => {
                    self.pending -= usize::from(reply.is_some());
                    // Also without a reply: the completion may be of a READ that `repeat` has put into the backlog.
                    self.submit_backlog()?;
                    if reply.is_some() {
                        return Ok(reply);
                    }
                }
                Err(Error::HostGone) => self.detach_host()?,
                Err(e) => return Err(e),
            }
        }
        let answer = self.local_replies.pop_front();
        self.pending -= usize::from(answer.is_some());
        Ok(answer)
    }

    fn next_reply(&mut self) -> Result<Option<Reply>, Error> {
        loop {
            let completion = match self.stash.pop_front() {
                Some(stashed) => Some(stashed),
                None => self.transport.reap()?,
            };
            let Some(completion) = completion else { return Ok(None) };
            if let Some(reply) = self.complete(completion)? {
                return Ok(Some(reply));
            }
        }
    }

    /// Turns a completion into a reply; `None` if the request is a READ that is sent again.
    fn complete(&mut self, mut completion: Completion) -> Result<Option<Reply>, Error> {
        let slot = completion.slot;
        let sent = self.requests.get(slot as usize).and_then(Option::as_ref).is_some_and(|request| request.sent);
        if !sent {
            return Err(Error::Protocol("answer to a request that was not made"));
        }
        // The kernel takes 0 and -511 to -1.
        let error = match completion.error() {
            e @ -511..=0 => e,
            _ => -libc::EIO,
        };
        if self.must_repeat(slot) && error == 0 {
            self.repeat(slot)?;
            return Ok(None);
        }
        self.expire_stale(&mut completion, error);
        if self.session.is_some() {
            self.translate_reply(&mut completion, error)?;
        }
        let request = self.requests[slot as usize].take().ok_or(Error::Protocol("answered twice"))?;
        self.stats.end(slot);
        let took = request.start.elapsed();
        self.stats.record(request.opcode, error, took, self.pending, &*self.transport);
        let bytes = request.payload_len.max(completion.payload_len as u32);
        self.stats.recording.count(request.opcode, bytes, self.pending, took);
        let header = reply_header(0, error, request.unique);
        let mut answer = Reply { slot, header, opcode: request.opcode, completion };
        let len = OUT_HEADER + answer.inline().len() + answer.payload_len();
        answer.header[..4].copy_from_slice(&(len as u32).to_ne_bytes());
        Ok(Some(answer))
    }

    /// Records in `write_order` that a request is answered. Returns `true` if it is a READ that may have overtaken a
    /// WRITE, `false` for any other request.
    fn must_repeat(&mut self, slot: u32) -> bool {
        self.requests[slot as usize]
            .as_mut()
            .is_some_and(|request| self.write_order.end(&request.head, &mut request.repeats))
    }

    /// Sends a request again. If this host has died, `detach_host` keeps the request for the next one.
    fn repeat(&mut self, slot: u32) -> Result<(), Error> {
        if self.session.as_ref().is_some_and(|session| session.draining) {
            return Ok(());
        }
        if let Some(request) = &mut self.requests[slot as usize] {
            request.sent = false;
        }
        self.submit_or_queue(slot)
    }

    /// Detaches from a dead host: takes its last completions, drops its transport, and keeps the unanswered requests
    /// for the next host.
    ///
    /// # Errors
    /// [`Error::HostGone`] if the queue has no reconnect state; [`Error::Io`] if the process has no descriptor left.
    pub fn detach_host(&mut self) -> Result<(), Error> {
        let Some(session) = &mut self.session else { return Err(Error::HostGone) };
        session.draining = true;
        let reconnect = session.reconnect.clone();
        // Take the replies that the host still sent.
        while self.requests.iter().flatten().any(|request| request.sent) {
            match self.next_reply() {
                Ok(Some(answer)) => self.local_replies.push_back(answer),
                _ => break,
            }
        }
        self.stash.clear();
        self.transport = Box::new(Absent::of(&*self.transport, reconnect.host_event())?);
        self.transport_id += 1;
        // Answer INTERRUPTs here: the next host does not have the requests that they interrupt.
        for slot in 0..self.requests.len() as u32 {
            if self.requests[slot as usize].as_ref().is_some_and(|request| request.opcode == opcode::INTERRUPT) {
                self.reply_locally(slot, 0);
            }
        }
        let mut waiting: Vec<_> =
            (0..self.requests.len() as u32).filter(|&s| self.requests[s as usize].is_some()).collect();
        waiting.sort_by_key(|&slot| self.requests[slot as usize].as_ref().map(|request| request.start));
        for &slot in &waiting {
            self.stats.end(slot);
            let place = self.transport.slot(slot);
            if let Some(request) = self.requests[slot as usize].as_mut().filter(|request| request.sent) {
                (request.sent, request.replay, request.interrupted) = (false, true, false);
                let request = &*request;
                if let Some(session) = &self.session {
                    session.restore(slot, request, place);
                }
            }
        }
        self.backlog = waiting.into();
        self.session_mut().detach();
        Ok(())
    }

    /// Returns `true` while there is no host.
    pub fn is_away(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.away)
    }

    fn session_mut(&mut self) -> &mut Session {
        self.session.as_mut().expect("checked by the caller")
    }

    fn poll_for_host(&mut self) -> Result<(), Error> {
        if let Some(transport) = self.session_mut().look()? {
            self.transport = transport;
            self.transport_id += 1;
            // INTERRUPTs for these requests were lost with the last host, if the kernel sent any.
            self.check_callers();
            let now = Instant::now();
            self.backlog.iter().for_each(|&slot| self.stats.begin(slot, now));
            self.submit_backlog()?;
        }
        Ok(())
    }
}
