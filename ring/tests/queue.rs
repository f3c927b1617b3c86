//! A queue in real shared memory, driven from both ends.

use proptest::prelude::*;
use tunnelfs_ring::*;

const GEOMETRY: Geometry = Geometry { entries: 4, slots: 4, slot_size: 8192 };

/// Where the tests' rings start: at 0, and so that positions wrap at once, after a few entries, and in mid-ring.
const STARTS: [u32; 5] = [0, u32::MAX, u32::MAX - 1, u32::MAX - 2, u32::MAX - 5];

fn ends(region: &Region) -> (DriverQueue, DeviceQueue) {
    ends_of(region, GEOMETRY)
}

fn ends_of(region: &Region, geometry: Geometry) -> (DriverQueue, DeviceQueue) {
    // SAFETY: the region is zeroed, page-aligned, large enough, and outlives both ends in each test.
    unsafe {
        let slot = |n: u32| region.as_ptr().add(geometry.control_bytes() + (n * geometry.slot_size) as usize);
        let slots = (0..geometry.slots).map(slot).collect();
        (
            DriverQueue::new(region.as_ptr(), geometry).unwrap(),
            DeviceQueue::new(region.as_ptr(), slots, geometry).unwrap(),
        )
    }
}

/// Both ends, as they would be after `position` messages in each direction.
fn ends_at(region: &Region, position: u32) -> (DriverQueue, DeviceQueue) {
    let (mut guest, mut host) = ends(region);
    if position != 0 {
        guest.sq.start_at(position);
        host.sq.start_at(position);
        host.cq.start_at(position);
        guest.cq.start_at(position);
    }
    (guest, host)
}

fn sqe(user_data: u32) -> Sqe {
    Sqe {
        user_data,
        slot: NO_SLOT,
        payload_len: 0,
        reply_max: 0,
        inline_len: SQE_INLINE_BYTES as u32,
        inline: [user_data as u8; SQE_INLINE_BYTES],
    }
}

#[test]
fn a_full_ring_pushes_back_and_loses_nothing() {
    for position in STARTS {
        let region = Region::new(GEOMETRY.bytes(), false).unwrap();
        let (mut guest, mut host) = ends_at(&region, position);
        assert_eq!(host.sq.pop(), None, "nothing waits at {position}");
        assert_eq!(guest.sq.free().unwrap(), 4, "at {position}");
        for tag in 0..4 {
            assert!(guest.sq.push(&sqe(tag)).unwrap());
        }
        assert!(!guest.sq.push(&sqe(4)).unwrap(), "a fifth entry does not fit at {position}");
        assert_eq!(host.sq.pop(), Some(sqe(0)));
        assert!(guest.sq.push(&sqe(4)).unwrap());
        for tag in 1..5 {
            assert_eq!(host.sq.pop(), Some(sqe(tag)));
        }
        assert_eq!(host.sq.pop(), None, "nothing is left at {position}");
    }
}

/// What an earlier lap has left at a place is never taken for the entry that comes there next.
#[test]
fn an_old_entry_is_not_taken_again() {
    for position in STARTS {
        let region = Region::new(GEOMETRY.bytes(), false).unwrap();
        let (mut guest, mut host) = ends_at(&region, position);
        for user_data in 0..12 {
            assert!(!host.sq.ready(), "{user_data} entries after {position}");
            guest.sq.push(&sqe(user_data)).unwrap();
            assert!(host.sq.ready(), "{user_data} entries after {position}");
            assert_eq!(host.sq.pop(), Some(sqe(user_data)));
            let cqe = Cqe { user_data, payload_len: 0, inline_len: 16, inline: [user_data as u8; CQE_INLINE_BYTES] };
            assert!(!guest.cq.ready() && host.cq.push(&cqe).unwrap());
            assert_eq!(guest.cq.pop(), Some(cqe));
        }
    }
}

#[test]
fn a_wild_head_is_an_error() {
    for position in STARTS {
        // Before what is in the ring, and after what has been sent.
        for wild in
            [position.wrapping_sub(1), position.wrapping_add(5), position.wrapping_add(77), position ^ (1 << 31)]
        {
            let region = Region::new(GEOMETRY.bytes(), false).unwrap();
            let (mut guest, _host) = ends_at(&region, position);
            for tag in 0..4 {
                guest.sq.push(&sqe(tag)).unwrap();
            }
            // SAFETY: the first word of the queue is the submission ring's head.
            unsafe { region.as_ptr().cast::<u32>().write_volatile(wild) };
            assert!(matches!(guest.sq.push(&sqe(9)), Err(Error::Corrupt(_))), "head {wild} at {position}");
        }
    }
}

#[test]
fn slots_are_checked() {
    let region = Region::new(GEOMETRY.bytes(), false).unwrap();
    let (_guest, host) = ends(&region);
    let good = Sqe { slot: 3, payload_len: 8192, reply_max: 8192, ..sqe(0) };
    assert_eq!(host.slots.get(&good).unwrap() as usize % 4096, 0);
    for bad in [
        Sqe { slot: 4, ..good },
        Sqe { payload_len: 8193, ..good },
        Sqe { reply_max: u32::MAX, ..good },
        Sqe { inline_len: SQE_INLINE_BYTES as u32 + 1, ..good },
        Sqe { slot: NO_SLOT, ..good },
    ] {
        assert!(host.slots.get(&bad).is_err(), "{bad:?}");
    }
}

#[test]
fn the_region_cannot_shrink() {
    let region = Region::new(4096, false).unwrap();
    assert!(region.try_clone_file().unwrap().set_len(0).is_err());
}

proptest! {
    #[test]
    fn any_interleaving_keeps_order(before_wrap in 0u32..200, ops in proptest::collection::vec(any::<bool>(), 1..400)) {
        let region = Region::new(GEOMETRY.bytes(), false).unwrap();
        let (mut guest, mut host) = ends_at(&region, 0u32.wrapping_sub(before_wrap));
        let (mut sent, mut got) = (0, 0);
        for push in ops {
            if push {
                let fits = guest.sq.push(&sqe(sent)).unwrap();
                prop_assert_eq!(fits, sent - got < 4);
                sent += u32::from(fits);
            } else {
                match host.sq.pop() {
                    Some(entry) => { prop_assert_eq!(entry, sqe(got)); got += 1 }
                    None => prop_assert_eq!(sent, got),
                }
            }
        }
    }

    /// Sizes from all sides of each limit: half of them are accepted.
    #[test]
    fn geometry_is_accepted_exactly_when_it_fits((entries, slots) in counts(), slot_size in slot_sizes()) {
        let valid = (2..=32_768).contains(&entries)
            && entries.count_ones() == 1
            && (1..=entries).contains(&slots)
            && (4096..=16 << 20).contains(&slot_size)
            && slot_size.trailing_zeros() >= 12;
        let g = Geometry { entries, slots, slot_size };
        prop_assert_eq!(g.check().is_ok(), valid, "{:?}", g);
        if valid {
            prop_assert!(g.control_bytes() >= 512 + entries as usize * 192 && g.control_bytes() % 4096 == 0);
            prop_assert_eq!(g.bytes(), g.control_bytes() + slots as usize * slot_size as usize);
        }
    }

    /// The parts of a queue do not overlap: full rings keep their entries, and leave the slots alone.
    #[test]
    fn rings_and_slots_lie_apart(shift in 1u32..8, part in 1u32..100) {
        let entries = 1 << shift;
        let g = Geometry { entries, slots: 1 + part * (entries - 1) / 100, slot_size: 8192 };
        let region = Region::new(g.bytes(), false).unwrap();
        let (mut guest, mut host) = ends_of(&region, g);
        let cqe = |user_data: u32| Cqe { user_data, payload_len: !0, inline_len: !0, inline: [0xff; CQE_INLINE_BYTES] };
        for n in 0..entries {
            let sqe = Sqe { inline: [0xff; SQE_INLINE_BYTES], ..sqe(n) };
            prop_assert!(guest.sq.push(&sqe).unwrap());
            prop_assert!(host.cq.push(&cqe(n)).unwrap());
        }
        guest.own_wakeup.set();
        host.own_wakeup.set();
        for n in 0..g.slots {
            let slot = host.slots.get(&Sqe { slot: n, ..sqe(n) }).unwrap();
            // SAFETY: a slot of the region, which only this test uses.
            let bytes = unsafe { std::slice::from_raw_parts(slot, g.slot_size as usize) };
            prop_assert!(bytes.iter().all(|&b| b == 0), "slot {}", n);
        }
        for n in 0..entries {
            prop_assert_eq!(host.sq.pop(), Some(Sqe { inline: [0xff; SQE_INLINE_BYTES], ..sqe(n) }));
            prop_assert_eq!(guest.cq.pop(), Some(cqe(n)));
        }
        prop_assert!(guest.peer_wakeup.take() && host.peer_wakeup.take());
    }
}

/// Entries: mostly powers of two. Slots: mostly what they allow, or one more.
fn counts() -> impl Strategy<Value = (u32, u32)> {
    let entries = prop_oneof![8 => (0u32..17).prop_map(|shift| 1 << shift), 1 => 0u32..70_000, 1 => any::<u32>()];
    entries.prop_flat_map(|entries| {
        let edges = prop_oneof![Just(0), Just(1), Just(entries), Just(entries.saturating_add(1))];
        (Just(entries), prop_oneof![4 => 1..=entries.max(1), 4 => edges, 1 => any::<u32>()])
    })
}

/// Bytes: mostly whole pages in range.
fn slot_sizes() -> impl Strategy<Value = u32> {
    let edges = prop_oneof![Just(0), Just(4095), Just(4096), Just(16 << 20), Just((16 << 20) + 4096)];
    prop_oneof![4 => (1u32..=4096).prop_map(|pages| pages * 4096), 2 => edges, 1 => 0u32..20_000_000, 1 => any::<u32>()]
}
