//! Driver of the virtio-fs device's registers (virtio 1.2, sections 3.1.1 and 4.1.4).

use super::function::{capabilities, Capability, Function, MASTER, MEMORY};
use super::interrupts::Interrupts;
use super::memory::Pinned;
use super::registers::Registers;
use crate::error::Error;
use crate::link::memory::QueueMemory;
use crate::split_queue::SplitQueue;
use memmap2::MmapRaw;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// `VIRTIO_PCI_CAP_*`.
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const ISR: u8 = 3;
const CONFIG: u8 = 4;

/// `struct virtio_pci_common_cfg`: offsets.
mod common {
    pub const DEVICE_FEATURE_SELECT: usize = 0;
    pub const DEVICE_FEATURE: usize = 4;
    pub const DRIVER_FEATURE_SELECT: usize = 8;
    pub const DRIVER_FEATURE: usize = 12;
    pub const CONFIG_VECTOR: usize = 16;
    pub const NUM_QUEUES: usize = 18;
    pub const STATUS: usize = 20;
    pub const QUEUE_SELECT: usize = 22;
    pub const QUEUE_SIZE: usize = 24;
    pub const QUEUE_VECTOR: usize = 26;
    pub const QUEUE_ENABLE: usize = 28;
    pub const QUEUE_NOTIFY_OFF: usize = 30;
    pub const QUEUE_DESC: usize = 32;
    pub const QUEUE_DRIVER: usize = 40;
    pub const QUEUE_DEVICE: usize = 48;
    pub const BYTES: usize = 56;
}
use common::*;

/// Bits of the status register.
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const FAILED: u8 = 128;
/// Feature bits.
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
const ACCESS_PLATFORM: u64 = 1 << 33;
const NO_VECTOR: u16 = 0xffff;

/// Offset of `num_request_queues` in `struct virtio_fs_config`.
const NUM_REQUEST_QUEUES: usize = 36;

/// The device; stopped when dropped.
pub struct Device {
    common: Registers,
    config: Registers,
    notify: Registers,
    isr: Registers,
    notify_multiplier: u32,
    /// By queue: its notification register.
    kicks: Vec<*mut u16>,
    features: u64,
    function: Function,
}

// SAFETY: the registers belong to one device. Any thread may write a notification register; only the owner uses the
// others.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// Resets the device and negotiates the features.
    ///
    /// # Errors
    /// [`Error::Setup`] if it is not a modern virtio-fs device, or does not reset.
    pub fn reset(function: Function) -> Result<Device, Error> {
        let found = capabilities(&|at, bytes| function.config.read(at, bytes))?;
        let mut maps = Vec::new();
        let [common, notify, isr, config] = [COMMON, NOTIFY, ISR, CONFIG].map(|kind| {
            let found = found.iter().find(|c| c.kind == kind);
            let found = found
                .ok_or_else(|| Error::Setup(format!("not a modern virtio device: capability {kind} is missing")))?;
            registers(&function, found, &mut maps)
        });
        let notify_multiplier = found.iter().find(|c| c.kind == NOTIFY).map_or(0, |c| c.more);
        let (common, notify, isr, config) = (common?, notify?, isr?, config?);
        if common.len() < BYTES || config.len() < NUM_REQUEST_QUEUES + 4 {
            return Err(Error::Setup("not a virtio-fs device: its registers are too few".into()));
        }
        function.config.command(MEMORY | MASTER, 0)?;
        let mut device =
            Device { common, config, notify, isr, notify_multiplier, kicks: Vec::new(), features: 0, function };
        device.stop()?;
        device.add_status(ACKNOWLEDGE);
        device.add_status(DRIVER);
        device.agree()?;
        Ok(device)
    }

    /// Negotiates the features.
    fn agree(&mut self) -> Result<(), Error> {
        let half = |i: u32| {
            self.common.write(DEVICE_FEATURE_SELECT, i);
            u64::from(self.common.read::<u32>(DEVICE_FEATURE))
        };
        let offered = half(0) | half(1) << 32;
        if offered & VERSION_1 == 0 {
            return Err(self.fail("the device is a legacy one"));
        }
        if offered & ACCESS_PLATFORM != 0 {
            return Err(self.fail("the device goes through an IOMMU: take iommu_platform=on off its QEMU options"));
        }
        self.features = offered & (VERSION_1 | EVENT_IDX);
        for i in 0..2u32 {
            self.common.write(DRIVER_FEATURE_SELECT, i);
            self.common.write(DRIVER_FEATURE, (self.features >> (32 * i)) as u32);
        }
        self.add_status(FEATURES_OK);
        if self.common.read::<u8>(STATUS) & FEATURES_OK == 0 {
            return Err(self.fail("the device refuses the features"));
        }
        Ok(())
    }

    /// Sets the FAILED status bit, and makes the error.
    fn fail(&self, why: &str) -> Error {
        self.add_status(FAILED);
        Error::Setup(why.into())
    }

    fn add_status(&self, bit: u8) {
        self.common.write(STATUS, self.common.read::<u8>(STATUS) | bit);
    }

    /// Resets the device, and waits for it for at most 5 s. It does not access memory afterwards.
    fn stop(&self) -> Result<(), Error> {
        self.common.write(STATUS, 0u8);
        let end = Instant::now() + Duration::from_secs(5);
        while self.common.read::<u8>(STATUS) != 0 {
            if Instant::now() > end {
                return Err(Error::Setup("the device does not reset".into()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Number of request queues, at least 1.
    pub fn request_queues(&self) -> usize {
        let wanted = u32::from_le(self.config.read(NUM_REQUEST_QUEUES)) as usize;
        wanted.min(usize::from(self.common.read::<u16>(NUM_QUEUES)).saturating_sub(1)).max(1)
    }

    /// Returns the most entries that a virtqueue may have, a power of two.
    ///
    /// # Errors
    /// [`Error::Setup`] if the virtqueue cannot be used.
    pub fn queue_size(&self, queue: u16) -> Result<u16, Error> {
        self.common.write(QUEUE_SELECT, queue);
        match self.common.read::<u16>(QUEUE_SIZE) {
            size @ 4.. if size.is_power_of_two() => Ok(size),
            size => Err(self.fail(&format!("virtqueue {queue} has {size} entries"))),
        }
    }

    /// Gives the device the addresses of its queues, and starts it.
    ///
    /// # Errors
    /// If the interrupts cannot be set up, or a queue is not in `memory`.
    pub fn start(&mut self, queues: &[QueueMemory], memory: &Pinned) -> Result<Interrupts, Error> {
        let interrupts = Interrupts::new(&self.function, queues.len(), self.isr.clone())?;
        self.common.write(CONFIG_VECTOR, NO_VECTOR);
        for (i, queue) in queues.iter().enumerate() {
            self.common.write(QUEUE_SELECT, i as u16);
            self.common.write(QUEUE_SIZE, queue.size);
            self.common.write(QUEUE_VECTOR, interrupts.vector(i).unwrap_or(NO_VECTOR));
            let areas = SplitQueue::areas(queue.virtqueue, queue.size);
            for (register, area) in [QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE].into_iter().zip(areas) {
                let address = memory.address(area, 1).ok_or(Error::Protocol("a virtqueue outside of the memory"))?;
                self.common.write_address(register, address);
            }
            let kick = usize::from(self.common.read::<u16>(QUEUE_NOTIFY_OFF)) * self.notify_multiplier as usize;
            self.kicks.push(self.notify.at(kick));
            self.common.write(QUEUE_ENABLE, 1u16);
        }
        self.add_status(DRIVER_OK);
        Ok(interrupts)
    }

    /// Returns `true` if `VIRTIO_RING_F_EVENT_IDX` is negotiated, `false` if not.
    pub fn event_idx(&self) -> bool {
        self.features & EVENT_IDX != 0
    }

    /// Kicks the device for a queue.
    pub fn kick(&self, queue: usize) {
        // SAFETY: a register in the mapped BAR, checked by `at`.
        unsafe { self.kicks[queue].write_volatile(queue as u16) };
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Err(e) = self.stop() {
            tracing::warn!("{e}");
        }
        let _ = self.function.config.command(0, MASTER);
    }
}

/// Returns the registers of a capability. Maps each BAR only once; `maps` are the mapped ones.
fn registers(function: &Function, found: &Capability, maps: &mut Vec<(u8, Arc<MmapRaw>)>) -> Result<Registers, Error> {
    let missing = || Error::Setup(format!("the device's BAR {} cannot be mapped", found.bar));
    let bar = function.bars.get(usize::from(found.bar)).and_then(Option::as_ref).ok_or_else(missing)?;
    if u64::from(found.offset) + u64::from(found.bytes) > bar.bytes {
        return Err(missing());
    }
    if maps.iter().all(|(number, _)| *number != found.bar) {
        maps.push((found.bar, Arc::new(bar.map()?)));
    }
    let (_, map) = maps.iter().find(|(number, _)| *number == found.bar).ok_or_else(missing)?;
    Ok(Registers::new(map.clone(), found.offset as usize, found.bytes as usize))
}
