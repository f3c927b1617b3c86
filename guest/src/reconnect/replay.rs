//! Which requests may be sent again after a host has died: the host may have carried them out, or not.

use crate::fuse::message::{request_opcode, u32_at, u64_at, BODY};
use tunnelfs_fuse_abi::opcode::*;

/// FUSE_WRITE_CACHE: a write from the page cache. Its offset counts, even with O_APPEND.
const WRITE_CACHE: u32 = 1;

/// Whether a request that a dead host had may be sent to the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayRule {
    /// Send it again: it is idempotent.
    Safe,
    /// Answer success: the host's death has done it.
    Skip,
    /// Send it again if the name that it creates does not exist.
    IfAbsent,
    /// Send it again if the name that it removes (for a rename, the old name) still stands for the same file.
    IfPresent,
    /// Send it again if the file's size is at most this, in bytes.
    IfSizeAtMost(u64),
    /// Answer EIO: the guest cannot find out whether it was carried out.
    Unsafe,
}

/// Returns the rule for a request; `head` is its header and fixed body.
pub fn rule_for(head: &[u8]) -> ReplayRule {
    match request_opcode(head) {
        LOOKUP | GETATTR | SETATTR | READLINK | OPEN | READ | STATFS | FSYNC | GETXATTR | LISTXATTR | FLUSH
        | OPENDIR | READDIR | READDIRPLUS | FSYNCDIR | ACCESS | BMAP | POLL | LSEEK | COPY_FILE_RANGE
        | COPY_FILE_RANGE_64 | SYNCFS | STATX | GETLK => ReplayRule::Safe,
        // A file without a name ended with the host that made it.
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

/// FALLOCATE is idempotent, except for the modes that move the data behind the range.
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
