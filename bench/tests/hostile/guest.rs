//! A guest that does as it likes: a vhost-user front end over memory that it
//! writes byte by byte. The same type drives correct requests too.

use crate::rig::{memory_file, soon, PATIENCE};
use memmap2::{MmapOptions, MmapRaw};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};
use tunnelfs_ring::{Cqe, DriverQueue, Geometry, RingSetup, SlotRun, Sqe, CPU_UNKNOWN, SQE_INLINE_BYTES};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

/// The guest's memory: its size, and where the host sees it.
pub const MEMORY: usize = 24 << 20;
pub const GPA: u64 = 0x1_0000_0000;
/// Entries of a virtqueue, and where its parts lie: one block a queue.
pub const VQ_SIZE: u16 = 64;
const VQ_BLOCK: usize = 256 << 10;
pub const AVAIL: usize = 0x4000;
pub const USED: usize = 0x6000;
const REQUEST: usize = 0x8000;
const REPLY: usize = 0x20000;
/// Bytes of one of 16 places for requests, and for replies.
const PLACE: usize = 4096 + 1024;
/// Where a queue's ring lies.
const RING: usize = 2 << 20;
const RING_BLOCK: usize = 8 << 20;
pub const GEOMETRY: Geometry = Geometry { entries: 64, slots: 16, slot_size: 256 << 10 };
pub const QUEUES: usize = 3;

/// FUSE's numbers and bodies (linux/fuse.h).
pub mod op {
    pub use tunnelfs_fuse_abi::opcode::*;

    pub fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_ne_bytes()).collect()
    }

    pub fn init_body() -> Vec<u8> {
        words(&[7, 38, 1 << 20, 0])
    }

    pub fn read_body(handle: u64, offset: u64, size: u32) -> Vec<u8> {
        let mut body = handle.to_ne_bytes().to_vec();
        body.extend(offset.to_ne_bytes());
        body.extend(words(&[size, 0, 0, 0, 0, 0]));
        body
    }
}

/// A whole request with an honest header.
pub fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    tunnelfs_guest::fuse::message::request(opcode, node, 7, body, 0)
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub error: i32,
    pub payload: Vec<u8>,
}

impl Answer {
    pub fn word(&self, at: usize) -> u64 {
        assert_eq!(self.error, 0, "{self:?}");
        u64::from_ne_bytes(self.payload[at..at + 8].try_into().unwrap())
    }
}

pub struct Hostile {
    pub front: Frontend,
    pub file: File,
    map: MmapRaw,
    pub kicks: Vec<EventFd>,
    pub calls: Vec<EventFd>,
    /// Chains made available so far, by queue.
    added: Vec<u16>,
}

// SAFETY: raw accesses to the mapping only; the tests that share one between threads want the races.
unsafe impl Sync for Hostile {}

impl Hostile {
    /// Connects; nothing is negotiated.
    pub fn bare(socket: &Path) -> Hostile {
        // Listening sockets have a backlog, and the host serves one guest at a time.
        let front = soon("a connection", || Frontend::connect(socket, QUEUES as u64).ok());
        let file = memory_file(MEMORY);
        let map = MmapOptions::new().len(MEMORY).map_raw(&file).unwrap();
        let bells = || (0..QUEUES).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
        Hostile { front, file, map, kicks: bells(), calls: bells(), added: vec![0; QUEUES] }
    }

    pub fn connect(socket: &Path) -> Hostile {
        let mut guest = Hostile::bare(socket);
        guest.negotiate();
        guest.start_queues();
        guest
    }

    pub fn negotiate(&mut self) {
        let front = &mut self.front;
        front.set_owner().unwrap();
        let features = front.get_features().unwrap();
        // VIRTIO_F_VERSION_1, indirect descriptors.
        front.set_features(features & (1 << 32 | 1 << 28 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())).unwrap();
        let offered = front.get_protocol_features().unwrap();
        front
            .set_protocol_features(
                offered
                    & (VhostUserProtocolFeatures::MQ
                        | VhostUserProtocolFeatures::CONFIG
                        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS),
            )
            .unwrap();
        let region = self.region();
        self.front.set_mem_table(&[region]).unwrap();
    }

    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GPA,
            memory_size: MEMORY as u64,
            userspace_addr: self.map.as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    pub fn start_queues(&mut self) {
        for queue in 0..QUEUES {
            self.start_queue(queue).unwrap();
        }
    }

    pub fn start_queue(&mut self, queue: usize) -> Result<(), vhost::Error> {
        self.start_queue_at(queue, 0)
    }

    /// Starts a queue whose driver has made `base` chains available so far.
    pub fn start_queue_at(&mut self, queue: usize, base: u16) -> Result<(), vhost::Error> {
        let at = self.map.as_ptr() as u64 + (queue * VQ_BLOCK) as u64;
        let config = VringConfigData {
            queue_max_size: VQ_SIZE,
            queue_size: VQ_SIZE,
            flags: 0,
            desc_table_addr: at,
            avail_ring_addr: at + AVAIL as u64,
            used_ring_addr: at + USED as u64,
            log_addr: None,
        };
        self.front.set_vring_num(queue, VQ_SIZE)?;
        self.front.set_vring_addr(queue, &config)?;
        self.front.set_vring_base(queue, base)?;
        self.front.set_vring_call(queue, &self.calls[queue])?;
        self.front.set_vring_kick(queue, &self.kicks[queue])?;
        self.front.set_vring_enable(queue, true)
    }

    /// A new driver of a stopped queue.
    pub fn begin_anew(&mut self, queue: usize) {
        self.put_bytes(queue * VQ_BLOCK, &vec![0; REQUEST]);
        self.added[queue] = 0;
        self.start_queue(queue).unwrap();
    }

    /// Waits until the host has done what it was told so far.
    pub fn settle(&self) {
        self.front.get_features().unwrap();
    }

    /// Writes raw bytes into the guest's memory.
    pub fn put<T>(&self, at: usize, value: T) {
        assert!(at + size_of::<T>() <= MEMORY);
        // SAFETY: in the mapping; the address may be odd.
        unsafe { self.map.as_mut_ptr().add(at).cast::<T>().write_unaligned(value) }
    }

    pub fn get<T: Copy>(&self, at: usize) -> T {
        assert!(at + size_of::<T>() <= MEMORY);
        // SAFETY: in the mapping, plain integers.
        unsafe { self.map.as_ptr().add(at).cast::<T>().read_unaligned() }
    }

    pub fn put_bytes(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= MEMORY);
        // SAFETY: in the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.map.as_mut_ptr().add(at), bytes.len()) }
    }

    pub fn bytes(&self, at: usize, len: usize) -> Vec<u8> {
        (at..at + len).map(|at| self.get::<u8>(at)).collect()
    }

    /// A descriptor of queue `queue`'s table.
    pub fn descriptor(&self, queue: usize, index: u16, (address, len): (u64, u32), flags: u16, next: u16) {
        let at = queue * VQ_BLOCK + usize::from(index) * 16;
        self.put(at, address);
        self.put(at + 8, len);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    /// Makes the chain that starts at `head` available.
    pub fn make_available(&mut self, queue: usize, head: u16) {
        let at = queue * VQ_BLOCK + AVAIL;
        self.put(at + 4 + usize::from(self.added[queue] % VQ_SIZE) * 2, head);
        self.added[queue] = self.added[queue].wrapping_add(1);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.put(at + 2, self.added[queue]);
        self.kick(queue);
    }

    pub fn kick(&self, queue: usize) {
        let _ = self.kicks[queue].write(1);
    }

    /// Chains of queue `queue` that have been answered.
    pub fn used(&self, queue: usize) -> u16 {
        self.get(queue * VQ_BLOCK + USED + 2)
    }

    /// Sends one request over a plain virtqueue.
    pub fn send(&mut self, queue: usize, message: &[u8]) {
        let base = queue * VQ_BLOCK;
        self.put_bytes(base + REQUEST, message);
        let gpa = |at: usize| GPA + (base + at) as u64;
        self.descriptor(queue, 0, (gpa(REQUEST), message.len() as u32), 1, 1);
        self.descriptor(queue, 1, (gpa(REPLY), 4096), 2, 0);
        self.make_available(queue, 0);
    }

    /// Sends a request by the chain at `place`, one of 16, with room of its own.
    pub fn send_in(&mut self, queue: usize, place: u16, message: &[u8]) {
        let at = |area: usize| queue * VQ_BLOCK + area + usize::from(place) * PLACE;
        self.put_bytes(at(REQUEST), message);
        self.descriptor(queue, 2 * place, (GPA + at(REQUEST) as u64, message.len() as u32), 1, 2 * place + 1);
        self.descriptor(queue, 2 * place + 1, (GPA + at(REPLY) as u64, PLACE as u32), 2, 0);
        self.make_available(queue, 2 * place);
    }

    /// The chain that has been answered as number `at`.
    pub fn used_place(&self, queue: usize, at: u16) -> u16 {
        let element = queue * VQ_BLOCK + USED + 4 + usize::from(at % VQ_SIZE) * 8;
        self.get::<u32>(element) as u16 / 2
    }

    /// What lies where a chain's reply goes.
    pub fn reply_bytes(&self, queue: usize, place: u16) -> Vec<u8> {
        self.bytes(queue * VQ_BLOCK + REPLY + usize::from(place) * PLACE, PLACE)
    }

    /// An answer, and the request's number.
    pub fn answer_in(&self, queue: usize, place: u16) -> (u64, Answer) {
        let bytes = self.reply_bytes(queue, place);
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        let len = (word(0) as usize).clamp(16, PLACE);
        let unique = u64::from_ne_bytes(bytes[8..16].try_into().unwrap());
        (unique, Answer { error: word(4) as i32, payload: bytes[16..len].to_vec() })
    }

    /// One request over a plain virtqueue, and its answer if there is one.
    pub fn call(&mut self, queue: usize, message: &[u8]) -> Option<Answer> {
        let base = queue * VQ_BLOCK;
        let before = self.used(queue);
        self.send(queue, message);
        let start = Instant::now();
        while self.used(queue) == before {
            if start.elapsed() > PATIENCE {
                return None;
            }
            std::thread::yield_now();
        }
        let len = (self.get::<u32>(base + REPLY) as usize).clamp(16, 4096);
        Some(Answer { error: self.get(base + REPLY + 4), payload: self.bytes(base + REPLY + 16, len - 16) })
    }

    /// Where queue `queue`'s ring lies in the guest's memory.
    pub fn ring_at(queue: usize) -> usize {
        RING + (queue - 1) * RING_BLOCK
    }

    /// Asks for a ring; the answer's error.
    pub fn ask_for_ring(&mut self, queue: usize, setup: RingSetup) -> i32 {
        let answer = self.call(queue, &request(RingSetup::OPCODE, 0, &setup.to_bytes()));
        answer.expect("the set-up message is answered").error
    }

    pub fn setup(queue: usize) -> RingSetup {
        Hostile::setup_at(GPA + Hostile::ring_at(queue) as u64)
    }

    /// A ring in one piece from `control` on.
    pub fn setup_at(control: u64) -> RingSetup {
        let address = control.wrapping_add(GEOMETRY.control_bytes() as u64);
        let runs = vec![SlotRun { address, slots: GEOMETRY.slots }];
        RingSetup { features: 0, geometry: GEOMETRY, control, cpu: CPU_UNKNOWN, runs }
    }

    /// A ring on this queue, in zeroed memory.
    pub fn ring(&mut self, queue: usize) -> Ring {
        let at = Hostile::ring_at(queue);
        self.put_bytes(at, &vec![0; GEOMETRY.control_bytes()]);
        assert_eq!(self.ask_for_ring(queue, Hostile::setup(queue)), 0, "a ring is given");
        // SAFETY: the ring lies in the mapping, which outlives it in each test.
        let driver = unsafe { DriverQueue::new(self.map.as_mut_ptr().add(at), GEOMETRY) }.unwrap();
        Ring { driver, queue }
    }
}

/// A ring's driver side, with the means to break its rules.
pub struct Ring {
    pub driver: DriverQueue,
    pub queue: usize,
}

/// A submission of a message: the first 80 bytes in the entry, the rest in the slot.
pub fn sqe(guest: &Hostile, queue: usize, slot: u32, message: &[u8]) -> Sqe {
    let inline_len = message.len().min(80);
    let mut inline = [0; SQE_INLINE_BYTES];
    inline[..inline_len].copy_from_slice(&message[..inline_len]);
    let rest = &message[inline_len..];
    guest.put_bytes(slot_at(queue, slot), rest);
    Sqe {
        user_data: slot,
        slot,
        payload_len: rest.len() as u32,
        reply_max: GEOMETRY.slot_size,
        inline_len: inline_len as u32,
        inline,
    }
}

pub fn slot_at(queue: usize, slot: u32) -> usize {
    Hostile::ring_at(queue) + GEOMETRY.control_bytes() + (slot * GEOMETRY.slot_size) as usize
}

impl Ring {
    pub fn submit(&mut self, guest: &Hostile, sqe: &Sqe) -> bool {
        let room = self.driver.sq.push(sqe).unwrap_or(false);
        guest.kick(self.queue);
        room
    }

    /// As an honest driver does: who is awake is not rung.
    pub fn submit_politely(&mut self, guest: &Hostile, sqe: &Sqe) {
        assert!(self.driver.sq.push(sqe).unwrap());
        if self.driver.peer_wakeup.take() {
            guest.kick(self.queue);
        }
    }

    pub fn reap(&mut self, within: Duration) -> Option<Cqe> {
        let start = Instant::now();
        loop {
            match self.driver.cq.pop() {
                Some(cqe) => return Some(cqe),
                None if start.elapsed() > within => return None,
                None => std::thread::yield_now(),
            }
        }
    }

    /// One request in slot 0, and its answer.
    pub fn call(&mut self, guest: &Hostile, message: &[u8]) -> Option<Answer> {
        assert!(self.submit(guest, &sqe(guest, self.queue, 0, message)));
        let cqe = self.reap(PATIENCE)?;
        let head_len = (cqe.inline_len as usize).clamp(16, cqe.inline.len());
        let mut payload = cqe.inline[16..head_len].to_vec();
        payload.extend(guest.bytes(slot_at(self.queue, 0), cqe.payload_len as usize));
        Some(Answer { error: i32::from_ne_bytes(cqe.inline[4..8].try_into().unwrap()), payload })
    }
}
