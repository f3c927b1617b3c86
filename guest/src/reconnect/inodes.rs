//! What the kernel knows of files, remembered for the next host: each node's
//! names and what it is. The kernel's numbers are the first host's; what a
//! later host calls the same file is found out when it is used.

use crate::fuse::message::{Entry, Identity, ROOT};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// Most names that one search for a way up to the root looks at. A path has at most 4096 bytes, so 2048 names; a
/// hostile host's web of directories must not hold the lock for longer.
const MAX_LOOKS: usize = 8192;
/// Most numbers of one file of many links that are remembered: one, from an honest host.
const MAX_KIN: usize = 16;
/// Most names that are remembered of a file with many links.
const MAX_NAMES: usize = 16;

/// A host's number for a node, and how often it has given it out.
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
    /// Directory and name, the newest at the end; none: deleted, or never had one.
    names: Vec<(u64, Name)>,
    children: HashMap<Name, u64>,
    /// How often the kernel has it.
    lookups: u64,
    handles: u64,
    /// Of the host of this time.
    known: Option<(u64, HostInode)>,
    /// How many names this time's host has not had, from the newest on.
    tried_names: (u64, usize),
}

/// What must be asked of the host before a node can be used.
#[derive(Debug, PartialEq, Eq)]
pub enum Unresolved {
    /// Look `name` up in the host's node `parent`: is it `child`?
    Lookup { parent: u64, child: u64, name: Name },
    /// Nothing: the file is gone.
    Stale,
}

/// All nodes. `time` counts hosts: at time 0 theirs are the kernel's numbers.
#[derive(Debug, Default)]
pub struct InodeTable {
    host_id: u64,
    all: HashMap<u64, Inode>,
    /// The host's numbers to ours, after time 0.
    of_host: HashMap<u64, u64>,
    /// Files that have been seen with several links, by inode number.
    linked: HashMap<u64, Vec<u64>>,
    /// Whether this time's host has the same root.
    root_changed: bool,
    next: u64,
    /// What was looked up on the way to others, and is not needed any more: to be forgotten with the next.
    owed: Vec<HostInode>,
}

impl InodeTable {
    /// Another host, with the same root or not.
    pub fn next_host(&mut self, same_root: bool) {
        self.host_id += 1;
        self.of_host.clear();
        self.owed.clear();
        self.root_changed = !same_root;
    }

    pub fn host_id(&self) -> u64 {
        self.host_id
    }

    /// The host's number for a node, or what must be done for it.
    pub fn translate(&self, node: u64) -> Result<u64, Unresolved> {
        if self.host_id == 0 || node == 0 {
            return Ok(node);
        }
        self.live(node).ok_or_else(|| self.missing(node))
    }

    fn live(&self, node: u64) -> Option<u64> {
        if node == ROOT {
            return (!self.root_changed).then_some(ROOT);
        }
        self.all.get(&node)?.known(self.host_id).map(|known| known.node)
    }

    /// The first name to look up on the way to `child`: of it, or of a directory above it, the newest names first.
    /// Each node is visited once.
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

    /// A node's names that this time's host has not been asked for, from the newest on.
    fn untried(&self, node: u64) -> impl Iterator<Item = &(u64, Name)> {
        let node = self.all.get(&node);
        let tried_names = node.map_or(0, |n| if n.tried_names.0 == self.host_id { n.tried_names.1 } else { 0 });
        node.into_iter().flat_map(|n| n.names.iter().rev()).skip(tried_names)
    }

    /// The host has answered a look-up of one of `child`'s names; whether it is that file. If not, the host's node is
    /// the caller's to forget.
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

    /// The host has given its number out once more, for nobody: whether its node is one that we have, and will forget.
    pub fn count_lookup(&mut self, host: u64) -> bool {
        let time = self.host_id;
        let node = self.of_host.get(&host).and_then(|node| self.all.get_mut(node));
        node.is_some_and(|node| node.count(time, host))
    }

    /// A file that may be the one of this entry, by another name: to be looked up first.
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

    /// The kernel is about to learn of an entry of `parent`: its number for it.
    pub fn insert(&mut self, parent: u64, name: Option<&[u8]>, entry: &Entry) -> u64 {
        if entry.node == ROOT {
            return ROOT;
        }
        let number = if self.host_id == 0 { entry.node } else { self.number(parent, name, entry) };
        let time = self.host_id;
        let node = self.all.entry(number).or_insert_with(|| Inode::new(entry));
        if node.identity != entry.identity {
            // The host has used its number again.
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
            if alias.len() < MAX_KIN && !alias.contains(&number) {
                alias.push(number);
            }
        }
        if let Some(name) = name {
            let only = is_dir || entry.links < 2;
            self.link(number, parent, name, only);
        }
        number
    }

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
            // No host's own numbers start there.
            self.next += 1;
            let number = 1 << 62 | self.next;
            if !self.all.contains_key(&number) {
                return number;
            }
        }
    }

    /// A node has a name; `only` this one, or one more.
    fn link(&mut self, number: u64, parent: u64, name: &[u8], only: bool) {
        let holds_name = |nodes: &Self, number: &u64| nodes.all.get(number).map(|n| n.identity);
        let directory = self.all.entry(parent).or_insert_with(Inode::unknown);
        let name: Name = match directory.children.get_key_value(name) {
            Some((name, _)) => name.clone(),
            None => name.into(),
        };
        let before = directory.children.insert(name.clone(), number);
        if let Some(before) = before.filter(|&before| before != number) {
            // A node that the kernel has forgotten, but not what lies below, keeps its name for that.
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

    /// Takes a name off a node.
    fn unlink(&mut self, number: u64, parent: u64, name: &[u8]) {
        if let Some(node) = self.all.get_mut(&number) {
            node.names.retain(|(p, n)| *p != parent || **n != *name);
            node.tried_names.1 = 0;
        }
    }

    fn forget_child(&mut self, parent: u64, name: &[u8], number: u64) {
        if let Some(directory) = self.all.get_mut(&parent) {
            if directory.children.get(name) == Some(&number) {
                directory.children.remove(name);
            }
        }
        self.drop_unused(parent);
    }

    /// A name is no more.
    pub fn removed(&mut self, parent: u64, name: &[u8]) {
        let child = self.all.get_mut(&parent).and_then(|directory| directory.children.remove(name));
        if let Some(child) = child {
            self.unlink(child, parent, name);
            self.drop_unused(child);
        }
    }

    /// A name has become another one.
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

    /// It may have.
    pub fn maybe_renamed(&mut self, from: (u64, &[u8]), to: (u64, &[u8])) {
        let node = self.child(from.0, from.1).and_then(|moved| self.all.get_mut(&moved));
        if let Some(node) = node.filter(|node| node.names.len() < MAX_NAMES) {
            node.names.push((to.0, to.1.into()));
            node.tried_names.1 = 0;
        }
    }

    /// The node that a name stood for.
    pub fn child(&self, parent: u64, name: &[u8]) -> Option<u64> {
        self.all.get(&parent)?.children.get(name).copied()
    }

    /// What a name stood for.
    pub fn identity(&self, node: u64) -> Option<Identity> {
        Some(self.all.get(&node)?.identity)
    }

    /// The kernel has forgotten a node, so often. What the host is to forget for it: at time 0 what the kernel says.
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

    /// What the host is to forget beside that.
    pub fn pending_forgets(&mut self) -> Vec<HostInode> {
        std::mem::take(&mut self.owed)
    }

    /// The kernel's number for a node of this time's host, if the kernel may have it.
    pub fn of_host(&self, host: u64) -> Option<u64> {
        match (host, self.host_id) {
            (0, _) => None,
            (ROOT, _) => (!self.root_changed).then_some(ROOT),
            (_, 0) => Some(host),
            _ => self.of_host.get(&host).copied(),
        }
    }

    /// Whether the kernel has been given the node, and has not given it back.
    pub fn is_looked_up(&self, number: u64) -> bool {
        number == ROOT || self.all.get(&number).is_some_and(|node| node.lookups > 0)
    }

    /// All nodes that the kernel may have, and whether each is a directory.
    pub fn all(&self) -> impl Iterator<Item = (u64, bool)> + '_ {
        let others = self.all.iter().filter(|(number, _)| **number != ROOT);
        std::iter::once((ROOT, true)).chain(others.map(|(n, node)| (*n, node.identity.kind == libc::S_IFDIR)))
    }

    /// The names in a directory that the kernel may have.
    pub fn children(&self, directory: u64) -> impl Iterator<Item = (&[u8], u64)> {
        let children = self.all.get(&directory).into_iter().flat_map(|node| &node.children);
        children.map(|(name, node)| (&**name, *node))
    }

    /// A handle of the node has been opened, or closed.
    pub fn opened(&mut self, number: u64) {
        if let Some(node) = self.all.get_mut(&number) {
            node.handles += 1;
        }
    }

    pub fn closed(&mut self, number: u64) {
        if let Some(node) = self.all.get_mut(&number) {
            node.handles = node.handles.saturating_sub(1);
            self.drop_unused(number);
        }
    }

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

    /// A directory that nobody has told of: the root, or a hostile host's.
    fn unknown() -> Inode {
        let identity = Identity { ino: 0, kind: libc::S_IFDIR, rdev: 0 };
        Inode::new(&Entry { node: 0, identity, links: 1 })
    }

    fn known(&self, time: u64) -> Option<HostInode> {
        self.known.filter(|(when, _)| *when == time).map(|(_, known)| known)
    }

    /// The host has given its number for this node out once more; `false` when it had another one before.
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
