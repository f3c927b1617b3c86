//! The thread that fetches changes from the host. It keeps one OP_CHANGES in flight, which the host answers when
//! something changes. So `mount.timeout` does not apply to it.

use super::actions::Recorder;
use super::counters::ChangeCounters;
use super::dispatch::Dispatcher;
use crate::fuse::message::request;
use crate::reconnect::{HostPoll, Reconnect};
use crate::transport::{reply_bytes, Transport};
use crate::Error;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_fuse_abi::changes::{Records, OP_CHANGES, OP_DROPPED};
use tunnelfs_ring::Eventfd;

/// The slots of OP_CHANGES and OP_DROPPED.
const CHANGES: u32 = 0;
const DROPPED: u32 = 1;
/// `unique` of OP_CHANGES; OP_DROPPED has the next number. The kernel uses neither.
const UNIQUE: u64 = 1 << 63;
/// Pause after the host has refused OP_CHANGES. It refuses while it still waits for a former guest of the same device.
const AFTER_REFUSAL: Duration = Duration::from_millis(20);

/// The state of the thread.
pub struct ChangeThread {
    /// The queue for changes, with two slots.
    pub transport: Box<dyn Transport>,
    /// The mounted connection.
    pub device: Arc<OwnedFd>,
    pub reconnect: Arc<Reconnect>,
    /// Index of `transport` in `reconnect`.
    pub queue_index: usize,
    pub counters: Arc<ChangeCounters>,
}

/// Why the thread stops serving a host.
enum End {
    Unmounted,
    HostGone,
}

/// The requests that the host has, or why it has none.
#[derive(Default)]
struct Asked {
    /// OP_CHANGES is in flight.
    changes: bool,
    /// OP_DROPPED is in flight.
    dropped: bool,
    /// The host does not know OP_CHANGES (ENOSYS).
    never: bool,
    /// The host has refused OP_CHANGES for now.
    refused: bool,
}

impl ChangeThread {
    /// Starts the thread. It ends with the mount.
    ///
    /// # Errors
    /// If the system has no thread or descriptor left.
    pub fn start(self) -> Result<(), Error> {
        let dispatcher = Dispatcher::new(self.device.clone(), self.counters.clone(), self.reconnect.clone())?;
        tunnelfs_program::thread::spawn("changes", move || self.run(&dispatcher))?;
        Ok(())
    }

    fn run(mut self, dispatcher: &Arc<Dispatcher>) {
        loop {
            match self.serve(dispatcher) {
                Ok(End::Unmounted) => break,
                Ok(End::HostGone) | Err(Error::HostGone) => {}
                Err(e) => {
                    tracing::error!(
                        "the host cannot tell what changes: {e}; until another host comes, caches may be stale"
                    );
                    dispatcher.invalidate_everything();
                }
            }
            // This thread does not access the old host's memory from here on.
            self.reconnect.handover.detach(self.queue_index);
            let Some(transport) = self.next_host() else { break };
            self.transport = transport;
            self.counters.set_active(true);
            // The new host does not watch the files that the old one watched, so no cached state is reliable.
            dispatcher.invalidate_everything();
        }
        dispatcher.end();
    }

    /// Waits for the next host; `None` if the mount has ended or no host will come.
    fn next_host(&self) -> Option<Box<dyn Transport>> {
        loop {
            match self.reconnect.handover.poll(self.queue_index) {
                HostPoll::Ready(_, transport) => return Some(transport),
                HostPoll::Closed => return None,
                HostPoll::Pending if self.unmounted_before_host() => return None,
                HostPoll::Pending => {}
            }
        }
    }

    /// Sleeps until `reconnect` has something (`false`) or the mount has ended (`true`).
    fn unmounted_before_host(&self) -> bool {
        let mut fds = [
            PollFd::new(self.device.as_fd(), PollFlags::empty()),
            PollFd::new(self.reconnect.host_event(), PollFlags::POLLIN),
        ];
        let _ = poll(&mut fds, PollTimeout::NONE);
        fds[0].any() == Some(true)
    }

    /// Serves until the host dies or the mount ends.
    fn serve(&mut self, dispatcher: &Arc<Dispatcher>) -> Result<End, Error> {
        let mut asked = Asked::default();
        loop {
            while let Some(done) = self.transport.reap()? {
                if done.slot == DROPPED {
                    asked.dropped = false;
                    continue;
                }
                asked.changes = false;
                // The host may send any number, and negating one could overflow.
                const ENOSYS: i32 = -libc::ENOSYS;
                match done.error() {
                    0 => self.take(&reply_bytes(&*self.transport, &done), dispatcher),
                    ENOSYS => {
                        asked.never = true;
                        self.counters.set_active(false);
                    }
                    _ => asked.refused = true,
                }
            }
            // After the last completion, as each frees its slot for the next request.
            self.ask(&mut asked, dispatcher)?;
            if let Some(end) = self.wait(&mut asked, dispatcher)? {
                return Ok(end);
            }
        }
    }

    /// Submits OP_CHANGES unless it is in flight, and OP_DROPPED for the files whose data has been dropped.
    fn ask(&mut self, asked: &mut Asked, dispatcher: &Dispatcher) -> Result<(), Error> {
        if !asked.changes && !asked.never && !asked.refused && dispatcher.has_room() {
            let room = self.transport.slot(CHANGES).1 as u32;
            asked.changes = self.transport.submit(CHANGES, &request(OP_CHANGES, 0, UNIQUE, &[], 0), 0, room)?;
        }
        if asked.dropped {
            return Ok(());
        }
        let (at, size) = self.transport.slot(DROPPED);
        let nodes: Vec<u8> = dispatcher.take_dropped(size / 8).into_iter().flat_map(u64::to_ne_bytes).collect();
        if !nodes.is_empty() {
            // SAFETY: the slot is ours, and that large.
            unsafe { std::ptr::copy_nonoverlapping(nodes.as_ptr(), at, nodes.len()) };
            let head = request(OP_DROPPED, 0, UNIQUE + 1, &[], nodes.len());
            asked.dropped = self.transport.submit(DROPPED, &head, nodes.len() as u32, 0)?;
        }
        Ok(())
    }

    /// Handles the records of a reply to OP_CHANGES.
    fn take(&self, reply: &[u8], dispatcher: &Arc<Dispatcher>) {
        let mut actions = Vec::new();
        {
            let tables = self.reconnect.tables.read();
            let mut recorder = Recorder { counters: &self.counters, inodes: &tables.nodes, actions: &mut actions };
            for (record, name, to_name) in Records(reply) {
                recorder.record(&record, name, to_name);
            }
        }
        if actions.contains(&super::actions::Action::Everything) {
            tracing::warn!("the host has lost changes of the shared directory: the kernel forgets all that is cached");
        }
        dispatcher.push(actions);
    }

    /// Sleeps until the host has replied, or the dispatcher has something for it. Returns `Some` if the host has died
    /// or the mount has ended.
    fn wait(&mut self, asked: &mut Asked, dispatcher: &Dispatcher) -> Result<Option<End>, Error> {
        let limit = if asked.refused { PollTimeout::try_from(AFTER_REFUSAL) } else { Ok(PollTimeout::NONE) };
        let transport = &mut self.transport;
        let mut end = None;
        if transport.announce_sleep() {
            let mut fds = [
                PollFd::new(transport.fd(), PollFlags::POLLIN),
                PollFd::new(dispatcher.news.as_fd(), PollFlags::POLLIN),
                PollFd::new(transport.hangup_fd(), PollFlags::empty()),
                PollFd::new(self.device.as_fd(), PollFlags::empty()),
            ];
            match poll(&mut fds, limit.unwrap_or(PollTimeout::MAX)) {
                Ok(0) => asked.refused = false,
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(e) => return Err(std::io::Error::from(e).into()),
            }
            let [answered, _, gone, ended] = fds.map(|fd| fd.any() == Some(true));
            if ended {
                end = Some(End::Unmounted);
            } else if gone && !answered {
                end = Some(End::HostGone);
            }
        }
        Eventfd::drain(&dispatcher.news);
        transport.drain_call();
        transport.awake();
        Ok(end)
    }
}
