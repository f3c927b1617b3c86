//! The thread that waits for a host's death, and connects to the next one.

use super::{missing_options, Reconnect};
use crate::config::GuestConfig;
use crate::connect::{connect_again, Connection, RetainedMemory};
use crate::error::Error;
use crate::events::{Event, Listener};
use crate::fuse::init::{self, InitReplay};
use crate::fuse::message::{request, u32_at, Identity, IN_HEADER, ROOT};
use crate::timeout;
use crate::transport::{call_within, reply_bytes, Transport};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{shutdown, Shutdown};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::flags::init::INIT_EXT;
use tunnelfs_fuse_abi::opcode;

/// Interval between two checks whether all queues have detached.
const DETACH_POLL: Duration = Duration::from_millis(5);
/// Shortest and longest pause between two attempts to connect to the next host. The pause grows with the time that the
/// host has been gone.
const CONNECT_RETRY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));
/// Pause after a host was refused. The next attempt sends INIT to the host that listens then.
const AFTER_REFUSAL: Duration = Duration::from_millis(500);
/// Most time for a new host to accept the connection, set it up and answer INIT.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// State for the handover to the next host.
pub struct HostMonitor {
    /// The hosts' socket, and the number and sizes of queues.
    pub config: GuestConfig,
    /// The memory that every host gets.
    pub retained: RetainedMemory,
    /// The INIT negotiation with the first host.
    pub init: InitReplay,
    /// Identity of the first host's root directory; `None` if the host refused GETATTR.
    pub root: Option<Identity>,
    /// The kernel's connection.
    pub device: Arc<OwnedFd>,
    /// Number of slots of each queue that is in use.
    pub slots: Vec<u32>,
    /// Whether the hiprio queue is in use.
    pub uses_hiprio: bool,
    /// How long to wait for the next host after a host's death.
    pub limit: Duration,
    /// State of the queues.
    pub reconnect: Arc<Reconnect>,
    /// Receives [`Event::HostLost`] and [`Event::HostBack`].
    pub listener: Listener,
}

/// Returns the identity of the host's root directory; `None` if the host refuses GETATTR.
///
/// # Errors
/// The transport's.
pub fn root_of(host: &mut dyn Transport, limit: PollTimeout) -> Result<Option<Identity>, Error> {
    let done = call_within(host, &request(opcode::GETATTR, ROOT, 1, &[0; 16], 0), 0, 4096, limit)?;
    // `struct fuse_attr_out`: 16 bytes before the attributes.
    let reply = reply_bytes(host, &done);
    Ok((done.error() == 0 && reply.len() >= 104).then(|| Identity::of(&reply[16..])))
}

/// By queue: a descriptor that hangs up when the host dies.
pub type HangupFds = Vec<OwnedFd>;

/// Duplicates each queue's hang-up descriptor.
///
/// # Errors
/// If the process has no descriptors left.
pub fn hangup_fds<'a>(queues: impl Iterator<Item = &'a Box<dyn Transport>>) -> std::io::Result<HangupFds> {
    queues.map(|queue| queue.hangup_fd().try_clone_to_owned()).collect()
}

impl HostMonitor {
    /// Runs until the file system is unmounted (`None`), or until no host came in time (the reason).
    pub fn run(self, mut alive: HangupFds) -> Option<Error> {
        loop {
            if !self.wait_for_hangup(&alive) {
                return None;
            }
            let gone = Instant::now();
            tracing::warn!(
                "the host has gone: waiting for another one on {}, at most {} s",
                self.config.socket_path.display(),
                self.limit.as_secs()
            );
            // Each socket queue has a connection of its own: end them all.
            for line in alive.drain(..) {
                let _ = shutdown(line.as_raw_fd(), Shutdown::Both);
            }
            self.reconnect.host_lost();
            self.listener.tell(Event::HostLost);
            while !self.reconnect.handover.all_detached() {
                if self.unmounted_within(DETACH_POLL) {
                    return None;
                }
            }
            alive = match self.next_host(gone) {
                Ok(Some(next)) => next,
                Ok(None) => return None,
                Err(e) => {
                    self.reconnect.close();
                    return Some(e);
                }
            };
            tracing::info!("going on with another host, after {} ms", gone.elapsed().as_millis());
            self.listener.tell(Event::HostBack { after: gone.elapsed() });
        }
    }

    /// Sleeps until the host hangs up (`true`) or the mount ends (`false`).
    fn wait_for_hangup(&self, alive: &HangupFds) -> bool {
        let mut fds: Vec<_> = alive.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::empty())).collect();
        fds.push(PollFd::new(self.device.as_fd(), PollFlags::empty()));
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(0) | Err(nix::Error::EINTR) => {}
                _ => return fds.pop().is_some_and(|device| device.any() != Some(true)),
            }
        }
    }

    /// Sleeps for `time`. Returns `true` as soon as the mount has ended, otherwise `false`.
    fn unmounted_within(&self, time: Duration) -> bool {
        let mut fds = [PollFd::new(self.device.as_fd(), PollFlags::empty())];
        matches!(poll(&mut fds, PollTimeout::try_from(time).unwrap_or(PollTimeout::ZERO)), Ok(1..))
    }

    /// Waits for a host that can take over; `None` if the mount has ended.
    ///
    /// # Errors
    /// After `limit`: [`Error::HostGone`], or why the last host was refused.
    fn next_host(&self, gone: Instant) -> Result<Option<HangupFds>, Error> {
        let mut refused = None;
        loop {
            let pause = match self.connect().and_then(|(connection, root)| self.hand_over(connection, root)) {
                Ok(hangup_fds) => return Ok(Some(hangup_fds)),
                Err(Error::Refused(why)) => {
                    if refused.as_ref() != Some(&why) {
                        tracing::warn!("{}: waiting for another one", self.refusal(&why));
                        refused = Some(why);
                    }
                    AFTER_REFUSAL
                }
                Err(e) => {
                    tracing::debug!("no host yet: {e}");
                    (gone.elapsed() / 16).clamp(CONNECT_RETRY.0, CONNECT_RETRY.1)
                }
            };
            let left = self.limit.saturating_sub(gone.elapsed());
            if left.is_zero() {
                return Err(refused.map_or(Error::HostGone, |why| Error::Setup(self.refusal(&why))));
            }
            if self.unmounted_within(pause.min(left)) {
                return Ok(None);
            }
        }
    }

    fn refusal(&self, why: &str) -> String {
        format!("cannot go on with the new host on {}: {why}", self.config.socket_path.display())
    }

    /// Checks that a host's reply to INIT agrees to everything that the first host agreed to.
    ///
    /// # Errors
    /// [`Error::Refused`] names the options that differ.
    fn check(&self, reply: &[u8]) -> Result<(), Error> {
        let asked = init::offered(&self.init.request()[IN_HEADER..]);
        // `struct fuse_init_out`: `flags`, and `flags2` where FUSE_INIT_EXT says that it counts.
        let low = u64::from(u32_at(reply, 12));
        let high = if low & INIT_EXT != 0 { u64::from(u32_at(reply, 32)) } else { 0 };
        let options = missing_options::options(asked & !(low | high << 32));
        self.init.check(reply).map_err(|why| match options {
            Some(options) => Error::Refused(format!("{why} (options that differ: {options})")),
            None => Error::Refused(why),
        })
    }

    /// Connects to a host, replays INIT, and asks for the root's identity.
    fn connect(&self) -> Result<(Connection, Option<Identity>), Error> {
        let mut root = None;
        let path = &self.config.socket_path;
        let connection = timeout::with_timeout(CONNECT_TIMEOUT, path, |opened| {
            connect_again(&self.config, &self.retained, opened, |host| {
                let limit = PollTimeout::try_from(CONNECT_TIMEOUT).unwrap_or(PollTimeout::MAX);
                let done = call_within(host, self.init.request(), 0, 4096, limit)?;
                if done.error() != 0 {
                    let e = std::io::Error::from_raw_os_error(-done.error());
                    return Err(Error::Refused(format!("it answers INIT with: {e}")));
                }
                self.check(&reply_bytes(host, &done))?;
                root = root_of(host, limit)?;
                Ok(())
            })
        })?;
        Ok((connection, root))
    }

    /// Hands the connection's queues to the queue threads, and returns the new hang-up descriptors.
    fn hand_over(&self, connection: Connection, root: Option<Identity>) -> Result<HangupFds, Error> {
        let Connection { hiprio, mut queues, changes, .. } = connection;
        queues.extend(self.uses_hiprio.then_some(hiprio));
        queues.extend(changes);
        if !queues.iter().map(|queue| queue.slots()).eq(self.slots.iter().copied()) {
            return Err(Error::Refused("its queues have other sizes".into()));
        }
        let same_root = root == self.root || self.root.is_none();
        if !same_root {
            tracing::error!("the new host shares another directory: what was open or known is stale (ESTALE)");
        }
        let alive = hangup_fds(queues.iter())?;
        self.reconnect.host_ready(queues, same_root);
        Ok(alive)
    }
}
