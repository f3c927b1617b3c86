//! Both ends of one queue: the halves of its rings, its flags, its slots.

use crate::layout::{Cqe, Sqe, NO_SLOT};
use crate::spsc::{Cell, Consumer, CacheLine, Producer};
use crate::{Error, Geometry, NeedWakeup};
use std::ptr::NonNull;

struct Parts {
    sq: (*const Cell<Sqe>, *const CacheLine),
    cq: (*const Cell<Cqe>, *const CacheLine),
    device_wakeup: NeedWakeup,
    driver_wakeup: NeedWakeup,
}

/// # Safety
/// `base` must be 128-aligned and `geometry.control_bytes()` mapped from there.
unsafe fn parts(base: *mut u8, g: &Geometry) -> Parts {
    // SAFETY: each offset lies in the mapped bytes, by `Geometry`'s arithmetic.
    unsafe {
        Parts {
            sq: (base.add(g.sqes()).cast(), base.add(g.sq_head()).cast()),
            cq: (base.add(g.cqes()).cast(), base.add(g.cq_head()).cast()),
            device_wakeup: NeedWakeup::new(base.add(g.device_wakeup()).cast()),
            driver_wakeup: NeedWakeup::new(base.add(g.driver_wakeup()).cast()),
        }
    }
}

/// The guest's end: submits and reaps.
#[derive(Debug)]
pub struct DriverQueue {
    /// Submissions to the host.
    pub sq: Producer<Sqe>,
    /// Completions from the host.
    pub cq: Consumer<Cqe>,
    /// Whether the host must be rung after a submission.
    pub peer_wakeup: NeedWakeup,
    /// This side's own flag.
    pub own_wakeup: NeedWakeup,
}

/// The host's end: consumes and completes.
#[derive(Debug)]
pub struct DeviceQueue {
    /// Submissions from the guest.
    pub sq: Consumer<Sqe>,
    /// Completions to the guest.
    pub cq: Producer<Cqe>,
    /// Whether the guest must be rung after a completion.
    pub peer_wakeup: NeedWakeup,
    /// This side's own flag.
    pub own_wakeup: NeedWakeup,
    /// Where the payloads lie.
    pub slots: SlotTable,
}

/// The payload slots as the host sees them: every number is checked.
#[derive(Debug)]
pub struct SlotTable {
    slots: Vec<*mut u8>,
    slot_size: u32,
}

// SAFETY: the pointers are only handed out as such.
unsafe impl Send for SlotTable {}

impl DriverQueue {
    /// # Safety
    /// `base` must be page-aligned, and `geometry.control_bytes()` of zeroed shared
    /// memory stay mapped from there as long as this lives.
    ///
    /// # Errors
    /// [`Error::Geometry`] for sizes that the layout cannot carry.
    pub unsafe fn new(base: *mut u8, geometry: Geometry) -> Result<Self, Error> {
        geometry.check()?;
        // SAFETY: by this function's own contract.
        unsafe {
            let p = parts(base, &geometry);
            Ok(DriverQueue {
                sq: Producer::new(p.sq.0, p.sq.1, geometry.entries),
                cq: Consumer::new(p.cq.0, p.cq.1, geometry.entries),
                peer_wakeup: p.device_wakeup,
                own_wakeup: p.driver_wakeup,
            })
        }
    }
}

impl DeviceQueue {
    /// # Safety
    /// `base` must be page-aligned, and `geometry.control_bytes()` stay mapped
    /// from there as long as this lives; so must each slot.
    ///
    /// # Errors
    /// [`Error::Geometry`] for sizes that the layout cannot carry,
    /// [`Error::Corrupt`] when there are not as many `slots` as it says.
    pub unsafe fn new(base: *mut u8, slots: Vec<*mut u8>, geometry: Geometry) -> Result<Self, Error> {
        geometry.check()?;
        if slots.len() != geometry.slots as usize {
            return Err(Error::Corrupt("another number of slots"));
        }
        // SAFETY: by this function's own contract.
        unsafe {
            let p = parts(base, &geometry);
            Ok(DeviceQueue {
                sq: Consumer::new(p.sq.0, p.sq.1, geometry.entries),
                cq: Producer::new(p.cq.0, p.cq.1, geometry.entries),
                peer_wakeup: p.driver_wakeup,
                own_wakeup: p.device_wakeup,
                slots: SlotTable { slots, slot_size: geometry.slot_size },
            })
        }
    }
}

impl SlotTable {
    /// Where the slot that a submission names starts (dangling for
    /// [`NO_SLOT`]); all lengths of the submission are within their bounds then.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the number or a length is out of range.
    pub fn get(&self, sqe: &Sqe) -> Result<*mut u8, Error> {
        let (size, start) = match self.slots.get(sqe.slot as usize) {
            Some(&start) => (self.slot_size, start),
            None if sqe.slot == NO_SLOT => (0, NonNull::dangling().as_ptr()),
            None => return Err(Error::Corrupt("slot number out of range")),
        };
        if sqe.payload_len > size || sqe.reply_max > size {
            return Err(Error::Corrupt("payload longer than its slot"));
        }
        if sqe.inline_len as usize > sqe.inline.len() {
            return Err(Error::Corrupt("header longer than its entry"));
        }
        Ok(start)
    }
}
