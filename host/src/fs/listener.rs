//! One guest that listens: what has changed in the share, by whomever, becomes changes for it.

use super::change_queue::ChangeQueue;
use super::changes::Change;
use super::fanotify::{events, Event};
use super::inodes::{Inode, Inodes, Key};
use super::leases::{self, Leases};
use super::mount_changes::MountChanges;
use super::sys;
use super::watch::Watches;
use nix::errno::Errno;
use nix::poll::{ppoll, PollFd, PollFlags};
use nix::sys::eventfd::EventFd;
use nix::sys::time::TimeSpec;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::changes::kind;

/// How long events may wait after some that were this process's own: each of those would wake the thread, and nobody
/// needs them.
const REST: Duration = Duration::from_micros(300);
/// Bytes of events read at a time.
const BUFFER: usize = 64 << 10;

/// What one guest has changed through this process, as others are told it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Happening<'a> {
    /// One of [`kind`].
    pub kind: u32,
    /// `S_IFMT` bits, or 0.
    pub mode: u32,
    /// How many names it has, of what has got one.
    pub links: u32,
    /// The directory that has or had `name`.
    pub parent: Option<Key>,
    pub name: &'a [u8],
    /// What it happened to.
    pub node: Option<Key>,
    /// Where a renamed entry is now.
    pub to_parent: Option<Key>,
    pub to_name: &'a [u8],
}

/// The same, as far as the guest knows it.
#[derive(Default)]
struct Seen<'a> {
    kind: u32,
    mode: u32,
    links: u32,
    parent: Option<Arc<Inode>>,
    name: &'a [u8],
    node: Option<Arc<Inode>>,
    to_parent: Option<Arc<Inode>>,
    to_name: &'a [u8],
}

/// The guest.
pub struct Listener {
    inodes: Arc<Inodes>,
    pub queue: Arc<ChangeQueue>,
    pub watches: Watches,
    pub leases: Leases,
    pub stop: EventFd,
}

impl Listener {
    /// For the guest that knows `inodes`.
    pub fn new(inodes: Arc<Inodes>, queue: Arc<ChangeQueue>, watches: Watches, leases: Leases, stop: EventFd) -> Self {
        Listener { inodes, queue, watches, leases, stop }
    }

    /// Has the guest drop the data of files for which there are too many leases.
    pub fn make_room(&self) {
        for node in self.leases.surplus(Instant::now()) {
            self.drop_part(node, kind::DROP_DATA);
        }
    }

    /// Has the guest drop what `kind` says of a file.
    pub fn drop_part(&self, node: u64, kind: u32) {
        self.queue.push(Change { kind, node, ..Change::default() });
    }

    /// Another guest of this process has changed something.
    pub fn told(&self, what: &Happening<'_>) {
        let find = |key: Option<Key>| key.and_then(|key| self.inodes.find_key(&key));
        self.deliver(Seen {
            kind: what.kind,
            mode: what.mode,
            links: what.links,
            parent: find(what.parent),
            name: what.name,
            node: find(what.node),
            to_parent: find(what.to_parent),
            to_name: what.to_name,
        });
    }

    fn deliver(&self, seen: Seen<'_>) {
        if seen.parent.is_none() && seen.node.is_none() && seen.to_parent.is_none() {
            return;
        }
        if let Some(node) = &seen.node {
            match seen.kind {
                // Where it is now nobody may be watching.
                kind::RENAMED | kind::DELETED => node.cover.found_in(None),
                // A second name.
                kind::CREATED if !node.is_dir() && seen.links > 1 => node.cover.set_linked(),
                _ => {}
            }
        }
        let id = |inode: &Option<Arc<Inode>>| inode.as_ref().map_or(0, |inode| inode.id);
        // A name means nothing without its directory.
        let name = |inode: &Option<Arc<Inode>>, name: &[u8]| inode.as_ref().map_or(Vec::new(), |_| name.to_vec());
        self.queue.push(Change {
            kind: seen.kind,
            mode: seen.node.as_ref().map_or(seen.mode, |node| node.kind),
            parent: id(&seen.parent),
            node: id(&seen.node),
            to_parent: id(&seen.to_parent),
            name: name(&seen.parent, seen.name),
            to_name: name(&seen.to_parent, seen.to_name),
        });
    }

    /// Reads what the marks have reported; whether all of it was this process's own.
    fn read_events(&self, buffer: &mut [u8]) -> bool {
        let mut only_own = true;
        // Bounded: a lease may wait.
        for _ in 0..16 {
            let n = match self.watches.group().read(buffer) {
                Ok(n) if n > 0 => n,
                _ => break,
            };
            only_own &= self.on_events(&buffer[..n]);
        }
        only_own
    }

    /// Tells of events; whether all of them were of this process's own changes.
    pub fn on_events(&self, bytes: &[u8]) -> bool {
        let own = std::process::id() as i32;
        let mut only_own = true;
        for event in events(bytes) {
            if event.mask & libc::FAN_Q_OVERFLOW != 0 {
                tracing::warn!("changes come faster than they are read: the guest is told to forget all");
                self.queue.overflow();
            } else if event.pid != own {
                only_own = false;
                self.on_event(&event);
            }
        }
        only_own
    }

    fn on_event(&self, event: &Event<'_>) {
        let node = event.target.and_then(|object| self.watches.find(&object));
        let find = |place: super::fanotify::Place<'_>| self.watches.find(&place.0);
        let (mut parent, mut name) = (event.place.and_then(find), event.place.map_or(&b""[..], |(_, name)| name));
        let mut node = node;
        if name == b"." || name.is_empty() {
            // It happened to the directory itself.
            node = node.or(parent.take());
            name = b"";
        }
        let mode = if event.mask & libc::FAN_ONDIR != 0 { libc::S_IFDIR } else { 0 };
        if event.mask & libc::FAN_RENAME != 0 {
            let to_parent = event.new_place.and_then(find);
            let to_name = event.new_place.map_or(&b""[..], |(_, name)| name);
            let mode = self.look(to_parent.as_ref(), to_name).map_or(mode, |(mode, _)| mode);
            let links = 0;
            return self.deliver(Seen { kind: kind::RENAMED, mode, links, parent, name, node, to_parent, to_name });
        }
        let tell = |kind: u32, (mode, links): (u32, u32)| {
            let (parent, node) = (parent.clone(), node.clone());
            self.deliver(Seen { kind, mode, links, parent, name, node, ..Seen::default() });
        };
        let (created, deleted) = (event.mask & libc::FAN_CREATE != 0, event.mask & libc::FAN_DELETE != 0);
        let there = if created { self.look(parent.as_ref(), name) } else { None };
        // The kernel has merged the two: what is there now was created last.
        let replaced = created && deleted && there.is_some();
        if replaced {
            tell(kind::DELETED, (mode, 0));
        }
        for (flag, what) in [
            (libc::FAN_CREATE, kind::CREATED),
            (libc::FAN_MODIFY, kind::MODIFIED),
            (libc::FAN_ATTRIB, kind::ATTRIBUTES),
            (libc::FAN_CLOSE_WRITE, kind::CLOSED),
        ] {
            if event.mask & flag != 0 {
                tell(what, there.unwrap_or((mode, 0)));
            }
        }
        if deleted && !replaced {
            tell(kind::DELETED, (mode, 0));
        }
    }

    /// `S_IFMT` bits of an entry and how many names it has, if it is there.
    fn look(&self, parent: Option<&Arc<Inode>>, name: &[u8]) -> Option<(u32, u32)> {
        let (dir, name) = (self.inodes.pin(parent?).ok()?, CString::new(name).ok()?);
        let st = sys::stat_at(dir.as_fd(), &name).ok()?;
        Some((u32::from(st.stx_mode) & libc::S_IFMT, st.stx_nlink))
    }

    /// Tells the guest of leases that somebody waits for. `signals`: where the kernel says so.
    fn read_signals(&self, signals: &OwnedFd) {
        loop {
            // SAFETY: all-zero bytes are a valid `signalfd_siginfo`.
            let mut info = unsafe { std::mem::zeroed::<libc::signalfd_siginfo>() };
            let size = size_of::<libc::signalfd_siginfo>();
            // SAFETY: a descriptor, and room for one structure.
            let n = unsafe { libc::read(signals.as_raw_fd(), (&raw mut info).cast(), size) };
            if n != size as isize {
                return;
            }
            // SIGIO comes instead of the signal where too many wait: it says not which lease.
            let fd = (info.ssi_signo == leases::signal() as u32).then_some(info.ssi_fd);
            for node in self.leases.broken(fd, Instant::now()) {
                self.drop_part(node, kind::DROP_DATA);
            }
        }
    }

    /// Watches until [`stop`](Listener::stop) is signalled: on the thread that gets the leases' signals.
    pub fn run(&self, signals: &OwnedFd, mut mounts: Option<MountChanges>) {
        let mut buffer = vec![0; BUFFER];
        let mut rest: Option<Instant> = None;
        loop {
            let now = Instant::now();
            let deadline = self.leases.expire(now).into_iter().chain(rest).min();
            let limit = deadline.map(|at| TimeSpec::from_duration(at.saturating_duration_since(now)));
            let rests = rest.is_some_and(|until| until > now);
            let mut fds = vec![
                PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.watches.group().as_fd(), if rests { PollFlags::empty() } else { PollFlags::POLLIN }),
            ];
            if let Some(mounts) = &mounts {
                fds.push(PollFd::new(mounts.as_fd(), PollFlags::POLLPRI));
            }
            match ppoll(&mut fds, limit, None) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => {
                    tracing::error!("changes are not seen any more: poll: {e}");
                    self.watches.end_all();
                    self.queue.overflow();
                    return;
                }
            }
            let ready = |at: usize| fds.get(at).and_then(PollFd::revents).is_some_and(|events| !events.is_empty());
            let (stops, signalled, changed, mounted) = (ready(0), ready(1), ready(2), ready(3));
            if stops {
                return;
            }
            if signalled {
                self.read_signals(signals);
            }
            if changed {
                rest = self.read_events(&mut buffer).then(|| Instant::now() + REST);
            } else if !rests {
                rest = None;
            }
            if mounted && mounts.as_mut().is_some_and(MountChanges::have_come) {
                self.queue.overflow();
            }
        }
    }
}

/// Blocks the signals of leases for this thread; where they can be read.
///
/// # Errors
/// The system refuses.
pub fn receive_signals() -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: a set of signals on the stack; the descriptor has just been opened, for this owner.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, leases::signal());
        libc::sigaddset(&raw mut set, libc::SIGIO);
        if libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(sys::errno(libc::EINVAL));
        }
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        Ok(OwnedFd::from_raw_fd(sys::check(libc::signalfd(-1, &raw const set, flags))?))
    }
}
