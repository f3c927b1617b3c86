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

/// What a connection has in common with the next one: the kernel knows the slots.
pub struct Memory {
    region: Region,
    queues: Vec<QueueMemory>,
}

struct Local {
    _vhost: FrontEnd,
    alive: OwnedFd,
    memory: Arc<Memory>,
    bells: Vec<Arc<EventFd>>,
    kicks: Vec<Box<dyn QueueNotifier>>,
    event_idx: bool,
}

impl Link for Local {
    fn memory(&self, virtqueue: usize) -> &QueueMemory {
        &self.memory.queues[virtqueue]
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

impl Memory {
    fn new(config: &GuestConfig, request_queues: usize) -> Result<Arc<Memory>, Error> {
        let geometries = geometries(config, request_queues);
        let region = Region::new(Carver::measure(&geometries, usize::MAX / 2 + 1), config.huge_pages)?;
        let end = |_| Some(region.len());
        let mut carver = Carver::new(region.as_ptr(), &end);
        let queues = geometries.iter().map(|&g| QueueMemory::new(&mut carver, g, u16::MAX));
        let queues = queues.collect::<Result<Vec<_>, _>>()?;
        Ok(Arc::new(Memory { region, queues }))
    }

    /// How many virtqueues it has.
    pub(super) fn count(&self) -> usize {
        self.queues.len()
    }
}

/// Connects, with the memory of a connection that has gone, if there was one; the link and its memory.
pub(super) fn open(config: &GuestConfig, kept: Option<Arc<Memory>>) -> Result<(Arc<dyn Link>, Arc<Memory>), Error> {
    let refused = |source| Error::Connect { path: config.socket_path.display().to_string(), source };
    let path = config.socket_path.to_str().ok_or(Error::Protocol("socket path is not UTF-8"))?;
    let features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
    let before = connections();
    let mut vhost = FrontEnd::new(path, features.bits()).map_err(refused)?;
    let alive = new_connection(&config.socket_path, &before)?;
    let offered: FsConfig = vhost.get_config().map_err(refused)?;
    let count = config.queues.min(u32::from_le(offered.num_request_queues).max(1) as usize);
    let memory = match kept {
        None => Memory::new(config, count)?,
        Some(kept) if count < kept.count() - 1 => {
            return Err(Error::Refused(format!("it has {count} request queues, not {}", kept.count() - 1)));
        }
        Some(kept) => {
            // SAFETY: mapped, and whoever resumes has seen that no transport uses it any more.
            kept.queues.iter().for_each(|queue| unsafe { queue.clear() });
            kept
        }
    };
    let region = &memory.region;
    vhost.map_mem_region(region.as_ptr() as usize, region.len(), region.as_fd().as_raw_fd(), 0)?;
    let features = VirtioFeatureFlags::from_bits_truncate(vhost.get_features());
    // They only serve to tell the host where the queues lie.
    let queues = memory.queues.iter().map(|m| {
        // SAFETY: the virtqueue's part of the region, which nobody uses yet.
        let part =
            unsafe { std::slice::from_raw_parts_mut(m.virtqueue, crate::transport::virtqueue::memory_bytes(m.size)) };
        Virtqueue::new(vhost.iova_translator(), part, m.size, features)
    });
    let queues = queues.collect::<Result<Vec<_>, _>>()?;
    vhost.setup_queues(&queues)?;
    let bells = (0..memory.count()).map(|i| nonblocking(vhost.get_completion_fd(i))).collect::<Result<_, _>>()?;
    let kicks = (0..memory.count()).map(|i| vhost.get_submission_notifier(i)).collect();
    let event_idx = features.contains(VirtioFeatureFlags::RING_EVENT_IDX);
    drop(queues);
    let link = Local { _vhost: vhost, alive, memory: memory.clone(), bells, kicks, event_idx };
    Ok((Arc::new(link), memory))
}

/// Draining a bell that has not kicks must not sleep.
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
