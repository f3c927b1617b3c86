//! A transport with the bookkeeping that both channels need: what is under
//! way, what must wait for room, and what the host may say about it.

use crate::fuse::abi::{opcode, reply_header, reply_room, request_opcode, request_unique};
use crate::message::OUT_HEADER;
use crate::stats::QueueStats;
use crate::transport::{Completion, Transport};
use crate::Error;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;
use tunnelfs_ring::SQE_HEAD_BYTES;

/// A request that the host has, or that waits for room.
struct Flight {
    unique: u64,
    opcode: u32,
    start: Instant,
}

struct Waiting {
    slot: u32,
    head: [u8; SQE_HEAD_BYTES],
    head_len: usize,
    payload_len: u32,
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
    /// Whether the kernel expects no reply (FORGET).
    pub fn wants_none(&self) -> bool {
        matches!(self.opcode, opcode::FORGET | opcode::BATCH_FORGET)
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
    flights: Vec<Option<Flight>>,
    waiting: VecDeque<Waiting>,
    under_way: usize,
    stats: Arc<QueueStats>,
}

impl Queue {
    pub fn new(transport: Box<dyn Transport>, stats: Arc<QueueStats>) -> Self {
        let flights = (0..transport.slots()).map(|_| None).collect();
        Queue { transport, flights, waiting: VecDeque::new(), under_way: 0, stats }
    }

    /// Requests that the host owes an answer.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// Submits the request in `slot`, as soon as there is room.
    ///
    /// # Errors
    /// The transport's.
    pub fn send(&mut self, slot: u32, head: &[u8], payload_len: u32) -> Result<(), Error> {
        let flight = Flight { unique: request_unique(head), opcode: request_opcode(head), start: Instant::now() };
        self.stats.begin(slot, flight.start);
        self.flights[slot as usize] = Some(flight);
        self.under_way += 1;
        if !self.waiting.is_empty() || !self.submit(slot, head, payload_len)? {
            let mut copy = [0; SQE_HEAD_BYTES];
            copy[..head.len()].copy_from_slice(head);
            self.waiting.push_back(Waiting { slot, head: copy, head_len: head.len(), payload_len });
        }
        Ok(())
    }

    fn submit(&mut self, slot: u32, head: &[u8], payload_len: u32) -> Result<bool, Error> {
        let room = reply_room(head, self.transport.slot(slot).1);
        self.transport.submit(slot, head, payload_len, room)
    }

    /// Takes one answer.
    ///
    /// # Errors
    /// The transport's.
    pub fn reap(&mut self) -> Result<Option<Answer>, Error> {
        let Some(completion) = self.transport.reap()? else { return Ok(None) };
        let slot = completion.slot;
        let flight = self.flights.get_mut(slot as usize).and_then(Option::take);
        let flight = flight.ok_or(Error::Protocol("answer to a request that was not made"))?;
        self.under_way -= 1;
        self.stats.end(slot);
        while let Some(next) = self.waiting.pop_front() {
            if !self.submit(next.slot, &next.head[..next.head_len], next.payload_len)? {
                self.waiting.push_front(next);
                break;
            }
        }
        // The kernel takes 0 and -511 to -1.
        let error = match completion.error() {
            e @ -511..=0 => e,
            _ => -libc::EIO,
        };
        let took = flight.start.elapsed();
        self.stats.record(flight.opcode, error, took, self.under_way + 1, &*self.transport);
        let header = reply_header(0, error, flight.unique);
        let mut answer = Answer { slot, header, opcode: flight.opcode, completion };
        let len = OUT_HEADER + answer.inline().len() + answer.payload_len();
        answer.header[..4].copy_from_slice(&(len as u32).to_ne_bytes());
        Ok(Some(answer))
    }
}
