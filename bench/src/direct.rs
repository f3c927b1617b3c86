//! The limit of every transport: the host's server called as a function.

use crate::plan::{Load, Op};
use crate::session::{open_file, thread_cpu, Bench, OpenFile};
use crate::workload::{check, fill, Sample, Template};
use std::io;
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::control::OP_NOOP;
use tunnelfs_guest::fuse::message;
use tunnelfs_host::fs::Passthrough;
use tunnelfs_host::fs_builder;
use tunnelfs_host::guest_buf::GuestBuf;
use tunnelfs_host::handler::{Handler, Outcome};
use tunnelfs_host::Server;
use tunnelfs_ring::{Geometry, Region};
use tunnelfs_settings::Host;

/// A server over the benchmark's directory, and as many payload buffers as a queue has slots.
pub struct Direct {
    server: Server<Passthrough>,
    memory: Region,
    geometry: Geometry,
    file: OpenFile,
}

impl Direct {
    /// Opens the benchmark's file.
    ///
    /// # Errors
    /// The file system's.
    pub fn open(bench: &Bench) -> io::Result<Self> {
        let host = Host { shared_dir: bench.dir.clone(), announce_submounts: false, ..bench.settings.host.clone() };
        let server = Server::new(fs_builder::open(&host)?);
        let geometry = bench.settings.transport.geometry();
        let memory = Region::new(geometry.slots as usize * geometry.slot_size as usize, false);
        let memory = memory.map_err(io::Error::other)?;
        let mut direct = Direct { server, memory, geometry, file: OpenFile { node: 1, handle: 0 } };
        direct.file = open_file(|head| direct.word(head))?;
        Ok(direct)
    }

    fn word(&self, head: &[u8]) -> io::Result<u64> {
        match self.call(head, self.buffer(0), 0, 4096) {
            Outcome::Reply(r) if r.error == 0 => Ok(u64::from_ne_bytes(r.body()[..8].try_into().expect("eight bytes"))),
            Outcome::Reply(r) => Err(io::Error::from_raw_os_error(-r.error)),
            _ => Err(io::Error::other("no reply")),
        }
    }

    fn buffer(&self, slot: u32) -> *mut u8 {
        let slot = slot % self.geometry.slots;
        // SAFETY: there is memory for that many.
        unsafe { self.memory.as_ptr().add(slot as usize * self.geometry.slot_size as usize) }
    }

    /// `payload` and `room` are at most a slot's bytes.
    fn call(&self, head: &[u8], buffer: *mut u8, payload: u32, room: u32) -> Outcome {
        let part = |len: u32| [libc::iovec { iov_base: buffer.cast(), iov_len: len as usize }];
        let (input, output) = (part(payload), part(room));
        // SAFETY: both lie in one of this object's buffers.
        let (input, output) = unsafe { (GuestBuf::new(&input), GuestBuf::new(&output)) };
        self.server.handle(head, input, output, None)
    }

    /// As [`crate::workload::run`], one call at a time; the depth only says over how many buffers
    /// the payloads go in turn (one alone would stay in the cache, as no queue's payloads do).
    ///
    /// # Errors
    /// The file system's, or wrong bytes.
    pub fn run(&mut self, load: Load, time: Duration, sample: &mut Sample) -> io::Result<()> {
        let mut template = Template::new(load, self.file);
        let (payload, room) = template.lengths();
        // A thread's first call sets it up: that is not the load's.
        self.call(&message::request(OP_NOOP, 1, 0, &[], 0), self.buffer(0), 0, 0);
        let (begin, cpu, mut ops) = (Instant::now(), thread_cpu(), 0);
        if load.size > self.geometry.slot_size {
            return Err(io::Error::other("a load larger than a slot"));
        }
        while begin.elapsed() < time {
            let (head, offset) = template.advance();
            let buffer = self.buffer((ops % u64::from(load.depth)) as u32);
            if payload > 0 {
                // SAFETY: a buffer is as large as a slot, which was checked.
                unsafe { fill(buffer, load.size, offset) };
            }
            let start = Instant::now();
            let outcome = self.call(head, buffer, payload, room);
            sample.latency.saturating_record(start.elapsed().as_nanos() as u64);
            match outcome {
                Outcome::Reply(reply)
                    if reply.error == 0 && (payload > 0 || reply.payload_len == load.size as usize) => {}
                _ => return Err(io::Error::other("the direct call failed")),
            }
            if load.op == Op::Read {
                // SAFETY: as above.
                unsafe { check(buffer, load.size, offset)? };
            }
            ops += 1;
        }
        sample.turn(ops, begin.elapsed());
        sample.guest_cpu += thread_cpu() - cpu;
        Ok(())
    }
}
