//! The operations, and how they are drawn.

use proptest::prelude::*;

/// One of [`NAMES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name(pub usize);

/// Few, so that operations meet each other. The first is the directory itself.
pub const NAMES: [&str; 14] =
    ["", "a", "b", "c", "d", "d/a", "d/b", "d/c", "e", "e/a", "e/d", "e/d/a", "e/d/b", "a-name-that-is-longer"];

/// Where symbolic links lead.
pub const TARGETS: [&str; 6] = ["a", "d", "../a", "e/d", "nowhere", "c"];

/// One of the users in `world.rs`.
pub type User = usize;

/// One of the open files.
pub type Slot = usize;

#[derive(Clone, Debug)]
pub enum Op {
    Open { user: User, slot: Slot, name: Name, flags: i32, mode: u32 },
    Tmpfile { user: User, slot: Slot, name: Name, mode: u32 },
    Close { slot: Slot },
    Read { slot: Slot, at: i64, len: usize },
    Write { user: User, slot: Slot, at: i64, len: usize, fill: u8 },
    Seek { slot: Slot, at: i64, whence: i32 },
    TruncateOpen { user: User, slot: Slot, len: i64 },
    Fallocate { user: User, slot: Slot, mode: i32, at: i64, len: i64 },
    CopyRange { user: User, from: Slot, to: Slot, at: i64, target: i64, len: usize },
    Sync { slot: Slot },
    StatOpen { slot: Slot },
    LinkOpen { user: User, slot: Slot, name: Name },
    RangeLock { slot: Slot, kind: i32, at: i64, len: i64 },
    FileLock { slot: Slot, kind: i32 },
    InodeFlags { user: User, slot: Slot, flags: i32 },
    WriteFile { user: User, name: Name, len: usize, fill: u8 },
    ReadFile { user: User, name: Name },
    Truncate { user: User, name: Name, len: i64 },
    MakeDir { user: User, name: Name, mode: u32 },
    RemoveDir { user: User, name: Name },
    Unlink { user: User, name: Name },
    Rename { user: User, from: Name, to: Name, flags: u32 },
    Link { user: User, from: Name, to: Name },
    Symlink { user: User, name: Name, target: usize },
    ReadLink { user: User, name: Name },
    MakeNode { user: User, name: Name, mode: u32 },
    SetMode { user: User, name: Name, mode: u32 },
    SetOwner { user: User, name: Name, uid: Option<u32>, gid: Option<u32>, follow: bool },
    SetTimes { user: User, name: Name, times: [i64; 2] },
    SetXattr { user: User, name: Name, key: usize, len: usize, flags: i32 },
    GetXattr { user: User, name: Name, key: usize },
    RemoveXattr { user: User, name: Name, key: usize },
    ListXattr { user: User, name: Name },
    SetAcl { user: User, name: Name, default: bool, list: usize },
    Stat { user: User, name: Name },
    Access { user: User, name: Name, mode: i32 },
    List { user: User, name: Name },
}

fn name() -> impl Strategy<Value = Name> {
    // The directory itself now and then.
    prop_oneof![20 => (1..NAMES.len()).prop_map(Name), 1 => Just(Name(0))]
}

fn user() -> impl Strategy<Value = User> {
    prop_oneof![4 => Just(0usize), 2 => Just(1usize), 1 => Just(2usize)]
}

fn slot() -> impl Strategy<Value = Slot> {
    0..3usize
}

fn place() -> impl Strategy<Value = i64> {
    prop_oneof![Just(0), 0..20_000i64, Just(4096), Just(65_536), 0..200_000i64, Just((5 << 30) + 7)]
}

fn len() -> impl Strategy<Value = usize> {
    prop_oneof![Just(1), 0..10_000usize, Just(4096), 0..150_000usize]
}

fn mode() -> impl Strategy<Value = u32> {
    prop::sample::select(vec![0o644, 0o600, 0o666, 0o777, 0o755, 0o4755, 0o2775, 0o6777, 0o2664, 0o1777, 0o400, 0o000])
}

fn open_flags() -> impl Strategy<Value = i32> {
    use libc::{O_APPEND, O_CREAT, O_DIRECTORY, O_EXCL, O_NOFOLLOW, O_PATH, O_RDONLY, O_RDWR, O_TRUNC, O_WRONLY};
    let kinds = vec![
        O_RDONLY,
        O_RDWR,
        O_RDWR | O_CREAT,
        O_RDWR | O_CREAT,
        O_RDWR | O_CREAT | O_EXCL,
        O_WRONLY | O_CREAT,
        O_WRONLY | O_CREAT | O_TRUNC,
        O_WRONLY,
        O_RDWR | O_TRUNC,
        O_RDWR | O_APPEND | O_CREAT,
        O_WRONLY | O_APPEND,
        O_RDONLY | O_NOFOLLOW,
        O_RDONLY | O_DIRECTORY,
        O_PATH,
        O_RDONLY | O_CREAT,
    ];
    prop::sample::select(kinds)
}

fn on_open_files() -> impl Strategy<Value = Op> {
    let modes = vec![0, 1, 2 | 1, 0x10, 0x10 | 1];
    let whences = vec![libc::SEEK_DATA, libc::SEEK_HOLE, libc::SEEK_END];
    let kinds = vec![libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK];
    let locks = vec![libc::LOCK_SH, libc::LOCK_EX, libc::LOCK_UN];
    prop_oneof![
        6 => (user(), slot(), name(), open_flags(), mode())
            .prop_map(|(user, slot, name, flags, mode)| Op::Open { user, slot, name, flags, mode }),
        1 => (user(), slot(), name(), mode())
            .prop_map(|(user, slot, name, mode)| Op::Tmpfile { user, slot, name, mode }),
        1 => slot().prop_map(|slot| Op::Close { slot }),
        4 => (slot(), place(), len()).prop_map(|(slot, at, len)| Op::Read { slot, at, len }),
        6 => (user(), slot(), place(), len(), any::<u8>())
            .prop_map(|(user, slot, at, len, fill)| Op::Write { user, slot, at, len, fill }),
        2 => (slot(), place(), prop::sample::select(whences))
            .prop_map(|(slot, at, whence)| Op::Seek { slot, at, whence }),
        2 => (user(), slot(), place()).prop_map(|(user, slot, len)| Op::TruncateOpen { user, slot, len }),
        2 => (user(), slot(), prop::sample::select(modes), 0..100_000i64, 0..100_000i64)
            .prop_map(|(user, slot, mode, at, len)| Op::Fallocate { user, slot, mode, at, len }),
        2 => (user(), slot(), slot(), place(), place(), len())
            .prop_map(|(user, from, to, at, target, len)| Op::CopyRange { user, from, to, at, target, len }),
        1 => slot().prop_map(|slot| Op::Sync { slot }),
        2 => slot().prop_map(|slot| Op::StatOpen { slot }),
        1 => (user(), slot(), name()).prop_map(|(user, slot, name)| Op::LinkOpen { user, slot, name }),
        1 => (slot(), prop::sample::select(kinds), 0..10i64, 0..10i64)
            .prop_map(|(slot, kind, at, len)| Op::RangeLock { slot, kind, at, len }),
        1 => (slot(), prop::sample::select(locks)).prop_map(|(slot, kind)| Op::FileLock { slot, kind }),
        1 => (user(), slot(), prop::sample::select(vec![0, 0x40, 0x80]))
            .prop_map(|(user, slot, flags)| Op::InodeFlags { user, slot, flags }),
    ]
}

fn on_names() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (user(), name(), len(), any::<u8>())
            .prop_map(|(user, name, len, fill)| Op::WriteFile { user, name, len, fill }),
        2 => (user(), name()).prop_map(|(user, name)| Op::ReadFile { user, name }),
        1 => (user(), name(), place()).prop_map(|(user, name, len)| Op::Truncate { user, name, len }),
        4 => (user(), name(), mode()).prop_map(|(user, name, mode)| Op::MakeDir { user, name, mode }),
        1 => (user(), name()).prop_map(|(user, name)| Op::RemoveDir { user, name }),
        2 => (user(), name()).prop_map(|(user, name)| Op::Unlink { user, name }),
        3 => (user(), name(), name(), prop::sample::select(vec![0, 0, 0, 1, 2, 4]))
            .prop_map(|(user, from, to, flags)| Op::Rename { user, from, to, flags }),
        2 => (user(), name(), name()).prop_map(|(user, from, to)| Op::Link { user, from, to }),
        2 => (user(), name(), 0..TARGETS.len()).prop_map(|(user, name, target)| Op::Symlink { user, name, target }),
        1 => (user(), name()).prop_map(|(user, name)| Op::ReadLink { user, name }),
        1 => (user(), name(), prop::sample::select(vec![libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFCHR, libc::S_IFREG]), mode())
            .prop_map(|(user, name, kind, mode)| Op::MakeNode { user, name, mode: kind | mode }),
        2 => (user(), name()).prop_map(|(user, name)| Op::Stat { user, name }),
        1 => (user(), name(), 0..8i32).prop_map(|(user, name, mode)| Op::Access { user, name, mode }),
        1 => (user(), name()).prop_map(|(user, name)| Op::List { user, name }),
    ]
}

fn on_attributes() -> impl Strategy<Value = Op> {
    let id = || prop::sample::select(vec![None, Some(0), Some(1000), Some(2000), Some(3000)]);
    prop_oneof![
        3 => (user(), name(), mode()).prop_map(|(user, name, mode)| Op::SetMode { user, name, mode }),
        3 => (user(), name(), id(), id(), any::<bool>())
            .prop_map(|(user, name, uid, gid, follow)| Op::SetOwner { user, name, uid, gid, follow }),
        2 => (user(), name(), prop::sample::select(vec![[5, 7], [-1, 9], [9, -1], [-2, -2], [1 << 31, 1 << 33]]))
            .prop_map(|(user, name, times)| Op::SetTimes { user, name, times }),
        2 => (user(), name(), 0..4usize, prop::sample::select(vec![0, 1, 30, 1000]), 0..3i32)
            .prop_map(|(user, name, key, len, flags)| Op::SetXattr { user, name, key, len, flags }),
        1 => (user(), name(), 0..4usize).prop_map(|(user, name, key)| Op::GetXattr { user, name, key }),
        1 => (user(), name(), 0..4usize).prop_map(|(user, name, key)| Op::RemoveXattr { user, name, key }),
        1 => (user(), name()).prop_map(|(user, name)| Op::ListXattr { user, name }),
        2 => (user(), name(), any::<bool>(), 0..4usize)
            .prop_map(|(user, name, default, list)| Op::SetAcl { user, name, default, list }),
    ]
}

/// Any of them.
pub fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![4 => on_open_files(), 4 => on_names(), 2 => on_attributes()]
}
