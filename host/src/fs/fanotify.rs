//! fanotify(7), as it is to be had without privileges: marks on inodes, and what they report.

use super::sys::check;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// How a group is made: events without descriptors, with handles and names.
pub const GROUP_FLAGS: u32 = libc::FAN_CLASS_NOTIF
    | libc::FAN_REPORT_DFID_NAME
    | libc::FAN_REPORT_FID
    | libc::FAN_REPORT_TARGET_FID
    | libc::FAN_CLOEXEC
    | libc::FAN_NONBLOCK;
/// What is reported of a file.
const FILE_MASK: u64 = libc::FAN_ATTRIB | libc::FAN_MODIFY | libc::FAN_CLOSE_WRITE;
/// What is reported of a directory and of what is in it.
const DIR_MASK: u64 =
    FILE_MASK | libc::FAN_CREATE | libc::FAN_DELETE | libc::FAN_RENAME | libc::FAN_ONDIR | libc::FAN_EVENT_ON_CHILD;
/// Bytes of `struct fanotify_event_metadata`, of an information record's header, and of a file system's number.
const METADATA: usize = 24;
const INFO: usize = 4;
const FSID: usize = 8;
/// Bytes of `struct file_handle` before the handle.
const HANDLE: usize = 8;

/// An inode, as an event names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object<'a> {
    /// The file system (`f_fsid` of statfs(2)).
    pub fsid: [u8; FSID],
    kind: i32,
    bytes: &'a [u8],
}

impl Object<'_> {
    /// The inode's number, which the handles of tmpfs, ext4, XFS and Btrfs begin with.
    pub fn ino(&self) -> Option<u64> {
        handle_ino(self.kind, self.bytes)
    }
}

/// The inode's number in a file handle, if the handle is of a kind that is known (linux/exportfs.h, fs/xfs/xfs_export.h).
pub fn handle_ino(kind: i32, bytes: &[u8]) -> Option<u64> {
    let half = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
    let whole = || bytes.get(..8).and_then(|b| b.try_into().ok()).map(u64::from_ne_bytes);
    match (kind, bytes.len()) {
        // FILEID_INO32_GEN: the number, a generation.
        (1, 8) => half(0).map(u64::from),
        // tmpfs: a generation, the number's halves.
        (1, 12) => Some(u64::from(half(4)?) | u64::from(half(8)?) << 32),
        // XFS's with 64 bits, FILEID_BTRFS_WITHOUT_PARENT.
        (0x81 | 0x4d, 12..) => whole(),
        _ => None,
    }
}

/// A name in a directory.
pub type Place<'a> = (Object<'a>, &'a [u8]);

/// One event, perhaps several that the kernel has merged.
#[derive(Clone, Copy, Debug, Default)]
pub struct Event<'a> {
    /// `FAN_CREATE` and the like.
    pub mask: u64,
    /// Whose change it was; 0 for others, without privileges.
    pub pid: i32,
    /// Where it was.
    pub place: Option<Place<'a>>,
    /// Where a renamed file is now.
    pub new_place: Option<Place<'a>>,
    /// What it happened to.
    pub target: Option<Object<'a>>,
}

/// Splits what was read into events; ends at what it does not understand.
pub fn events(mut bytes: &[u8]) -> impl Iterator<Item = Event<'_>> {
    std::iter::from_fn(move || {
        let len = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        let metadata = usize::from(u16::from_ne_bytes(bytes.get(6..8)?.try_into().ok()?));
        let one = bytes.get(..len).filter(|_| len >= METADATA && metadata >= METADATA)?;
        bytes = &bytes[len..];
        let mut event = Event {
            mask: u64::from_ne_bytes(one[8..16].try_into().ok()?),
            pid: i32::from_ne_bytes(one[20..24].try_into().ok()?),
            ..Event::default()
        };
        let mut records = one.get(metadata..)?;
        while let Some((kind, record)) = next_record(&mut records) {
            match kind {
                libc::FAN_EVENT_INFO_TYPE_FID => event.target = object(record).map(|(object, _)| object),
                libc::FAN_EVENT_INFO_TYPE_DFID
                | libc::FAN_EVENT_INFO_TYPE_DFID_NAME
                | libc::FAN_EVENT_INFO_TYPE_OLD_DFID_NAME => event.place = object(record),
                libc::FAN_EVENT_INFO_TYPE_NEW_DFID_NAME => event.new_place = object(record),
                _ => {}
            }
        }
        Some(event)
    })
}

fn next_record<'a>(records: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let len = usize::from(u16::from_ne_bytes(records.get(2..4)?.try_into().ok()?));
    let (kind, record) = (*records.first()?, records.get(INFO..len)?);
    *records = &records[len..];
    Some((kind, record))
}

/// A handle and the name behind it.
fn object(record: &[u8]) -> Option<Place<'_>> {
    let fsid = record.get(..FSID)?.try_into().ok()?;
    let handle = &record[FSID..];
    let len = u32::from_ne_bytes(handle.get(..4)?.try_into().ok()?) as usize;
    let kind = i32::from_ne_bytes(handle.get(4..HANDLE)?.try_into().ok()?);
    let bytes = handle.get(HANDLE..HANDLE.checked_add(len)?)?;
    let name = CStr::from_bytes_until_nul(&handle[HANDLE + len..]).map_or(&b""[..], CStr::to_bytes);
    Some((Object { fsid, kind, bytes }, name))
}

/// A group of marks and its queue of events.
#[derive(Debug)]
pub struct Group(OwnedFd);

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Group {
    /// A group without marks.
    pub fn new() -> io::Result<Group> {
        // SAFETY: numbers only.
        let fd = check(unsafe { libc::fanotify_init(GROUP_FLAGS, libc::O_RDONLY as u32) })?;
        // SAFETY: it has just been opened, for this owner.
        Ok(Group(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Marks what `name` in `dir` leads to, a directory or not.
    pub fn mark(&self, dir: BorrowedFd<'_>, name: &CStr, is_dir: bool) -> io::Result<()> {
        self.change(libc::FAN_MARK_ADD, dir, name, is_dir)
    }

    /// Takes the mark away.
    pub fn unmark(&self, dir: BorrowedFd<'_>, name: &CStr, is_dir: bool) -> io::Result<()> {
        self.change(libc::FAN_MARK_REMOVE, dir, name, is_dir)
    }

    fn change(&self, flags: u32, dir: BorrowedFd<'_>, name: &CStr, is_dir: bool) -> io::Result<()> {
        let mask = if is_dir { DIR_MASK } else { FILE_MASK };
        // SAFETY: borrowed descriptors and a C string.
        check(unsafe { libc::fanotify_mark(self.0.as_raw_fd(), flags, mask, dir.as_raw_fd(), name.as_ptr()) }).map(drop)
    }

    /// Reads events that have come; `EAGAIN`: none.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: a slice with its length.
        check(unsafe { libc::read(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) }).map(|n| n as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_cut_off_is_an_event() {
        let mut bytes = vec![0; 24 + 4 + 8 + 8 + 8 + 3];
        let len = bytes.len() as u32;
        bytes[..4].copy_from_slice(&len.to_ne_bytes());
        bytes[6..8].copy_from_slice(&24u16.to_ne_bytes());
        bytes[8..16].copy_from_slice(&libc::FAN_CREATE.to_ne_bytes());
        bytes[24] = libc::FAN_EVENT_INFO_TYPE_DFID_NAME;
        bytes[26..28].copy_from_slice(&(len as u16 - 24).to_ne_bytes());
        bytes[36..40].copy_from_slice(&8u32.to_ne_bytes());
        bytes[40..44].copy_from_slice(&1u32.to_ne_bytes());
        bytes[44..48].copy_from_slice(&77u32.to_ne_bytes());
        bytes[52..54].copy_from_slice(b"ab");
        let event = events(&bytes).next().unwrap();
        let (dir, name) = event.place.unwrap();
        assert_eq!((dir.ino(), name, event.mask), (Some(77), &b"ab"[..], libc::FAN_CREATE));
        for cut in 0..bytes.len() {
            assert!(events(&bytes[..cut]).next().is_none());
        }
        // A handle that claims to be longer than its record.
        bytes[36..40].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(events(&bytes).next().unwrap().place.is_none());
    }

    #[test]
    fn numbers_in_handles() {
        assert_eq!(handle_ino(1, &[7, 0, 0, 0, 9, 9, 9, 9]), Some(7));
        assert_eq!(handle_ino(1, &[9, 9, 9, 9, 7, 0, 0, 0, 1, 0, 0, 0]), Some(7 | 1 << 32));
        assert_eq!(handle_ino(0x4d, &[7; 20]), Some(u64::from_ne_bytes([7; 8])));
        assert_eq!((handle_ino(0x81, &[7; 4]), handle_ino(2, &[7; 8]), handle_ino(1, &[])), (None, None, None));
    }
}
