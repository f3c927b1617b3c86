//! Configuration of a connection to a host: plain data.

use crate::error::Error;
use std::path::PathBuf;
use tunnelfs_ring::{first_unusable_cpu, Geometry, LiveWait, WaitConfig};
use tunnelfs_settings::{Mount, PciDriver, Settings, TransportKind};

/// Configuration of a connection to a host.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// The host's UNIX socket, for the local link.
    pub socket_path: PathBuf,
    /// The VM's virtio-fs device, for the PCI link.
    pub pci: Option<PciTarget>,
    /// The transport.
    pub transport: TransportKind,
    /// Number of request queues to use; a host may have fewer.
    pub queues: usize,
    /// Number and size of each request queue's slots.
    pub geometry: Geometry,
    /// Whether to back the region with 2 MiB pages.
    pub huge_pages: bool,
    /// Wait policy of this side; copies of this configuration share it.
    pub wait: LiveWait,
    /// CPUs to pin the request queues' threads to, in order. Threads of further queues are not pinned.
    pub cpus: Vec<usize>,
    /// If `cpus` is empty and there are exactly this many request queues: pins each thread to the CPU with its number.
    pub one_cpu_per_queue: Option<usize>,
}

/// Cost of a wakeup between a VM and its host, relative to one between two processes. It goes through the VMM, so
/// spinning pays for that much longer.
const WAKEUP_COST: u32 = 4;

impl From<&Settings> for GuestConfig {
    fn from(settings: &Settings) -> Self {
        let transport = &settings.transport;
        let pci = PciTarget::of(&settings.mount);
        GuestConfig {
            socket_path: transport.socket_path.clone(),
            transport: transport.kind,
            queues: transport.queue_count(),
            geometry: transport.geometry(),
            huge_pages: transport.huge_pages,
            wait: LiveWait::new(wait_config(settings)),
            pci,
            cpus: settings.mount.cpus.clone(),
            one_cpu_per_queue: None,
        }
    }
}

/// Returns the wait policy of a guest with these settings.
pub fn wait_config(settings: &Settings) -> WaitConfig {
    let (wait, in_vm) = (settings.wait, PciTarget::of(&settings.mount).is_some());
    WaitConfig { auto_us: wait.auto_us.saturating_mul(if in_vm { WAKEUP_COST } else { 1 }), ..wait }
}

impl GuestConfig {
    /// Checks that this process may use all `cpus`. Otherwise the threads would run unpinned without an error.
    ///
    /// # Errors
    /// [`Error::Setup`], which names the first CPU that it may not use.
    pub(crate) fn check_cpus(&self) -> Result<(), Error> {
        let Some(cpu) = first_unusable_cpu(&self.cpus) else { return Ok(()) };
        let there = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
        Err(Error::Setup(format!(
            "cpus: there is no CPU {cpu} for this process; this machine has {}: choose of these",
            there.trim()
        )))
    }

    /// Returns the CPU for the thread of request queue `i` of `count`; `None`: do not pin it.
    pub(crate) fn cpu(&self, i: usize, count: usize) -> Option<usize> {
        if self.cpus.is_empty() && self.one_cpu_per_queue == Some(count) {
            Some(i)
        } else {
            self.cpus.get(i).copied()
        }
    }
}

/// A PCI device, and how to drive it.
#[derive(Clone, Debug)]
pub struct PciTarget {
    /// The device.
    pub which: DeviceId,
    /// The kernel driver that opens it to user space.
    pub driver: PciDriver,
}

/// Identifies a virtio-fs device.
#[derive(Clone, Debug)]
pub enum DeviceId {
    /// By its PCI address, such as `0000:00:03.0` (or `00:03.0`).
    Address(String),
    /// By its virtio-fs tag.
    Tag(String),
}

impl std::fmt::Display for DeviceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DeviceId::Address(text) | DeviceId::Tag(text) => f.write_str(text),
        }
    }
}

impl PciTarget {
    /// Returns the device that the settings name; `None` if they name none.
    pub fn of(mount: &Mount) -> Option<PciTarget> {
        let which = match (mount.pci.as_str(), mount.tag.as_str()) {
            ("", "") => return None,
            ("", tag) => DeviceId::Tag(tag.into()),
            (address, _) => DeviceId::Address(address.into()),
        };
        Some(PciTarget { which, driver: mount.pci_driver })
    }
}
