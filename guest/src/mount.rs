//! A mounted file system: connection, mount, INIT, workers, unmount.

use crate::channel::{ChannelKind, Worker, WriteOrder};
use crate::coherence::changes::ChangeThread;
use crate::coherence::counters::ChangeCounters;
use crate::config::GuestConfig;
use crate::connect::{connect_under, Connection, RetainedMemory};
use crate::error::Error;
use crate::events::{Event, Listener};
use crate::figures::Figures;
use crate::fuse::device::{self, MountOptions};
use crate::fuse::init::{self, InitReplay, InitResult};
use crate::fuse::message::{
    reply_header, request, request_len, request_opcode, request_unique, IN_HEADER, OUT_HEADER, ROOT,
};
use crate::fuse::mountinfo;
use crate::reconnect::monitor::{hangup_fds, root_of, HangupFds, HostMonitor};
use crate::reconnect::Reconnect;
use crate::recording::{self, Recording};
use crate::stats::{self, QueueStats};
use crate::timeout;
use crate::timeout::{Opened, Watchdog};
use crate::transport::{call_within, reply_bytes, Transport};
use nix::mount::MsFlags;
use nix::poll::PollTimeout;
use parking_lot::Mutex;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::flags::init as init_flag;
use tunnelfs_fuse_abi::opcode;
use tunnelfs_ring::{Eventfd, LiveWait};
use tunnelfs_settings::{Channel, Settings};

/// Most time that a host may take for the connection, the mount and INIT.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What to mount, and how.
#[derive(Clone, Debug)]
pub struct MountConfig {
    /// The host, the transport and the sizes.
    pub guest: GuestConfig,
    /// Where to mount.
    pub point: PathBuf,
    /// mount(8)'s options.
    pub options: MountOptions,
    /// The kernel interface for the requests.
    pub channel: Channel,
    /// Whether the kernel caches writes.
    pub writeback: bool,
    /// Most time that the host may take for a reply; zero: no limit.
    pub timeout: Duration,
    /// How long to wait for another host after a host's death; `None`: not at all.
    pub reconnect: Option<Duration>,
    /// Receives the mount's events.
    pub listener: Listener,
}

/// Prefixes of the names of a mount's worker threads.
pub const WORKERS: &[&str] = &["queue-", "control"];

/// Why no next host came, set by the thread that waits for it.
type Failure = Arc<Mutex<Option<Error>>>;

impl MountConfig {
    /// Makes the configuration of a mount on `point` from `settings`.
    pub fn new(settings: &Settings, point: &Path, options: MountOptions) -> Self {
        let mut guest = GuestConfig::from(settings);
        let Settings { mount, .. } = settings;
        // FUSE-over-io_uring has a kernel queue per CPU. If there are as many request queues, pin each thread to its
        // CPU, but not in a VM.
        guest.one_cpu_per_queue = (mount.channel != Channel::Fuse && guest.pci.is_none()).then(possible_cpus);
        MountConfig {
            guest,
            point: point.into(),
            options,
            channel: mount.channel,
            writeback: mount.writeback,
            timeout: Duration::from_secs(mount.timeout),
            reconnect: mount.reconnect.then(|| Duration::from_secs(mount.reconnect_timeout)),
            listener: Listener::default(),
        }
    }
}

/// A mounted file system; unmounted when dropped.
pub struct Mount {
    pub(crate) point: PathBuf,
    workers: Vec<JoinHandle<Result<(), Error>>>,
    pub(crate) queues: Vec<(&'static str, u32, Arc<QueueStats>)>,
    exit_fd: Arc<OwnedFd>,
    agreed: InitResult,
    pub(crate) wait: LiveWait,
    /// The kernel's number of the FUSE connection; `None` if /proc/self/mountinfo does not show it.
    connection: Option<u32>,
    watchdog: Option<Watchdog>,
    /// Reconnect state, and the memory for the next host. `None` for a mount that neither reconnects nor gets change
    /// reports.
    reconnect: Option<(Arc<Reconnect>, Option<RetainedMemory>)>,
    /// Change counters; `None` if the host has no queue for change reports.
    counters: Option<Arc<ChangeCounters>>,
    write_order: Arc<WriteOrder>,
    no_host: Failure,
}

impl Mount {
    /// Connects to the host, mounts and starts to serve.
    ///
    /// # Errors
    /// Any [`Error`]; nothing is left mounted then.
    pub fn new(config: &MountConfig) -> Result<Mount, Error> {
        let path = &config.guest.socket_path;
        let mount = timeout::with_opened(CONNECT_TIMEOUT, path, Opened::with_start(), |opened| {
            Mount::with_connection(connect_under(&config.guest, opened)?, config)
        });
        mount.map_err(|e| match e {
            Error::HostGone => Error::Setup(format!(
                "the host at {} closes the connection: does it use another transport, or speak something else?",
                path.display()
            )),
            e => e,
        })
    }

    /// Mounts over an open connection.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_connection(mut connection: Connection, config: &MountConfig) -> Result<Mount, Error> {
        let device = Arc::new(device::open_device()?);
        device::mount_on(&device, &config.point, &config.options)?;
        let ended = Arc::new(Eventfd::new()?);
        let mut mount = Mount {
            point: config.point.clone(),
            workers: Vec::new(),
            queues: Vec::new(),
            exit_fd: ended,
            agreed: InitResult { uring: false, max_write: 0, shared_locks: false },
            wait: config.guest.wait.clone(),
            connection: mountinfo::topmost(&config.point).map(|m| m.minor),
            watchdog: None,
            reconnect: None,
            counters: None,
            write_order: Arc::default(),
            no_host: Failure::default(),
        };
        let (agreed, init) = negotiate_init(&device, connection.queues[0].as_mut(), config)?;
        mount.agreed = agreed;
        if agreed.shared_locks && config.reconnect.is_some() {
            tracing::warn!(
                "the host keeps the locks (host.locks = \"shared\"), and they end with it: this mount does not go on \
                 with another host, as with `noreconnect`"
            );
        }
        if is_read_only(connection.queues[0].as_mut(), limit_of(config.timeout))? {
            tracing::info!("the host lets nothing be changed: mounted read-only");
            device::remount(&config.point, config.options.flags | MsFlags::MS_RDONLY)?;
        }
        let reconnect = config.reconnect.filter(|_| !agreed.shared_locks);
        let (used, changes) = (used_queues(&connection, agreed), connection.changes.is_some());
        if changes || reconnect.is_some() {
            mount.reconnect = Some((Arc::new(Reconnect::new(used)?), connection.retained.clone()));
            mount.counters = changes.then(|| Arc::new(ChangeCounters::new(used)));
        }
        let next = match (connection.retained.clone(), reconnect) {
            (Some(retained), Some(limit)) => {
                Some(mount.next_host(&mut connection, (retained, init, limit), &device, config)?)
            }
            _ => None,
        };
        if let (None, Some((reconnect, _))) = (&next, &mount.reconnect) {
            reconnect.close();
        }
        mount.start(connection, &device, config)?;
        mount.watch(config.timeout)?;
        config.listener.tell(Event::Mounted);
        if let Some((watch, hangup_fds)) = next {
            mount.watch_host(watch, hangup_fds)?;
        }
        Ok(mount)
    }

    /// Makes the monitor for the next host, and duplicates this host's hang-up descriptors.
    fn next_host(
        &mut self,
        connection: &mut Connection,
        (retained, init, limit): (RetainedMemory, InitReplay, Duration),
        device: &Arc<OwnedFd>,
        config: &MountConfig,
    ) -> Result<(HostMonitor, HangupFds), Error> {
        let root = root_of(connection.queues[0].as_mut(), limit_of(config.timeout))?;
        let control = self.agreed.uring.then_some(&connection.hiprio);
        let used = || connection.queues.iter().chain(control).chain(&connection.changes);
        let (slots, hangup_fds) = (used().map(|queue| queue.slots()).collect::<Vec<_>>(), hangup_fds(used())?);
        let reconnect = self.reconnect.as_ref().map(|(reconnect, _)| reconnect.clone());
        let reconnect = reconnect.ok_or(Error::Protocol("no queues to go on with"))?;
        let uses_hiprio = self.agreed.uring;
        let mut of_host = config.guest.clone();
        of_host.queues = connection.queues.len();
        let watch = HostMonitor {
            config: of_host,
            retained,
            init,
            root,
            device: device.clone(),
            slots,
            uses_hiprio,
            limit,
            reconnect,
            listener: config.listener.clone(),
        };
        Ok((watch, hangup_fds))
    }

    /// Starts the thread of the host monitor. It aborts the mount if no next host comes.
    fn watch_host(&self, watch: HostMonitor, hangup_fds: HangupFds) -> Result<(), Error> {
        let (point, connection, ended) = (self.point.clone(), self.connection, self.exit_fd.clone());
        let failure = self.no_host.clone();
        let work = move || {
            if let Some(why) = watch.run(hangup_fds) {
                tracing::error!("{why}: giving up");
                *failure.lock() = Some(why);
                abort(&point, connection);
                Eventfd::signal(&*ended);
            }
        };
        tunnelfs_program::thread::spawn("next-host", work)?;
        Ok(())
    }

    /// Starts the workers and the change thread.
    fn start(&mut self, connection: Connection, device: &Arc<OwnedFd>, config: &MountConfig) -> Result<(), Error> {
        let Connection { hiprio, queues, changes, .. } = connection;
        if config.guest.transport == tunnelfs_settings::TransportKind::Ring && queues.iter().any(|q| q.name() != "ring")
        {
            tracing::info!("the host has no ring, or one of another version: going on over virtqueues");
        }
        let (count, possible) = (queues.len(), possible_cpus());
        for (i, transport) in queues.into_iter().enumerate() {
            let share = (0..possible as u16).filter(|q| usize::from(*q) % count == i).collect();
            let cpu = config.guest.cpu(i, count);
            // In a VM, a wakeup of an idle vCPU goes through the VMM, so the thread spins instead. This needs a vCPU
            // beside the one that runs the application.
            let wait = (config.guest.pci.is_some() && cpu.is_none() && possible > 1).then(|| config.guest.wait.clone());
            let kind = if self.agreed.uring { ChannelKind::Uring(share, wait) } else { ChannelKind::Dev };
            self.spawn(format!("queue-{i}"), transport, device, kind, cpu)?;
        }
        if self.agreed.uring {
            // FORGET and INTERRUPT still come over /dev/fuse.
            self.spawn("control".into(), hiprio, device, ChannelKind::DevForget, None)?;
        }
        if let (Some(transport), Some((reconnect, _)), Some(counters)) = (changes, &self.reconnect, &self.counters) {
            let (reconnect, counters, queue_index) = (reconnect.clone(), counters.clone(), self.queues.len());
            ChangeThread { transport, device: device.clone(), reconnect, queue_index, counters }.start()?;
        }
        Ok(())
    }

    fn spawn(
        &mut self,
        name: String,
        transport: Box<dyn Transport>,
        device: &Arc<OwnedFd>,
        kind: ChannelKind,
        cpu: Option<usize>,
    ) -> Result<(), Error> {
        let stats = Arc::new(QueueStats::new(transport.slots()));
        let reconnect = self.reconnect.clone().map(|(reconnect, retained)| (reconnect, self.queues.len(), retained));
        self.queues.push((transport.name(), transport.slots(), stats.clone()));
        let (counters, write_order) = (self.counters.clone(), self.write_order.clone());
        let worker = Worker { transport, device: device.clone(), kind, cpu, stats, reconnect, counters, write_order };
        let ended = self.exit_fd.clone();
        let thread = tunnelfs_program::thread::spawn(&name, move || {
            let result = worker.run();
            Eventfd::signal(&*ended);
            result
        })?;
        self.workers.push(thread);
        Ok(())
    }

    /// Starts the watchdog, which aborts the mount if the host does not answer within `timeout`; zero: no watchdog.
    fn watch(&mut self, timeout: Duration) -> Result<(), Error> {
        if timeout.is_zero() {
            return Ok(());
        }
        let queues = self.queues.iter().map(|q| q.2.clone()).collect();
        let (point, connection, ended) = (self.point.clone(), self.connection, self.exit_fd.clone());
        let give_up = move || {
            abort(&point, connection);
            Eventfd::signal(&*ended);
        };
        self.watchdog = Some(Watchdog::start(timeout, queues, give_up)?);
        Ok(())
    }

    /// Returns the eventfd that becomes readable when the service ends: unmounted, or failed.
    pub fn exit_fd(&self) -> BorrowedFd<'_> {
        self.exit_fd.as_fd()
    }

    /// Describes in one line what was negotiated.
    pub fn describe(&self) -> String {
        let transport = self.queues.first().map_or("no", |q| q.0);
        let channel = if self.agreed.uring { "FUSE-over-io_uring" } else { "/dev/fuse" };
        let queues = self.queues.len() - usize::from(self.agreed.uring);
        format!(
            "{} mounted: {transport} transport, {queues} queue(s), {channel}, writes up to {} KiB",
            self.point.display(),
            self.agreed.max_write >> 10
        )
    }

    /// Returns the kernel's number of the connection if a thread of this process may block in a call that only the end
    /// of the connection ends. Another process must then call [`abort`] if this one is killed. `None` if no thread may
    /// block so.
    pub fn needs_abort_when_killed(&self) -> Option<u32> {
        self.connection.filter(|_| self.counters.is_some())
    }

    /// Returns `true` while the mount waits for another host, `false` while there is a host.
    pub fn is_host_away(&self) -> bool {
        self.reconnect.as_ref().is_some_and(|(reconnect, _)| reconnect.handover.is_away())
    }

    /// Returns the wait policy, which may be changed while the mount is in use.
    pub fn wait(&self) -> &LiveWait {
        &self.wait
    }

    /// Returns the statistics so far, as a table.
    pub fn statistics(&self) -> String {
        stats::render(self.wait.get().policy, &self.queues)
    }

    /// Returns the source of the figures for monitoring, which any thread may read.
    pub fn figures(&self) -> Figures {
        let reconnect = self.reconnect.as_ref().map(|(reconnect, _)| reconnect.clone());
        Figures { queues: self.queues.clone(), reconnect }
    }

    /// Starts a recording of the mount's requests, or ends it and writes it to its file.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn record(&self) -> std::io::Result<()> {
        let parts = || self.queues.iter().map(|(.., stats)| &stats.recording);
        if parts().any(Recording::is_on) {
            return recording::write(&recording::stop(parts()));
        }
        parts().for_each(Recording::start);
        Ok(())
    }

    /// Unmounts. A busy mount is detached, and ends with its last user.
    ///
    /// # Errors
    /// The system's.
    pub fn unmount(&self) -> std::io::Result<()> {
        device::unmount(&self.point)
    }

    /// Waits until all workers have ended, after [`Self::exit_fd`].
    ///
    /// # Errors
    /// The first worker's error, why no next host came, or [`Error::HostSilent`]. All pending and later requests of the
    /// mount then fail, at the latest when this process ends.
    pub fn finish(mut self) -> Result<(), Error> {
        while !self.workers.is_empty() {
            if self.watchdog.as_ref().is_some_and(Watchdog::timed_out) {
                return self.abort_with(Error::HostSilent);
            }
            let no_host = self.no_host.lock().take();
            if let Some(why) = no_host {
                return self.abort_with(why);
            }
            // The eventfd is signalled a moment before a worker has ended.
            let Some(done) = self.workers.iter().position(JoinHandle::is_finished) else {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            };
            let ended = self.workers.swap_remove(done).join();
            if let Err(e) = ended.unwrap_or(Err(Error::Protocol("a worker panicked"))) {
                let why = self.no_host.lock().take();
                return self.abort_with(why.unwrap_or(e));
            }
        }
        Ok(())
    }

    /// Aborts the connection and returns `error`. Waits for the other workers for at most 1 s.
    fn abort_with(&mut self, error: Error) -> Result<(), Error> {
        let start = Instant::now();
        if let Some((reconnect, _)) = &self.reconnect {
            reconnect.close();
        }
        let ending = abort(&self.point, self.connection);
        while ending && start.elapsed() < Duration::from_secs(1) && self.workers.iter().any(|w| !w.is_finished()) {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.workers.clear();
        Err(error)
    }
}

/// Number of queues that must detach from a dead host.
fn used_queues(connection: &Connection, agreed: InitResult) -> usize {
    connection.queues.len() + usize::from(agreed.uring) + usize::from(connection.changes.is_some())
}

/// Aborts the FUSE connection: all pending and later requests fail at once. Returns `true` if it is aborted, `false` if
/// that is not possible. The dead mount stays until it is unmounted, so that programs do not use the directory below it
/// instead.
pub fn abort(point: &Path, connection: Option<u32>) -> bool {
    let Some(number) = connection else { return false };
    if std::fs::write(format!("/sys/fs/fuse/connections/{number}/abort"), "1").is_ok() {
        return true;
    }
    // Without a fusectl file system: by the mount point, if it is still ours.
    is_mounted(point, connection) && device::abort(point).is_ok()
}

/// Returns `true` if the host refuses each change (EROFS). `false` if not, or if the host does not support ACCESS: its
/// errors then come with the requests.
fn is_read_only(host: &mut dyn Transport, limit: PollTimeout) -> Result<bool, Error> {
    // `struct fuse_access_in`: the mask, and padding.
    let body = u64::from(libc::W_OK as u32).to_le_bytes();
    let done = call_within(host, &request(opcode::ACCESS, ROOT, 1, &body, 0), 0, 4096, limit)?;
    Ok(done.error() == -libc::EROFS)
}

/// Returns `true` if the topmost mount on `point` is this connection.
fn is_mounted(point: &Path, connection: Option<u32>) -> bool {
    mountinfo::topmost(point).map(|m| m.minor) == connection
}

impl Drop for Mount {
    fn drop(&mut self) {
        let served = !self.workers.is_empty() || self.queues.is_empty();
        if served && is_mounted(&self.point, self.connection) {
            let _ = device::detach(&self.point);
        }
    }
}

/// Carries INIT between the kernel and the host. Returns the result, and what the next host must agree to.
///
/// # Errors
/// [`Error::Setup`] if the host refuses INIT, or if io_uring is required and the kernel does not offer it.
fn negotiate_init(
    device: &OwnedFd,
    transport: &mut dyn Transport,
    config: &MountConfig,
) -> Result<(InitResult, InitReplay), Error> {
    // FUSE_MIN_READ_BUFFER bytes: the kernel refuses a smaller buffer.
    let mut request = [0; 8192];
    let n = nix::unistd::read(device, &mut request).map_err(std::io::Error::from)?;
    let head = &mut request[..n];
    if n < IN_HEADER || request_len(head) != n || request_opcode(head) != opcode::INIT {
        return Err(Error::Protocol("the kernel's first request is not INIT"));
    }
    let wanted = init::InitOptions {
        slot_size: config.guest.geometry.slot_size,
        uring: match config.channel {
            Channel::Auto => None,
            Channel::Uring => Some(true),
            Channel::Fuse => Some(false),
        },
        writeback: config.writeback,
        default_permissions: config.options.default_permissions,
    };
    let offered = init::offered(&head[IN_HEADER..]);
    let uring_offered = offered & init_flag::OVER_IO_URING != 0;
    if config.channel == Channel::Uring && !uring_offered {
        return Err(Error::Setup(device::uring_hint().into()));
    }
    if config.channel == Channel::Auto && !uring_offered {
        tracing::info!("{}", device::uring_hint());
    }
    init::filter_init_in(&mut head[IN_HEADER..], wanted);
    let done = call_within(transport, head, 0, 4096, limit_of(config.timeout))?;
    if done.error() != 0 {
        let e = std::io::Error::from_raw_os_error(-done.error());
        return Err(Error::Setup(format!("the host refuses this kernel's version of FUSE, or an option: {e}")));
    }
    let mut body = reply_bytes(transport, &done);
    let theirs = body.clone();
    let agreed = init::filter_init_out(&mut body, offered, wanted);
    let agreed = agreed.map_err(|e| Error::Setup(format!("the host is of another version: {e}")))?;
    let mut reply = reply_header(OUT_HEADER + body.len(), 0, request_unique(head)).to_vec();
    reply.extend_from_slice(&body);
    nix::unistd::write(device, &reply).map_err(std::io::Error::from)?;
    Ok((agreed, InitReplay::new(head, &theirs, agreed)))
}

/// Returns `timeout` for poll(2); zero is no limit.
fn limit_of(timeout: Duration) -> PollTimeout {
    match timeout {
        Duration::ZERO => PollTimeout::NONE,
        timeout => PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX),
    }
}

/// Number of CPUs that the kernel may ever have: FUSE-over-io_uring needs a queue for each.
pub fn possible_cpus() -> usize {
    // "0-3" or "0": the last number plus one.
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    text.trim().rsplit([',', '-']).next().and_then(|n| n.parse::<usize>().ok()).map_or(1, |n| n + 1)
}
