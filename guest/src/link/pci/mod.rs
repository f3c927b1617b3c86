//! The PCI link: drives the VM's virtio-fs device from user space, inside the VM. The queues are in pinned guest
//! memory, which the VMM shares with the host process.
//!
//! ```text
//! sysfs (find, claim) -> function (uio or vfio: config space, BARs, interrupts) -> device (virtio) -> link
//! memory (pinned, with its guest-physical addresses) ----------------------------------------------^
//! ```

mod device;
mod function;
mod interrupts;
mod memory;
mod msix;
mod registers;
mod sysfs;
mod uio;
mod vfio;

use super::memory::{geometries, QueueMemory, RegionAllocator};
use super::Link;
use crate::config::{GuestConfig, PciTarget};
use crate::error::Error;
use device::Device;
use interrupts::Interrupts;
use memory::Pinned;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use sysfs::Claim;
use tunnelfs_settings::PciDriver;

/// A device in use. The order of the fields is the order of their drops. The interrupt thread uses the device's
/// registers and ends first. The device stops before its memory is unmapped. Last, the former driver gets the device
/// back.
struct Pci {
    interrupts: Interrupts,
    device: Device,
    queues: Vec<QueueMemory>,
    memory: Pinned,
    _claim: Claim,
}

impl Link for Pci {
    fn memory(&self, virtqueue: usize) -> &QueueMemory {
        &self.queues[virtqueue]
    }

    fn address(&self, at: *const u8, bytes: usize) -> Option<u64> {
        self.memory.address(at, bytes)
    }

    fn kick(&self, virtqueue: usize) -> std::io::Result<()> {
        self.device.kick(virtqueue);
        Ok(())
    }

    fn call_fd(&self, virtqueue: usize) -> BorrowedFd<'_> {
        self.interrupts.call_fd(virtqueue)
    }

    fn set_waiting(&self, virtqueue: usize, asleep: bool) {
        self.interrupts.set_waiting(virtqueue, asleep);
    }

    fn hangup_fd(&self) -> BorrowedFd<'_> {
        self.interrupts.hangup_fd()
    }

    fn event_idx(&self) -> bool {
        self.device.event_idx()
    }

    fn shares_cpus(&self) -> bool {
        false
    }
}

/// Takes over the device and starts it. Returns the link, the number of virtqueues in use, and whether the last one is
/// for changes. It is if the device has more request queues than the guest uses.
///
/// # Errors
/// [`Error::Setup`] if the device is missing, in use, or cannot be driven.
pub(crate) fn open(config: &GuestConfig, target: &PciTarget) -> Result<(Arc<dyn Link>, usize, bool), Error> {
    let found = sysfs::find(&target.which)?;
    let claim = match target.driver {
        PciDriver::Uio => found.claim("uio_pci_generic")?,
        PciDriver::Vfio => found.claim("vfio-pci")?,
        PciDriver::Auto => found.claim(if found.has_iommu() { "vfio-pci" } else { "uio_pci_generic" })?,
    };
    // Before the pinned memory: if this process is killed, the kernel closes its descriptors in order. Closing this one
    // stops the device's DMA, before the pages can get another owner.
    let function = if claim.driver() == "vfio-pci" { vfio::open(claim.device())? } else { uio::open(claim.device())? };
    let mut device = Device::reset(function)?;
    let count = config.queues.min(device.request_queues());
    let changes = device.request_queues() > count;
    let geometries = geometries(config, count, changes);
    let memory = Pinned::new(RegionAllocator::measure(&geometries, memory::HUGE_PAGE))?;
    let end = |at| memory.segment_end(at);
    let mut carver = RegionAllocator::new(memory.base(), &end);
    let mut queues = Vec::with_capacity(count + 1);
    for (i, &geometry) in geometries.iter().enumerate() {
        queues.push(QueueMemory::new(&mut carver, geometry, device.queue_size(i as u16)?)?);
    }
    let interrupts = device.start(&queues, &memory)?;
    tracing::info!("{}: {}, {}", claim.device().name(), claim.driver(), memory.describe());
    let link = Pci { interrupts, device, queues, memory, _claim: claim };
    Ok((Arc::new(link), count + 1 + usize::from(changes), changes))
}
