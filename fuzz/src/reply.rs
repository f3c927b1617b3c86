//! A guest's drivers of all three transports, and its INIT, with a host that answers anything at any time.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use tunnelfs_fuse_abi::opcode;
use tunnelfs_guest::config::GuestConfig;
use tunnelfs_guest::fuse::init;
use tunnelfs_guest::fuse::message::request;
use tunnelfs_guest::link::memory::{QueueMemory, RegionAllocator};
use tunnelfs_guest::link::Link;
use tunnelfs_guest::transport::{ring, socket, virtqueue, Transport};
use tunnelfs_ring::{Eventfd, Geometry, Region, WaitConfig};
use tunnelfs_settings::{Settings, TransportKind};

const GEOMETRY: Geometry = Geometry { entries: 4, slots: 4, slot_size: 8192 };

/// One queue of memory that the input writes as it likes.
struct Anything {
    region: Region,
    memory: QueueMemory,
    bell: OwnedFd,
}

impl Anything {
    fn new() -> Anything {
        let region = Region::new(RegionAllocator::measure(&[GEOMETRY], usize::MAX / 2 + 1), false).unwrap();
        let end = |_: usize| Some(region.len());
        let memory = QueueMemory::new(&mut RegionAllocator::new(region.as_ptr(), &end), GEOMETRY, u16::MAX).unwrap();
        Anything { region, memory, bell: Eventfd::new().unwrap() }
    }

    /// Bytes before the slots.
    fn shared(&self) -> usize {
        self.memory.slot(0).0 as usize - self.region.as_ptr() as usize
    }

    fn put<T>(&self, at: *mut u8, value: T) {
        // SAFETY: callers stay in the region, and write integers at their alignment.
        unsafe { at.cast::<T>().write_volatile(value) }
    }
}

impl Link for Anything {
    fn memory(&self, _virtqueue: usize) -> &QueueMemory {
        &self.memory
    }

    fn address(&self, at: *const u8, _bytes: usize) -> Option<u64> {
        Some(at as u64)
    }

    /// The answer to the ring's set-up, which is the first request: chain 0 is used.
    fn kick(&self, _virtqueue: usize) -> std::io::Result<()> {
        // virtio 1.2, 2.7: descriptors of 16 bytes, the available ring, and the used ring at a multiple of 4.
        let size = usize::from(self.memory.size);
        let used = self.memory.virtqueue.wrapping_add(16 * size + (8 + 2 * size).next_multiple_of(4));
        self.put(used.wrapping_add(4), 0u32);
        self.put(used.wrapping_add(2), 1u16);
        Ok(())
    }

    fn call_fd(&self, _virtqueue: usize) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn hangup_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn event_idx(&self) -> bool {
        false
    }

    fn shares_cpus(&self) -> bool {
        true
    }
}

thread_local! {
    static MEMORY: Arc<Anything> = Arc::new(Anything::new());
    static LISTENER: RefCell<(UnixListener, GuestConfig, tempfile::TempDir)> = RefCell::new({
        let dir = tempfile::tempdir().unwrap();
        let mut config = GuestConfig::from(&Settings::default());
        (config.socket_path, config.transport) = (dir.path().join("s"), TransportKind::Socket);
        (UnixListener::bind(&config.socket_path).unwrap(), config, dir)
    });
}

/// First byte: which of them.
pub fn once(bytes: &[u8]) {
    let [kind, rest @ ..] = bytes else { return };
    match kind % 4 {
        0 => agree(rest),
        1 => LISTENER.with_borrow(|(listener, config, _)| {
            let stream = UnixStream::connect(&config.socket_path).unwrap();
            let mut driver = socket::SocketTransport::new(stream, &config.wait, GEOMETRY, None).unwrap();
            let (host, _) = listener.accept().unwrap();
            host.set_nonblocking(true).unwrap();
            // A stream that has begun an answer would be waited for: before anything is taken off it, it ends.
            drive(&mut driver, rest, |step| answer(&host, step), || drop(host.shutdown(Shutdown::Write)));
        }),
        _ => MEMORY.with(|memory| {
            // SAFETY: the region has that many bytes; the last driver is gone.
            unsafe { memory.region.as_ptr().write_bytes(0, memory.shared()) };
            let plain = virtqueue::VirtqueueTransport::new(memory.clone(), 0, WaitConfig::default());
            let mut driver: Box<dyn Transport> = Box::new(plain);
            if kind % 4 == 3 {
                let plain = virtqueue::VirtqueueTransport::new(memory.clone(), 0, WaitConfig::default());
                driver = ring::upgrade(plain, WaitConfig::default(), None).unwrap();
                assert_eq!(driver.name(), "ring");
            }
            let scribble = |&[_, a, b, c, d, e, f, _]: &[u8; 8]| {
                let at = u16::from_ne_bytes([a, b]) as usize * 4 % memory.shared();
                // Half of all at the start of a page, where indices are.
                let at = if c % 2 == 0 { at } else { at & !0xf80 };
                memory.put(memory.region.as_ptr().wrapping_add(at), u32::from_ne_bytes([c / 2, d, e, f]));
            };
            drive(driver.as_mut(), rest, scribble, || {});
        }),
    }
}

fn agree(body: &[u8]) {
    let [slot, flags, body @ ..] = body else { return };
    let slot_size = (8192 << (slot % 12)).min(16 << 20);
    let wanted = init::InitOptions {
        slot_size,
        uring: [None, Some(true), Some(false)][*flags as usize % 3],
        writeback: flags & 4 != 0,
        default_permissions: flags & 8 != 0,
    };
    let mut body = body.to_vec();
    let offered = init::offered(&body);
    init::filter_init_in(&mut body, wanted);
    if let Ok(agreed) = init::filter_init_out(&mut body, offered, wanted) {
        assert!(agreed.max_write <= slot_size, "writes of {} into slots of {slot_size}", agreed.max_write);
    }
}

/// An answer with any fields, and any number of bytes behind it.
fn answer(mut host: &UnixStream, &[_, a, b, c, d, e, f, _]: &[u8; 8]) {
    // Else the driver's own writes would wait.
    while matches!(host.read(&mut [0; 16384]), Ok(1..)) {}
    let mut frame = u32::from(b).wrapping_mul(u32::from(a).max(1)).to_ne_bytes().to_vec();
    frame.extend(i32::from(c as i8).to_ne_bytes());
    frame.extend(u64::from(d).to_ne_bytes());
    frame.resize(frame.len() + usize::from(e), f);
    let _ = host.write_all(&frame);
}

/// Requests and completions in any order, with what `host` does between them: each request that is answered was made,
/// once, and its answer fits the room.
fn drive(driver: &mut dyn Transport, steps: &[u8], host: impl Fn(&[u8; 8]), before_reaping: impl Fn()) {
    let mut rooms = [None; GEOMETRY.slots as usize];
    for step in steps.chunks_exact(8) {
        let step: &[u8; 8] = step.try_into().expect("eight bytes");
        match step[0] % 4 {
            0 => {
                let Some(slot) = rooms.iter().position(Option::is_none).filter(|s| *s < driver.slots() as usize) else {
                    continue;
                };
                let (payload, room) = (u32::from(step[1]) * 32, u32::from(step[2]) * 32);
                let head = request(opcode::GETATTR, 1, step[3].into(), &[0; 16], payload as usize);
                match driver.submit(slot as u32, &head, payload, room) {
                    Ok(true) => rooms[slot] = Some(room),
                    Ok(false) => {}
                    Err(_) => return,
                }
            }
            1 => host(step),
            2 => drop((driver.announce_sleep(), driver.awake())),
            _ => {
                before_reaping();
                match driver.reap() {
                    Ok(Some(done)) => {
                        let room = rooms.get_mut(done.slot as usize).and_then(Option::take).expect("it was under way");
                        assert!(done.payload_len <= room as usize && (16..=done.head.len()).contains(&done.head_len));
                    }
                    Ok(None) => {}
                    Err(_) => return,
                }
            }
        }
    }
}
