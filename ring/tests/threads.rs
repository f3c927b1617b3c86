//! Both ends of a queue on two threads, in private memory: miri and the sanitizers follow no shared mapping.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::thread::{scope, yield_now};
use tunnelfs_ring::*;

const GEOMETRY: Geometry = Geometry { entries: 4, slots: 4, slot_size: 8192 };
const MESSAGES: u32 = if cfg!(miri) { 200 } else { 50_000 };

fn sqe(user_data: u32) -> Sqe {
    Sqe {
        user_data,
        slot: user_data % GEOMETRY.slots,
        payload_len: 8,
        reply_max: 8,
        inline_len: SQE_INLINE_BYTES as u32,
        inline: [user_data as u8; SQE_INLINE_BYTES],
    }
}

/// The host's end: each payload is answered with its complement, in place.
fn serve(mut host: DeviceQueue) {
    let mut served = 0;
    while served < MESSAGES {
        let Some(sqe) = host.sq.pop() else {
            // Where nothing has come meanwhile, it would sleep.
            host.own_wakeup.set();
            if !host.sq.ready() {
                yield_now();
            }
            host.own_wakeup.clear();
            continue;
        };
        assert_eq!(sqe.inline, [sqe.user_data as u8; SQE_INLINE_BYTES]);
        let payload = host.slots.get(&sqe).unwrap().cast::<u64>();
        // SAFETY: a slot of the test's memory, which is the host's until it completes the request.
        unsafe { payload.write(!payload.read()) };
        let cqe = Cqe {
            user_data: sqe.user_data,
            payload_len: 8,
            inline_len: 16,
            inline: [!sqe.user_data as u8; CQE_INLINE_BYTES],
        };
        assert!(host.cq.push(&cqe).unwrap());
        host.peer_wakeup.take();
        served += 1;
    }
}

#[test]
fn messages_and_payloads_cross_between_threads() {
    let layout = Layout::from_size_align(GEOMETRY.bytes(), PAGE).unwrap();
    // SAFETY: not of no bytes.
    let memory = unsafe { alloc_zeroed(layout) };
    // SAFETY: the slots lie in the memory.
    let slot = |n: u32| unsafe { memory.add(GEOMETRY.control_bytes() + (n * GEOMETRY.slot_size) as usize) };
    let slots: Vec<_> = (0..GEOMETRY.slots).map(slot).collect();
    // SAFETY: zeroed, page-aligned, large enough, and it outlives both ends.
    let (mut guest, host) = unsafe {
        (DriverQueue::new(memory, GEOMETRY).unwrap(), DeviceQueue::new(memory, slots.clone(), GEOMETRY).unwrap())
    };
    scope(|scope| {
        let serving = scope.spawn(|| serve(host));
        let (mut sent, mut done) = (0, 0);
        while done < MESSAGES {
            if sent < MESSAGES && sent - done < GEOMETRY.slots {
                // SAFETY: nothing is under way in this slot.
                unsafe { slots[(sent % GEOMETRY.slots) as usize].cast::<u64>().write(sent.into()) };
                assert!(guest.sq.push(&sqe(sent)).unwrap());
                guest.peer_wakeup.take();
                sent += 1;
            }
            match guest.cq.pop() {
                Some(cqe) => {
                    assert_eq!(cqe.user_data, done);
                    // SAFETY: the request is done, and the slot this side's again.
                    let answer = unsafe { slots[(done % GEOMETRY.slots) as usize].cast::<u64>().read() };
                    assert_eq!(answer, !u64::from(done));
                    done += 1;
                }
                None => yield_now(),
            }
        }
        // By its own end, not only the scope's: that is what a sanitizer sees without the standard library's sources.
        serving.join().unwrap();
    });
    // SAFETY: allocated above, and no longer used.
    unsafe { dealloc(memory, layout) };
}
