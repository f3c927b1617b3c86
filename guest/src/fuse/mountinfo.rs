//! Mounts, from /proc/self/mountinfo. A system call on a file system itself could block.

use std::path::{Path, PathBuf};

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// The minor number of its device; for FUSE, the name of its directory in /sys/fs/fuse/connections.
    pub minor: u32,
    /// Its type, for example `fuse.tunnelfs`.
    pub kind: String,
}

/// Returns the topmost file system that is mounted on `point` itself; `None` if there is none.
pub fn topmost(point: &Path) -> Option<Mounted> {
    find(&std::fs::read_to_string("/proc/self/mountinfo").ok()?, &resolve(point)?)
}

/// Returns the path without symbolic links. Does not ask for the attributes of the mount point itself, only for its
/// link target. For a directory the kernel answers that without the file system.
fn resolve(point: &Path) -> Option<PathBuf> {
    match (point.parent(), point.file_name()) {
        (Some(parent), Some(name)) if point.read_link().is_err() => Some(parent.canonicalize().ok()?.join(name)),
        _ => point.canonicalize().ok(),
    }
}

/// Finds a mount in the text of proc_pid_mountinfo(5): `36 35 0:45 / /mnt/point rw - fuse.tunnelfs ...`.
fn find(mountinfo: &str, point: &Path) -> Option<Mounted> {
    // Of several mounts on one point the last one is the topmost.
    mountinfo.lines().rev().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let fields: Vec<_> = place.split(' ').collect();
        if unescape(fields.get(4)?) != point {
            return None;
        }
        let minor = fields[2].split_once(':')?.1.parse().ok()?;
        Some(Mounted { minor, kind: kind.split(' ').next()?.into() })
    })
}

/// Decodes the octal escapes of blanks and other characters, such as `\040`.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let Some((&first, others)) = rest.split_first() {
        let code = others.get(..3).filter(|_| first == b'\\');
        let code = code.and_then(|c| u8::from_str_radix(std::str::from_utf8(c).ok()?, 8).ok());
        bytes.push(code.unwrap_or(first));
        rest = if code.is_some() { &others[3..] } else { others };
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_topmost_mount_is_found() {
        let text = "22 1 253:0 / / rw - ext4 /dev/vda rw\n\
                    36 22 0:45 / /mnt/a\\040b\\134c rw,nosuid shared:1 - fuse.tunnelfs /run/s rw\n\
                    37 22 0:46 / /mnt/x rw - tmpfs none rw\n\
                    38 37 0:47 / /mnt/x rw - fuse.tunnelfs /run/s rw\n";
        let number = |point: &str| find(text, Path::new(point)).map(|m| m.minor);
        assert_eq!(number("/mnt/a b\\c"), Some(45));
        assert_eq!(number("/mnt/x"), Some(47));
        assert_eq!((number("/mnt"), number("/mnt/a")), (None, None));
        assert_eq!(find(text, Path::new("/")), Some(Mounted { minor: 0, kind: "ext4".into() }));
    }
}
