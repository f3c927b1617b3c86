//! The ring as a library: a request without a payload, echoed by another thread of this process, through the safe ends
//! (`Driver`, `Device`) and through the raw queues below them, in turns.

use crate::limits::histogram;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use serde::Serialize;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use tunnelfs_ring::{
    allowed_cpus, set_affinity, Cqe, Device, DeviceQueue, Driver, DriverQueue, Error, Eventfd, Geometry, NeedWakeup,
    Parker, Policy, Region, Sqe, Wait, WaitConfig, CQE_INLINE_BYTES, NO_SLOT, SQE_INLINE_BYTES,
};

const GEOMETRY: Geometry = Geometry { entries: 16, slots: 16, slot_size: 4096 };
const ROUNDS: usize = 3;
const TURN: Duration = Duration::from_millis(50);
/// As long as a FUSE header and the operation's structure.
const MESSAGE: [u8; 80] = [7; 80];
const STOP: &[u8] = b"stop";

/// Which ends were measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ends {
    /// `DriverQueue` and `DeviceQueue`.
    Raw,
    /// `Driver` and `Device`.
    Endpoint,
}

/// One row.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Echo {
    /// Which ends.
    pub ends: Ends,
    /// How both threads waited.
    pub policy: Policy,
    /// Median of all round trips, nanoseconds.
    pub p50_ns: u64,
}

/// Measures both under each policy (about a second).
///
/// # Errors
/// The ring's.
pub fn measure() -> io::Result<Vec<Echo>> {
    let mut rows = Vec::new();
    for policy in [Policy::Spin, Policy::Park, Policy::Auto] {
        let wait = WaitConfig { policy, ..WaitConfig::default() };
        let mut times = [(Ends::Raw, histogram()), (Ends::Endpoint, histogram())];
        for _ in 0..ROUNDS {
            for (ends, times) in &mut times {
                let mut record = |time: Duration| times.saturating_record(time.as_nanos() as u64);
                match ends {
                    Ends::Raw => raw(wait, &mut record),
                    Ends::Endpoint => endpoint(wait, &mut record),
                }
                .map_err(io::Error::other)?;
            }
        }
        rows.extend(times.map(|(ends, times)| Echo { ends, policy, p50_ns: times.value_at_quantile(0.5) }));
    }
    Ok(rows)
}

/// Runs the two sides on threads with a CPU of their own each, where there are two.
fn two_threads(
    driver: impl FnOnce() -> Result<(), Error> + Send,
    device: impl FnOnce() -> Result<(), Error> + Send,
) -> Result<(), Error> {
    let all = allowed_cpus();
    let place = |cpu: Option<&usize>| {
        if let Some(&cpu) = cpu {
            let _ = set_affinity(&[cpu]);
        }
    };
    std::thread::scope(|scope| {
        let device = scope.spawn(|| {
            place(all.last());
            device()
        });
        let driver = scope.spawn(|| {
            place(all.first());
            driver()
        });
        let driver = driver.join().expect("no panic");
        device.join().expect("no panic").and(driver)
    })
}

fn endpoint(wait: WaitConfig, record: &mut (dyn FnMut(Duration) + Send)) -> Result<(), Error> {
    let (mut driver, handoff) = Driver::create(GEOMETRY, wait)?;
    let mut device = Device::attach(handoff, wait)?;
    let driver = move || {
        let mut call = |msg: &[u8]| {
            let slot = driver.alloc().ok_or(Error::Corrupt("no slot is free"))?;
            driver.submit(msg, slot, 0, 0).map_err(|_| Error::Corrupt("the ring is full"))?;
            driver.reap_within(None).map(|reply| driver.free(reply.slot))
        };
        time(&mut call, record)
    };
    two_threads(driver, move || loop {
        let request = device.next_within(None)?;
        let stop = request.msg() == STOP;
        device.complete(request, b"", 0)?;
        if stop {
            return Ok(());
        }
    })
}

/// Calls for a turn, and ends the other side.
fn time(
    call: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
    record: &mut (dyn FnMut(Duration) + Send),
) -> Result<(), Error> {
    let begin = Instant::now();
    let mut last = begin;
    while last - begin < TURN {
        call(&MESSAGE)?;
        let now = Instant::now();
        record(now - last);
        last = now;
    }
    call(STOP)
}

/// Sleeps on an eventfd.
struct Sleep<'a, R> {
    ready: R,
    flag: &'a NeedWakeup,
    fd: &'a OwnedFd,
}

impl<R: Fn() -> bool> Wait for Sleep<'_, R> {
    type Error = Error;

    fn ready(&self) -> bool {
        (self.ready)()
    }

    fn arm(&mut self) {
        self.flag.set();
    }

    fn sleep(&mut self) -> Result<(), Error> {
        let told = |e: nix::Error| Error::Os { what: "poll".into(), source: e.into() };
        poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).map(drop).map_err(told)
    }

    fn disarm(&mut self) {
        self.flag.clear();
        Eventfd::drain(self.fd);
    }
}

fn raw(wait: WaitConfig, record: &mut (dyn FnMut(Duration) + Send)) -> Result<(), Error> {
    let region = Region::new(GEOMETRY.bytes(), false)?;
    let slot = |n: u32| GEOMETRY.control_bytes() + (n * GEOMETRY.slot_size) as usize;
    let slots = (0..GEOMETRY.slots).map(|n| region.as_ptr().wrapping_add(slot(n))).collect();
    // SAFETY: the region is zeroed, page-aligned and that large, and outlives both threads.
    let (mut driver, mut device) =
        unsafe { (DriverQueue::new(region.as_ptr(), GEOMETRY)?, DeviceQueue::new(region.as_ptr(), slots, GEOMETRY)?) };
    let (kick, call) = (Eventfd::new()?, Eventfd::new()?);
    let (kick, call) = (&kick, &call);
    let (mut driver_parker, mut device_parker) = (Parker::new(wait), Parker::new(wait));
    let submit = move || {
        let mut sqe = Sqe {
            user_data: 0,
            slot: NO_SLOT,
            payload_len: 0,
            reply_max: 0,
            inline_len: 0,
            inline: [0; SQE_INLINE_BYTES],
        };
        let mut round_trip = |msg: &[u8]| {
            sqe.inline_len = msg.len() as u32;
            sqe.inline[..msg.len()].copy_from_slice(msg);
            driver.sq.push(&sqe)?;
            if driver.peer_wakeup.take() {
                Eventfd::signal(kick);
            }
            loop {
                if driver.cq.pop().is_some() {
                    return Ok(());
                }
                let cq = &driver.cq;
                driver_parker.wait(&mut Sleep { ready: || cq.ready(), flag: &driver.own_wakeup, fd: call })?;
            }
        };
        time(&mut round_trip, record)
    };
    two_threads(submit, move || loop {
        let Some(sqe) = device.sq.pop() else {
            let sq = &device.sq;
            device_parker.wait(&mut Sleep { ready: || sq.ready(), flag: &device.own_wakeup, fd: kick })?;
            continue;
        };
        device.slots.get(&sqe)?;
        let cqe = Cqe { user_data: sqe.user_data, payload_len: 0, inline_len: 0, inline: [0; CQE_INLINE_BYTES] };
        device.cq.push(&cqe)?;
        if device.peer_wakeup.take() {
            Eventfd::signal(call);
        }
        if &sqe.inline[..sqe.inline_len as usize] == STOP {
            return Ok(());
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_are_measured_under_each_policy() {
        let rows = measure().unwrap();
        assert_eq!(rows.len(), 6);
        assert!(rows.iter().all(|row| row.p50_ns > 0), "{rows:?}");
    }
}
