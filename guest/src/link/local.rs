//! The local link: a vhost-user front end on a UNIX socket that brings the memory.

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

/// What a connection has in common with the next one: the kernel knows the slots.
pub struct Memory {
    region: Region,
    queues: Vec<QueueMemory>,
    /// The last one is for changes.
    changes: bool,
}

struct Local {
    /// The connection; the host lets go of everything when it is closed.
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

    /// Whether the last virtqueue is for changes.
    pub(crate) fn has_changes(&self) -> bool {
        self.changes
    }

    fn request_queues(&self) -> usize {
        self.queues.len() - 1 - usize::from(self.changes)
    }

    /// How many virtqueues it has.
    pub(crate) fn count(&self) -> usize {
        self.queues.len()
    }
}

/// Connects, with the memory of a connection that has gone, if there was one; the link and its memory.
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
    // The control queue, the request queues, and one more.
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
            // SAFETY: mapped, and whoever resumes has seen that no transport uses it any more.
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

/// Agrees on features; these, how many request queues the host has, and how many virtqueues if it tells.
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
    // A stock virtiofsd without --tag has no config space, and does not say how many queues it has.
    let told = if protocol.contains(VhostUserProtocolFeatures::CONFIG) { request_queues(front)? } else { 1 };
    let (mut count, mut virtqueues) = (u64::from(told), 0);
    if protocol.contains(VhostUserProtocolFeatures::MQ) {
        // The control queue is one of them.
        virtqueues = front.get_queue_num()?;
        count = count.min(virtqueues.saturating_sub(1));
    }
    Ok((features, count.max(1) as usize, virtqueues as usize))
}

fn request_queues(front: &mut Frontend) -> vhost::Result<u32> {
    let flags = VhostUserConfigFlags::empty();
    let (_, config) = front.get_config(0, CONFIG_BYTES as u32, flags, &[0; CONFIG_BYTES])?;
    let number = config.get(TAG_BYTES..).and_then(|bytes| bytes.try_into().ok());
    Ok(number.map_or(1, u32::from_le_bytes))
}

/// The region at our own addresses: the guest's "physical" ones are these too.
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

/// Neither side can make a write to one of them, or a read from it, wait.
fn eventfds(count: usize) -> Result<Vec<OwnedFd>, Error> {
    (0..count).map(|_| Ok(Eventfd::new()?)).collect()
}

/// A copy of an eventfd in the form that goes into a message.
fn lend(fd: &OwnedFd) -> std::io::Result<EventFd> {
    let copy = fd.try_clone()?.into_raw_fd();
    // SAFETY: an open eventfd, which nobody else owns.
    Ok(unsafe { EventFd::from_raw_fd(copy) })
}
