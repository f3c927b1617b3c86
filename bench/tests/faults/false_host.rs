//! A vhost-user-fs back end by hand, which answers as it is told: over the virtqueue, and over a ring where the guest asks
//! for one. It trusts the guest, and polls; the guest under test is honest.

use memmap2::{MmapOptions, MmapRaw};
use nix::sys::socket::{recvmsg, ControlMessageOwned, MsgFlags};
use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{fence, AtomicBool, AtomicU16, Ordering};
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_ring::{Cqe, DeviceQueue, Eventfd, RingSetup, Sqe, CQE_INLINE_BYTES};

/// What is said to one request.
pub enum Said {
    /// A `fuse_out_header` of these fields, and what follows.
    Reply { len: u32, error: i32, unique: [u8; 8], body: Vec<u8> },
    /// No bytes, as to a FORGET.
    Done,
    /// The connection ends.
    End,
}

/// Completions that are not what they should be.
#[derive(Clone, Copy)]
pub struct Twist {
    pub cqe: fn(&mut Cqe),
    pub used: fn(&mut Used),
}

/// An entry of the used ring, and how far the index moves.
#[derive(Clone, Copy)]
pub struct Used {
    pub id: u32,
    pub len: u32,
    pub step: u16,
}

/// Says what it likes to a request; `true`: an honest completion carries it.
pub type Speaker = Arc<dyn Fn(&[u8]) -> (Vec<Said>, bool) + Send + Sync>;

const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;
/// MQ and CONFIG.
const PROTOCOL: u64 = 1 | 1 << 9;
const QUEUES: usize = 3;

#[derive(Default)]
struct Vring {
    size: u16,
    /// Descriptors, used ring, available ring.
    parts: [u64; 3],
    call: Option<OwnedFd>,
}

/// Serves one guest until it goes.
pub fn serve(mut stream: UnixStream, speaker: Speaker, twist: Twist) -> io::Result<()> {
    let gone = Arc::new(AtomicBool::new(false));
    let result = talk(&mut stream, &gone, &speaker, twist);
    gone.store(true, Ordering::Release);
    let _ = stream.shutdown(Shutdown::Both);
    result
}

fn talk(stream: &mut UnixStream, gone: &Arc<AtomicBool>, speaker: &Speaker, twist: Twist) -> io::Result<()> {
    let mut memory = None;
    let mut vrings: [Vring; QUEUES] = Default::default();
    loop {
        let (request, body, fds) = message(stream)?;
        let word = |at: usize| body.get(at..at + 4).map_or(0, |b| u32::from_ne_bytes(b.try_into().unwrap()));
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let vring = word(0) as usize % QUEUES;
        match request {
            1 => answer(stream, request, &(PROTOCOL_FEATURES | VERSION_1).to_ne_bytes())?,
            15 => answer(stream, request, &PROTOCOL.to_ne_bytes())?,
            17 => answer(stream, request, &(QUEUES as u64).to_ne_bytes())?,
            24 => {
                let mut config = body;
                config.resize(12 + 40, 0);
                config[12 + 36..].copy_from_slice(&(QUEUES as u32 - 1).to_le_bytes());
                answer(stream, request, &config)?;
            }
            5 => {
                let file = fds.into_iter().next().map(File::from).ok_or(io::ErrorKind::InvalidInput)?;
                let map = MmapOptions::new().len(long(16) as usize).map_raw(&file)?;
                memory = Some(Arc::new(Memory { map, base: long(24) }));
            }
            8 => vrings[vring].size = word(4) as u16,
            9 => vrings[vring].parts = [long(8), long(16), long(24)],
            13 => vrings[vring].call = fds.into_iter().next(),
            18 => {
                let started = std::mem::take(&mut vrings[vring]);
                let (Some(memory), Some(call)) = (memory.clone(), started.call) else { continue };
                let queue = Queue {
                    memory,
                    size: started.size,
                    parts: started.parts,
                    call,
                    seen: 0,
                    used: 0,
                    ring: None,
                    stream: stream.try_clone()?,
                    speaker: speaker.clone(),
                    twist,
                };
                let gone = gone.clone();
                std::thread::spawn(move || queue.run(&gone));
            }
            _ => {}
        }
    }
}

/// One message: its number, its body and its descriptors.
fn message(stream: &mut UnixStream) -> io::Result<(u32, Vec<u8>, Vec<OwnedFd>)> {
    let mut head = [0; 12];
    let mut space = nix::cmsg_space!([i32; 8]);
    let mut fds = Vec::new();
    let mut parts = [IoSliceMut::new(&mut head)];
    let got = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: the kernel has just made them, for us.
            fds.extend(numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if got.bytes != head.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
    let mut body = vec![0; word(8) as usize];
    stream.read_exact(&mut body)?;
    Ok((word(0), body, fds))
}

fn answer(stream: &mut UnixStream, request: u32, body: &[u8]) -> io::Result<()> {
    // Version 1, and the flag of replies.
    let head = [request, 1 | 1 << 2, body.len() as u32];
    let mut bytes: Vec<u8> = head.into_iter().flat_map(u32::to_ne_bytes).collect();
    bytes.extend(body);
    stream.write_all(&bytes)
}

/// The guest's region, mapped here.
struct Memory {
    map: MmapRaw,
    base: u64,
}

impl Memory {
    fn at(&self, address: u64, bytes: usize) -> *mut u8 {
        let offset = (address - self.base) as usize;
        assert!(offset + bytes <= self.map.len());
        self.map.as_mut_ptr().wrapping_add(offset)
    }

    fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        let from = self.at(address, bytes);
        // SAFETY: mapped, by `at`.
        (0..bytes).map(|i| unsafe { from.add(i).read_volatile() }).collect()
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        let to = self.at(address, bytes.len());
        // SAFETY: mapped, by `at`.
        bytes.iter().enumerate().for_each(|(i, byte)| unsafe { to.add(i).write_volatile(*byte) });
    }

    fn index(&self, address: u64) -> &AtomicU16 {
        // SAFETY: mapped, by `at`, and even.
        unsafe { &*self.at(address, 2).cast() }
    }
}

/// A buffer of a chain.
struct Buffer {
    address: u64,
    len: usize,
    write: bool,
}

struct Queue {
    memory: Arc<Memory>,
    size: u16,
    parts: [u64; 3],
    call: OwnedFd,
    seen: u16,
    used: u16,
    ring: Option<DeviceQueue>,
    stream: UnixStream,
    speaker: Speaker,
    twist: Twist,
}

impl Queue {
    fn run(mut self, gone: &AtomicBool) {
        while !gone.load(Ordering::Acquire) {
            if !self.serve_virtqueue() && !self.serve_ring() {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    fn end(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn serve_virtqueue(&mut self) -> bool {
        let [_, _, available] = self.parts;
        if self.memory.index(available + 2).load(Ordering::Acquire) == self.seen {
            return false;
        }
        let place = u64::from(self.seen % self.size);
        let head = self.memory.index(available + 4 + 2 * place).load(Ordering::Relaxed);
        self.seen = self.seen.wrapping_add(1);
        let chain = self.chain(head);
        let request: Vec<u8> =
            chain.iter().filter(|b| !b.write).flat_map(|b| self.memory.read(b.address, b.len)).collect();
        if request.get(4..8) == Some(&RingSetup::OPCODE.to_ne_bytes()[..]) {
            let done = self.set_up(&request[40..]).is_some();
            let unique = request[8..16].try_into().unwrap();
            let error = if done { 0 } else { -libc::ENOSYS };
            self.reply(head, &chain, Said::Reply { len: 16, error, unique, body: Vec::new() }, true);
            return true;
        }
        let (said, honest) = (self.speaker)(&request);
        for said in said {
            self.reply(head, &chain, said, honest);
        }
        true
    }

    fn chain(&self, head: u16) -> Vec<Buffer> {
        let mut chain = Vec::new();
        let mut next = head;
        loop {
            let bytes = self.memory.read(self.parts[0] + 16 * u64::from(next), 16);
            let half = |at: usize| u16::from_ne_bytes(bytes[at..at + 2].try_into().unwrap());
            let address = u64::from_ne_bytes(bytes[..8].try_into().unwrap());
            let len = u32::from_ne_bytes(bytes[8..12].try_into().unwrap()) as usize;
            chain.push(Buffer { address, len, write: half(12) & 2 != 0 });
            if half(12) & 1 == 0 {
                return chain;
            }
            next = half(14);
        }
    }

    fn reply(&mut self, head: u16, chain: &[Buffer], said: Said, honest: bool) {
        let mut bytes = match said {
            Said::End => return self.end(),
            Said::Done => Vec::new(),
            Said::Reply { len, error, unique, body } => {
                [&len.to_ne_bytes()[..], &error.to_ne_bytes(), &unique, &body].concat()
            }
        };
        let total = bytes.len() as u32;
        for buffer in chain.iter().filter(|b| b.write) {
            let rest = bytes.split_off(buffer.len.min(bytes.len()));
            self.memory.write(buffer.address, &bytes);
            bytes = rest;
        }
        let mut used = Used { id: head.into(), len: total, step: 1 };
        if !honest {
            (self.twist.used)(&mut used);
        }
        let ring = self.parts[1];
        let place = u64::from(self.used % self.size);
        self.memory.write(ring + 4 + 8 * place, &[used.id.to_ne_bytes(), used.len.to_ne_bytes()].concat());
        self.used = self.used.wrapping_add(used.step);
        self.memory.index(ring + 2).store(self.used, Ordering::Release);
        fence(Ordering::SeqCst);
        Eventfd::signal(&self.call);
    }

    fn set_up(&mut self, body: &[u8]) -> Option<()> {
        let setup = RingSetup::from_bytes(body).ok()?;
        let (geometry, size) = (setup.geometry, u64::from(setup.geometry.slot_size));
        let slots = setup.runs.iter().flat_map(|run| (0..u64::from(run.slots)).map(|i| run.address + i * size));
        let slots = slots.map(|address| self.memory.at(address, size as usize)).collect();
        let control = self.memory.at(setup.control, geometry.control_bytes());
        // SAFETY: the queue keeps the memory mapped.
        self.ring = Some(unsafe { DeviceQueue::new(control, slots, geometry).ok()? });
        Some(())
    }

    fn serve_ring(&mut self) -> bool {
        let Some(sqe) = self.ring.as_mut().and_then(|ring| ring.sq.pop()) else { return false };
        let Some(slot) = self.ring.as_ref().and_then(|ring| ring.slots.get(&sqe).ok()) else { return true };
        let mut request = sqe.inline[..sqe.inline_len as usize].to_vec();
        // SAFETY: in the slot, by `get`.
        request.extend((0..sqe.payload_len as usize).map(|i| unsafe { slot.add(i).read_volatile() }));
        let (said, honest) = (self.speaker)(&request);
        for said in said {
            self.complete(&sqe, slot, said, honest);
        }
        true
    }

    fn complete(&mut self, sqe: &Sqe, slot: *mut u8, said: Said, honest: bool) {
        let mut cqe = Cqe { user_data: sqe.user_data, payload_len: 0, inline_len: 0, inline: [0; CQE_INLINE_BYTES] };
        match said {
            Said::End => return self.end(),
            Said::Done => {}
            Said::Reply { len, error, unique, body } => {
                let room = body.len().min(sqe.reply_max as usize);
                // SAFETY: the slot has room for that, by `get`.
                body[..room].iter().enumerate().for_each(|(i, byte)| unsafe { slot.add(i).write_volatile(*byte) });
                cqe.inline[..16].copy_from_slice(&[&len.to_ne_bytes()[..], &error.to_ne_bytes(), &unique].concat());
                (cqe.payload_len, cqe.inline_len) = (len.saturating_sub(16), 16);
            }
        }
        if !honest {
            (self.twist.cqe)(&mut cqe);
        }
        if let Some(ring) = &mut self.ring {
            let _ = ring.cq.push(&cqe);
            fence(Ordering::SeqCst);
            Eventfd::signal(&self.call);
        }
    }
}
