//! The PCI link: inside a VM, the VM's own virtio-fs device driven from user
//! space. The memory is the guest's, pinned; the VMM has told the host process
//! where it lies.
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

/// A device in use. Fields are dropped in this order: the interrupts' thread, which uses the device's registers, ends
/// first; then the device is stopped, before its memory goes; it is given back at the end.
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

/// Takes the device over; the link, and how many virtqueues it has.
pub(crate) fn open(config: &GuestConfig, target: &PciTarget) -> Result<(Arc<dyn Link>, usize), Error> {
    let found = sysfs::find(&target.which)?;
    let claim = match target.driver {
        PciDriver::Uio => found.claim("uio_pci_generic")?,
        PciDriver::Vfio => found.claim("vfio-pci")?,
        PciDriver::Auto => found.claim(if found.has_iommu() { "vfio-pci" } else { "uio_pci_generic" })?,
    };
    // Before the pinned memory: when this process is killed its descriptors are closed in order, and the
    // kernel stops the device's DMA with this one before the pages are anybody else's.
    let function = if claim.driver() == "vfio-pci" { vfio::open(claim.device())? } else { uio::open(claim.device())? };
    let mut device = Device::reset(function)?;
    let count = config.queues.min(device.request_queues());
    let geometries = geometries(config, count);
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
    Ok((Arc::new(link), count + 1))
}
