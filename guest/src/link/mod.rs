//! Ways to reach a host, and what every one of them gives the transports.

pub mod local;
mod memory;
pub mod pci;

pub use memory::{QueueMemory, RegionAllocator, SETUP_BUFFER};

use crate::timeout::Opened;
use crate::transport::{ring, socket, virtqueue, Transport};
use crate::Error;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use tunnelfs_ring::{first_unusable_cpu, Geometry, Policy, Region, WaitConfig};
use tunnelfs_settings::{Settings, TransportKind};

/// How to reach a host.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// The host's UNIX socket, for the local link.
    pub socket_path: PathBuf,
    /// The VM's virtio-fs device, for the PCI link.
    pub pci: Option<pci::Target>,
    /// The transport.
    pub transport: TransportKind,
    /// Request queues wanted; a host may have fewer.
    pub queues: usize,
    /// Sizes of each queue.
    pub geometry: Geometry,
    /// Back the region with 2 MiB pages.
    pub huge_pages: bool,
    /// How this side waits.
    pub wait: WaitConfig,
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
        let pci = pci::Target::of(&settings.mount);
        let wait = settings.wait;
        GuestConfig {
            socket_path: transport.socket_path.clone(),
            transport: transport.kind,
            queues: transport.queue_count(),
            geometry: transport.geometry(),
            huge_pages: transport.huge_pages,
            wait: WaitConfig {
                auto_us: wait.auto_us.saturating_mul(if pci.is_some() { WAKEUP_COST } else { 1 }),
                ..wait
            },
            pci,
            cpus: settings.mount.cpus.clone(),
            one_cpu_per_queue: None,
        }
    }
}

impl GuestConfig {
    /// A CPU that was asked for and cannot be had would go unnoticed otherwise: the thread would run anywhere.
    ///
    /// # Errors
    /// [`Error::Setup`] names the first one.
    fn check_cpus(&self) -> Result<(), Error> {
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

/// What all queues of one connection share; keeps it open. Virtqueue 0 is the
/// high-priority one, here called control queue; then come the request queues.
pub trait Link: Send + Sync {
    /// Where a virtqueue's parts lie.
    fn memory(&self, virtqueue: usize) -> &QueueMemory;

    /// The device's address of memory of this link; `None` where the bytes are not in one piece for it.
    fn address(&self, at: *const u8, bytes: usize) -> Option<u64>;

    /// Tells the host that a queue has something for it.
    ///
    /// # Errors
    /// The system's.
    fn kick(&self, virtqueue: usize) -> std::io::Result<()>;

    /// Becomes readable when the host has something for a queue.
    fn call_fd(&self, virtqueue: usize) -> BorrowedFd<'_>;

    /// Whether somebody waits for a queue's bell now. To be said before the
    /// last look for work, with a full fence between.
    fn set_waiting(&self, _virtqueue: usize, _asleep: bool) {}

    /// Hangs up when the host goes.
    fn hangup_fd(&self) -> BorrowedFd<'_>;

    /// Whether both sides name the events that they want (`VIRTIO_RING_F_EVENT_IDX`).
    fn event_idx(&self) -> bool;

    /// Whether the host can see on which CPU a thread of the guest runs.
    fn shares_cpus(&self) -> bool;
}

/// The queues of a connection.
pub struct Connection {
    /// For FORGET and the like, where they come apart from the others.
    pub hiprio: Box<dyn Transport>,
    /// The request queues.
    pub queues: Vec<Box<dyn Transport>>,
    /// What another connection can take over, if one can.
    pub retained: Option<RetainedMemory>,
}

/// A connection's memory, which the next one has too: what lies in the slots is still to be done.
#[derive(Clone)]
pub enum RetainedMemory {
    /// Shared with a host.
    Shared(Arc<local::Memory>),
    /// Of each streamed queue, the control queue's first.
    Private(Vec<Arc<Region>>),
}

/// The control queue has few small messages; but a slot must take the largest
/// request, for the kernel reads none into less.
fn hiprio_geometry(of: Geometry) -> Geometry {
    Geometry { entries: 4, slots: 2, slot_size: of.slot_size }
}

/// The geometry of every virtqueue of a connection.
fn geometries(config: &GuestConfig, request_queues: usize) -> Vec<Geometry> {
    let mut all = vec![config.geometry; request_queues + 1];
    all[0] = hiprio_geometry(config.geometry);
    all
}

/// Connects; one transport per request queue.
///
/// # Errors
/// [`Error::Connect`] when nobody serves the socket, [`Error::Setup`] when the
/// device cannot be had; [`Error::Ring`] for sizes out of range or memory that cannot be had.
pub fn connect(config: &GuestConfig) -> Result<Connection, Error> {
    connect_under(config, &Opened::default())
}

/// As [`connect`], under a deadline.
pub(crate) fn connect_under(config: &GuestConfig, opened: &Opened) -> Result<Connection, Error> {
    config.geometry.check()?;
    config.check_cpus()?;
    let (link, retained, count) = match &config.pci {
        Some(target) => pci::open(config, target).map(|(link, count)| (link, None, count))?,
        None if config.transport == TransportKind::Socket => return connect_socket(config, opened),
        None => {
            let (link, memory) = local::open(config, None, opened)?;
            let count = memory.count();
            (link, Some(RetainedMemory::Shared(memory)), count)
        }
    };
    let drivers = (0..count).map(|i| virtqueue_driver(&link, i, config)).collect();
    Ok(Connection { retained, ..upgrade(drivers, config)? })
}

/// Connects to another host with a former connection's memory. `handshake` is the first to talk to it; what it says and
/// hears lies beside the slots.
///
/// # Errors
/// As [`connect`]; [`Error::Setup`] when this host cannot take over.
pub(crate) fn connect_again(
    config: &GuestConfig,
    retained: &RetainedMemory,
    opened: &Opened,
    handshake: impl FnOnce(&mut dyn Transport) -> Result<(), Error>,
) -> Result<Connection, Error> {
    let memory = match retained {
        RetainedMemory::Shared(memory) => memory,
        RetainedMemory::Private(regions) => return connect_socket_again(config, regions, opened, handshake),
    };
    let (link, memory) = local::open(config, Some(memory.clone()), opened)?;
    let mut drivers: Vec<_> =
        (0..memory.count()).map(|i| virtqueue_driver(&link, i, config).beside_the_slots()).collect();
    handshake(&mut drivers[1])?;
    Ok(Connection { retained: Some(retained.clone()), ..upgrade(drivers, config)? })
}

fn virtqueue_driver(link: &Arc<dyn Link>, index: usize, config: &GuestConfig) -> virtqueue::VirtqueueTransport {
    let park = WaitConfig { policy: Policy::Park, ..config.wait };
    virtqueue::VirtqueueTransport::new(link.clone(), index, if index == 0 { park } else { config.wait })
}

/// Rings for the request queues, where they are wanted and the host knows them.
fn upgrade(drivers: Vec<virtqueue::VirtqueueTransport>, config: &GuestConfig) -> Result<Connection, Error> {
    let count = drivers.len() - 1;
    let transports = drivers.into_iter().enumerate().map(|(i, driver)| match config.transport {
        TransportKind::Ring if i > 0 => ring::upgrade(driver, config.wait, config.cpu(i - 1, count)),
        _ => Ok(Box::new(driver.settled()) as Box<dyn Transport>),
    });
    let mut queues = transports.collect::<Result<Vec<_>, _>>()?;
    Ok(Connection { hiprio: queues.remove(0), queues, retained: None })
}

fn connect_socket(config: &GuestConfig, opened: &Opened) -> Result<Connection, Error> {
    let token = socket::new_token()?;
    let control = socket::connect(config, hiprio_geometry(config.geometry), None, opened)?.join(&token)?;
    let queues = (0..config.queues).map(|_| socket::connect(config, config.geometry, None, opened)?.join(&token));
    let queues = queues.collect::<Result<Vec<_>, _>>()?;
    let regions = std::iter::once(&control).chain(&queues).map(|driver| driver.memory().clone()).collect();
    let queues = queues.into_iter().map(|driver| driver as Box<dyn Transport>).collect();
    Ok(Connection { hiprio: control, queues, retained: Some(RetainedMemory::Private(regions)) })
}

fn connect_socket_again(
    config: &GuestConfig,
    regions: &[Arc<Region>],
    opened: &Opened,
    handshake: impl FnOnce(&mut dyn Transport) -> Result<(), Error>,
) -> Result<Connection, Error> {
    let [of_hiprio, of_first, of_others @ ..] = regions else {
        return Err(Error::Protocol("no memory to go on with"));
    };
    let token = socket::new_token()?;
    let connect =
        |geometry, region: &Arc<Region>| socket::connect(config, geometry, Some(region.clone()), opened)?.join(&token);
    let control = connect(hiprio_geometry(config.geometry), of_hiprio)?;
    // The first words lie in memory of their own; by a queue that stays: a host forgets all with its last connection.
    let mut first = socket::connect(config, config.geometry, None, opened)?.join(&token)?;
    handshake(first.as_mut())?;
    let mut queues: Vec<Box<dyn Transport>> = vec![Box::new(first.with_memory(of_first.clone()))];
    for region in of_others {
        queues.push(connect(config.geometry, region)?);
    }
    Ok(Connection { hiprio: control, queues, retained: Some(RetainedMemory::Private(regions.to_vec())) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_that_cannot_be_had_are_refused() {
        let mut config = GuestConfig::from(&Settings::default());
        assert!(config.check_cpus().is_ok());
        let here = tunnelfs_ring::allowed_cpus()[0];
        config.cpus = vec![here, here];
        assert!(config.check_cpus().is_ok());
        for cpu in [1023, 1 << 20, usize::MAX] {
            config.cpus = vec![here, cpu];
            // Before anybody is connected to.
            let refused = connect(&config).map(drop).unwrap_err().to_string();
            assert!(refused.contains(&format!("no CPU {cpu}")), "{refused}");
        }
    }
}
