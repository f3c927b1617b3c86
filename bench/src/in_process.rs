//! The host's server called from the guest's own thread: the in-VMM option of
//! the original design, without any isolation. A transport for a mount.

use nix::sys::eventfd::EventFd;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use tunnelfs_guest::fuse::message::reply_header;
use tunnelfs_guest::{Completion, Error, Transport};
use tunnelfs_host::guest_buf::GuestBuf;
use tunnelfs_host::handler::{Handler, Outcome};
use tunnelfs_ring::{Counters, Geometry, Region, CQE_INLINE_BYTES};

const OUT_HEADER: usize = 16;

/// A request queue that answers as soon as it is asked.
pub struct InProcess {
    server: Arc<dyn Handler>,
    memory: Region,
    geometry: Geometry,
    done: VecDeque<Completion>,
    /// Never rings: there is nobody to wait for.
    bell: EventFd,
}

impl InProcess {
    /// One queue over `server`.
    ///
    /// # Errors
    /// When there is no memory or descriptor.
    pub fn new(server: Arc<dyn Handler>, geometry: Geometry) -> Result<Self, Error> {
        let memory = Region::new(geometry.slots as usize * geometry.slot_size as usize, false)?;
        let bell = EventFd::new().map_err(std::io::Error::from)?;
        Ok(InProcess { server, memory, geometry, done: VecDeque::new(), bell })
    }
}

impl Transport for InProcess {
    fn name(&self) -> &'static str {
        "inline"
    }

    fn slots(&self) -> u32 {
        self.geometry.slots
    }

    fn slot(&self, slot: u32) -> (*mut u8, usize) {
        assert!(slot < self.geometry.slots);
        let size = self.geometry.slot_size as usize;
        // SAFETY: the slot's number was just checked.
        (unsafe { self.memory.as_ptr().add(slot as usize * size) }, size)
    }

    fn submit(&mut self, slot: u32, head: &[u8], payload_len: u32, reply_max: u32) -> Result<bool, Error> {
        let (ptr, _) = self.slot(slot);
        let part = |len: u32| [libc::iovec { iov_base: ptr.cast(), iov_len: len as usize }];
        let (input, output) = (part(payload_len), part(reply_max));
        // SAFETY: both lie in the slot.
        let (input, output) = unsafe { (GuestBuf::new(&input), GuestBuf::new(&output)) };
        let mut completion = Completion { slot, head: [0; CQE_INLINE_BYTES], head_len: OUT_HEADER, payload_len: 0 };
        if let Outcome::Reply(reply) = self.server.handle(head, input, output, None) {
            output.write(0, reply.body())?;
            completion.payload_len = reply.body().len() + reply.payload_len;
            let unique = u64::from_ne_bytes(head[8..16].try_into().expect("eight bytes"));
            let header = reply_header(OUT_HEADER + completion.payload_len, reply.error, unique);
            completion.head[..OUT_HEADER].copy_from_slice(&header);
        }
        self.done.push_back(completion);
        Ok(true)
    }

    fn reap(&mut self) -> Result<Option<Completion>, Error> {
        Ok(self.done.pop_front())
    }

    fn spin(&mut self, _other: &mut dyn FnMut() -> bool) -> bool {
        true
    }

    fn announce_sleep(&mut self) -> bool {
        false
    }

    fn awake(&mut self) {}

    fn fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn hangup_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn wait_counters(&self) -> Counters {
        Counters::default()
    }

    fn copied(&self) -> u64 {
        0
    }

    fn on_peer_core(&self) -> bool {
        false
    }
}
