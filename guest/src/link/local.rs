//! The local link: a vhost-user front end on a UNIX socket that brings the memory.

use super::{geometries, Carver, GuestConfig, Link, QueueMemory};
use crate::Error;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tunnelfs_ring::Region;
use virtio_driver::virtqueue::Virtqueue;
use virtio_driver::{EventFd, QueueNotifier, VhostUser, VirtioFeatureFlags, VirtioTransport};

/// `struct virtio_fs_config` (linux/virtio_fs.h).
#[derive(Clone, Copy)]
#[repr(C)]
struct FsConfig {
    tag: [u8; 36],
    num_request_queues: u32,
}

// SAFETY: plain integers without padding.
unsafe impl virtio_driver::ByteValued for FsConfig {}

type FrontEnd = VhostUser<FsConfig, ()>;

struct Local {
    _vhost: FrontEnd,
    alive: OwnedFd,
    _region: Region,
    memory: Vec<QueueMemory>,
    bells: Vec<Arc<EventFd>>,
    kicks: Vec<Box<dyn QueueNotifier>>,
    event_idx: bool,
}

impl Link for Local {
    fn memory(&self, virtqueue: usize) -> &QueueMemory {
        &self.memory[virtqueue]
    }

    fn address(&self, at: *const u8, _bytes: usize) -> Option<u64> {
        Some(at as u64)
    }

    fn kick(&self, virtqueue: usize) -> std::io::Result<()> {
        self.kicks[virtqueue].notify()
    }

    fn bell(&self, virtqueue: usize) -> BorrowedFd<'_> {
        self.bells[virtqueue].as_fd()
    }

    fn alive(&self) -> BorrowedFd<'_> {
        self.alive.as_fd()
    }

    fn event_idx(&self) -> bool {
        self.event_idx
    }

    fn same_cpus(&self) -> bool {
        true
    }
}

/// Connects; the link, and how many virtqueues it has.
pub(super) fn open(config: &GuestConfig) -> Result<(Arc<dyn Link>, usize), Error> {
    let refused = |source| Error::Connect { path: config.socket_path.display().to_string(), source };
    let path = config.socket_path.to_str().ok_or(Error::Protocol("socket path is not UTF-8"))?;
    let features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
    let before = connections();
    let mut vhost = FrontEnd::new(path, features.bits()).map_err(refused)?;
    let alive = new_connection(&config.socket_path, &before)?;
    let offered: FsConfig = vhost.get_config().map_err(refused)?;
    let count = config.queues.min(u32::from_le(offered.num_request_queues).max(1) as usize);

    let geometries = geometries(config, count);
    let region = Region::new(Carver::measure(&geometries, usize::MAX / 2 + 1), config.huge_pages)?;
    let region_fd = region.as_fd().as_raw_fd();
    vhost.map_mem_region(region.ptr() as usize, region.bytes(), region_fd, 0)?;
    let end = |_| Some(region.bytes());
    let mut carver = Carver::new(region.ptr(), &end);
    let memory = geometries.iter().map(|&g| QueueMemory::new(&mut carver, g, u16::MAX));
    let memory = memory.collect::<Result<Vec<_>, _>>()?;
    let features = VirtioFeatureFlags::from_bits_truncate(vhost.get_features());
    // They only serve to tell the host where the queues lie.
    let queues = memory.iter().map(|m| {
        // SAFETY: the virtqueue's part of the region, which nobody uses yet.
        let part =
            unsafe { std::slice::from_raw_parts_mut(m.virtqueue, crate::transport::virtqueue::memory_bytes(m.size)) };
        Virtqueue::new(vhost.iova_translator(), part, m.size, features)
    });
    let queues = queues.collect::<Result<Vec<_>, _>>()?;
    vhost.setup_queues(&queues)?;
    let bells = (0..=count).map(|i| nonblocking(vhost.get_completion_fd(i))).collect::<Result<_, _>>()?;
    let kicks = (0..=count).map(|i| vhost.get_submission_notifier(i)).collect();
    let event_idx = features.contains(VirtioFeatureFlags::RING_EVENT_IDX);
    let link = Local { _vhost: vhost, alive, _region: region, memory, bells, kicks, event_idx };
    Ok((Arc::new(link), count + 1))
}

/// Draining a bell that has not rung must not sleep.
fn nonblocking(bell: Arc<EventFd>) -> Result<Arc<EventFd>, Error> {
    use nix::fcntl::{fcntl, FcntlArg, OFlag};
    fcntl(&*bell, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(std::io::Error::from)?;
    Ok(bell)
}

/// This process's connections to named UNIX sockets, and the names as their hosts gave them.
pub(crate) fn connections() -> Vec<(i32, PathBuf)> {
    use nix::sys::socket::{getpeername, UnixAddr};
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return Vec::new() };
    let numbers = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    numbers.filter_map(|fd| Some((fd, getpeername::<UnixAddr>(fd).ok()?.path()?.into()))).collect()
}

/// A duplicate of the connection that was not there `before`: virtio-driver
/// does not lend its own, and without it the host's death could not be seen
/// while we sleep.
fn new_connection(path: &Path, before: &[(i32, PathBuf)]) -> Result<OwnedFd, Error> {
    let new: Vec<_> = connections().into_iter().filter(|c| !before.contains(c)).collect();
    // Another thread may connect elsewhere meanwhile; the host may know its socket by another path.
    let ours = new.iter().find(|(_, name)| name == path).or(new.first());
    let fd = ours.ok_or(Error::Protocol("the connection's socket cannot be found"))?.0;
    // SAFETY: the descriptor was open a moment ago, and virtio-driver keeps it open.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(fd.try_clone_to_owned()?)
}
