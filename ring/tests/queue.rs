//! A queue in real shared memory, driven from both ends.

use proptest::prelude::*;
use tunnelfs_ring::*;

const GEOMETRY: Geometry = Geometry { entries: 4, slots: 4, slot_size: 8192 };

fn ends(region: &Region) -> (DriverQueue, DeviceQueue) {
    // SAFETY: the region is zeroed, page-aligned, large enough, and outlives both ends in each test.
    unsafe {
        let slot = |n: u32| region.as_ptr().add(GEOMETRY.control_bytes() + (n * GEOMETRY.slot_size) as usize);
        let slots = (0..GEOMETRY.slots).map(slot).collect();
        (
            DriverQueue::new(region.as_ptr(), GEOMETRY).unwrap(),
            DeviceQueue::new(region.as_ptr(), slots, GEOMETRY).unwrap(),
        )
    }
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
    let region = Region::new(GEOMETRY.bytes(), false).unwrap();
    let (mut guest, mut host) = ends(&region);
    for tag in 0..4 {
        assert!(guest.sq.push(&sqe(tag)).unwrap());
    }
    assert!(!guest.sq.push(&sqe(4)).unwrap(), "a fifth entry does not fit");
    assert_eq!(host.sq.pop(), Some(sqe(0)));
    assert!(guest.sq.push(&sqe(4)).unwrap());
    for tag in 1..5 {
        assert_eq!(host.sq.pop(), Some(sqe(tag)));
    }
    assert_eq!(host.sq.pop(), None);
}

#[test]
fn a_wild_head_is_an_error() {
    let region = Region::new(GEOMETRY.bytes(), false).unwrap();
    let (mut guest, _host) = ends(&region);
    for tag in 0..4 {
        guest.sq.push(&sqe(tag)).unwrap();
    }
    // SAFETY: the first word of the queue is the submission ring's head.
    unsafe { region.as_ptr().cast::<u32>().write_volatile(77) };
    assert!(matches!(guest.sq.push(&sqe(9)), Err(Error::Corrupt(_))));
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
    fn any_interleaving_keeps_order(ops in proptest::collection::vec(any::<bool>(), 1..400)) {
        let region = Region::new(GEOMETRY.bytes(), false).unwrap();
        let (mut guest, mut host) = ends(&region);
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

    #[test]
    fn geometry_is_accepted_only_when_it_fits(entries in 0u32..70_000, slots in 0u32..70_000, slot_size in 0u32..20_000_000) {
        let g = Geometry { entries, slots, slot_size };
        if g.check().is_ok() {
            prop_assert!(entries.is_power_of_two() && slots <= entries && slot_size % 4096 == 0);
            prop_assert!(g.control_bytes() >= 512 + entries as usize * 192);
        }
    }
}
