//! A transport with the bookkeeping that both channels need: what is under
//! way, what must wait for room or for another host, and what the host may say about it.

use super::session::{Ready, Session};
use crate::fuse::abi::{has_reply, opcode, reply_header, reply_room, request_opcode, request_unique};
use crate::message::OUT_HEADER;
use crate::resume::absent::Absent;
use crate::resume::wire::{u64_at, BODY};
use crate::stats::QueueStats;
use crate::transport::{Completion, Transport};
use crate::Error;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tunnelfs_ring::{CQE_INLINE_BYTES, SQE_INLINE_BYTES};

/// How long a request waits for room until the guest checks whether its caller has been killed.
pub const CALLER_CHECK: Duration = Duration::from_millis(100);

/// A request that the host has, or that waits for room.
pub struct Flight {
    pub unique: u64,
    pub opcode: u32,
    start: Instant,
    /// As the kernel has it.
    pub head: [u8; SQE_INLINE_BYTES],
    pub head_len: usize,
    pub payload_len: u32,
    /// The host has it.
    pub sent: bool,
    /// A host that has gone had it.
    pub again: bool,
    /// An INTERRUPT of ours has been sent for it.
    interrupted: bool,
    /// What it gives back has been taken off the tables, for the host of this time.
    pub noted: Option<u64>,
}

/// The host's answer to the request in `slot`, fit for the kernel.
pub struct Answer {
    pub slot: u32,
    /// `fuse_out_header`, made here: the host's word is only taken for the error.
    pub header: [u8; OUT_HEADER],
    opcode: u32,
    completion: Completion,
}

impl Answer {
    /// Without a host.
    fn own(slot: u32, flight: &Flight, error: i32) -> Answer {
        let completion = Completion { slot, head: [0; CQE_INLINE_BYTES], head_len: OUT_HEADER, payload_len: 0 };
        Answer { slot, header: reply_header(OUT_HEADER, error, flight.unique), opcode: flight.opcode, completion }
    }

    /// Whether the kernel expects no reply (FORGET, INTERRUPT).
    pub fn wants_none(&self) -> bool {
        !has_reply(self.opcode)
    }

    /// The header of a reply that is an error instead.
    pub fn error_header(&self, error: i32) -> [u8; OUT_HEADER] {
        reply_header(OUT_HEADER, error, request_unique(&self.header))
    }

    /// Reply bytes before those in the slot.
    pub fn inline(&self) -> &[u8] {
        if self.failed() {
            &[]
        } else {
            self.completion.inline()
        }
    }

    /// Reply bytes in the slot.
    pub fn payload_len(&self) -> usize {
        if self.failed() {
            0
        } else {
            self.completion.payload_len
        }
    }

    fn failed(&self) -> bool {
        self.header[4..8] != [0; 4]
    }
}

/// One request queue to the host.
pub struct Queue {
    pub transport: Box<dyn Transport>,
    pub flights: Vec<Option<Flight>>,
    /// Slots whose requests wait for room, or for a host.
    waiting: VecDeque<u32>,
    /// Completions that came while another one was waited for.
    pub stash: VecDeque<Completion>,
    /// Not fetched yet.
    answers: VecDeque<Answer>,
    under_way: usize,
    stats: Arc<QueueStats>,
    /// Where another host may take over.
    pub session: Option<Session>,
    generation: u32,
}

impl Queue {
    pub fn new(transport: Box<dyn Transport>, stats: Arc<QueueStats>, session: Option<Session>) -> Self {
        Queue {
            flights: (0..transport.slots()).map(|_| None).collect(),
            transport,
            waiting: VecDeque::new(),
            stash: VecDeque::new(),
            answers: VecDeque::new(),
            under_way: 0,
            stats,
            session,
            generation: 0,
        }
    }

    /// Requests that wait for an answer.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// Another number, another transport: its descriptors are new.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// The thread is going to wait for the kernel alone, and holds nothing of the host's.
    pub fn rest(&self) {
        if let Some(session) = &self.session {
            session.resume.handover.rest(session.seat);
        }
    }

    /// It is back.
    ///
    /// # Errors
    /// As [`Self::lose`].
    pub fn rested(&mut self) -> Result<(), Error> {
        let Some(session) = &self.session else { return Ok(()) };
        // Also without a host: whoever takes the next one must not count as at rest when that one goes.
        let lost = session.resume.handover.rested(session.seat, session.time);
        if lost && !session.away {
            self.lose()
        } else {
            Ok(())
        }
    }

    /// Submits the request in `slot`, as soon as there is room.
    ///
    /// # Errors
    /// The transport's.
    pub fn send(&mut self, slot: u32, head: &[u8], payload_len: u32) -> Result<(), Error> {
        let flight = Flight::new(head, payload_len);
        if let Some(session) = &mut self.session {
            session.keep(slot, &flight, self.transport.slot(slot));
        }
        // While there is no host, none is late.
        if !self.is_away() {
            self.stats.begin(slot, flight.start);
        }
        self.flights[slot as usize] = Some(flight);
        self.under_way += 1;
        if request_opcode(head) == opcode::INTERRUPT {
            return self.interrupt(slot, head);
        }
        let before = self.generation;
        if (!self.waiting.is_empty() || !self.submit(slot)?) && self.generation == before {
            self.waiting.push_back(slot);
        }
        Ok(())
    }

    /// Submits an INTERRUPT, ahead of the requests that wait for room: they may be waiting for the one that it ends.
    fn interrupt(&mut self, slot: u32, head: &[u8]) -> Result<(), Error> {
        // `fuse_interrupt_in.unique`
        let target = u64_at(head, BODY);
        let unsent = |&&slot: &&u32| self.flights[slot as usize].as_ref().is_some_and(|flight| flight.unique == target);
        let unsent = self.waiting.iter().find(unsent).copied();
        // Without a host nothing is stuck there.
        if self.is_away() || unsent.is_some_and(|target| self.end_if_killed(target)) {
            self.answer(slot, 0);
            return Ok(());
        }
        let before = self.generation;
        match unsent {
            // The host must see the request first.
            Some(_) => self.waiting.push_back(slot),
            None if !self.submit(slot)? && self.generation == before => self.waiting.push_front(slot),
            None => {}
        }
        Ok(())
    }

    /// How long the channel may sleep before it must call [`Self::check_callers`]; `None`: as long as it likes.
    pub fn sleep_limit(&self) -> Option<Duration> {
        (!self.waiting.is_empty()).then_some(CALLER_CHECK)
    }

    /// Answers requests that wait for room, or for a host, and whose callers are being killed: the kernel cannot take
    /// them back.
    pub fn check_callers(&mut self) {
        let waiting: Vec<u32> = self.waiting.iter().copied().collect();
        waiting.into_iter().for_each(|slot| {
            self.end_if_killed(slot);
        });
    }

    /// Answers a request that the host does not have, if its caller is being killed. Returns whether it is.
    fn end_if_killed(&mut self, slot: u32) -> bool {
        let killed = self.flights[slot as usize].as_ref().is_some_and(Flight::caller_is_killed);
        if killed {
            self.waiting.retain(|&s| s != slot);
            self.answer(slot, -libc::EINTR);
        }
        killed
    }

    /// The requests that the host has, whose callers have been sent a signal since. Each is returned once.
    pub fn signalled(&mut self) -> Vec<u64> {
        let with_host = self.flights.iter_mut().flatten().filter(|flight| flight.sent && has_reply(flight.opcode));
        let signalled = with_host.filter(|flight| !flight.interrupted && flight.caller_has_signal());
        signalled
            .map(|flight| {
                flight.interrupted = true;
                flight.unique
            })
            .collect()
    }

    /// Whether the request in `slot` needs no more waiting: it is with the host, or answered.
    fn submit(&mut self, slot: u32) -> Result<bool, Error> {
        let Some(flight) = &self.flights[slot as usize] else { return Ok(true) };
        let (mut head, mut payload_len) = (flight.head, flight.payload_len);
        let mut head_len = flight.head_len;
        if let Some(session) = &self.session {
            if session.away {
                return Ok(false);
            }
            match self.make_ready(slot, &mut head, &mut head_len, &mut payload_len) {
                Ok(Ready::Go) => {}
                Ok(Ready::Answered(error)) => {
                    self.answer(slot, error);
                    return Ok(true);
                }
                Err(Error::HostGone) => return self.lose().map(|()| false),
                Err(e) => return Err(e),
            }
        }
        let head = &head[..head_len];
        let room = reply_room(head, self.transport.slot(slot).1);
        match self.transport.submit(slot, head, payload_len, room) {
            Ok(sent) => {
                if let Some(flight) = &mut self.flights[slot as usize] {
                    flight.sent = sent;
                }
                Ok(sent)
            }
            Err(Error::HostGone) => self.lose().map(|()| false),
            Err(e) => Err(e),
        }
    }

    fn flush(&mut self) -> Result<(), Error> {
        while let Some(slot) = self.waiting.pop_front() {
            let before = self.generation;
            if !self.submit(slot)? {
                if self.generation == before {
                    self.waiting.push_front(slot);
                }
                break;
            }
        }
        Ok(())
    }

    /// Answers a request without the host.
    fn answer(&mut self, slot: u32, error: i32) {
        if let Some(flight) = self.flights[slot as usize].take() {
            self.stats.end(slot);
            self.answers.push_back(Answer::own(slot, &flight, error));
        }
    }

    /// Takes one answer.
    ///
    /// # Errors
    /// The transport's.
    pub fn reap(&mut self) -> Result<Option<Answer>, Error> {
        if self.is_away() {
            self.look_for_host()?;
        }
        if self.answers.is_empty() {
            match self.next_completion() {
                Ok(None) => return Ok(None),
                Ok(Some(answer)) => {
                    self.under_way -= 1;
                    self.flush()?;
                    return Ok(Some(answer));
                }
                Err(Error::HostGone) => self.lose()?,
                Err(e) => return Err(e),
            }
        }
        let answer = self.answers.pop_front();
        self.under_way -= usize::from(answer.is_some());
        Ok(answer)
    }

    fn next_completion(&mut self) -> Result<Option<Answer>, Error> {
        let completion = match self.stash.pop_front() {
            Some(stashed) => Some(stashed),
            None => self.transport.reap()?,
        };
        completion.map(|completion| self.settle(completion)).transpose()
    }

    /// A completion to its answer.
    fn settle(&mut self, mut completion: Completion) -> Result<Answer, Error> {
        let slot = completion.slot;
        let sent = self.flights.get(slot as usize).and_then(Option::as_ref).is_some_and(|flight| flight.sent);
        if !sent {
            return Err(Error::Protocol("answer to a request that was not made"));
        }
        // The kernel takes 0 and -511 to -1.
        let error = match completion.error() {
            e @ -511..=0 => e,
            _ => -libc::EIO,
        };
        if self.session.is_some() {
            self.take_note(&mut completion, error)?;
        }
        let flight = self.flights[slot as usize].take().ok_or(Error::Protocol("answered twice"))?;
        self.stats.end(slot);
        let took = flight.start.elapsed();
        self.stats.record(flight.opcode, error, took, self.under_way, &*self.transport);
        let header = reply_header(0, error, flight.unique);
        let mut answer = Answer { slot, header, opcode: flight.opcode, completion };
        let len = OUT_HEADER + answer.inline().len() + answer.payload_len();
        answer.header[..4].copy_from_slice(&(len as u32).to_ne_bytes());
        Ok(answer)
    }

    /// The host has gone: lets go of what was shared with it, and keeps what is to be asked of the next one.
    ///
    /// # Errors
    /// [`Error::HostGone`] when there is to be none.
    pub fn lose(&mut self) -> Result<(), Error> {
        let Some(session) = &mut self.session else { return Err(Error::HostGone) };
        session.leaving = true;
        // What it still answered.
        while self.flights.iter().flatten().any(|flight| flight.sent) {
            match self.next_completion() {
                Ok(Some(answer)) => self.answers.push_back(answer),
                _ => break,
            }
        }
        self.stash.clear();
        self.transport = Box::new(Absent::of(&*self.transport)?);
        self.generation += 1;
        // What they would end is not with the next host.
        for slot in 0..self.flights.len() as u32 {
            if self.flights[slot as usize].as_ref().is_some_and(|flight| flight.opcode == opcode::INTERRUPT) {
                self.answer(slot, 0);
            }
        }
        let mut waiting: Vec<_> =
            (0..self.flights.len() as u32).filter(|&s| self.flights[s as usize].is_some()).collect();
        waiting.sort_by_key(|&slot| self.flights[slot as usize].as_ref().map(|flight| flight.start));
        for &slot in &waiting {
            self.stats.end(slot);
            let place = self.transport.slot(slot);
            if let Some(flight) = self.flights[slot as usize].as_mut().filter(|flight| flight.sent) {
                (flight.sent, flight.again, flight.interrupted) = (false, true, false);
                let flight = &*flight;
                if let Some(session) = &self.session {
                    session.restore(slot, flight, place);
                }
            }
        }
        self.waiting = waiting.into();
        self.session_mut().park();
        Ok(())
    }

    /// Whether there is no host.
    pub fn is_away(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.away)
    }

    fn session_mut(&mut self) -> &mut Session {
        self.session.as_mut().expect("checked by the caller")
    }

    fn look_for_host(&mut self) -> Result<(), Error> {
        if let Some(transport) = self.session_mut().look()? {
            self.transport = transport;
            self.generation += 1;
            // Their INTERRUPTs, if the kernel has sent any, went with the last host.
            self.check_callers();
            let now = Instant::now();
            self.waiting.iter().for_each(|&slot| self.stats.begin(slot, now));
            return self.flush();
        }
        // A request cannot be taken back by the kernel once it is here: whoever is killed would wait on.
        if self.session_mut().time_to_look_at_callers() {
            self.check_callers();
        }
        Ok(())
    }
}

impl Flight {
    pub fn new(head: &[u8], payload_len: u32) -> Flight {
        let mut copy = [0; SQE_INLINE_BYTES];
        copy[..head.len()].copy_from_slice(head);
        Flight {
            unique: request_unique(head),
            opcode: request_opcode(head),
            start: Instant::now(),
            head: copy,
            head_len: head.len(),
            payload_len,
            sent: false,
            again: false,
            interrupted: false,
            noted: None,
        }
    }
}
