//! Attacks through queues: indices, slots, lengths and chains that cannot be.

use crate::guest::{op, request, slot_at, sqe, Hostile, AVAIL, GEOMETRY, GPA, MEMORY, VQ_SIZE};
use crate::rig::{Random, Target};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::control::OP_NOOP;
use tunnelfs_ring::{Geometry, RingSetup, SlotRun, Sqe, NO_SLOT};

const SOON: Duration = Duration::from_millis(500);

#[test]
fn slots_and_lengths_out_of_range() {
    let mut target = Target::new(&[]);
    let mut guest = target.guest();
    let good = sqe(&guest, 1, 0, &request(OP_NOOP, 1, b""));
    let wild = [1 << 8, 1 << 16, 1 << 31, u32::MAX - 1, u32::MAX];
    let mut bad: Vec<Sqe> = vec![Sqe { slot: NO_SLOT, payload_len: 1, ..good }, Sqe { inline_len: 105, ..good }];
    for n in wild {
        bad.push(Sqe { inline_len: n, ..good });
        bad.push(Sqe { payload_len: n.max(GEOMETRY.slot_size + 1), ..good });
        bad.push(Sqe { reply_max: n.max(GEOMETRY.slot_size + 1), ..good });
        if n != NO_SLOT {
            bad.push(Sqe { slot: n, ..good });
        }
    }
    for entry in bad {
        let mut ring = guest.ring(1);
        assert!(ring.submit(&guest, &good) && ring.reap(SOON * 10).is_some(), "a good entry is answered");
        ring.submit(&guest, &entry);
        // The ring is closed: neither this one nor a good one is answered.
        ring.submit(&guest, &good);
        assert!(ring.reap(SOON / 10).is_none(), "{entry:?} was answered");
    }
    drop(guest);
    target.check("slots");
}

#[test]
fn submissions_published_again_and_again() {
    let mut target = Target::new(&[]);
    let mut guest = target.guest();
    let mut ring = guest.ring(1);
    let message = request(OP_NOOP, 1, b"");
    // One slot for all, more than the completions hold, none reaped.
    let entry = sqe(&guest, 1, 0, &message);
    for _ in 0..100_000 {
        ring.submit(&guest, &entry);
    }
    // The same place's sequence number, lap after lap.
    for lap in 0..2000u32 {
        guest.put(Hostile::ring_at(1) + 512, 1 + lap * GEOMETRY.entries);
        guest.kick(1);
    }
    drop(guest);
    target.check("replays");
}

/// Operations that go to the pool, faster than they are done, none reaped: what waits there is bounded.
#[test]
fn a_flood_of_what_blocks() {
    let mut target = Target::new(&[]);
    let mut guest = target.guest();
    assert_eq!(guest.call(0, &request(op::INIT, 0, &op::init_body())).unwrap().error, 0);
    for opcode in [op::SYNCFS, op::FSYNC] {
        let mut ring = guest.ring(1);
        let entry = sqe(&guest, 1, 0, &request(opcode, 1, &[0; 16]));
        let start = Instant::now();
        let mut submitted = 0;
        while start.elapsed() < SOON {
            submitted += usize::from(ring.submit(&guest, &entry));
        }
        assert!(submitted < 4 * GEOMETRY.entries as usize, "{submitted} requests were taken, and none was reaped");
    }
    // Over a virtqueue the chains are given back, or taken while there is room.
    for _ in 0..20_000 {
        guest.descriptor(2, 0, (GPA + slot_at(2, 0) as u64, 56), 1, 1);
        guest.descriptor(2, 1, (GPA + slot_at(2, 1) as u64, 4096), 2, 0);
        guest.put_bytes(slot_at(2, 0), &request(op::FSYNC, 1, &[0; 16]));
        guest.make_available(2, 0);
    }
    drop(guest);
    target.check("flood");
}

/// A thread writes anything anywhere in the ring's indices, flags and entries while others are served.
#[test]
fn racing_indices() {
    let mut target = Target::new(&[]);
    for seed in 1..=4 {
        let mut guest = target.guest();
        assert_eq!(guest.call(0, &request(op::INIT, 0, &op::init_body())).unwrap().error, 0);
        let mut rings = [guest.ring(1), guest.ring(2)];
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = Random(seed);
                while !done.load(Ordering::Relaxed) {
                    let queue = random.of(&[1, 2]);
                    let at = (random.next() as usize % GEOMETRY.control_bytes()) & !3;
                    let word = random.of(&[0u32, 1, 2, 64, 65, 0x8000_0000, u32::MAX]);
                    guest.put(Hostile::ring_at(queue) + at, word.wrapping_add(random.next() as u32 % 3));
                }
            });
            let start = Instant::now();
            while start.elapsed() < SOON {
                for ring in &mut rings {
                    let entry = sqe(&guest, ring.queue, 0, &request(op::LOOKUP, 1, b"words\0"));
                    ring.submit(&guest, &entry);
                    ring.reap(Duration::from_micros(50));
                }
            }
            done.store(true, Ordering::Relaxed);
        });
    }
    target.check("racing indices");
}

#[test]
fn rings_in_impossible_places() {
    let mut target = Target::new(&[]);
    let mut guest = target.guest();
    let good = Hostile::setup(1);
    let end = GPA + MEMORY as u64;
    for base in [0, 1, GPA - 4096, GPA + 1, GPA + 128, end, end - 4096, u64::MAX, u64::MAX - 4095, 1 << 63] {
        assert_ne!(guest.ask_for_ring(1, Hostile::setup_at(base)), 0, "a ring at {base:#x}");
        let runs = vec![SlotRun { address: base, slots: GEOMETRY.slots }];
        assert_ne!(guest.ask_for_ring(1, RingSetup { runs, ..good.clone() }), 0, "slots at {base:#x}");
    }
    for (entries, slots, slot_size) in [
        (0, 1, 8192),
        (3, 1, 8192),
        (1 << 16, 1, 8192),
        (64, 0, 8192),
        (64, 65, 8192),
        (64, 16, 0),
        (64, 16, 4097),
        (64, 16, 1 << 31),
        (32768, 32768, 16 << 20),
    ] {
        let geometry = Geometry { entries, slots, slot_size };
        assert_ne!(guest.ask_for_ring(1, RingSetup { geometry, ..good.clone() }), 0, "{geometry:?}");
    }
    // Twice on one queue, the same place for two queues, and one in the other's slots: odd, but the guest's own affair.
    let mut first = guest.ring(1);
    let mut again = guest.ring(1);
    let noop = request(OP_NOOP, 1, b"");
    assert_eq!(again.call(&guest, &noop).unwrap().error, 0);
    assert_eq!(guest.ask_for_ring(2, good.clone()), 0);
    let inside = RingSetup { control: GPA + slot_at(1, 2) as u64, ..good };
    assert_eq!(guest.ask_for_ring(2, inside), 0);
    for slot in 0..16 {
        let entry = sqe(&guest, 1, slot, &request(op::LOOKUP, 1, &[0xff; 2000]));
        first.submit(&guest, &entry);
        again.submit(&guest, &entry);
    }
    drop(guest);
    target.check("rings");
}

#[test]
fn chains_that_cannot_be() {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    let mut target = Target::new(&[]);
    let mut random = Random(0x5eed_0003);
    for round in 0..60 {
        let mut guest = target.guest();
        let good = GPA + slot_at(1, 0) as u64;
        let addresses = [good, 0, GPA - 1, GPA + MEMORY as u64 - 8, u64::MAX, u64::MAX - 4095];
        let lengths = [0, 1, 16, 39, 40, 4096, 1 << 20, u32::MAX];
        for index in 0..VQ_SIZE {
            let buffer = (random.of(&addresses), random.of(&lengths));
            let flags = random.of(&[0, NEXT, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, u16::MAX]);
            guest.descriptor(1, index, buffer, flags, random.of(&[index, index + 1, 0, 63, 64, u16::MAX]));
            // An indirect table full of the same, in the buffer.
            guest.put(slot_at(1, 0) + usize::from(index) * 16, buffer.0);
            guest.put(slot_at(1, 0) + usize::from(index) * 16 + 8, buffer.1);
            guest.put(slot_at(1, 0) + usize::from(index) * 16 + 12, u32::from(flags) | 1 << 16);
        }
        for head in [0, 1, 5, 63, 64, u16::MAX] {
            guest.make_available(1, head);
        }
        if round % 3 == 0 {
            // More chains than there can be.
            guest.put(256 * 1024 + AVAIL + 2, random.next() as u16);
            guest.kick(1);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    target.check("chains");
}
