//! The raw ends of one queue: the halves of its rings, its wake-up flags, its slots.

use crate::error::Error;
use crate::geometry::Geometry;
use crate::layout::{Cqe, Sqe};
use crate::notify::NeedWakeup;
use crate::slots::SlotTable;
use crate::spsc::{CacheLine, Cell, Consumer, Producer};

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

/// The driver's end: submits and reaps.
#[derive(Debug)]
pub struct DriverQueue {
    /// Submissions to the device.
    pub sq: Producer<Sqe>,
    /// Completions from the device.
    pub cq: Consumer<Cqe>,
    /// Whether the device must be kicked after a submission.
    pub peer_wakeup: NeedWakeup,
    /// This side's own flag: set while it sleeps.
    pub own_wakeup: NeedWakeup,
}

/// The device's end: consumes and completes.
#[derive(Debug)]
pub struct DeviceQueue {
    /// Submissions from the driver.
    pub sq: Consumer<Sqe>,
    /// Completions to the driver.
    pub cq: Producer<Cqe>,
    /// Whether the driver must be called after a completion.
    pub peer_wakeup: NeedWakeup,
    /// This side's own flag: set while it sleeps.
    pub own_wakeup: NeedWakeup,
    /// The payload slots.
    pub slots: SlotTable,
}

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
                slots: SlotTable::new(slots, geometry.slot_size),
            })
        }
    }
}
