//! Translation of a change record of the host into the cache entries that the kernel must drop.

use super::counters::{ChangeCounters, Key};
use super::notify::Part;
use crate::reconnect::inodes::InodeTable;
use tunnelfs_fuse_abi::changes::{kind, ChangeRecord};

/// What the kernel must drop from its cache. `node` and `parent` are the kernel's nodeids, `host` is the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// A name, or a negative entry.
    Name { parent: u64, name: Vec<u8> },
    /// A part of an inode.
    Inode { node: u64, part: Part },
    /// A part of an inode. The guest then reports to the host that it is dropped.
    Drop { node: u64, host: u64, part: Part },
    /// Nothing: the kernel does not have the inode. The guest still reports it as dropped, as the host waits for that.
    Dropped { host: u64 },
    /// The whole cache.
    Everything,
}

/// Translates records into actions, and notes their names and inodes in the counters.
pub struct Recorder<'a> {
    pub counters: &'a ChangeCounters,
    pub inodes: &'a InodeTable,
    pub actions: &'a mut Vec<Action>,
}

impl Recorder<'_> {
    /// Handles one record, which has the current host's nodeids.
    pub fn record(&mut self, record: &ChangeRecord, name: &[u8], to_name: &[u8]) {
        let node = self.node(record.node);
        match record.kind {
            kind::CREATED | kind::DELETED => {
                self.name(record.parent, name);
                self.inode(node, Part::Attributes);
            }
            kind::RENAMED => {
                self.name(record.parent, name);
                self.name(record.to_parent, to_name);
                self.inode(node, Part::Attributes);
            }
            // Stores through a mapping are told of only when the file is closed.
            kind::MODIFIED | kind::CLOSED => self.inode(node, Part::Data),
            kind::ATTRIBUTES => self.inode(node, Part::Attributes),
            kind::DROP_DATA | kind::CLEAN => self.drop_part(node, record.node, Part::Data),
            kind::EXPIRE => self.drop_part(node, record.node, Part::Attributes),
            kind::OVERFLOW => {
                self.counters.note_everything();
                self.actions.push(Action::Everything);
            }
            kind::UNWATCHED => self.unwatched(node),
            _ => {}
        }
    }

    /// Notes a change of an inode of the host. Returns the kernel's nodeid; `None` if the kernel does not have it.
    fn node(&self, host: u64) -> Option<u64> {
        if host == 0 {
            return None;
        }
        // Also if the kernel does not have it yet: the reply with the inode may be on its way.
        self.counters.note(Key::host_node(host));
        let node = self.inodes.of_host(host)?;
        self.counters.note(Key::node(node));
        Some(node)
    }

    fn inode(&mut self, node: Option<u64>, part: Part) {
        self.actions.extend(node.map(|node| Action::Inode { node, part }));
    }

    /// Drops a part of an inode for a host that waits for it.
    fn drop_part(&mut self, node: Option<u64>, host: u64, part: Part) {
        self.actions.push(node.map_or(Action::Dropped { host }, |node| Action::Drop { node, host, part }));
    }

    /// Drops a name that stands for another file now, the old file's attributes, and the directory's.
    fn name(&mut self, parent: u64, name: &[u8]) {
        let Some(parent) = self.inodes.of_host(parent).filter(|_| !name.is_empty()) else { return };
        self.counters.note(Key::name(parent, name));
        self.counters.note(Key::node(parent));
        let stood_for = self.inodes.child(parent, name);
        stood_for.into_iter().for_each(|node| self.counters.note(Key::node(node)));
        self.actions.push(Action::Name { parent, name: name.into() });
        self.inode(Some(parent), Part::Attributes);
        self.inode(stood_for, Part::Attributes);
    }

    /// Drops everything about a directory that the host no longer watches.
    fn unwatched(&mut self, directory: Option<u64>) {
        let Some(directory) = directory else { return };
        // Replies with its names may be on their way, and these names are unknown.
        self.counters.note_everything();
        for (name, node) in self.inodes.children(directory) {
            self.actions.push(Action::Name { parent: directory, name: name.to_vec() });
            self.actions.push(Action::Inode { node, part: Part::Attributes });
        }
        self.inode(Some(directory), Part::Attributes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::message::{Entry, Identity, ROOT};

    fn entry(node: u64, ino: u64) -> Entry {
        Entry { node, identity: Identity { ino, kind: libc::S_IFREG, rdev: 0 }, links: 1 }
    }

    fn actions(inodes: &InodeTable, counters: &ChangeCounters, record: ChangeRecord, names: [&[u8]; 2]) -> Vec<Action> {
        let mut actions = Vec::new();
        Recorder { counters, inodes, actions: &mut actions }.record(&record, names[0], names[1]);
        actions
    }

    fn name(parent: u64, name: &[u8]) -> Action {
        Action::Name { parent, name: name.into() }
    }

    fn attributes(node: u64) -> Action {
        Action::Inode { node, part: Part::Attributes }
    }

    #[test]
    fn a_name_takes_along_what_it_stood_for() {
        let (mut inodes, counters) = (InodeTable::default(), ChangeCounters::new(1));
        inodes.insert(ROOT, Some(b"a"), &entry(7, 70));
        inodes.insert(ROOT, Some(b"b"), &entry(8, 80));
        let stamp = counters.stamp();
        let record =
            ChangeRecord { kind: kind::RENAMED, parent: ROOT, node: 7, to_parent: ROOT, ..ChangeRecord::default() };
        let got = actions(&inodes, &counters, record, [b"a", b"b"]);
        for wanted in [name(ROOT, b"a"), name(ROOT, b"b"), attributes(ROOT), attributes(7), attributes(8)] {
            assert!(got.contains(&wanted), "{wanted:?} of {got:?}");
        }
        for key in [Key::name(ROOT, b"a"), Key::name(ROOT, b"b"), Key::node(7), Key::node(8), Key::host_node(7)] {
            assert!(counters.changed_since(stamp, key));
        }
    }

    #[test]
    fn a_later_hosts_numbers_are_translated() {
        let (mut inodes, counters) = (InodeTable::default(), ChangeCounters::new(1));
        inodes.insert(ROOT, Some(b"a"), &entry(7, 70));
        inodes.next_host(true);
        let record = |node| ChangeRecord { kind: kind::MODIFIED, node, ..ChangeRecord::default() };
        assert_eq!(actions(&inodes, &counters, record(50), [b"", b""]), []);
        assert!(inodes.resolved(7, b"a", Some(&entry(50, 70))));
        assert_eq!(actions(&inodes, &counters, record(50), [b"", b""]), [Action::Inode { node: 7, part: Part::Data }]);
        // The number that the first host had for it is nobody's now.
        assert_eq!(actions(&inodes, &counters, record(7), [b"", b""]), []);
    }

    #[test]
    fn a_host_that_waits_hears_of_a_file_that_nobody_knows() {
        let (mut inodes, counters) = (InodeTable::default(), ChangeCounters::new(1));
        let record = ChangeRecord { kind: kind::DROP_DATA, node: 9, ..ChangeRecord::default() };
        inodes.next_host(true);
        assert_eq!(actions(&inodes, &counters, record, [b"", b""]), [Action::Dropped { host: 9 }]);
    }

    #[test]
    fn a_host_that_waits_hears_of_what_was_dropped() {
        let (mut inodes, counters) = (InodeTable::default(), ChangeCounters::new(1));
        inodes.insert(ROOT, Some(b"a"), &entry(7, 70));
        for (kind, part) in [(kind::DROP_DATA, Part::Data), (kind::CLEAN, Part::Data), (kind::EXPIRE, Part::Attributes)]
        {
            let stamp = counters.stamp();
            let record = ChangeRecord { kind, node: 7, ..ChangeRecord::default() };
            let dropped = Action::Drop { node: 7, host: 7, part };
            assert_eq!(actions(&inodes, &counters, record, [b"", b""]), [dropped]);
            assert!(counters.changed_since(stamp, Key::node(7)), "replies that are under way must not last");
        }
    }

    #[test]
    fn what_is_not_watched_is_forgotten_with_its_names() {
        let (mut inodes, counters) = (InodeTable::default(), ChangeCounters::new(1));
        inodes.insert(ROOT, Some(b"a"), &entry(7, 70));
        let record = ChangeRecord { kind: kind::UNWATCHED, node: ROOT, ..ChangeRecord::default() };
        assert_eq!(
            actions(&inodes, &counters, record, [b"", b""]),
            [name(ROOT, b"a"), attributes(7), attributes(ROOT)]
        );
    }
}
