//! The inodes that the kernel has, kept for the next host: each inode's names and identity. The kernel's nodeids are
//! the first host's. The guest finds a later host's nodeid of a file when the kernel uses the file.

use crate::fuse::message::{Entry, Identity, ROOT};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// Most names that one search for a path to the root visits. A path has at most 4096 bytes, so 2048 names. The limit
/// bounds how long a hostile host's web of directories can hold the lock.
const MAX_LOOKS: usize = 8192;
/// Most nodeids that are kept per inode number of a file with several links. An honest host gives out one.
const MAX_ALIASES: usize = 16;
/// Most names that are kept of a file with several links, to bound memory.
const MAX_NAMES: usize = 16;

/// A host's nodeid, and how many lookups of it the host has counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostInode {
    pub node: u64,
    pub lookups: u64,
}

type Name = Arc<[u8]>;

#[derive(Debug)]
struct Inode {
    identity: Identity,
    links: u32,
    /// Directory and name, the newest at the end. Empty: deleted, or never had a name.
    names: Vec<(u64, Name)>,
    children: HashMap<Name, u64>,
    /// The kernel's lookup count.
    lookups: u64,
    /// Number of open handles.
    handles: u64,
    /// Id of a host, and that host's nodeid.
    known: Option<(u64, HostInode)>,
    /// Id of a host, and the number of names, from the newest on, that did not lead to the file on that host.
    tried_names: (u64, usize),
}

/// Why an inode has no nodeid of the current host yet.
#[derive(Debug, PartialEq, Eq)]
pub enum Unresolved {
    /// The guest must look up `name` in the host's directory `parent`: it may be `child`.
    Lookup { parent: u64, child: u64, name: Name },
    /// The file is gone: no name is left to try.
    Stale,
}

/// All inodes, by the kernel's nodeids. While the first host lives these are its nodeids; for inodes of a later host
/// the guest makes them up.
#[derive(Debug, Default)]
pub struct InodeTable {
    host_id: u64,
    all: HashMap<u64, Inode>,
    /// From the nodeids of the current host to the kernel's; empty for the first host.
    of_host: HashMap<u64, u64>,
    /// From an inode number to the nodeids of files that were seen with several links.
    linked: HashMap<u64, Vec<u64>>,
    /// Whether the current host shares another root directory.
    root_changed: bool,
    /// Number of nodeids that the guest has made up.
    next: u64,
    /// Lookups of inodes that are not needed any more, for the next FORGET to the host.
    owed: Vec<HostInode>,
}

impl InodeTable {
    /// Starts with the next host; `same_root` says whether it shares the same root directory.
    pub fn next_host(&mut self, same_root: bool) {
        self.host_id += 1;
        self.of_host.clear();
        self.owed.clear();
        self.root_changed = !same_root;
    }

    pub fn host_id(&self) -> u64 {
        self.host_id
    }

    /// Returns the host's nodeid for the kernel's `node`, or why there is none yet.
    pub fn translate(&self, node: u64) -> Result<u64, Unresolved> {
        if self.host_id == 0 || node == 0 {
            return Ok(node);
        }
        self.live(node).ok_or_else(|| self.missing(node))
    }

    /// Returns the current host's nodeid for `node`; `None` if it is not known.
    fn live(&self, node: u64) -> Option<u64> {
        if node == ROOT {
            return (!self.root_changed).then_some(ROOT);
        }
        self.all.get(&node)?.known(self.host_id).map(|known| known.node)
    }

    /// Returns the first name to look up on the path to `child`: one of its own, or of a directory above it. Newer
    /// names come first. Visits each inode once, so that a cycle of parents ends.
    fn missing(&self, child: u64) -> Unresolved {
        let mut visited = HashSet::from([child]);
        let mut path = vec![(child, self.untried(child))];
        let mut looks = 0;
        while let Some((child, names)) = path.last_mut() {
            let Some((parent, name)) = names.next() else {
                path.pop();
                continue;
            };
            if let Some(parent) = self.live(*parent) {
                return Unresolved::Lookup { parent, child: *child, name: name.clone() };
            }
            looks += 1;
            if looks == MAX_LOOKS {
                break;
            }
            if visited.insert(*parent) {
                path.push((*parent, self.untried(*parent)));
            }
        }
        Unresolved::Stale
    }

    /// Returns the names of an inode that were not tried on the current host, from the newest on.
    fn untried(&self, node: u64) -> impl Iterator<Item = &(u64, Name)> {
        let node = self.all.get(&node);
        let tried_names = node.map_or(0, |n| if n.tried_names.0 == self.host_id { n.tried_names.1 } else { 0 });
        node.into_iter().flat_map(|n| n.names.iter().rev()).skip(tried_names)
    }

    /// Records the host's reply to a lookup of one of `child`'s names; `entry` is `None` if the name does not exist.
    /// Returns `true` if the entry is that file. If `false`, the caller must forget the entry's nodeid.
    pub fn resolved(&mut self, child: u64, name: &[u8], entry: Option<&Entry>) -> bool {
        let time = self.host_id;
        let Some(node) = self.all.get_mut(&child) else { return false };
        let Some(entry) = entry.filter(|e| e.identity == node.identity && e.node != ROOT) else {
            let tried_names = if node.tried_names.0 == time { node.tried_names.1 } else { 0 };
            // Another queue may have asked for the same name.
            if node.names.iter().rev().nth(tried_names).is_some_and(|(_, n)| **n == *name) {
                node.tried_names = (time, tried_names + 1);
            }
            return false;
        };
        node.count(time, entry.node) && {
            self.of_host.entry(entry.node).or_insert(child);
            true
        }
    }

    /// Counts a lookup of the guest's own, not the kernel's. Returns `false` for an inode that is not in the table: the
    /// caller must send FORGET.
    pub fn count_lookup(&mut self, host: u64) -> bool {
        let time = self.host_id;
        let node = self.of_host.get(&host).and_then(|node| self.all.get_mut(node));
        node.is_some_and(|node| node.count(time, host))
    }

    /// Returns an inode that may be the entry's file by another name, and that has no nodeid of this host yet. The
    /// caller resolves it before [`Self::insert`]. `None` if there is no such inode.
    pub fn alias(&self, entry: &Entry) -> Option<u64> {
        if self.host_id == 0 || self.of_host.contains_key(&entry.node) {
            return None;
        }
        let like = |node: &&u64| {
            let found = self.all.get(*node).filter(|n| n.identity == entry.identity);
            found.is_some_and(|n| n.known(self.host_id).is_none()) && self.missing(**node) != Unresolved::Stale
        };
        self.linked.get(&entry.identity.ino)?.iter().find(like).copied()
    }

    /// Adds an entry of `parent` that a reply is about to give the kernel, or counts it. Returns the kernel's nodeid.
    pub fn insert(&mut self, parent: u64, name: Option<&[u8]>, entry: &Entry) -> u64 {
        if entry.node == ROOT {
            return ROOT;
        }
        let number = if self.host_id == 0 { entry.node } else { self.number(parent, name, entry) };
        let time = self.host_id;
        let node = self.all.entry(number).or_insert_with(|| Inode::new(entry));
        if node.identity != entry.identity {
            // The host has reused the nodeid for another file.
            node.identity = entry.identity;
            node.names.clear();
        }
        node.lookups += 1;
        node.links = entry.links;
        if time > 0 && node.count(time, entry.node) {
            self.of_host.entry(entry.node).or_insert(number);
        }
        let is_dir = entry.identity.kind == libc::S_IFDIR;
        if entry.links > 1 && !is_dir {
            let alias = self.linked.entry(entry.identity.ino).or_default();
            if alias.len() < MAX_ALIASES && !alias.contains(&number) {
                alias.push(number);
            }
        }
        if let Some(name) = name {
            let only = is_dir || entry.links < 2;
            self.link(number, parent, name, only);
        }
        number
    }

    /// Returns the kernel's nodeid for an entry of a later host: the nodeid of a known inode, or a new one.
    fn number(&mut self, parent: u64, name: Option<&[u8]>, entry: &Entry) -> u64 {
        let is = |number: &u64| self.all.get(number).is_some_and(|node| node.identity == entry.identity);
        if let Some(&number) = self.of_host.get(&entry.node).filter(|n| is(n)) {
            return number;
        }
        let same_name = name.and_then(|name| self.all.get(&parent)?.children.get(name)).filter(|n| is(n));
        if let Some(&number) = same_name.filter(|n| self.all[n].known(self.host_id).is_none()) {
            return number;
        }
        loop {
            // A range that no host uses for its own nodeids.
            self.next += 1;
            let number = 1 << 62 | self.next;
            if !self.all.contains_key(&number) {
                return number;
            }
        }
    }

    /// Records a name of an inode: its only name if `only`, otherwise one more.
    fn link(&mut self, number: u64, parent: u64, name: &[u8], only: bool) {
        let holds_name = |nodes: &Self, number: &u64| nodes.all.get(number).map(|n| n.identity);
        let directory = self.all.entry(parent).or_insert_with(Inode::unknown);
        let name: Name = match directory.children.get_key_value(name) {
            Some((name, _)) => name.clone(),
            None => name.into(),
        };
        let before = directory.children.insert(name.clone(), number);
        if let Some(before) = before.filter(|&before| before != number) {
            // An older nodeid of the same file keeps the name. The kernel may have forgotten it, but not the inodes
            // below it, which need the name for their path.
            if holds_name(self, &before) != holds_name(self, &number) {
                self.unlink(before, parent, &name);
            }
        }
        let Some(node) = self.all.get_mut(&number) else { return };
        let known = node.names.iter().position(|(p, n)| *p == parent && *n == name);
        if known.is_some_and(|at| at + 1 == node.names.len()) && !(only && node.names.len() > 1) {
            return;
        }
        let mut gone = if only || node.names.len() >= MAX_NAMES { std::mem::take(&mut node.names) } else { Vec::new() };
        node.names.retain(|(p, n)| *p != parent || *n != name);
        gone.retain(|(p, n)| *p != parent || *n != name);
        node.names.push((parent, name));
        node.tried_names.1 = 0;
        for (parent, name) in gone {
            self.forget_child(parent, &name, number);
        }
    }

    /// Removes a name from an inode, but not from the directory.
    fn unlink(&mut self, number: u64, parent: u64, name: &[u8]) {
        if let Some(node) = self.all.get_mut(&number) {
            node.names.retain(|(p, n)| *p != parent || **n != *name);
            node.tried_names.1 = 0;
        }
    }

    /// Removes a name from a directory, if it still stands for the inode `number`.
    fn forget_child(&mut self, parent: u64, name: &[u8], number: u64) {
        if let Some(directory) = self.all.get_mut(&parent) {
            if directory.children.get(name) == Some(&number) {
                directory.children.remove(name);
            }
        }
        self.drop_unused(parent);
    }

    /// Records that a name does not exist any more.
    pub fn removed(&mut self, parent: u64, name: &[u8]) {
        let child = self.all.get_mut(&parent).and_then(|directory| directory.children.remove(name));
        if let Some(child) = child {
            self.unlink(child, parent, name);
            self.drop_unused(child);
        }
    }

    /// Records a rename.
    pub fn renamed(&mut self, from: (u64, &[u8]), to: (u64, &[u8]), exchange: bool) {
        let (moved, other) = (self.child(from.0, from.1), self.child(to.0, to.1));
        if moved.is_some() && moved == other {
            return;
        }
        self.removed(to.0, to.1);
        self.removed(from.0, from.1);
        if let Some(moved) = moved {
            self.link(moved, to.0, to.1, false);
        }
        if let Some(other) = other.filter(|_| exchange) {
            self.link(other, from.0, from.1, false);
        }
    }

    /// Records a rename that may have been carried out: the inode keeps its old name and gets the new one.
    pub fn maybe_renamed(&mut self, from: (u64, &[u8]), to: (u64, &[u8])) {
        let node = self.child(from.0, from.1).and_then(|moved| self.all.get_mut(&moved));
        if let Some(node) = node.filter(|node| node.names.len() < MAX_NAMES) {
            node.names.push((to.0, to.1.into()));
            node.tried_names.1 = 0;
        }
    }

    /// Returns the inode of a name, as far as the table knows.
    pub fn child(&self, parent: u64, name: &[u8]) -> Option<u64> {
        self.all.get(&parent)?.children.get(name).copied()
    }

    /// Returns the identity of an inode in the table.
    pub fn identity(&self, node: u64) -> Option<Identity> {
        Some(self.all.get(&node)?.identity)
    }

    /// Applies a FORGET of `count` lookups by the kernel. Returns the lookups that the host must forget, if any. For
    /// the first host these are the same. For a later host they are all its lookups, once the kernel has forgotten all
    /// of its.
    pub fn forget(&mut self, number: u64, count: u64) -> Option<HostInode> {
        let time = self.host_id;
        let Some(node) = self.all.get_mut(&number).filter(|_| number != ROOT) else {
            return (time == 0).then_some(HostInode { node: number, lookups: count });
        };
        node.lookups = node.lookups.saturating_sub(count);
        if time == 0 {
            self.drop_unused(number);
            return Some(HostInode { node: number, lookups: count });
        }
        let known = node.known(time).filter(|_| node.lookups == 0);
        if let Some(known) = known {
            node.known = None;
            if self.of_host.get(&known.node) == Some(&number) {
                self.of_host.remove(&known.node);
            }
        }
        self.drop_unused(number);
        known
    }

    /// Takes the lookups that the host must forget besides: of inodes that are not in the table any more.
    pub fn pending_forgets(&mut self) -> Vec<HostInode> {
        std::mem::take(&mut self.owed)
    }

    /// Returns the kernel's nodeid for a nodeid of the current host; `None` if the kernel cannot have it.
    pub fn of_host(&self, host: u64) -> Option<u64> {
        match (host, self.host_id) {
            (0, _) => None,
            (ROOT, _) => (!self.root_changed).then_some(ROOT),
            (_, 0) => Some(host),
            _ => self.of_host.get(&host).copied(),
        }
    }

    /// Returns `true` if the kernel holds a lookup of the inode (the root always), `false` if it has forgotten it.
    pub fn is_looked_up(&self, number: u64) -> bool {
        number == ROOT || self.all.get(&number).is_some_and(|node| node.lookups > 0)
    }

    /// Returns all inodes that the kernel may have, and for each whether it is a directory.
    pub fn all(&self) -> impl Iterator<Item = (u64, bool)> + '_ {
        let others = self.all.iter().filter(|(number, _)| **number != ROOT);
        std::iter::once((ROOT, true)).chain(others.map(|(n, node)| (*n, node.identity.kind == libc::S_IFDIR)))
    }

    /// Returns the names in a directory that the kernel may have, with their inodes.
    pub fn children(&self, directory: u64) -> impl Iterator<Item = (&[u8], u64)> {
        let children = self.all.get(&directory).into_iter().flat_map(|node| &node.children);
        children.map(|(name, node)| (&**name, *node))
    }

    /// Counts an open handle of the inode.
    pub fn opened(&mut self, number: u64) {
        if let Some(node) = self.all.get_mut(&number) {
            node.handles += 1;
        }
    }

    /// Undoes one [`Self::opened`].
    pub fn closed(&mut self, number: u64) {
        if let Some(node) = self.all.get_mut(&number) {
            node.handles = node.handles.saturating_sub(1);
            self.drop_unused(number);
        }
    }

    /// Drops an inode without lookups, handles and children, and then its parents if they are unused too.
    fn drop_unused(&mut self, number: u64) {
        let mut left = vec![number];
        while let Some(number) = left.pop() {
            let unused = |n: &Inode| n.lookups == 0 && n.handles == 0 && n.children.is_empty();
            if number == ROOT || !self.all.get(&number).is_some_and(unused) {
                continue;
            }
            let Some(node) = self.all.remove(&number) else { continue };
            if let Some(known) = node.known(self.host_id) {
                self.owed.push(known);
                if self.of_host.get(&known.node) == Some(&number) {
                    self.of_host.remove(&known.node);
                }
            }
            if let Some(alias) = self.linked.get_mut(&node.identity.ino) {
                alias.retain(|&n| n != number);
                if alias.is_empty() {
                    self.linked.remove(&node.identity.ino);
                }
            }
            for (parent, name) in node.names {
                let directory = self.all.get_mut(&parent);
                if let Some(directory) = directory.filter(|d| d.children.get(&name) == Some(&number)) {
                    directory.children.remove(&name);
                    left.push(parent);
                }
            }
        }
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.all.len()
    }
}

impl Inode {
    fn new(entry: &Entry) -> Inode {
        Inode {
            identity: entry.identity,
            links: entry.links,
            names: Vec::new(),
            children: HashMap::new(),
            lookups: 0,
            handles: 0,
            known: None,
            tried_names: (0, 0),
        }
    }

    /// Makes a directory that no entry described: the root, or a parent that a hostile host made up.
    fn unknown() -> Inode {
        let identity = Identity { ino: 0, kind: libc::S_IFDIR, rdev: 0 };
        Inode::new(&Entry { node: 0, identity, links: 1 })
    }

    fn known(&self, time: u64) -> Option<HostInode> {
        self.known.filter(|(when, _)| *when == time).map(|(_, known)| known)
    }

    /// Counts a lookup of this inode by its nodeid on the host `time`. Returns `false`, and counts nothing, if that
    /// host has another nodeid for it.
    fn count(&mut self, time: u64, host: u64) -> bool {
        let mut known = self.known(time).unwrap_or(HostInode { node: host, lookups: 0 });
        known.lookups += 1;
        if known.node != host {
            return false;
        }
        self.known = Some((time, known));
        true
    }
}

#[cfg(test)]
#[path = "inodes_hostile.rs"]
mod hostile;

#[cfg(test)]
#[path = "inodes_tests.rs"]
mod tests;
