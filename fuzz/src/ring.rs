//! Both ends of a ring over memory that the input writes between any two steps, and set-up messages.

use std::cell::RefCell;
use tunnelfs_ring::{
    Cqe, DeviceQueue, DriverQueue, Geometry, Region, RingSetup, Sqe, CQE_INLINE_BYTES, SQE_INLINE_BYTES,
};

const GEOMETRY: Geometry = Geometry { entries: 4, slots: 4, slot_size: 8192 };

thread_local! {
    static REGION: RefCell<Region> = RefCell::new(Region::new(GEOMETRY.bytes(), false).unwrap());
}

pub fn once(bytes: &[u8]) {
    let _ = RingSetup::from_bytes(bytes);
    REGION.with_borrow(|region| {
        let control = GEOMETRY.control_bytes();
        // SAFETY: the region has that many bytes, and nobody else uses them.
        unsafe { region.as_ptr().write_bytes(0, control) };
        // SAFETY: each slot lies in the region.
        let slot = |n: u32| unsafe { region.as_ptr().add(control + (n * GEOMETRY.slot_size) as usize) };
        let slots = (0..GEOMETRY.slots).map(slot).collect();
        // SAFETY: zeroed, page-aligned, and outlives both.
        let (mut guest, mut host) = unsafe {
            (
                DriverQueue::new(region.as_ptr(), GEOMETRY).unwrap(),
                DeviceQueue::new(region.as_ptr(), slots, GEOMETRY).unwrap(),
            )
        };
        for step in bytes.chunks(8) {
            let &[what, a, b, c, d, e, f, g] = step else { return };
            let at = u16::from_ne_bytes([a, b]) as usize * 4 % control;
            let word = u32::from_ne_bytes([d, e, f, g]);
            match what % 6 {
                0 => {
                    let sqe = Sqe {
                        user_data: word,
                        slot: c.into(),
                        payload_len: word,
                        reply_max: word,
                        inline_len: g.into(),
                        inline: [f; SQE_INLINE_BYTES],
                    };
                    let _ = guest.sq.push(&sqe);
                }
                1 => {
                    if let Some(sqe) = host.sq.pop() {
                        if let Ok(slot) = host.slots.get(&sqe) {
                            assert!(sqe.payload_len <= GEOMETRY.slot_size && sqe.reply_max <= GEOMETRY.slot_size);
                            assert!(sqe.inline_len as usize <= SQE_INLINE_BYTES);
                            let end = slot as usize + sqe.payload_len.max(sqe.reply_max) as usize;
                            assert!(sqe.slot == u32::MAX || end <= region.as_ptr() as usize + region.len());
                        }
                    }
                }
                2 => {
                    let cqe =
                        Cqe { user_data: word, payload_len: word, inline_len: c.into(), inline: [f; CQE_INLINE_BYTES] };
                    let _ = host.cq.push(&cqe);
                }
                3 => drop(guest.cq.pop()),
                // SAFETY: inside the region, aligned.
                4 => unsafe { region.as_ptr().add(at).cast::<u32>().write_volatile(word) },
                _ => drop((guest.peer_wakeup.take(), host.peer_wakeup.peer_cpu(), guest.sq.free())),
            }
        }
    });
}
