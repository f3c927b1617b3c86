//! Drives one load on one session for a while, and checks the data.

use crate::limits::histogram;
use crate::plan::{Load, Op};
use crate::session::{opcode, reply_word, thread_cpu, OpenFile, Session, FILE};
use hdrhistogram::Histogram;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::control::{OP_COPIED, OP_NOOP};
use tunnelfs_guest::{fuse::message, Transport};
use tunnelfs_ring::{set_affinity, SlotPool};

/// Bytes of the file that is read and written.
pub const FILE_BYTES: u64 = 64 << 20;

/// What a case came to, over all its turns.
pub struct Sample {
    /// Latencies, nanoseconds.
    pub latency: Histogram<u64>,
    /// Operations done.
    pub ops: u64,
    /// Operations a second, of each turn.
    pub rates: Vec<f64>,
    /// The p50 of each turn, nanoseconds.
    pub p50s: Vec<u64>,
    /// CPU time an operation of both sides in each turn, nanoseconds.
    pub cpus: Vec<f64>,
    /// CPU time of the guest's thread.
    pub guest_cpu: Duration,
    /// CPU time of the host.
    pub host_cpu: Duration,
    /// Payload bytes copied in user space, by both sides.
    pub copied: u64,
}

impl Sample {
    /// A turn is over: `ops` operations in `time`.
    pub fn turn(&mut self, ops: u64, time: Duration) {
        self.ops += ops;
        self.rates.push(ops as f64 / time.as_secs_f64());
    }

    /// Adds the sample of one turn, with the turn's own p50 and CPU time.
    ///
    /// # Errors
    /// None that is expected: all histograms have the same bounds.
    pub fn add(&mut self, turn: &Sample) -> io::Result<()> {
        self.latency.add(&turn.latency).map_err(io::Error::other)?;
        self.ops += turn.ops;
        self.rates.extend(&turn.rates);
        self.p50s.push(turn.latency.value_at_quantile(0.5));
        self.cpus.push((turn.guest_cpu + turn.host_cpu).as_nanos() as f64 / turn.ops.max(1) as f64);
        self.guest_cpu += turn.guest_cpu;
        self.host_cpu += turn.host_cpu;
        self.copied += turn.copied;
        Ok(())
    }

    /// The median turn's operations a second: one that the machine spoilt does not count.
    pub fn rate(&self) -> f64 {
        let mut rates = self.rates.clone();
        rates.sort_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied().unwrap_or(0.0)
    }
}

impl Default for Sample {
    fn default() -> Self {
        let latency = histogram();
        let zero = Duration::ZERO;
        let (rates, p50s, cpus) = (Vec::new(), Vec::new(), Vec::new());
        Sample { latency, ops: 0, rates, p50s, cpus, guest_cpu: zero, host_cpu: zero, copied: 0 }
    }
}

/// The word that belongs at a byte offset (a multiple of 8) of the file.
pub fn pattern(offset: u64) -> u64 {
    (offset / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Makes the benchmark's file in `dir`.
///
/// # Errors
/// The file system's.
pub fn make_file(dir: &Path) -> io::Result<()> {
    let bytes: Vec<u8> = (0..FILE_BYTES / 8).flat_map(|i| pattern(i * 8).to_ne_bytes()).collect();
    std::fs::write(dir.join(FILE), bytes)
}

/// Checks the whole file from the host's side; WRITEs write the same pattern.
///
/// # Errors
/// `InvalidData` at the first wrong word.
pub fn check_file(dir: &Path) -> io::Result<()> {
    let bytes = std::fs::read(dir.join(FILE))?;
    let wrong = bytes.chunks_exact(8).enumerate().find(|(i, w)| **w != pattern(*i as u64 * 8).to_ne_bytes());
    match wrong {
        Some((i, _)) => Err(wrong_bytes(i as u64 * 8)),
        None if bytes.len() as u64 != FILE_BYTES => Err(wrong_bytes(bytes.len() as u64)),
        None => Ok(()),
    }
}

fn wrong_bytes(offset: u64) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("wrong bytes at offset {offset}"))
}

/// A request that is made over and over, at moving offsets.
pub struct Template {
    load: Load,
    head: Vec<u8>,
    next: u64,
}

impl Template {
    /// The requests of `load` on `file`.
    pub fn new(load: Load, file: OpenFile) -> Self {
        let body = |words: &[u64]| words.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
        let size = load.size as usize;
        let io = body(&[file.handle, 0, load.size.into(), 0, 0]);
        let head = match load.op {
            Op::Noop => message::request(OP_NOOP, 1, 0, &[], 0),
            Op::Getattr => message::request(opcode::GETATTR, file.node, 0, &body(&[0, 0]), 0),
            Op::Lookup => message::request(opcode::LOOKUP, 1, 0, format!("{FILE}\0").as_bytes(), 0),
            Op::Read => message::request(opcode::READ, file.node, 0, &io, 0),
            Op::Write => message::request(opcode::WRITE, file.node, 0, &io, size),
        };
        Template { load, head, next: 0 }
    }

    /// The next request's first bytes and its file offset.
    pub fn advance(&mut self) -> (&[u8], u64) {
        // Only whole pieces of the file.
        let size = u64::from(self.load.size);
        let offset = FILE_BYTES.checked_div(size).map_or(0, |pieces| self.next % pieces * size);
        self.next += 1;
        self.head[8..16].copy_from_slice(&self.next.to_ne_bytes());
        if matches!(self.load.op, Op::Read | Op::Write) {
            self.head[48..56].copy_from_slice(&offset.to_ne_bytes());
        }
        (&self.head, offset)
    }

    /// Payload bytes that follow the head, and room for the reply.
    pub fn lengths(&self) -> (u32, u32) {
        match self.load.op {
            Op::Noop => (0, 0),
            Op::Getattr | Op::Lookup => (0, 256),
            Op::Read => (0, self.load.size),
            Op::Write => (self.load.size, 16),
        }
    }
}

/// Words of a payload that are looked at on every operation: one each so many bytes.
const STRIDE: usize = 4096;

/// # Safety
/// `size` bytes from `ptr` must be mapped, 8-aligned.
pub(crate) unsafe fn fill(ptr: *mut u8, size: u32, offset: u64) {
    for at in (0..size as usize).step_by(8) {
        // SAFETY: inside the caller's bytes.
        unsafe { ptr.add(at).cast::<u64>().write_volatile(pattern(offset + at as u64)) };
    }
}

/// # Safety
/// As for [`fill`].
pub(crate) unsafe fn check(ptr: *mut u8, size: u32, offset: u64) -> io::Result<()> {
    let last = (size as usize).saturating_sub(8);
    for at in (0..last).step_by(STRIDE).chain([last]) {
        // SAFETY: inside the caller's bytes.
        if unsafe { ptr.add(at).cast::<u64>().read_volatile() } != pattern(offset + at as u64) {
            return Err(wrong_bytes(offset + at as u64));
        }
    }
    Ok(())
}

/// Bytes that the host has copied so far; a stock host does not count any.
fn host_copied(t: &mut dyn Transport) -> u64 {
    reply_word(t, &message::request(OP_COPIED, 1, 1, &[], 0)).unwrap_or(0)
}

struct Flight {
    offset: u64,
    start: Instant,
}

/// Runs `load` for `time`, one thread a queue, and adds it to `sample`.
///
/// # Errors
/// The transport's, a negative answer, or wrong bytes.
pub fn run(session: &mut Session, load: Load, time: Duration, sample: &mut Sample) -> io::Result<()> {
    run_paused(session, load, Duration::ZERO, time, sample)
}

/// As [`run`], with a pause before each request, or before as many as are in flight together.
///
/// # Errors
/// As for [`run`].
pub fn run_paused(
    session: &mut Session,
    load: Load,
    pause: Duration,
    time: Duration,
    sample: &mut Sample,
) -> io::Result<()> {
    let pinned = session.pinned.clone();
    let file = session.file;
    let host_copied_before = host_copied(session.queues[0].as_mut());
    let cpu_before = session.process_cpu();
    let queues = session.queues.get_mut(..load.queues as usize).ok_or_else(|| io::Error::other("too few queues"))?;
    let turns = match queues {
        [only] if pinned.is_empty() => vec![drive(only.as_mut(), file, load, pause, time)?],
        queues => std::thread::scope(|s| {
            let queues = queues.iter_mut();
            let threads: Vec<_> = queues
                .enumerate()
                .map(|(i, t)| {
                    let cpu = pinned.get(i % pinned.len().max(1)).copied();
                    s.spawn(move || {
                        cpu.map_or(Ok(()), |cpu| set_affinity(&[cpu])).map_err(io::Error::other)?;
                        drive(t.as_mut(), file, load, pause, time)
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().expect("no panic")).collect::<io::Result<_>>()
        })?,
    };
    let cpu = session.process_cpu().saturating_sub(cpu_before);
    let guest_cpu: Duration = turns.iter().map(|turn| turn.guest_cpu).sum();
    sample.host_cpu += if session.host_pid().is_some() { cpu } else { cpu.saturating_sub(guest_cpu) };
    sample.copied += host_copied(session.queues[0].as_mut()) - host_copied_before;
    sample.rates.push(turns.iter().map(Sample::rate).sum());
    for turn in turns {
        sample.ops += turn.ops;
        sample.latency.add(&turn.latency).map_err(io::Error::other)?;
        sample.guest_cpu += turn.guest_cpu;
        sample.copied += turn.copied;
    }
    Ok(())
}

/// One queue's part of a load, by the calling thread.
fn drive(t: &mut dyn Transport, file: OpenFile, load: Load, pause: Duration, time: Duration) -> io::Result<Sample> {
    let (mut sample, mut ops) = (Sample::default(), 0);
    let mut template = Template::new(load, file);
    let depth = load.depth.min(t.slots());
    let mut flights: Vec<Option<Flight>> = (0..depth).map(|_| None).collect();
    let mut slots = SlotPool::new(depth);
    let (start, mut cpu, copied) = (Instant::now(), thread_cpu(), t.copied());
    loop {
        if !pause.is_zero() && slots.available() == depth as usize && start.elapsed() < time {
            // What a program does between its requests is not the file system's.
            let before = thread_cpu();
            wait_for(pause);
            cpu += thread_cpu() - before;
        }
        let stop = start.elapsed() >= time;
        while let Some(slot) = (!stop).then(|| slots.alloc()).flatten() {
            if !submit(t, &mut template, slot, &mut flights)? {
                slots.free(slot);
                break;
            }
        }
        if slots.available() == depth as usize {
            break;
        }
        let done = loop {
            match t.reap().map_err(io::Error::other)? {
                Some(done) => break done,
                None => t.wait().map_err(io::Error::other)?,
            }
        };
        let flight = flights.get_mut(done.slot as usize).and_then(Option::take);
        let flight = flight.ok_or_else(|| io::Error::other("completion of an idle slot"))?;
        sample.latency.saturating_record(flight.start.elapsed().as_nanos() as u64);
        accept(t, &load, &done, flight.offset)?;
        slots.free(done.slot);
        ops += 1;
    }
    sample.turn(ops, start.elapsed());
    sample.guest_cpu = thread_cpu() - cpu;
    sample.copied = t.copied() - copied;
    Ok(sample)
}

/// Pauses: short ones awake, since a sleep takes some 60 µs longer than it was told.
fn wait_for(pause: Duration) {
    let start = Instant::now();
    if pause > Duration::from_micros(200) {
        std::thread::sleep(pause - Duration::from_micros(60));
    }
    while start.elapsed() < pause {
        std::hint::spin_loop();
    }
}

fn submit(
    t: &mut dyn Transport,
    template: &mut Template,
    slot: u32,
    flights: &mut [Option<Flight>],
) -> io::Result<bool> {
    let (payload, room) = template.lengths();
    let (op, size, serial) = (template.load.op, template.load.size, template.next);
    let (head, offset) = template.advance();
    if op == Op::Write {
        // SAFETY: a free slot is ours, page-aligned and at least `size` long.
        unsafe { fill(t.slot(slot).0, size, offset) };
    }
    let start = Instant::now();
    let fits = t.submit(slot, head, payload, room).map_err(io::Error::other)?;
    match fits {
        true => flights[slot as usize] = Some(Flight { offset, start }),
        false => template.next = serial,
    }
    Ok(fits)
}

fn accept(t: &dyn Transport, load: &Load, done: &tunnelfs_guest::Completion, offset: u64) -> io::Result<()> {
    // A stock host does not know our no-op and says so, which is as short an answer.
    let refused = load.op == Op::Noop && done.error() == -libc::ENOSYS;
    if done.error() != 0 && !refused {
        return Err(io::Error::from_raw_os_error(-done.error()));
    }
    if load.op == Op::Read {
        if done.payload_len != load.size as usize {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "short READ"));
        }
        // SAFETY: a completed slot is ours again.
        unsafe { check(t.slot(done.slot).0, load.size, offset)? };
    }
    Ok(())
}
