//! How a host tells its guest what has changed in the share, without being asked.
//!
//! The guest sends [`OP_CHANGES`], which has no body, and the host replies as soon as something has changed: a list of
//! records, each a [`ChangeRecord`] and its names. Then the guest sends the next one. So changes wait in the host while
//! the guest is busy, none is lost, and each transport carries them. If more wait than the host keeps, it drops all and
//! sends [`kind::OVERFLOW`]. A host without change events answers ENOSYS.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Opcode of the request that the host answers when something has changed.
pub const OP_CHANGES: u32 = 0x5446_0005;
/// Opcode of the guest's answer to [`kind::DROP_DATA`], [`kind::EXPIRE`] and [`kind::CLEAN`]: the body is the nodeid of each file of which it
/// has dropped what it was told to.
pub const OP_DROPPED: u32 = 0x5446_0006;

/// What happened, in [`ChangeRecord::kind`].
pub mod kind {
    /// `parent` has a new entry `name`, which is `node` if the guest knows it (a link), else 0; `mode` is its type.
    pub const CREATED: u32 = 1;
    /// `name` is gone from `parent`; it was `node`, or 0 if the guest did not know it.
    pub const DELETED: u32 = 2;
    /// `name` of `parent` is now `to_name` of `to_parent`. A directory that the guest does not know is 0.
    pub const RENAMED: u32 = 3;
    /// The data and the size of `node` may be others. Here, and with `ATTRIBUTES` and `CLOSED`, `parent` and `name` say
    /// where that was seen, if the host knows it; `node` is 0 if the guest does not know the file that has this name.
    pub const MODIFIED: u32 = 4;
    /// The attributes of `node` are others: mode, owner, times, number of links, extended attributes.
    pub const ATTRIBUTES: u32 = 5;
    /// `node`, which was open for writing, was closed.
    pub const CLOSED: u32 = 6;
    /// Somebody else is about to change `node`'s data: drop it from the cache, then send [`super::OP_DROPPED`].
    pub const DROP_DATA: u32 = 7;
    /// Changes were lost: forget all that is cached.
    pub const OVERFLOW: u32 = 8;
    /// Names below `node`, a directory, are no longer watched: forget them, and what they lead to.
    pub const UNWATCHED: u32 = 9;
    /// The attributes of `node` must be asked for again; then send [`super::OP_DROPPED`].
    pub const EXPIRE: u32 = 10;
    /// What is cached of `node`'s data may be old: drop it, then send [`super::OP_DROPPED`].
    pub const CLEAN: u32 = 11;
}

/// The fixed part of a record. `name_len` and `to_name_len` bytes of names follow, without a NUL, padded with zeros to a
/// multiple of 8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ChangeRecord {
    /// One of [`kind`].
    pub kind: u32,
    /// `S_IFMT` bits of the entry's mode, if the host knows them.
    pub mode: u32,
    /// Nodeid of the directory that has or had `name`; 0 if there is none.
    pub parent: u64,
    /// Nodeid of what changed; 0 if the guest does not know it.
    pub node: u64,
    /// Nodeid of the directory that `name` was moved to.
    pub to_parent: u64,
    /// Bytes of the first name.
    pub name_len: u32,
    /// Bytes of the second name.
    pub to_name_len: u32,
}

const _: () = assert!(size_of::<ChangeRecord>() == 40);

/// Bytes that a record takes with its names.
fn padded(name: usize, to_name: usize) -> usize {
    (size_of::<ChangeRecord>() + name + to_name).next_multiple_of(8)
}

/// Appends a record and its names, whose lengths it sets; `false`, and nothing is appended, if there would be more than
/// `room` bytes.
pub fn push_record(out: &mut Vec<u8>, room: usize, record: ChangeRecord, name: &[u8], to_name: &[u8]) -> bool {
    let end = out.len() + padded(name.len(), to_name.len());
    if end > room {
        return false;
    }
    let record = ChangeRecord { name_len: name.len() as u32, to_name_len: to_name.len() as u32, ..record };
    out.extend_from_slice(record.as_bytes());
    out.extend_from_slice(name);
    out.extend_from_slice(to_name);
    out.resize(end, 0);
    true
}

/// The records of a reply, each with its two names. Ends at the first that is cut off.
pub struct Records<'a>(pub &'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = (ChangeRecord, &'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (record, rest) = ChangeRecord::read_from_prefix(self.0).ok()?;
        let (name_len, to_name_len) = (record.name_len as usize, record.to_name_len as usize);
        let (name, rest) = rest.split_at_checked(name_len)?;
        let (to_name, _) = rest.split_at_checked(to_name_len)?;
        self.0 = self.0.get(padded(name_len, to_name_len)..).unwrap_or_default();
        Some((record, name, to_name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_out_as_they_went_in() {
        let first = ChangeRecord { kind: kind::RENAMED, parent: 1, node: 7, to_parent: 9, ..ChangeRecord::default() };
        let second = ChangeRecord { kind: kind::MODIFIED, node: 8, ..ChangeRecord::default() };
        let mut bytes = Vec::new();
        assert!(push_record(&mut bytes, 4096, first, b"old", b"newer"));
        assert!(push_record(&mut bytes, 4096, second, b"", b""));
        let whole = bytes.clone();
        assert!(!push_record(&mut bytes, whole.len() + 47, second, b"x", b""), "no part of a record");
        assert_eq!(bytes, whole);
        let got: Vec<_> = Records(&bytes).map(|(r, a, b)| (r.kind, r.parent, r.node, r.to_parent, a, b)).collect();
        let wanted =
            [(kind::RENAMED, 1, 7, 9, &b"old"[..], &b"newer"[..]), (kind::MODIFIED, 0, 8, 0, &b""[..], &b""[..])];
        assert_eq!(got, wanted);
    }

    #[test]
    fn records_that_are_cut_off_are_none() {
        let mut bytes = Vec::new();
        push_record(&mut bytes, 4096, ChangeRecord::default(), b"name", b"other");
        for cut in 0..40 + 9 {
            assert_eq!(Records(&bytes[..cut]).count(), 0, "{cut}");
        }
        for at in [32, 36] {
            let mut long = bytes.clone();
            long[at..at + 4].fill(0xff);
            assert_eq!(Records(&long).count(), 0);
        }
    }
}
