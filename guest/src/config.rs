//! How to reach a host: plain data.

use crate::error::Error;
use std::path::PathBuf;
use tunnelfs_ring::{first_unusable_cpu, Geometry, LiveWait, WaitConfig};
use tunnelfs_settings::{Mount, PciDriver, Settings, TransportKind};

/// How to reach a host.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// The host's UNIX socket, for the local link.
    pub socket_path: PathBuf,
    /// The VM's virtio-fs device, for the PCI link.
    pub pci: Option<PciTarget>,
    /// The transport.
    pub transport: TransportKind,
    /// Request queues wanted; a host may have fewer.
    pub queues: usize,
    /// Sizes of each queue.
    pub geometry: Geometry,
    /// Back the region with 2 MiB pages.
    pub huge_pages: bool,
    /// How this side waits; copies of this configuration share it.
    pub wait: LiveWait,
    /// The CPU that each queue's thread will stay on, in order; the others' threads go where they like.
    pub cpus: Vec<usize>,
    /// With none of them said: one each, where there are so many queues.
    pub one_cpu_per_queue: Option<usize>,
}

/// A wake out of a virtual machine and into it goes through the VMM: it takes that many times as long as one between
/// two processes, and so long spinning pays.
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

/// How a guest with these settings waits.
pub fn wait_config(settings: &Settings) -> WaitConfig {
    let (wait, in_vm) = (settings.wait, PciTarget::of(&settings.mount).is_some());
    WaitConfig { auto_us: wait.auto_us.saturating_mul(if in_vm { WAKEUP_COST } else { 1 }), ..wait }
}

impl GuestConfig {
    /// A CPU that was asked for and cannot be had would go unnoticed otherwise: the thread would run anywhere.
    ///
    /// # Errors
    /// [`Error::Setup`] names the first one.
    pub(crate) fn check_cpus(&self) -> Result<(), Error> {
        let Some(cpu) = first_unusable_cpu(&self.cpus) else { return Ok(()) };
        let there = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
        Err(Error::Setup(format!(
            "cpus: there is no CPU {cpu} for this process; this machine has {}: choose of these",
            there.trim()
        )))
    }

    /// The CPU of the thread of request queue `i` of `count`.
    pub(crate) fn cpu(&self, i: usize, count: usize) -> Option<usize> {
        if self.cpus.is_empty() && self.one_cpu_per_queue == Some(count) {
            Some(i)
        } else {
            self.cpus.get(i).copied()
        }
    }
}

/// Which device, and how to drive it.
#[derive(Clone, Debug)]
pub struct PciTarget {
    /// Which one.
    pub which: DeviceId,
    /// The kernel driver that opens it to user space.
    pub driver: PciDriver,
}

/// Which device.
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
    /// What the settings name, if they name a device.
    pub fn of(mount: &Mount) -> Option<PciTarget> {
        let which = match (mount.pci.as_str(), mount.tag.as_str()) {
            ("", "") => return None,
            ("", tag) => DeviceId::Tag(tag.into()),
            (address, _) => DeviceId::Address(address.into()),
        };
        Some(PciTarget { which, driver: mount.pci_driver })
    }
}
