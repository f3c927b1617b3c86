//! What may be asked again after the host that was asked has died: it may have done it, or not.

use crate::fuse::message::{request_opcode, u32_at, u64_at, BODY};
use tunnelfs_fuse_abi::opcode::*;

/// FUSE_WRITE_CACHE: the kernel itself says where it goes.
const WRITE_CACHE: u32 = 1;

/// How to go on with a request that a dead host had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayRule {
    /// Ask again: twice is once.
    Safe,
    /// Nothing is left to be done: the host's death did it.
    Skip,
    /// Ask again if what it makes is not there yet: its (last) name.
    IfAbsent,
    /// Ask again if what it takes away is still there: its first name.
    IfPresent,
    /// Ask again if the file ends no later than here.
    IfSizeAtMost(u64),
    /// Nobody can tell whether it has happened.
    Unsafe,
}

/// By the request's first bytes.
pub fn rule_for(head: &[u8]) -> ReplayRule {
    match request_opcode(head) {
        LOOKUP | GETATTR | SETATTR | READLINK | OPEN | READ | STATFS | FSYNC | GETXATTR | LISTXATTR | FLUSH
        | OPENDIR | READDIR | READDIRPLUS | FSYNCDIR | ACCESS | BMAP | POLL | LSEEK | COPY_FILE_RANGE
        | COPY_FILE_RANGE_64 | SYNCFS | STATX | GETLK => ReplayRule::Safe,
        // A file without a name went with the host that had it.
        TMPFILE => ReplayRule::Safe,
        WRITE => write(head),
        FALLOCATE => fallocate(u32_at(head, BODY + 24)),
        CREATE if u32_at(head, BODY) & libc::O_EXCL as u32 == 0 => ReplayRule::Safe,
        CREATE | MKNOD | MKDIR | SYMLINK | LINK => ReplayRule::IfAbsent,
        UNLINK | RMDIR | RENAME | RENAME2 => ReplayRule::IfPresent,
        // XATTR_CREATE and XATTR_REPLACE fail the second time.
        SETXATTR if u32_at(head, BODY + 4) == 0 => ReplayRule::Safe,
        FORGET | BATCH_FORGET | RELEASE | RELEASEDIR | INTERRUPT | DESTROY => ReplayRule::Skip,
        _ => ReplayRule::Unsafe,
    }
}

fn write(head: &[u8]) -> ReplayRule {
    let (offset, how, flags) = (u64_at(head, BODY + 8), u32_at(head, BODY + 20), u32_at(head, BODY + 32));
    if flags & libc::O_APPEND as u32 != 0 && how & WRITE_CACHE == 0 {
        ReplayRule::IfSizeAtMost(offset)
    } else {
        ReplayRule::Safe
    }
}

/// All but those that move what lies behind.
fn fallocate(mode: u32) -> ReplayRule {
    let moves = libc::FALLOC_FL_COLLAPSE_RANGE | libc::FALLOC_FL_INSERT_RANGE;
    if mode & moves as u32 == 0 {
        ReplayRule::Safe
    } else {
        ReplayRule::Unsafe
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(opcode: u32, words: &[(usize, u32)]) -> [u8; 104] {
        let mut head = [0; 104];
        head[4..8].copy_from_slice(&opcode.to_ne_bytes());
        for &(at, word) in words {
            head[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        head
    }

    #[test]
    fn what_moves_or_makes_is_not_blindly_repeated() {
        let append = libc::O_APPEND as u32;
        for (request, expected) in [
            (head(READ, &[]), ReplayRule::Safe),
            (head(WRITE, &[]), ReplayRule::Safe),
            (head(WRITE, &[(48, 4096), (72, append)]), ReplayRule::IfSizeAtMost(4096)),
            (head(WRITE, &[(48, 4096), (60, WRITE_CACHE), (72, append)]), ReplayRule::Safe),
            (head(FALLOCATE, &[(64, 3)]), ReplayRule::Safe),
            (head(FALLOCATE, &[(64, 8)]), ReplayRule::Unsafe),
            (head(CREATE, &[(40, libc::O_CREAT as u32)]), ReplayRule::Safe),
            (head(CREATE, &[(40, (libc::O_CREAT | libc::O_EXCL) as u32)]), ReplayRule::IfAbsent),
            (head(SETXATTR, &[]), ReplayRule::Safe),
            (head(SETXATTR, &[(44, 1)]), ReplayRule::Unsafe),
            (head(RENAME2, &[]), ReplayRule::IfPresent),
            (head(REMOVE_XATTR, &[]), ReplayRule::Unsafe),
            (head(9999, &[]), ReplayRule::Unsafe),
        ] {
            assert_eq!(rule_for(&request), expected, "{}", name(request_opcode(&request)));
        }
    }

    const REMOVE_XATTR: u32 = 24;
}
