//! A share inside a program that is something else: it serves a driver on the program's memory and eventfds, and leaves
//! the process as it was. One test: it compares the whole process before and after.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::ptr::{read_volatile, write_volatile};
use std::sync::atomic::{fence, Ordering};
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::{Opcode, ROOT_ID};
use tunnelfs_host::in_process::{Device, MemoryRegion, Queue};
use tunnelfs_host::{Counted, Handler, Host, Meter};
use tunnelfs_ring::{Eventfd, Region};
use tunnelfs_settings::Settings;

/// Where the guest has its memory, and what lies where in it.
const GUEST: u64 = 0x4000_0000;
const BYTES: usize = 1 << 20;
const DESCRIPTORS: usize = 0x1000;
const AVAILABLE: usize = 0x2000;
const USED: usize = 0x3000;
const REQUEST: usize = 0x4000;
const REPLY: usize = 0x5000;
const ENTRIES: u16 = 8;

/// The guest's driver of one queue.
struct Driver {
    memory: Region,
    kick: OwnedFd,
    call: OwnedFd,
    submitted: u16,
}

impl Driver {
    fn new() -> Driver {
        let eventfd = || Eventfd::new().unwrap();
        Driver { memory: Region::new(BYTES, false).unwrap(), kick: eventfd(), call: eventfd(), submitted: 0 }
    }

    fn region(&self) -> MemoryRegion {
        MemoryRegion { guest_address: GUEST, start: self.memory.as_ptr(), len: BYTES }
    }

    fn queue(&self, next: u16) -> Queue {
        Queue {
            size: ENTRIES,
            descriptors: GUEST + DESCRIPTORS as u64,
            available: GUEST + AVAILABLE as u64,
            used: GUEST + USED as u64,
            event_idx: false,
            kick: self.kick.try_clone().unwrap(),
            call: self.call.try_clone().unwrap(),
            next,
        }
    }

    fn put<T>(&self, at: usize, value: T) {
        assert!(at + size_of::<T>() <= BYTES);
        // SAFETY: inside the region.
        unsafe { write_volatile(self.memory.as_ptr().add(at).cast(), value) }
    }

    fn get<T: Copy>(&self, at: usize) -> T {
        assert!(at + size_of::<T>() <= BYTES);
        // SAFETY: inside the region; only plain numbers are read.
        unsafe { read_volatile(self.memory.as_ptr().add(at).cast()) }
    }

    /// Asks, as the user 1000, and waits for the reply: its error.
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> i32 {
        let length = 40 + body.len() as u32;
        self.put(REQUEST, [length, opcode]);
        self.put(REQUEST + 8, [u64::from(self.submitted) + 1, node]);
        self.put(REQUEST + 24, [1000u32, 1000, 1, 0]);
        body.iter().enumerate().for_each(|(i, &byte)| self.put(REQUEST + 40 + i, byte));
        let part = |at: usize, bytes: u32, flags: u64| (GUEST + at as u64, u64::from(bytes) | flags << 32);
        self.put(DESCRIPTORS, part(REQUEST, length, 1 | 1 << 16));
        self.put(DESCRIPTORS + 16, part(REPLY, 4096, 2));
        self.put(AVAILABLE + 4 + usize::from(self.submitted % ENTRIES) * 2, 0u16);
        self.submitted += 1;
        fence(Ordering::SeqCst);
        self.put(AVAILABLE + 2, self.submitted);
        fence(Ordering::SeqCst);
        Eventfd::signal(&self.kick);
        let until = Instant::now() + Duration::from_secs(60);
        while self.get::<u16>(USED + 2) != self.submitted {
            assert!(Instant::now() < until, "no reply");
            use nix::poll::{poll, PollFd, PollFlags};
            poll(&mut [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)], 100u8).unwrap();
            Eventfd::drain(&self.call);
        }
        fence(Ordering::SeqCst);
        self.get(REPLY + 4)
    }

    fn init(&mut self) -> i32 {
        let mut body = [0; 64];
        body[..12].copy_from_slice([7u32, 38, 65536].map(u32::to_ne_bytes).as_flattened());
        self.ask(Opcode::Init as u32, 0, &body)
    }
}

/// What a process is, as far as others may rely on it.
#[derive(Debug, PartialEq)]
struct Process {
    /// Signals' handlers and masks, ids, capabilities, umask.
    status: Vec<String>,
    limits: String,
    directory: PathBuf,
    threads: usize,
    descriptors: BTreeMap<String, PathBuf>,
    /// The program's mapping of the guest's memory.
    mapping: Vec<String>,
}

impl Process {
    fn now(driver: &Driver) -> Process {
        const LINES: [&str; 12] = [
            "Uid:",
            "Gid:",
            "Groups:",
            "Umask:",
            "SigBlk:",
            "SigIgn:",
            "SigCgt:",
            "CapPrm:",
            "CapEff:",
            "CapInh:",
            "NoNewPrivs:",
            "Seccomp:",
        ];
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let of = |line: &&str| LINES.iter().any(|name| line.starts_with(name));
        let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
        let open =
            open.filter_map(|entry| Some((entry.file_name().into_string().ok()?, fs::read_link(entry.path()).ok()?)));
        let start = format!("{:x}-", driver.memory.as_ptr() as usize);
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        Process {
            status: status.lines().filter(of).map(Into::into).collect(),
            limits: fs::read_to_string("/proc/self/limits").unwrap(),
            directory: std::env::current_dir().unwrap(),
            threads: fs::read_dir("/proc/self/task").unwrap().count(),
            // The one that lists them has gone.
            descriptors: open.filter(|(_, target)| !target.ends_with("fd")).collect(),
            mapping: maps.lines().filter(|line| line.starts_with(&start)).map(Into::into).collect(),
        }
    }
}

fn device(host: &Host, settings: &Settings, driver: &Driver, meter: &Meter) -> Device<Counted<impl Handler>> {
    let handler = meter.count(host.server().unwrap());
    // SAFETY: the driver's memory outlives the device.
    unsafe { Device::new(settings, handler, &[driver.region()]) }.unwrap()
}

#[test]
fn a_program_is_left_as_it_was() {
    let share = tempfile::tempdir().unwrap();
    fs::write(share.path().join("hello"), "there").unwrap();
    let mut settings = Settings::default();
    settings.host.shared_dir = share.path().into();
    settings.transport.queues = 1;
    let (mut driver, meter) = (Driver::new(), Meter::default());
    let before = Process::now(&driver);
    {
        // On a thread of its own: `server` makes its caller one that serves.
        let host = Host::in_process(&settings).unwrap();
        let device = std::thread::scope(|s| s.spawn(|| device(&host, &settings, &driver, &meter)).join().unwrap());
        assert_eq!(device.queues(), 2);
        device.start_queue(1, driver.queue(0)).unwrap();
        assert_eq!(driver.init(), 0);
        assert_eq!(driver.ask(Opcode::Lookup as u32, ROOT_ID, b"hello\0"), 0);
        assert_eq!(driver.ask(Opcode::Lookup as u32, ROOT_ID, b"missing\0"), -libc::ENOENT);
        // A directory that belongs to the guest's user, where the process may do that.
        let made = driver.ask(Opcode::Mkdir as u32, ROOT_ID, b"\xff\x01\0\0\0\0\0\0made\0");
        assert!(made == 0 && share.path().join("made").is_dir(), "{made}");
        // Paused, and going on.
        let next = device.stop_queue(1).unwrap();
        assert_eq!(next, driver.submitted);
        device.start_queue(1, driver.queue(next)).unwrap();
        assert_eq!(driver.ask(Opcode::Lookup as u32, ROOT_ID, b"hello\0"), 0);
        let busy = Process::now(&driver);
        assert_eq!((&busy.status, &busy.limits), (&before.status, &before.limits));
        assert_eq!((&busy.directory, &busy.mapping), (&before.directory, &before.mapping));
        // Reset: another driver, from the beginning.
        device.reset();
        (0..BYTES).for_each(|at| driver.put(at, 0u8));
        driver.submitted = 0;
        device.start_queue(1, driver.queue(0)).unwrap();
        assert_eq!(driver.init(), 0);
        let counted = meter.statistics();
        assert_eq!((counted.requests, counted.errors), (6, 1), "{counted:?}");
    }
    let mut after = Process::now(&driver);
    // A joined thread may be listed for a moment.
    let until = Instant::now() + Duration::from_secs(30);
    while after != before && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
        after = Process::now(&driver);
    }
    assert_eq!(after, before);
    refused_queues(&settings, &driver);
}

fn refused_queues(settings: &Settings, driver: &Driver) {
    let host = Host::in_process(settings).unwrap();
    let device = device(&host, settings, driver, &Meter::default());
    let refused = |number, queue| device.start_queue(number, queue).unwrap_err().to_string();
    assert!(refused(2, driver.queue(0)).contains("no queue 2"));
    assert!(refused(1, Queue { size: 7, ..driver.queue(0) }).contains("a power of two"));
    let outside = refused(1, Queue { used: GUEST + BYTES as u64, ..driver.queue(0) });
    assert!(outside.contains("outside of the guest's memory"), "{outside}");
    let file: OwnedFd = tempfile::tempfile().unwrap().into();
    assert!(refused(1, Queue { kick: file, ..driver.queue(0) }).contains("not an eventfd"));
    device.start_queue(1, driver.queue(0)).unwrap();
    assert!(refused(1, driver.queue(0)).contains("runs already"));
}
