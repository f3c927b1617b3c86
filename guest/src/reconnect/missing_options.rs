//! Names of the host options that would turn on missing INIT flags.

use tunnelfs_fuse_abi::flags::init::WRITEBACK_CACHE;

/// Each option, with the INIT flags that it controls (linux/fuse.h).
const OPTIONS: [(&str, u64); 6] = [
    // FUSE_POSIX_ACL, FUSE_SETXATTR_EXT, FUSE_DONT_MASK.
    ("--posix-acl", 1 << 20 | 1 << 29 | 1 << 6),
    // FUSE_HANDLE_KILLPRIV_V2.
    ("--killpriv-v2", 1 << 28),
    ("--writeback", WRITEBACK_CACHE),
    // FUSE_DO_READDIRPLUS, FUSE_READDIRPLUS_AUTO.
    ("--no-readdirplus", 1 << 13 | 1 << 14),
    // FUSE_SUBMOUNTS.
    ("--announce-submounts", 1 << 27),
    // FUSE_DIRECT_IO_ALLOW_MMAP.
    ("--allow-mmap", 1 << 36),
];

/// Lists the options for the `lacking` INIT flags, as the host's command line names them, and the flags of no option.
/// `None` if no flag is lacking.
pub fn options(lacking: u64) -> Option<String> {
    let mut names: Vec<_> =
        OPTIONS.iter().filter(|(_, flags)| lacking & flags != 0).map(|(n, _)| (*n).into()).collect();
    let known = OPTIONS.iter().fold(0, |all, (_, flags)| all | flags);
    if lacking & !known != 0 {
        names.push(format!("INIT flags {:#x} (another version?)", lacking & !known));
    }
    (!names.is_empty()).then(|| names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_named_and_what_is_none_is_not_hidden() {
        assert_eq!(options(0), None);
        assert_eq!(options(1 << 20 | 1 << 29).unwrap(), "--posix-acl");
        assert_eq!(options(1 << 28 | 1 << 13).unwrap(), "--killpriv-v2, --no-readdirplus");
        assert_eq!(options(1 << 36 | 1).unwrap(), "--allow-mmap, INIT flags 0x1 (another version?)");
    }
}
