//! Both ends of a queue on two threads, in private memory: miri and the sanitizers follow no shared mapping. Who finds
//! nothing sleeps, and must be woken; and both rings' positions cross u32::MAX on the way.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::thread::scope;
use tunnelfs_ring::*;

const GEOMETRY: Geometry = Geometry { entries: 4, slots: 4, slot_size: 8192 };
const MESSAGES: u32 = if cfg!(miri) { 200 } else { 20_000 };
/// Half of the messages are sent before the positions wrap.
const START: u32 = u32::MAX - MESSAGES / 2;

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

/// What a sleeper sleeps on.
#[cfg(not(miri))]
mod bell {
    use nix::poll::{poll, PollFd, PollFlags};
    use std::os::fd::{AsFd, OwnedFd};

    pub struct Bell(OwnedFd);

    impl Bell {
        pub fn new() -> Bell {
            Bell(tunnelfs_ring::Eventfd::new().unwrap())
        }

        pub fn ring(&self) {
            tunnelfs_ring::Eventfd::signal(&self.0);
        }

        /// Sleeps until it is rung. A lost wake-up is a failure, not a test that hangs.
        pub fn wait(&self) {
            let woken = poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], 60_000u16);
            assert_eq!(woken, Ok(1), "nobody has woken the sleeper");
            tunnelfs_ring::Eventfd::drain(&self.0);
        }
    }
}

/// miri knows no poll(2).
#[cfg(miri)]
mod bell {
    use std::sync::{Condvar, Mutex};

    pub struct Bell(Mutex<bool>, Condvar);

    impl Bell {
        pub fn new() -> Bell {
            Bell(Mutex::new(false), Condvar::new())
        }

        pub fn ring(&self) {
            *self.0.lock().unwrap() = true;
            self.1.notify_one();
        }

        pub fn wait(&self) {
            *self.1.wait_while(self.0.lock().unwrap(), |rung| !*rung).unwrap() = false;
        }
    }
}

use bell::Bell;

/// Sleeps unless something is there; whether it has slept.
fn sleep_unless(ready: impl Fn() -> bool, flag: &NeedWakeup, bell: &Bell) -> bool {
    flag.set();
    let sleeps = !ready();
    if sleeps {
        bell.wait();
    }
    flag.clear();
    sleeps
}

/// The host's end: each payload is answered with its complement, in place. Returns how often it has slept.
fn serve(mut host: DeviceQueue, kick: &Bell, call: &Bell) -> u32 {
    let (mut served, mut slept) = (0, 0);
    while served < MESSAGES {
        let Some(sqe) = host.sq.pop() else {
            slept += u32::from(sleep_unless(|| host.sq.ready(), &host.own_wakeup, kick));
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
        if host.peer_wakeup.take() {
            call.ring();
        }
        served += 1;
    }
    slept
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
    let (mut guest, mut host) = unsafe {
        (DriverQueue::new(memory, GEOMETRY).unwrap(), DeviceQueue::new(memory, slots.clone(), GEOMETRY).unwrap())
    };
    guest.sq.start_at(START);
    host.sq.start_at(START);
    host.cq.start_at(START);
    guest.cq.start_at(START);
    let (kick, call) = (Bell::new(), Bell::new());
    scope(|scope| {
        let serving = scope.spawn(|| serve(host, &kick, &call));
        let (mut sent, mut done, mut slept) = (0, 0, 0);
        while done < MESSAGES {
            if sent < MESSAGES && sent - done < GEOMETRY.slots {
                // SAFETY: nothing is under way in this slot.
                unsafe { slots[(sent % GEOMETRY.slots) as usize].cast::<u64>().write(sent.into()) };
                assert!(guest.sq.push(&sqe(sent)).unwrap());
                if guest.peer_wakeup.take() {
                    kick.ring();
                }
                sent += 1;
                continue;
            }
            match guest.cq.pop() {
                Some(cqe) => {
                    assert_eq!(cqe.user_data, done);
                    assert_eq!(cqe.inline, [!done as u8; CQE_INLINE_BYTES]);
                    // SAFETY: the request is done, and the slot this side's again.
                    let answer = unsafe { slots[(done % GEOMETRY.slots) as usize].cast::<u64>().read() };
                    assert_eq!(answer, !u64::from(done));
                    done += 1;
                }
                None => slept += u32::from(sleep_unless(|| guest.cq.ready(), &guest.own_wakeup, &call)),
            }
        }
        // By its own end, not only the scope's: that is what a sanitizer sees without the standard library's sources.
        let host_slept = serving.join().unwrap();
        assert!(host_slept > 0 && slept > 0, "the host slept {host_slept} times, the guest {slept} times");
    });
    // SAFETY: allocated above, and no longer used.
    unsafe { dealloc(memory, layout) };
}
