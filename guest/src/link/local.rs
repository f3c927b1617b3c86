//! The local link: a vhost-user front end on a UNIX socket. It allocates the memory and shares it with the host.

use super::memory::{geometries, QueueMemory, RegionAllocator};
use super::Link;
use crate::config::GuestConfig;
use crate::error::Error;
use crate::split_queue::SplitQueue;
use crate::timeout::Opened;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use tunnelfs_ring::{Eventfd, Region};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// `VIRTIO_RING_F_EVENT_IDX` and `VIRTIO_F_VERSION_1`.
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
/// Bytes of `struct virtio_fs_config` (linux/virtio_fs.h): a tag, then the number of request queues.
const CONFIG_BYTES: usize = 40;
const TAG_BYTES: usize = 36;
/// Most virtqueues of a vhost-user device (`VHOST_USER_MAX_VRINGS`).
const MAX_VIRTQUEUES: u64 = 1 << 15;

/// The memory of a connection. The next connection gets it too, as the kernel has the addresses of the slots.
pub struct Memory {
    region: Region,
    queues: Vec<QueueMemory>,
    /// Whether the last queue is for changes.
    changes: bool,
}

struct Local {
    /// The vhost-user connection. When it is closed the host unmaps the memory and closes the eventfds.
    connection: UnixStream,
    memory: Arc<Memory>,
    bells: Vec<OwnedFd>,
    kicks: Vec<OwnedFd>,
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
        Eventfd::signal(&self.kicks[virtqueue]);
        Ok(())
    }

    fn call_fd(&self, virtqueue: usize) -> BorrowedFd<'_> {
        self.bells[virtqueue].as_fd()
    }

    fn hangup_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    fn event_idx(&self) -> bool {
        self.event_idx
    }

    fn shares_cpus(&self) -> bool {
        true
    }
}

impl Memory {
    fn new(config: &GuestConfig, request_queues: usize, changes: bool) -> Result<Arc<Memory>, Error> {
        let geometries = geometries(config, request_queues, changes);
        let region = Region::new(RegionAllocator::measure(&geometries, usize::MAX / 2 + 1), config.huge_pages)?;
        let end = |_| Some(region.len());
        let mut carver = RegionAllocator::new(region.as_ptr(), &end);
        let queues = geometries.iter().map(|&g| QueueMemory::new(&mut carver, g, u16::MAX));
        let queues = queues.collect::<Result<Vec<_>, _>>()?;
        Ok(Arc::new(Memory { region, queues, changes }))
    }

    /// Returns `true` if the last virtqueue is for changes, `false` if there is none for changes.
    pub(crate) fn has_changes(&self) -> bool {
        self.changes
    }

    fn request_queues(&self) -> usize {
        self.queues.len() - 1 - usize::from(self.changes)
    }

    /// Number of virtqueues.
    pub(crate) fn count(&self) -> usize {
        self.queues.len()
    }
}

/// Connects to a host and starts its virtqueues. `retained` is the memory of an earlier connection; `None`: new memory.
/// Returns the link and its memory.
///
/// # Errors
/// [`Error::Connect`], or [`Error::Refused`] if the host has fewer queues than the earlier one.
pub(crate) fn open(
    config: &GuestConfig,
    retained: Option<Arc<Memory>>,
    opened: &Opened,
) -> Result<(Arc<dyn Link>, Arc<Memory>), Error> {
    let connection = opened.connect(&config.socket_path)?;
    let mut front = Frontend::from_stream(connection.try_clone()?, MAX_VIRTQUEUES);
    let refused = |e: vhost::Error| Error::Connect {
        path: config.socket_path.display().to_string(),
        source: std::io::Error::other(e),
    };
    let (features, offered, virtqueues) = negotiate(&mut front).map_err(refused)?;
    let count = config.queues.min(offered);
    // More virtqueues than the hiprio queue and the request queues.
    let changes = virtqueues > count + 1;
    let memory = match retained {
        None => Memory::new(config, count, changes)?,
        Some(retained) if retained.changes && !changes => {
            return Err(Error::Refused("it has no queue for changes: it is of an older version".into()));
        }
        Some(retained) if count < retained.request_queues() => {
            return Err(Error::Refused(format!("it has {count} request queues, not {}", retained.request_queues())));
        }
        Some(retained) => {
            // SAFETY: mapped, and the caller has waited until no transport uses it any more.
            retained.queues.iter().for_each(|queue| unsafe { queue.clear() });
            retained
        }
    };
    front.set_mem_table(&[table_entry(&memory.region)]).map_err(refused)?;
    let bells = eventfds(memory.count())?;
    let kicks = eventfds(memory.count())?;
    for (i, queue) in memory.queues.iter().enumerate() {
        start_queue(&mut front, i, queue, &lend(&kicks[i])?, &lend(&bells[i])?).map_err(refused)?;
    }
    let link = Local { connection, memory: memory.clone(), bells, kicks, event_idx: features & EVENT_IDX != 0 };
    Ok((Arc::new(link), memory))
}

/// Negotiates the features. Returns them, the host's number of request queues (at least 1), and its number of
/// virtqueues (0 if the host does not report it).
fn negotiate(front: &mut Frontend) -> vhost::Result<(u64, usize, usize)> {
    front.set_owner()?;
    let wanted = VERSION_1 | EVENT_IDX | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    let features = front.get_features()? & wanted;
    front.set_features(features)?;
    let wanted = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::CONFIG;
    let protocol = front.get_protocol_features()? & (wanted | VhostUserProtocolFeatures::MQ);
    front.set_protocol_features(protocol)?;
    if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    // A stock virtiofsd without --tag has no config space, and so reports no number of request queues.
    let told = if protocol.contains(VhostUserProtocolFeatures::CONFIG) { request_queues(front)? } else { 1 };
    let (mut count, mut virtqueues) = (u64::from(told), 0);
    if protocol.contains(VhostUserProtocolFeatures::MQ) {
        // One of them is the hiprio queue.
        virtqueues = front.get_queue_num()?;
        count = count.min(virtqueues.saturating_sub(1));
    }
    Ok((features, count.max(1) as usize, virtqueues as usize))
}

/// Reads the number of request queues from the config space; 1 if it is too short.
fn request_queues(front: &mut Frontend) -> vhost::Result<u32> {
    let flags = VhostUserConfigFlags::empty();
    let (_, config) = front.get_config(0, CONFIG_BYTES as u32, flags, &[0; CONFIG_BYTES])?;
    let number = config.get(TAG_BYTES..).and_then(|bytes| bytes.try_into().ok());
    Ok(number.map_or(1, u32::from_le_bytes))
}

/// Describes the region. Guest-physical addresses are this process's virtual addresses.
fn table_entry(region: &Region) -> VhostUserMemoryRegionInfo {
    let address = region.as_ptr() as u64;
    VhostUserMemoryRegionInfo {
        guest_phys_addr: address,
        memory_size: region.len() as u64,
        userspace_addr: address,
        mmap_offset: 0,
        mmap_handle: region.as_fd().as_raw_fd(),
    }
}

fn start_queue(
    front: &mut Frontend,
    index: usize,
    queue: &QueueMemory,
    kick: &EventFd,
    call: &EventFd,
) -> vhost::Result<()> {
    let [descriptors, available, used] = SplitQueue::areas(queue.virtqueue, queue.size).map(|area| area as u64);
    front.set_vring_num(index, queue.size)?;
    front.set_vring_base(index, 0)?;
    let addresses = VringConfigData {
        queue_max_size: queue.size,
        queue_size: queue.size,
        flags: 0,
        desc_table_addr: descriptors,
        used_ring_addr: used,
        avail_ring_addr: available,
        log_addr: None,
    };
    front.set_vring_addr(index, &addresses)?;
    front.set_vring_kick(index, kick)?;
    front.set_vring_call(index, call)?;
    front.set_vring_enable(index, true)
}

/// Makes non-blocking eventfds, so that the host cannot block a write or read of this side.
fn eventfds(count: usize) -> Result<Vec<OwnedFd>, Error> {
    (0..count).map(|_| Ok(Eventfd::new()?)).collect()
}

/// Duplicates an eventfd, in the type that the vhost crate wants.
fn lend(fd: &OwnedFd) -> std::io::Result<EventFd> {
    let copy = fd.try_clone()?.into_raw_fd();
    // SAFETY: an open eventfd, which no other object owns.
    Ok(unsafe { EventFd::from_raw_fd(copy) })
}
