//! A queue's part in going on with another host: what a request needs before it
//! can go out, what is to be noted of a reply.

use super::give_back::GivenBack;
use super::queue::{Flight, Queue};
use crate::fuse::abi::opcode::{name as opcode_name, *};
use crate::fuse::abi::{request_opcode, u32_at};
use crate::link::Kept;
use crate::message::IN_HEADER;
use crate::resume::cache::HandleCache;
use crate::resume::nodes::Missing;
use crate::resume::repeat::{self, Repeat};
use crate::resume::tables::Needed;
use crate::resume::wire::{self, put_u64, u64_at, Entry, BODY, NODE};
use crate::resume::{News, Resume};
use crate::transport::{reply_bytes, Completion, Transport};
use crate::Error;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tunnelfs_ring::SQE_INLINE_BYTES;

/// Bytes at a slot's start that are kept privately: two names, and more than any reply to a request with a payload
/// has. A host may have begun to answer where the question was.
const KEPT: usize = 512;
/// As much of data to be written.
const KEPT_DATA: usize = 64;
/// Most questions for one request.
const MAX_STEPS: usize = 8192;
/// Between two looks whether a caller has been killed.
const CALLERS: Duration = Duration::from_millis(100);
/// How [`Queue::make_ready`] comes out.
pub enum Ready {
    /// To the host.
    Go,
    /// This is the answer: 0 or a negative errno.
    Answered(i32),
}

/// One queue's.
pub struct Session {
    pub resume: Arc<Resume>,
    pub seat: usize,
    /// Which host the transport leads to.
    pub time: u64,
    /// There is none.
    pub away: bool,
    /// The last completions of one are being taken: it cannot be asked any more.
    pub leaving: bool,
    /// The start of each slot's request.
    starts: Box<[[u8; KEPT]]>,
    looked: Instant,
    pub cache: HandleCache,
    /// Keeps the slots mapped.
    _kept: Kept,
}

impl Session {
    pub fn new(resume: Arc<Resume>, seat: usize, slots: u32, kept: Kept) -> Session {
        let starts = vec![[0; KEPT]; slots as usize].into();
        let (cache, looked) = (HandleCache::default(), Instant::now());
        Session { resume, seat, time: 0, away: false, leaving: false, starts, looked, cache, _kept: kept }
    }

    /// Keeps the start of a request's payload.
    pub fn keep(&mut self, slot: u32, flight: &Flight, (at, size): (*mut u8, usize)) {
        let bytes = kept_bytes(flight).min(size);
        // SAFETY: the slot is this queue's now, and that large.
        unsafe { std::ptr::copy_nonoverlapping(at, self.starts[slot as usize].as_mut_ptr(), bytes) };
    }

    /// Puts it back.
    pub fn restore(&self, slot: u32, flight: &Flight, (at, size): (*mut u8, usize)) {
        let bytes = kept_bytes(flight).min(size);
        // SAFETY: as in `keep`; the host that had it has gone.
        unsafe { std::ptr::copy_nonoverlapping(self.starts[slot as usize].as_ptr(), at, bytes) };
    }

    /// What a request has from its first name on, or from its body's `from`-th byte.
    fn text(&self, slot: u32, flight: &Flight, from: usize) -> Vec<u8> {
        let mut text = flight.head[..flight.head_len].get(BODY + from..).unwrap_or_default().to_vec();
        text.extend_from_slice(&self.starts[slot as usize][..kept_bytes(flight)]);
        text
    }

    fn names(&self, slot: u32, flight: &Flight) -> Vec<u8> {
        self.text(slot, flight, wire::before_names(flight.opcode))
    }

    /// The host has been let go.
    pub fn park(&mut self) {
        (self.away, self.leaving) = (true, false);
        self.resume.handover.park(self.seat);
    }

    /// Whether there is a new host.
    pub fn look(&mut self) -> Result<Option<Box<dyn Transport>>, Error> {
        match self.resume.handover.news(self.seat) {
            News::Wait => Ok(None),
            News::Over => Err(Error::HostGone),
            News::Host(time, transport) => {
                (self.time, self.away) = (time, false);
                Ok(Some(transport))
            }
        }
    }

    pub fn time_to_look_at_callers(&mut self) -> bool {
        let due = self.looked.elapsed() >= CALLERS;
        if due {
            self.looked = Instant::now();
        }
        due
    }
}

fn kept_bytes(flight: &Flight) -> usize {
    let most = if flight.opcode == WRITE { KEPT_DATA } else { KEPT };
    most.min(flight.payload_len as usize)
}

impl Flight {
    /// Whether the thread that asks is being killed, as proc_pid_status(5) tells.
    pub fn caller_is_killed(&self) -> bool {
        self.caller_signals().0 & 1 << (libc::SIGKILL - 1) != 0
    }

    /// Whether a signal waits for it that it does not block: then the kernel sends an INTERRUPT.
    pub fn caller_has_signal(&self) -> bool {
        let (pending, blocked) = self.caller_signals();
        pending & !blocked != 0
    }

    /// Its pending and its blocked signals, as bits; none for a caller that this process cannot see.
    fn caller_signals(&self) -> (u64, u64) {
        let caller = u32_at(&self.head, 32);
        if caller == 0 {
            return (0, 0);
        }
        let status = std::fs::read_to_string(format!("/proc/{caller}/status")).unwrap_or_default();
        let set = |name: &str| {
            let set = status.lines().find_map(|line| line.strip_prefix(name));
            set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).unwrap_or(0)
        };
        (set("SigPnd:") | set("ShdPnd:"), set("SigBlk:"))
    }
}

impl Queue {
    /// Puts the host's numbers into the request in `slot`, after asking it for those that it has not told yet.
    pub(super) fn make_ready(
        &mut self,
        slot: u32,
        head: &mut [u8; SQE_INLINE_BYTES],
        head_len: &mut usize,
        payload_len: &mut u32,
    ) -> Result<Ready, Error> {
        let (Some(session), Some(flight)) = (&mut self.session, &mut self.flights[slot as usize]) else {
            return Ok(Ready::Go);
        };
        if matches!(flight.opcode, FORGET | BATCH_FORGET | RELEASE | RELEASEDIR) {
            let given = session.give_back(flight, self.transport.slot(slot));
            let going = match given {
                GivenBack::Nothing => false,
                GivenBack::Request => true,
                GivenBack::Nodes(known) => self.forget(slot, known)?,
            };
            if let Some(flight) = &self.flights[slot as usize] {
                (*head, *head_len, *payload_len) = (flight.head, flight.head_len, flight.payload_len);
            }
            return Ok(if going { Ready::Go } else { Ready::Answered(0) });
        }
        let time = session.time;
        if time == 0 {
            return Ok(Ready::Go);
        }
        let again = flight.again;
        if !again && session.cache.translate(time, &mut head[..*head_len]) {
            return Ok(Ready::Go);
        }
        for _ in 0..MAX_STEPS {
            let Some(flight) = &self.flights[slot as usize] else { return Ok(Ready::Go) };
            *head = flight.head;
            let Some(session) = &mut self.session else { return Ok(Ready::Go) };
            let needed = session.resume.tables.read().translate(&mut head[..*head_len]);
            let failed = match needed {
                None if again => return self.ask_before_repeating(slot, head),
                None => {
                    session.cache.note(time, &flight.head, &head[..]);
                    return Ok(Ready::Go);
                }
                Some(Needed::Node(missing)) => self.find(slot, missing)?,
                Some(handle) => self.reopen(slot, handle)?,
            };
            if let Some(error) = failed {
                tracing::debug!("{}: {}", opcode_name(request_opcode(head)), std::io::Error::from_raw_os_error(-error));
                // What this host did not have, the next one may.
                return if self.host_is_there() { Ok(Ready::Answered(error)) } else { Err(Error::HostGone) };
            }
        }
        Ok(Ready::Answered(-libc::EIO))
    }

    fn tables<T>(&self, work: impl FnOnce(&mut crate::resume::tables::Tables) -> T) -> T {
        let session = self.session.as_ref().expect("only with one");
        work(&mut session.resume.tables.write())
    }

    fn host_is_there(&self) -> bool {
        let mut fds = [PollFd::new(self.transport.alive(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|events| events == 0)
    }

    /// Looks for a node by one of its names; the error for whoever needs it, if that cannot be done.
    fn find(&mut self, slot: u32, missing: Missing) -> Result<Option<i32>, Error> {
        let Missing::Name { parent, child, name } = missing else { return Ok(Some(-libc::ESTALE)) };
        let found = match self.look_up(slot, parent, &name)? {
            Ok(found) => found,
            Err(error) => return Ok(Some(error)),
        };
        let is_it = self.tables(|tables| tables.nodes.found(child, &name, found.as_ref()));
        if !is_it {
            tracing::debug!("{} is gone, or another file", String::from_utf8_lossy(&name));
        }
        if let Some(other) = found.filter(|_| !is_it) {
            self.give_up(slot, other.node)?;
        }
        Ok(None)
    }

    /// What the host's node `parent` has under a name; or what stands in the way.
    fn look_up(&mut self, slot: u32, parent: u64, name: &[u8]) -> Result<Result<Option<Entry>, i32>, Error> {
        let (error, reply) = self.call(slot, LOOKUP, parent, &[], name)?;
        Ok(match -error {
            0 => Ok(Entry::read(&reply)),
            libc::ENOENT | libc::ENOTDIR | libc::ESTALE | libc::ELOOP => Ok(None),
            _ => Err(error),
        })
    }

    /// A host's number that is of no use.
    fn give_up(&mut self, slot: u32, node: u64) -> Result<(), Error> {
        if !self.tables(|tables| tables.nodes.absorb(node)) {
            self.call(slot, FORGET, node, &1u64.to_ne_bytes(), &[])?;
        }
        Ok(())
    }

    /// Opens a file for a handle that the kernel has.
    fn reopen(&mut self, slot: u32, needed: Needed) -> Result<Option<i32>, Error> {
        let Needed::Handle { node, handle, host, flags, is_dir, opener } = needed else { return Ok(None) };
        let ours = self.flights[slot as usize].as_ref().map(|flight| flight.head);
        if let Some(flight) = &mut self.flights[slot as usize] {
            flight.head[24..36].copy_from_slice(&opener);
        }
        let open = if is_dir { OPENDIR } else { OPEN };
        let opened = self.call(slot, open, host, &u64::from(flags).to_ne_bytes(), &[]);
        if let (Some(flight), Some(head)) = (&mut self.flights[slot as usize], ours) {
            flight.head = head;
        }
        let (error, reply) = opened?;
        match -error {
            0 if reply.len() >= wire::OPENED => {}
            libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EINTR => return Ok(Some(error)),
            _ => {
                tracing::debug!("a file cannot be opened again: {}", std::io::Error::from_raw_os_error(-error));
                return Ok(Some(-libc::ESTALE));
            }
        }
        let number = u64_at(&reply, 0);
        if !self.tables(|tables| tables.reopened(node, handle, number)) {
            let mut body = [0; 24];
            put_u64(&mut body, 0, number);
            self.call(slot, if is_dir { RELEASEDIR } else { RELEASE }, host, &body, &[])?;
        }
        Ok(None)
    }

    /// Whether a request that a dead host had may go to the next one; `head` has that one's numbers.
    fn ask_before_repeating(&mut self, slot: u32, head: &[u8]) -> Result<Ready, Error> {
        let (Some(session), Some(flight)) = (&self.session, &self.flights[slot as usize]) else {
            return Ok(Ready::Go);
        };
        let (host, theirs) = (u64_at(head, NODE), u64_at(&flight.head, NODE));
        let names = session.names(slot, flight);
        let name = wire::split_name(&names).map_or(&[][..], |(name, _)| name);
        let not_done = match repeat::how(&flight.head) {
            Repeat::Again => true,
            Repeat::Done => return Ok(Ready::Answered(0)),
            Repeat::Never => false,
            Repeat::IfEnds(offset) => {
                let (error, reply) = self.call(slot, GETATTR, host, &[0; 16], &[])?;
                // `fuse_attr_out`: the size follows the inode number.
                error == 0 && reply.len() >= 104 && u64_at(&reply, 24) <= offset
            }
            how => {
                let Ok(found) = self.look_up(slot, host, name)? else { return Ok(Ready::Answered(-libc::EIO)) };
                if let Some(found) = found {
                    self.give_up(slot, found.node)?;
                }
                let nodes = |tables: &mut crate::resume::tables::Tables| {
                    tables.nodes.child(theirs, name).and_then(|child| tables.nodes.identity(child))
                };
                match how {
                    Repeat::IfAbsent => found.is_none(),
                    _ => found.is_some() && found.map(|entry| entry.identity) == self.tables(nodes),
                }
            }
        };
        if not_done {
            return Ok(Ready::Go);
        }
        if let Some(flight) = &self.flights[slot as usize] {
            if matches!(flight.opcode, RENAME | RENAME2) {
                self.tables(|tables| tables.perhaps_renamed(&flight.head, &names));
            }
            tracing::info!(
                "{}: the host that had it is gone, and nobody can tell whether it was done",
                opcode_name(flight.opcode)
            );
        }
        Ok(Ready::Answered(-libc::EIO))
    }

    /// Asks the host a question of our own in a slot whose request has not been sent; what lies there comes back.
    /// The error (0 or negative) and the reply.
    fn call(&mut self, slot: u32, opcode: u32, node: u64, body: &[u8], name: &[u8]) -> Result<(i32, Vec<u8>), Error> {
        let payload = if name.is_empty() { Vec::new() } else { [name, &[0]].concat() };
        let head = self.own_head(slot, opcode, node, body, payload.len());
        let (at, size) = self.transport.slot(slot);
        let mut before = [0; KEPT];
        let kept = KEPT.min(size);
        assert!(payload.len() <= kept);
        // SAFETY: the slot is ours, and that large.
        unsafe {
            std::ptr::copy_nonoverlapping(at, before.as_mut_ptr(), kept);
            std::ptr::copy_nonoverlapping(payload.as_ptr(), at, payload.len());
        }
        let done = self.wait_for(slot, &head, payload.len() as u32);
        let result = done.map(|done| (done.error().clamp(-511, 0), reply_bytes(&*self.transport, &done)));
        // SAFETY: the slot is ours again; or its host has gone.
        unsafe { std::ptr::copy_nonoverlapping(before.as_ptr(), at, kept) };
        result
    }

    pub(super) fn wait_for(&mut self, slot: u32, head: &[u8], payload_len: u32) -> Result<Completion, Error> {
        let mut sent = false;
        loop {
            if !sent {
                sent = self.transport.submit(slot, head, payload_len, KEPT as u32)?;
            }
            match self.transport.reap()? {
                Some(done) if done.slot == slot => return Ok(done),
                Some(other) => self.stash.push_back(other),
                None if sent || self.flights.iter().flatten().any(|flight| flight.sent) => self.wait_a_while()?,
                None => return Err(Error::Protocol("no room in an idle queue")),
            }
        }
    }

    fn wait_a_while(&mut self) -> Result<(), Error> {
        match self.transport.wait_within(PollTimeout::from(500u16)) {
            Err(Error::HostSilent) => match &self.session {
                Some(session) if session.resume.handover.is_over() => Err(Error::HostGone),
                _ => Ok(()),
            },
            result => result,
        }
    }

    /// Notes what a reply says, and puts the kernel's numbers into it.
    pub(super) fn take_note(&mut self, completion: &mut Completion, error: i32) -> Result<(), Error> {
        let slot = completion.slot;
        let (Some(session), Some(flight)) = (&self.session, &self.flights[slot as usize]) else { return Ok(()) };
        let brings = matches!(
            flight.opcode,
            LOOKUP | MKNOD | MKDIR | SYMLINK | LINK | CREATE | TMPFILE | OPEN | OPENDIR | READDIRPLUS
        );
        let moves = matches!(flight.opcode, UNLINK | RMDIR | RENAME | RENAME2);
        let absent = flight.opcode == LOOKUP && error == -libc::ENOENT;
        if !(error == 0 && (brings || moves)) && !absent {
            return Ok(());
        }
        let (time, leaving) = (session.time, session.leaving);
        let (head, names) = (flight.head, session.names(slot, flight));
        if absent {
            self.tables(|tables| tables.absent(&head, &names));
            return Ok(());
        }
        let mut reply = if brings { reply_bytes(&*self.transport, completion) } else { Vec::new() };
        if time > 0 && !leaving {
            self.find_kin(slot, &head, &reply)?;
        }
        self.tables(|tables| tables.reply(&head, &names, &mut reply));
        if time > 0 && brings {
            put_back(&*self.transport, completion, &reply);
        }
        Ok(())
    }

    /// A file of several names may be one that the kernel has by another.
    fn find_kin(&mut self, slot: u32, head: &[u8], reply: &[u8]) -> Result<(), Error> {
        let entries: Vec<_> = match request_opcode(head) {
            LOOKUP => Entry::read(reply).into_iter().collect(),
            READDIRPLUS => wire::entries(reply).into_iter().map(|(_, entry, _)| entry).collect(),
            _ => return Ok(()),
        };
        for entry in entries.iter().filter(|entry| entry.links > 1) {
            let Some(kin) = self.tables(|tables| tables.nodes.kin(entry)) else { continue };
            for _ in 0..MAX_STEPS {
                let Err(missing) = self.tables(|tables| tables.nodes.translate(kin)) else { break };
                if self.find(slot, missing)?.is_some() {
                    break;
                }
            }
        }
        Ok(())
    }
}

impl Queue {
    /// The first bytes of a request of our own, in the name of whoever asks in `slot`.
    pub(super) fn own_head(&self, slot: u32, opcode: u32, node: u64, body: &[u8], payload: usize) -> Vec<u8> {
        let asker = self.flights[slot as usize].as_ref().map_or([0; SQE_INLINE_BYTES], |flight| flight.head);
        let mut head = asker[..IN_HEADER].to_vec();
        head.extend_from_slice(body);
        let len = head.len() + payload;
        head[..4].copy_from_slice(&(len as u32).to_ne_bytes());
        head[4..8].copy_from_slice(&opcode.to_ne_bytes());
        put_u64(&mut head, NODE, node);
        // No extensions: `total_extlen` and padding.
        head[36..40].fill(0);
        head
    }
}

/// Writes a reply's bytes back to where they were.
fn put_back(transport: &dyn Transport, completion: &mut Completion, reply: &[u8]) {
    let start = completion.head_len - completion.inline().len();
    let inline = completion.inline().len();
    let end = completion.head_len;
    completion.head[start..end].copy_from_slice(&reply[..inline]);
    let (at, size) = transport.slot(completion.slot);
    let rest = &reply[inline..];
    assert!(rest.len() <= size);
    // SAFETY: the slot is ours again, and that large.
    unsafe { std::ptr::copy_nonoverlapping(rest.as_ptr(), at, rest.len()) };
}
