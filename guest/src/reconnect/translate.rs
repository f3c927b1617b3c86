//! Translation of nodeids and handles: from the kernel's to the host's in requests, and back in replies.

use super::inodes::{HostInode, InodeTable, Unresolved};
use crate::fuse::message::{self, put_u64, request_opcode, u32_at, u64_at, Entry, BODY, ENTRY, NODE, OPENED};
use std::collections::HashMap;
use tunnelfs_fuse_abi::{opcode::*, NO_HANDLE};
use tunnelfs_ring::SQE_INLINE_BYTES;

/// Flags of open(2) that must not take effect again when a file is reopened.
const ONE_SHOT_FLAGS: u32 = (libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_NOCTTY) as u32;
/// `O_TMPFILE` without `O_DIRECTORY`.
const TMPFILE_BIT: u32 = (libc::O_TMPFILE & !libc::O_DIRECTORY) as u32;

/// The caller that opened a file: `uid`, `gid` and `pid` of `fuse_in_header`.
pub type Credentials = [u8; 12];

#[derive(Clone, Copy, Debug)]
struct Handle {
    flags: u32,
    is_dir: bool,
    opener: Credentials,
    /// Number of opens that returned this handle to the kernel.
    count: u32,
    /// Id of a host, and that host's handle.
    known: Option<(u64, u64)>,
}

/// What the guest must do before it can send a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Prerequisite {
    /// Look up an inode.
    Lookup(Unresolved),
    /// Open the host's inode `host`, for the kernel's handle `handle` of `node`.
    Open { node: u64, handle: u64, host: u64, flags: u32, is_dir: bool, opener: Credentials },
}

/// The kernel's inodes and open handles, by the kernel's numbers.
#[derive(Debug, Default)]
pub struct Translator {
    pub nodes: InodeTable,
    /// By nodeid and handle.
    handles: HashMap<(u64, u64), Handle>,
    /// Number of handles that the guest has made up.
    next: u64,
}

impl Translator {
    /// Replaces the kernel's numbers in a request's first bytes with the host's. Returns `None` if it has replaced them
    /// all; otherwise the first thing to do before the next attempt. `head` is then only partly translated.
    pub fn translate(&self, head: &mut [u8]) -> Option<Prerequisite> {
        let opcode = request_opcode(head);
        let mut copy = [0; SQE_INLINE_BYTES];
        let before = &mut copy[..head.len().min(SQE_INLINE_BYTES)];
        before.copy_from_slice(&head[..before.len()]);
        let before = &*before;
        for at in [Some(NODE), message::other_node(opcode)].into_iter().flatten() {
            match self.nodes.translate(u64_at(before, at)) {
                Ok(host) => put_u64(head, at, host),
                Err(missing) => return Some(Prerequisite::Lookup(missing)),
            }
        }
        for &(at, of) in message::handles(opcode, before) {
            let (node, handle) = (u64_at(before, of), u64_at(before, at));
            let Some(open) = self.handles.get(&(node, handle)) else {
                // The kernel has not opened the file: the host has answered ENOSYS to OPEN.
                if handle == 0 || handle == NO_HANDLE {
                    continue;
                }
                return Some(Prerequisite::Lookup(Unresolved::Stale));
            };
            match open.known.filter(|(time, _)| *time == self.nodes.host_id()) {
                Some((_, host)) => put_u64(head, at, host),
                None => {
                    let Handle { flags, is_dir, opener, .. } = *open;
                    return Some(Prerequisite::Open { node, handle, host: u64_at(head, of), flags, is_dir, opener });
                }
            }
        }
        None
    }

    /// Records that the current host has opened `host` for the kernel's handle. Returns `false` if that host has the
    /// handle open already, or if the kernel has closed it: the caller must release `host`.
    pub fn reopened(&mut self, node: u64, handle: u64, host: u64) -> bool {
        let time = self.nodes.host_id();
        match self.handles.get_mut(&(node, handle)) {
            Some(open) if open.known.is_none_or(|(when, _)| when != time) => {
                open.known = Some((time, host));
                true
            }
            _ => false,
        }
    }

    /// Applies a RELEASE or RELEASEDIR. Returns `true` if the host has the handle open, `false` if there is nothing to
    /// release.
    pub fn released(&mut self, head: &[u8]) -> bool {
        let key = (u64_at(head, NODE), u64_at(head, BODY));
        let Some(open) = self.handles.get_mut(&key) else { return self.nodes.host_id() == 0 };
        let held = self.nodes.host_id() == 0 || open.known.is_some_and(|(when, _)| when == self.nodes.host_id());
        open.count -= 1;
        if open.count == 0 {
            self.handles.remove(&key);
            self.nodes.closed(key.0);
        }
        held
    }

    /// Applies a FORGET or BATCH_FORGET; `body` is the request without its header. Returns the lookups that the host
    /// must forget, with the pending ones of the table.
    pub fn forget(&mut self, head: &[u8], body: &[u8]) -> Vec<HostInode> {
        let mut known = self.forget_what_it_says(head, body);
        known.append(&mut self.nodes.pending_forgets());
        known
    }

    fn forget_what_it_says(&mut self, head: &[u8], body: &[u8]) -> Vec<HostInode> {
        if request_opcode(head) == FORGET {
            return self.nodes.forget(u64_at(head, NODE), u64_at(body, 0)).into_iter().collect();
        }
        // `struct fuse_batch_forget_in`, then `count` times `struct fuse_forget_one`, as far as there are bytes.
        let count = u32_at(body, 0) as usize;
        let all = body.get(8..).unwrap_or_default().chunks_exact(16).take(count);
        all.filter_map(|one| self.nodes.forget(u64_at(one, 0), u64_at(one, 8))).collect()
    }

    /// Records a reply, and replaces the host's numbers in it with the kernel's. `names` are the request's bytes from
    /// its first name on.
    pub fn reply(&mut self, head: &[u8], names: &[u8], reply: &mut [u8]) {
        let (opcode, parent) = (request_opcode(head), u64_at(head, NODE));
        match opcode {
            LOOKUP | MKNOD | MKDIR | SYMLINK | LINK | CREATE | TMPFILE => {
                let Some(entry) = Entry::read(reply) else { return };
                let name = message::next_name(names).map(|(name, _)| name).filter(|_| opcode != TMPFILE);
                let node = self.nodes.insert(parent, name, &entry);
                put_u64(reply, 0, node);
                if matches!(opcode, CREATE | TMPFILE) {
                    self.opened(head, node, reply.get_mut(ENTRY..).unwrap_or_default());
                }
            }
            OPEN | OPENDIR => self.opened(head, parent, reply),
            READDIRPLUS => {
                let entries: Vec<_> = message::direntplus_entries(reply)
                    .into_iter()
                    .map(|(at, e, name)| (at, e, name.to_vec()))
                    .collect();
                for (at, entry, name) in entries {
                    put_u64(reply, at, self.nodes.insert(parent, Some(&name), &entry));
                }
            }
            UNLINK | RMDIR => {
                if let Some((name, _)) = message::next_name(names) {
                    self.nodes.removed(parent, name);
                }
            }
            RENAME | RENAME2 => {
                if let Some((from, to, exchange)) = rename(head, names) {
                    self.nodes.renamed((parent, from), (u64_at(head, BODY), to), exchange);
                }
            }
            _ => {}
        }
    }

    /// Records that a LOOKUP has found nothing.
    pub fn record_enoent(&mut self, head: &[u8], names: &[u8]) {
        if let Some((name, _)) = message::next_name(names) {
            self.nodes.removed(u64_at(head, NODE), name);
        }
    }

    /// Records a RENAME or RENAME2 that may have been carried out.
    pub fn maybe_renamed(&mut self, head: &[u8], names: &[u8]) {
        if let Some((from, to, false)) = rename(head, names) {
            self.nodes.maybe_renamed((u64_at(head, NODE), from), (u64_at(head, BODY), to));
        }
    }

    /// Records a `fuse_open_out`, and replaces the host's handle in it. A later host's handle gets a new number, which
    /// no earlier handle had.
    fn opened(&mut self, head: &[u8], node: u64, reply: &mut [u8]) {
        if reply.len() < OPENED {
            return;
        }
        let (host, time) = (u64_at(reply, 0), self.nodes.host_id());
        if host == NO_HANDLE {
            return;
        }
        let mut number = host;
        while time > 0 && (number == host || self.handles.contains_key(&(node, number))) {
            self.next += 1;
            number = 1 << 62 | self.next;
        }
        let opener = head[24..36].try_into().expect("twelve bytes");
        let flags = u32_at(head, BODY);
        let flags = if request_opcode(head) == TMPFILE { flags & !TMPFILE_BIT } else { flags };
        let is_dir = request_opcode(head) == OPENDIR;
        let new = Handle { flags: flags & !ONE_SHOT_FLAGS, is_dir, opener, count: 0, known: None };
        let handle = self.handles.entry((node, number)).or_insert(new);
        if handle.count == 0 {
            self.nodes.opened(node);
        }
        handle.count += 1;
        handle.known = Some((time, host));
        put_u64(reply, 0, number);
    }
}

/// Returns the old and the new name of a rename, and whether it is an exchange; `None` if a name is invalid.
fn rename<'a>(head: &[u8], names: &'a [u8]) -> Option<(&'a [u8], &'a [u8], bool)> {
    let (from, rest) = message::next_name(names)?;
    let (to, _) = message::next_name(rest)?;
    let exchange = request_opcode(head) == RENAME2 && u32_at(head, BODY + 8) & libc::RENAME_EXCHANGE != 0;
    Some((from, to, exchange))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::message::tests::{direntplus, entry};
    use crate::fuse::message::{request, ROOT};

    const FLAGS: u32 = (libc::O_RDWR | libc::O_APPEND) as u32;

    fn open_out(handle: u64) -> Vec<u8> {
        let mut bytes = vec![0; OPENED];
        put_u64(&mut bytes, 0, handle);
        bytes
    }

    fn body(words: &[u64]) -> Vec<u8> {
        words.iter().copied().flat_map(u64::to_ne_bytes).collect()
    }

    fn ask(opcode: u32, node: u64, words: &[u64]) -> Vec<u8> {
        request(opcode, node, 1, &body(words), 0)
    }

    /// Node 2 is `f`, created and open as handle 7; then another host comes.
    fn after_a_host() -> Translator {
        let mut tables = Translator::default();
        let create = ask(CREATE, ROOT, &[u64::from(FLAGS | ONE_SHOT_FLAGS), 0]);
        let mut reply = [entry(2, 20, libc::S_IFREG, 1), open_out(7)].concat();
        let before = reply.clone();
        tables.reply(&create, b"f\0", &mut reply);
        assert_eq!(reply, before, "the first host's numbers are the kernel's");
        tables.nodes.next_host(true);
        tables
    }

    fn find(tables: &mut Translator, host: u64) {
        assert!(tables.nodes.resolved(2, b"f", Entry::read(&entry(host, 20, libc::S_IFREG, 1)).as_ref()));
    }

    #[test]
    fn a_read_waits_for_its_node_and_its_handle() {
        let mut tables = after_a_host();
        let read = ask(READ, 2, &[7, 4096, 0, 0, 0]);
        let mut head = read.clone();
        assert!(matches!(
            tables.translate(&mut head),
            Some(Prerequisite::Lookup(Unresolved::Lookup { parent: ROOT, child: 2, .. }))
        ));
        find(&mut tables, 50);
        let mut head = read.clone();
        let needed = tables.translate(&mut head);
        let Some(Prerequisite::Open { node: 2, handle: 7, host: 50, flags: FLAGS, is_dir: false, .. }) = needed else {
            panic!("{needed:?}");
        };
        assert!(tables.reopened(2, 7, 3));
        assert!(!tables.reopened(2, 7, 4), "another queue was faster");
        let mut head = read.clone();
        assert_eq!(tables.translate(&mut head), None);
        assert_eq!((u64_at(&head, NODE), u64_at(&head, BODY), &head[48..]), (50, 3, &read[48..]));
        assert!(tables.released(&ask(RELEASE, 2, &[7])));
        assert!(!tables.released(&ask(RELEASE, 2, &[7])));
        assert_eq!(tables.translate(&mut read.clone()), Some(Prerequisite::Lookup(Unresolved::Stale)));
    }

    #[test]
    fn what_the_kernel_has_not_opened_needs_no_handle() {
        let mut tables = Translator::default();
        let create = ask(CREATE, ROOT, &[u64::from(FLAGS), 0]);
        let mut reply = [entry(2, 20, libc::S_IFREG, 1), open_out(NO_HANDLE)].concat();
        tables.reply(&create, b"f\0", &mut reply);
        tables.nodes.next_host(true);
        find(&mut tables, 50);
        for handle in [0, NO_HANDLE] {
            let mut read = ask(READ, 2, &[handle, 4096, 0, 0, 0]);
            assert_eq!(tables.translate(&mut read), None);
            assert_eq!((u64_at(&read, NODE), u64_at(&read, BODY)), (50, handle));
        }
        // A later host's handle for what it has opened is the kernel's as any other.
        let mut opened = open_out(0);
        tables.reply(&ask(OPEN, 2, &[u64::from(FLAGS)]), b"", &mut opened);
        let mut read = ask(READ, 2, &[u64_at(&opened, 0), 4096, 0, 0, 0]);
        assert_ne!(u64_at(&read, BODY), 0);
        assert_eq!(tables.translate(&mut read), None);
        assert_eq!(u64_at(&read, BODY), 0);
    }

    #[test]
    fn both_files_of_a_copy_are_found() {
        let mut tables = after_a_host();
        tables.reply(&ask(LOOKUP, ROOT, &[]), b"g\0", &mut entry(9, 90, libc::S_IFREG, 1));
        find(&mut tables, 50);
        tables.reopened(2, 7, 3);
        let new = tables.nodes.child(ROOT, b"g").unwrap();
        let mut reply = open_out(3);
        tables.reply(&ask(OPEN, new, &[u64::from(FLAGS)]), b"", &mut reply);
        let number = u64_at(&reply, 0);
        assert_ne!(number, 3, "no number of the host's own");
        let mut copy = ask(COPY_FILE_RANGE, 2, &[7, 0, new, number, 0, 100, 0]);
        assert_eq!(tables.translate(&mut copy), None);
        assert_eq!([NODE, BODY, BODY + 16, BODY + 24].map(|at| u64_at(&copy, at)), [50, 3, 9, 3]);
    }

    #[test]
    fn a_listing_gets_the_kernels_numbers() {
        let mut tables = after_a_host();
        let mut reply = [direntplus(80, 20, b"f"), direntplus(2, 30, b"new"), direntplus(81, 1, b"..")].concat();
        tables.reply(&ask(READDIRPLUS, ROOT, &[0, 0, 4096]), b"", &mut reply);
        assert_eq!(u64_at(&reply, 0), 2);
        assert!(u64_at(&reply, 160) > 1 << 62);
        assert_eq!(u64_at(&reply, 320), 81, "these are not counted");
    }

    #[test]
    fn whatever_bytes_come() {
        let mut random = 1u64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        for time in 0..3 {
            let mut tables = Translator::default();
            (0..time).for_each(|_| tables.nodes.next_host(true));
            for _ in 0..30_000 {
                let mut reply: Vec<u8> = (0..next() % 400).map(|_| (next() % 3) as u8).collect();
                let names: Vec<u8> = (0..next() % 6).map(|_| b"a\0b./"[next() as usize % 5]).collect();
                let head = ask(next() as u32 % 54, next() % 5, &[next() % 3, next() % 3, next() % 3, next() % 3]);
                tables.reply(&head, &names, &mut reply);
                tables.record_enoent(&head, &names);
                tables.translate(&mut head.clone());
                tables.released(&head);
                tables.forget(&head, &body(&[next() % 4, next() % 4, next() % 4]));
            }
        }
    }
}
