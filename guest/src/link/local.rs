//! The local link: a vhost-user front end on a UNIX socket that brings the memory.

use crate::transport::{ring, socket, virtqueue, Transport};
use crate::Error;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tunnelfs_ring::{Geometry, Policy, Region, WaitConfig};
use tunnelfs_settings::{Kind, Settings};
use virtio_driver::virtqueue::{Virtqueue, VirtqueueLayout};
use virtio_driver::{VhostUser, VirtioFeatureFlags, VirtioTransport};

/// How to reach a host.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// The host's UNIX socket.
    pub socket_path: PathBuf,
    /// The transport.
    pub transport: Kind,
    /// Request queues wanted; a host may have fewer.
    pub queues: usize,
    /// Sizes of each queue.
    pub geometry: Geometry,
    /// Back the region with 2 MiB pages.
    pub huge_pages: bool,
    /// How this side waits.
    pub wait: WaitConfig,
    /// The CPU that each queue's thread will stay on, as far as that is known.
    pub cpus: Vec<usize>,
}

impl From<&Settings> for GuestConfig {
    fn from(settings: &Settings) -> Self {
        let transport = &settings.transport;
        GuestConfig {
            socket_path: transport.socket_path.clone(),
            transport: transport.kind,
            queues: transport.queue_count(),
            geometry: transport.geometry(),
            huge_pages: transport.huge_pages,
            wait: settings.wait,
            cpus: settings.mount.cpus.clone(),
        }
    }
}

/// `struct virtio_fs_config` (linux/virtio_fs.h).
#[derive(Clone, Copy)]
#[repr(C)]
pub struct FsConfig {
    tag: [u8; 36],
    num_request_queues: u32,
}

// SAFETY: plain integers without padding.
unsafe impl virtio_driver::ByteValued for FsConfig {}

/// What all queues of one connection share; keeps it open.
pub struct Link {
    vhost: VhostUser<FsConfig, virtqueue::Headers>,
    alive: OwnedFd,
    region: Region,
    geometry: Geometry,
}

/// The queues of a connection.
pub struct Connection {
    /// For FORGET and the like, where they come apart from the others.
    pub control: Box<dyn Transport>,
    /// The request queues.
    pub queues: Vec<Box<dyn Transport>>,
}

/// The control queue has few small messages; but a slot must take the largest
/// request, for the kernel reads none into less.
fn control_geometry(of: Geometry) -> Geometry {
    Geometry { entries: 4, slots: 2, slot_size: of.slot_size }
}

impl Link {
    /// Becomes readable or hung up when the host closes the connection.
    pub fn alive(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.alive.as_fd()
    }

    /// First byte of a virtqueue's part of the region; number 0 is the control queue.
    pub fn queue_base(&self, virtqueue: usize) -> *mut u8 {
        let before = |n: usize| control_geometry(self.geometry).bytes() + (n - 1) * self.geometry.bytes();
        // SAFETY: the region was made for all queues.
        unsafe { self.region.ptr().add(if virtqueue == 0 { 0 } else { before(virtqueue) }) }
    }

    /// A virtqueue's sizes.
    pub fn geometry(&self, virtqueue: usize) -> Geometry {
        if virtqueue == 0 {
            control_geometry(self.geometry)
        } else {
            self.geometry
        }
    }

    /// The doorbell of a virtqueue, made non-blocking: draining one that has not rung must not sleep.
    pub(crate) fn call_fd(&self, virtqueue: usize) -> Result<Arc<virtio_driver::EventFd>, Error> {
        use nix::fcntl::{fcntl, FcntlArg, OFlag};
        let bell = self.vhost.get_completion_fd(virtqueue);
        fcntl(&*bell, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(std::io::Error::from)?;
        Ok(bell)
    }

    pub(crate) fn notifier(&self, virtqueue: usize) -> Box<dyn virtio_driver::QueueNotifier> {
        self.vhost.get_submission_notifier(virtqueue)
    }
}

/// Connects; one transport per request queue.
///
/// # Errors
/// [`Error::Connect`] when nobody serves the socket; [`Error::Ring`] for
/// sizes out of range or memory that cannot be had.
pub fn connect(config: &GuestConfig) -> Result<Connection, Error> {
    config.geometry.check()?;
    if config.transport == Kind::Socket {
        let control = socket::connect(config, control_geometry(config.geometry))?;
        let queues = (0..config.queues).map(|_| socket::connect(config, config.geometry)).collect::<Result<_, _>>()?;
        return Ok(Connection { control, queues });
    }
    let (link, queues) = open(config)?;
    let park = WaitConfig { policy: Policy::Park, ..config.wait };
    let drivers = queues.into_iter().enumerate().map(|(i, vq)| {
        let driver = virtqueue::Driver::new(link.clone(), vq, i, if i == 0 { park } else { config.wait })?;
        match config.transport {
            Kind::Ring if i > 0 => ring::upgrade(driver, config.wait, config.cpus.get(i - 1).copied()),
            _ => Ok(Box::new(driver) as Box<dyn Transport>),
        }
    });
    let mut queues = drivers.collect::<Result<Vec<_>, _>>()?;
    Ok(Connection { control: queues.remove(0), queues })
}

type Queue = Virtqueue<'static, virtqueue::Headers>;

fn open(config: &GuestConfig) -> Result<(Arc<Link>, Vec<Queue>), Error> {
    let refused = |source| Error::Connect { path: config.socket_path.display().to_string(), source };
    let path = config.socket_path.to_str().ok_or(Error::Protocol("socket path is not UTF-8"))?;
    let features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
    let before = connections_to(&config.socket_path);
    let mut vhost = VhostUser::<FsConfig, virtqueue::Headers>::new(path, features.bits()).map_err(refused)?;
    let alive = new_connection(&config.socket_path, &before)?;
    let offered: FsConfig = vhost.get_config().map_err(refused)?;
    let count = config.queues.min(u32::from_le(offered.num_request_queues).max(1) as usize);

    let bytes = control_geometry(config.geometry).bytes() + count * config.geometry.bytes();
    let region = Region::new(bytes, config.huge_pages)?;
    vhost.map_mem_region(region.ptr() as usize, region.bytes(), region_fd(&region), 0)?;
    let features = VirtioFeatureFlags::from_bits_truncate(vhost.get_features());
    // Four descriptors a request; the high-priority queue comes first.
    let size = (config.geometry.slots * 4).next_power_of_two().clamp(4, 1024) as usize;
    let layout = VirtqueueLayout::new::<virtqueue::Headers>(count + 1, size, features)?;
    let memory = vhost.alloc_queue_mem(&layout)?;
    let (start, part) = (memory.as_mut_ptr(), layout.end_offset);
    let mut queues = Vec::with_capacity(count + 1);
    for i in 0..=count {
        // SAFETY: `alloc_queue_mem` gave that much for each queue; the parts do
        // not overlap, and the `Link` that each driver holds keeps them mapped.
        let memory = unsafe { std::slice::from_raw_parts_mut(start.add(i * part), part) };
        queues.push(Virtqueue::new(vhost.iova_translator(), memory, size as u16, features)?);
    }
    vhost.setup_queues(&queues)?;
    let link = Arc::new(Link { vhost, alive, region, geometry: config.geometry });
    Ok((link, queues))
}

fn region_fd(region: &Region) -> i32 {
    use std::os::fd::AsFd;
    region.as_fd().as_raw_fd()
}

/// This process's sockets that are connected to `path`.
fn connections_to(path: &Path) -> Vec<i32> {
    use nix::sys::socket::{getpeername, UnixAddr};
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return Vec::new() };
    let numbers = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    numbers.filter(|&fd| getpeername::<UnixAddr>(fd).is_ok_and(|peer| peer.path() == Some(path))).collect()
}

/// A duplicate of the connection that was not there `before`: virtio-driver
/// does not lend its own, and without it the host's death could not be seen
/// while we sleep.
fn new_connection(path: &Path, before: &[i32]) -> Result<OwnedFd, Error> {
    let fd = connections_to(path).into_iter().find(|fd| !before.contains(fd));
    let fd = fd.ok_or(Error::Protocol("the connection's socket cannot be found"))?;
    // SAFETY: the descriptor was open a moment ago, and virtio-driver keeps it open.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(fd.try_clone_to_owned()?)
}
