//! Translation of a queue's requests for a later host: the LOOKUPs and OPENs that must precede a request, and the
//! records of replies.

use super::forget::ForgetAction;
use super::pending::PendingQueue;
use super::session::{Prepared, SAVED_BYTES};
use crate::error::Error;
use crate::fuse::message::{self, put_u64, request_opcode, u64_at, Entry, IN_HEADER, NODE};
use crate::reconnect::inodes::Unresolved;
use crate::reconnect::replay::{self, ReplayRule};
use crate::reconnect::translate::{Prerequisite, Translator};
use crate::transport::{reply_bytes, write_reply, Completion};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use tunnelfs_fuse_abi::opcode::{name as opcode_name, *};
use tunnelfs_fuse_abi::NO_HANDLE;
use tunnelfs_ring::SQE_INLINE_BYTES;

/// Most LOOKUPs and OPENs before one request. It fails with EIO after that, so a host cannot hold a queue for ever.
const MAX_STEPS: usize = 8192;

impl PendingQueue {
    /// Replaces the kernel's numbers in the request in `slot` with the host's. First sends LOOKUPs and OPENs for the
    /// inodes and handles that this host has not given out yet.
    ///
    /// # Errors
    /// [`Error::HostGone`] if the host dies meanwhile.
    pub(super) fn prepare(
        &mut self,
        slot: u32,
        head: &mut [u8; SQE_INLINE_BYTES],
        head_len: &mut usize,
        payload_len: &mut u32,
    ) -> Result<Prepared, Error> {
        let (Some(session), Some(request)) = (&mut self.session, &mut self.requests[slot as usize]) else {
            return Ok(Prepared::Submit);
        };
        if matches!(request.opcode, FORGET | BATCH_FORGET | RELEASE | RELEASEDIR) {
            let given = session.apply_forget(request, self.transport.slot(slot));
            let going = match given {
                ForgetAction::Drop => false,
                ForgetAction::Forward => true,
                ForgetAction::InodeTable(known) => self.forget(slot, known)?,
            };
            if let Some(request) = &self.requests[slot as usize] {
                (*head, *head_len, *payload_len) = (request.head, request.head_len, request.payload_len);
            }
            return Ok(if going { Prepared::Submit } else { Prepared::Reply(0) });
        }
        let time = session.host_id;
        if time == 0 {
            return Ok(Prepared::Submit);
        }
        let again = request.replay;
        if !again && session.cache.translate(time, &mut head[..*head_len]) {
            return Ok(Prepared::Submit);
        }
        for _ in 0..MAX_STEPS {
            let Some(request) = &self.requests[slot as usize] else { return Ok(Prepared::Submit) };
            *head = request.head;
            let Some(session) = &mut self.session else { return Ok(Prepared::Submit) };
            let needed = session.reconnect.tables.read().translate(&mut head[..*head_len]);
            let failed = match needed {
                None if again => return self.check_replay(slot, head),
                None => {
                    session.cache.note(time, &request.head, &head[..]);
                    return Ok(Prepared::Submit);
                }
                Some(Prerequisite::Lookup(missing)) => self.resolve(slot, missing)?,
                Some(handle) => self.reopen(slot, handle)?,
            };
            if let Some(error) = failed {
                tracing::debug!("{}: {}", opcode_name(request_opcode(head)), std::io::Error::from_raw_os_error(-error));
                // If the host has died, try again on the next one: it may have the file.
                return if self.host_is_there() { Ok(Prepared::Reply(error)) } else { Err(Error::HostGone) };
            }
        }
        Ok(Prepared::Reply(-libc::EIO))
    }

    fn tables<T>(&self, work: impl FnOnce(&mut Translator) -> T) -> T {
        let session = self.session.as_ref().expect("only with one");
        work(&mut session.reconnect.tables.write())
    }

    /// Returns `true` if the host has not hung up.
    fn host_is_there(&self) -> bool {
        let mut fds = [PollFd::new(self.transport.hangup_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|events| events == 0)
    }

    /// Looks up an inode by one of its names. Returns `None` if the name has led to the inode, or to another file or
    /// none. Returns the error (a negative errno) for the request that needs the inode if no name is left or the LOOKUP
    /// failed.
    fn resolve(&mut self, slot: u32, missing: Unresolved) -> Result<Option<i32>, Error> {
        let Unresolved::Lookup { parent, child, name } = missing else { return Ok(Some(-libc::ESTALE)) };
        let found = match self.look_up(slot, parent, &name)? {
            Ok(found) => found,
            Err(error) => return Ok(Some(error)),
        };
        let is_it = self.tables(|tables| tables.nodes.resolved(child, &name, found.as_ref()));
        if !is_it {
            tracing::debug!("{} is gone, or another file", String::from_utf8_lossy(&name));
        }
        if let Some(other) = found.filter(|_| !is_it) {
            self.forget_unused(slot, other.node)?;
        }
        Ok(None)
    }

    /// Looks up `name` in the host's directory `parent`. The inner result is the entry, `None` if there is none, or the
    /// host's error (a negative errno).
    fn look_up(&mut self, slot: u32, parent: u64, name: &[u8]) -> Result<Result<Option<Entry>, i32>, Error> {
        let (error, reply) = self.call(slot, LOOKUP, parent, &[], name)?;
        Ok(match -error {
            0 => Ok(Entry::read(&reply)),
            libc::ENOENT | libc::ENOTDIR | libc::ESTALE | libc::ELOOP => Ok(None),
            _ => Err(error),
        })
    }

    /// Undoes one lookup of the host's inode `node`: sends FORGET, unless the table tracks the inode and counts the
    /// lookup.
    fn forget_unused(&mut self, slot: u32, node: u64) -> Result<(), Error> {
        if !self.tables(|tables| tables.nodes.count_lookup(node)) {
            self.call(slot, FORGET, node, &1u64.to_ne_bytes(), &[])?;
        }
        Ok(())
    }

    /// Opens a file on this host for a handle that the kernel has. Returns `None` if the host has opened it; otherwise
    /// the error (a negative errno) for the request that needs the handle.
    fn reopen(&mut self, slot: u32, needed: Prerequisite) -> Result<Option<i32>, Error> {
        let Prerequisite::Open { node, handle, host, flags, is_dir, opener } = needed else { return Ok(None) };
        let ours = self.requests[slot as usize].as_ref().map(|request| request.head);
        if let Some(request) = &mut self.requests[slot as usize] {
            request.head[24..36].copy_from_slice(&opener);
        }
        let open = if is_dir { OPENDIR } else { OPEN };
        let opened = self.call(slot, open, host, &u64::from(flags).to_ne_bytes(), &[]);
        if let (Some(request), Some(head)) = (&mut self.requests[slot as usize], ours) {
            request.head = head;
        }
        let (error, reply) = opened?;
        let number = match -error {
            0 if reply.len() >= message::OPENED => u64_at(&reply, 0),
            // This host wants no file opened.
            libc::ENOSYS => NO_HANDLE,
            libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EINTR => return Ok(Some(error)),
            _ => {
                tracing::debug!("a file cannot be opened again: {}", std::io::Error::from_raw_os_error(-error));
                return Ok(Some(-libc::ESTALE));
            }
        };
        let is_new = self.tables(|tables| tables.reopened(node, handle, number));
        if !is_new && number != NO_HANDLE {
            let mut body = [0; 24];
            put_u64(&mut body, 0, number);
            self.call(slot, if is_dir { RELEASEDIR } else { RELEASE }, host, &body, &[])?;
        }
        Ok(None)
    }

    /// Decides whether a request that a dead host had may be sent to this one. `head` has this host's numbers.
    fn check_replay(&mut self, slot: u32, head: &[u8]) -> Result<Prepared, Error> {
        let (Some(session), Some(request)) = (&self.session, &self.requests[slot as usize]) else {
            return Ok(Prepared::Submit);
        };
        let (host, theirs) = (u64_at(head, NODE), u64_at(&request.head, NODE));
        let names = session.names(slot, request);
        let name = message::next_name(&names).map_or(&[][..], |(name, _)| name);
        let not_done = match replay::rule_for(&request.head) {
            ReplayRule::Safe => true,
            ReplayRule::Skip => return Ok(Prepared::Reply(0)),
            ReplayRule::Unsafe => false,
            ReplayRule::IfSizeAtMost(offset) => {
                let (error, reply) = self.call(slot, GETATTR, host, &[0; 16], &[])?;
                // `fuse_attr_out`: the size follows the inode number.
                error == 0 && reply.len() >= 104 && u64_at(&reply, 24) <= offset
            }
            how => {
                let Ok(found) = self.look_up(slot, host, name)? else { return Ok(Prepared::Reply(-libc::EIO)) };
                if let Some(found) = found {
                    self.forget_unused(slot, found.node)?;
                }
                let nodes = |tables: &mut Translator| {
                    tables.nodes.child(theirs, name).and_then(|child| tables.nodes.identity(child))
                };
                match how {
                    ReplayRule::IfAbsent => found.is_none(),
                    _ => found.is_some() && found.map(|entry| entry.identity) == self.tables(nodes),
                }
            }
        };
        if not_done {
            return Ok(Prepared::Submit);
        }
        if let Some(request) = &self.requests[slot as usize] {
            if matches!(request.opcode, RENAME | RENAME2) {
                self.tables(|tables| tables.maybe_renamed(&request.head, &names));
            }
            tracing::info!(
                "{}: the host that had it is gone, and nobody can tell whether it was done",
                opcode_name(request.opcode)
            );
        }
        Ok(Prepared::Reply(-libc::EIO))
    }

    /// Sends the host a request of the guest's own, in a slot whose request has not been sent. Saves and restores the
    /// slot's content. Returns the error (0 or a negative errno) and the reply.
    fn call(&mut self, slot: u32, opcode: u32, node: u64, body: &[u8], name: &[u8]) -> Result<(i32, Vec<u8>), Error> {
        let payload = if name.is_empty() { Vec::new() } else { [name, &[0]].concat() };
        let head = self.own_head(slot, opcode, node, body, payload.len());
        let (at, size) = self.transport.slot(slot);
        let mut before = [0; SAVED_BYTES];
        let kept = SAVED_BYTES.min(size);
        assert!(payload.len() <= kept);
        // SAFETY: the slot is ours, and that large.
        unsafe {
            std::ptr::copy_nonoverlapping(at, before.as_mut_ptr(), kept);
            std::ptr::copy_nonoverlapping(payload.as_ptr(), at, payload.len());
        }
        let done = self.wait_for(slot, &head, payload.len() as u32);
        let result = done.map(|done| (done.error().clamp(-511, 0), reply_bytes(&*self.transport, &done)));
        // SAFETY: the host has returned the slot, or has died.
        unsafe { std::ptr::copy_nonoverlapping(before.as_ptr(), at, kept) };
        result
    }

    /// Submits a request of the guest's own and waits for its completion. Other completions go to `stash`.
    pub(super) fn wait_for(&mut self, slot: u32, head: &[u8], payload_len: u32) -> Result<Completion, Error> {
        let mut sent = false;
        loop {
            if !sent {
                sent = self.transport.submit(slot, head, payload_len, SAVED_BYTES as u32)?;
            }
            match self.transport.reap()? {
                Some(done) if done.slot == slot => return Ok(done),
                Some(other) => self.stash.push_back(other),
                None if sent || self.requests.iter().flatten().any(|request| request.sent) => self.wait_a_while()?,
                None => return Err(Error::Protocol("no room in an idle queue")),
            }
        }
    }

    /// Waits for the host, for at most 500 ms. [`Error::HostGone`] if no other host will come.
    fn wait_a_while(&mut self) -> Result<(), Error> {
        match self.transport.wait_within(PollTimeout::from(500u16)) {
            Err(Error::HostSilent) => match &self.session {
                Some(session) if session.reconnect.handover.is_closed() => Err(Error::HostGone),
                _ => Ok(()),
            },
            result => result,
        }
    }

    /// Records a reply in the tables, and replaces the host's numbers in it with the kernel's.
    pub(super) fn translate_reply(&mut self, completion: &mut Completion, error: i32) -> Result<(), Error> {
        let slot = completion.slot;
        let (Some(session), Some(request)) = (&self.session, &self.requests[slot as usize]) else { return Ok(()) };
        let brings = matches!(
            request.opcode,
            LOOKUP | MKNOD | MKDIR | SYMLINK | LINK | CREATE | TMPFILE | OPEN | OPENDIR | READDIRPLUS
        );
        let moves = matches!(request.opcode, UNLINK | RMDIR | RENAME | RENAME2);
        let absent = request.opcode == LOOKUP && error == -libc::ENOENT;
        if !(error == 0 && (brings || moves)) && !absent {
            return Ok(());
        }
        let (time, draining) = (session.host_id, session.draining);
        let (head, names) = (request.head, session.names(slot, request));
        if absent {
            self.tables(|tables| tables.record_enoent(&head, &names));
            return Ok(());
        }
        let mut reply = if brings { reply_bytes(&*self.transport, completion) } else { Vec::new() };
        if time > 0 && !draining {
            self.resolve_aliases(slot, &head, &reply)?;
        }
        self.tables(|tables| tables.reply(&head, &names, &mut reply));
        if time > 0 && brings {
            write_reply(&*self.transport, completion, &reply);
        }
        Ok(())
    }

    /// Resolves inodes that may be the file of an entry with several links: the kernel may have it by another name.
    fn resolve_aliases(&mut self, slot: u32, head: &[u8], reply: &[u8]) -> Result<(), Error> {
        let entries: Vec<_> = match request_opcode(head) {
            LOOKUP => Entry::read(reply).into_iter().collect(),
            READDIRPLUS => message::direntplus_entries(reply).into_iter().map(|(_, entry, _)| entry).collect(),
            _ => return Ok(()),
        };
        for entry in entries.iter().filter(|entry| entry.links > 1) {
            let Some(alias) = self.tables(|tables| tables.nodes.alias(entry)) else { continue };
            for _ in 0..MAX_STEPS {
                let Err(missing) = self.tables(|tables| tables.nodes.translate(alias)) else { break };
                if self.resolve(slot, missing)?.is_some() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Returns the first bytes of a request of the guest's own, with the credentials of the caller of the request in
    /// `slot`.
    pub(super) fn own_head(&self, slot: u32, opcode: u32, node: u64, body: &[u8], payload: usize) -> Vec<u8> {
        let asker = self.requests[slot as usize].as_ref().map_or([0; SQE_INLINE_BYTES], |request| request.head);
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
