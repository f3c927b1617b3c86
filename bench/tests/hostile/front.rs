//! Attacks by the vhost-user front end: connections, memory and doorbells.

use crate::guest::{op, request, Hostile, GPA, MEMORY};
use crate::rig::{memory_file, Random, Target};
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};
use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use tunnelfs_fuse_abi::control::OP_NOOP;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::EventFd;

#[test]
fn connections_opened_and_dropped() {
    let mut target = Target::new(&[]);
    for round in 0..60 {
        let mut guest = Hostile::bare(&target.socket());
        match round % 3 {
            0 => {}
            1 => guest.negotiate(),
            _ => {
                guest.negotiate();
                guest.start_queues();
                // Left in the middle of a request.
                guest.make_available(1, 0);
            }
        }
    }
    target.check("connections");
}

#[test]
fn messages_that_are_none() {
    let mut target = Target::new(&[]);
    let mut random = Random(0x5eed_0004);
    for _ in 0..60 {
        let mut stream = UnixStream::connect(target.socket()).unwrap();
        let _ = stream.set_write_timeout(Some(Duration::from_secs(5)));
        for _ in 0..20 {
            // Request number, version 1, a length, and something.
            let kind = if random.next() % 4 == 0 { random.next() as u32 } else { random.next() as u32 % 48 };
            let len = random.of(&[0u32, 4, 8, 12, 32, 40, 4096, u32::MAX]);
            let mut message = op::words(&[kind, random.of(&[1, 9, 0, u32::MAX]), len]);
            message.extend((0..len.min(4096)).map(|_| random.of(&[0u8, 1, 0xff])));
            let cut = if random.next() % 8 == 0 { random.next() as usize % message.len() } else { message.len() };
            if stream.write_all(&message[..cut]).is_err() {
                break;
            }
        }
    }
    target.check("messages");
}

/// More descriptors with a message than any message has.
#[test]
fn descriptors_with_messages() {
    let mut target = Target::new(&[]);
    for _ in 0..30 {
        let stream = UnixStream::connect(target.socket()).unwrap();
        let fds = vec![stream.as_raw_fd(); 250];
        let message = op::words(&[5, 1, 8, 0, 0]);
        for _ in 0..4 {
            let parts = [IoSlice::new(&message)];
            let _ = sendmsg::<()>(
                stream.as_raw_fd(),
                &parts,
                &[ControlMessage::ScmRights(&fds)],
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
        }
    }
    target.check("descriptors");
}

#[test]
fn memory_that_vanishes() {
    let mut target = Target::new(&[]);
    for left in [0, 4096, 1 << 20, MEMORY as u64 / 2] {
        let mut guest = target.guest();
        assert_eq!(guest.call(0, &request(op::INIT, 0, &op::init_body())).unwrap().error, 0);
        let mut ring = guest.ring(1);
        assert_eq!(ring.call(&guest, &request(OP_NOOP, 1, b"")).unwrap().error, 0);
        // The guest itself must not touch it any more.
        guest.file.set_len(left).unwrap();
        for queue in [0, 1, 2, 1, 0] {
            guest.kick(queue);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    target.check("lost memory");
}

#[test]
fn memory_tables_that_cannot_be() {
    let mut target = Target::new(&[]);
    let small = memory_file(4096);
    let pipe = nix::unistd::pipe().unwrap();
    let null = File::open("/dev/null").unwrap();
    let dir = File::open("/").unwrap();
    for case in 0..14 {
        let mut guest = Hostile::bare(&target.socket());
        guest.negotiate();
        let good = guest.region();
        let handle = |mmap_handle| VhostUserMemoryRegionInfo { mmap_handle, ..good };
        let table = match case {
            0 => vec![good, good],
            1 => vec![good, VhostUserMemoryRegionInfo { guest_phys_addr: GPA + 4096, ..good }],
            2 => vec![VhostUserMemoryRegionInfo { guest_phys_addr: u64::MAX - 4095, ..good }],
            3 => vec![VhostUserMemoryRegionInfo { userspace_addr: u64::MAX - 4095, ..good }],
            4 => vec![VhostUserMemoryRegionInfo { memory_size: 0, ..good }],
            5 => vec![VhostUserMemoryRegionInfo { memory_size: u64::MAX, ..good }],
            6 => vec![VhostUserMemoryRegionInfo { memory_size: 1 << 47, ..good }],
            7 => vec![VhostUserMemoryRegionInfo { mmap_offset: 1 << 62, ..good }],
            8 => vec![VhostUserMemoryRegionInfo { mmap_offset: 1, ..good }],
            9 => vec![handle(small.as_raw_fd())],
            10 => vec![handle(pipe.0.as_raw_fd())],
            11 => vec![handle(null.as_raw_fd())],
            12 => vec![handle(dir.as_raw_fd())],
            _ => {
                (0..8).map(|i| VhostUserMemoryRegionInfo { guest_phys_addr: GPA + i * MEMORY as u64, ..good }).collect()
            }
        };
        let _ = guest.front.set_mem_table(&table);
        for queue in 0..3 {
            let _ = guest.start_queue(queue);
            guest.kick(queue);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    target.check("memory tables");
}

/// The memory is taken away and given back while requests are under way in it.
#[test]
fn memory_that_changes() {
    let mut target = Target::new(&[]);
    let mut guest = target.guest();
    assert_eq!(guest.call(0, &request(op::INIT, 0, &op::init_body())).unwrap().error, 0);
    let mut ring = guest.ring(1);
    for round in 0..400 {
        let entry =
            crate::guest::sqe(&guest, 1, 0, &request([op::FSYNC, op::LOOKUP][round % 2], 1, b"words\0_________"));
        ring.submit(&guest, &entry);
        let mut region = guest.region();
        if round % 3 == 1 {
            region.guest_phys_addr += 1 << 30;
        }
        let _ = guest.front.set_mem_table(&[region]);
        ring.reap(Duration::from_micros(100));
    }
    drop(guest);
    target.check("changing memory");
}

#[test]
fn a_reset_in_the_middle_of_it_all() {
    let mut target = Target::new(&["--wait", "spin"]);
    let mut guest = target.guest();
    let mut ring = guest.ring(1);
    let entry = crate::guest::sqe(&guest, 1, 0, &request(OP_NOOP, 1, b""));
    for _ in 0..200 {
        ring.submit(&guest, &entry);
        ring.reap(Duration::from_micros(20));
        let _ = guest.front.reset_device();
    }
    drop(guest);
    target.check("resets");
}

/// The same doorbell again and again, and counters that are full.
#[test]
fn storms_on_doorbells() {
    let mut target = Target::new(&[]);
    let mut guest = target.guest();
    for i in 0..200_000 {
        guest.kick(i % 3);
    }
    for call in &guest.calls {
        let _ = call.write(u64::MAX - 1);
    }
    assert_eq!(guest.call(1, &request(OP_NOOP, 1, b"")).unwrap().error, 0, "an answer although the bell cannot ring");
    drop(guest);
    target.check("storms");
}

/// A call whose counter is full and that is made blocking behind the host's back: whoever rings it waits. The guest
/// goes, but keeps the descriptor.
#[test]
fn a_call_that_blocks() {
    let mut target = Target::new(&[]);
    let mut kept = Vec::new();
    for _ in 0..2 {
        let mut guest = target.guest();
        for queue in 0..3 {
            // Answered: the host has set its flags.
            assert_eq!(guest.call(queue, &request(OP_NOOP, 1, b"")).unwrap().error, 0);
        }
        for call in &guest.calls {
            let _ = call.read();
            call.write(u64::MAX - 1).unwrap();
            // SAFETY: a flag of our own descriptor.
            unsafe { libc::fcntl(call.as_raw_fd(), libc::F_SETFL, libc::O_RDWR) };
        }
        for queue in 0..3 {
            guest.descriptor(queue, 0, (GPA, 40), 1, 1);
            guest.descriptor(queue, 1, (GPA + 8192, 4096), 2, 0);
            guest.make_available(queue, 0);
        }
        std::thread::sleep(Duration::from_millis(50));
        kept.extend(guest.calls.iter().map(|call| call.try_clone().unwrap()));
    }
    target.check("blocking calls");
}

/// Doorbells that are something else: the host must not read or write them.
#[test]
fn doorbells_that_are_none() {
    let mut target = Target::new(&[]);
    let file = tempfile::tempfile().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    for fd in [file.as_raw_fd(), theirs.as_raw_fd(), File::open("/dev/zero").unwrap().into_raw_fd()] {
        let mut guest = Hostile::bare(&target.socket());
        guest.negotiate();
        // SAFETY: duplicates, which the event objects own.
        let bell = || unsafe { EventFd::from_raw_fd(libc::dup(fd)) };
        guest.calls = (0..3).map(|_| bell()).collect();
        for queue in 0..3 {
            let _ = guest.start_queue(queue);
        }
        guest.descriptor(1, 0, (GPA, 40), 1, 1);
        guest.descriptor(1, 1, (GPA + 8192, 4096), 2, 0);
        guest.make_available(1, 0);
        std::thread::sleep(Duration::from_millis(20));
        guest.kicks = (0..3).map(|_| bell()).collect();
        for queue in 0..3 {
            let _ = guest.front.set_vring_kick(queue, &guest.kicks[queue]);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    ours.set_nonblocking(true).unwrap();
    assert!((&ours).read(&mut [0; 8]).is_err(), "the host wrote to what is no doorbell");
    assert_eq!(file.metadata().unwrap().len(), 0, "the host wrote to what is no doorbell");
    target.check("no doorbells");
}
