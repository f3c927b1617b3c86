//! Where a mount may differ from a local directory, and why. Whatever is not here is an error.
//!
//! Not compared at all (see `world::attributes`): device and inode numbers, sizes and link counts of directories, blocks,
//! places in directories, times of accesses and of changes of state, and times that nobody has set, but for being of this time.

use crate::ops::Op;
use crate::world::Outcome;
use nix::errno::Errno;
use std::collections::BTreeMap;

/// Whether an operation may end like this.
pub fn is_known(op: &Op, mounted: &Outcome, native: &Outcome) -> bool {
    match op {
        // The guest's kernel has no way to say them to any FUSE file system (6.18).
        Op::Fallocate { mode, .. } => *mode & !0x13 != 0 && *mounted == Err(Errno::EOPNOTSUPP),
        // Which of several reasons is told first, where both refuse: the kernel looks at an xattr's name, or asks the
        // file system, in an order that differs between local file systems too.
        Op::SetXattr { .. } | Op::GetXattr { .. } | Op::RemoveXattr { .. } => {
            let refusals = [Errno::EOPNOTSUPP, Errno::EPERM, Errno::ENODATA, Errno::EACCES];
            let refused = |o: &Outcome| o.as_ref().is_err_and(|e| refusals.contains(e));
            refused(mounted) && refused(native)
        }
        // With writeback the host does not know what is data: then all is. It never tells a hole where there is data.
        Op::Seek { whence, .. } if matches!(*whence, libc::SEEK_DATA | libc::SEEK_HOLE) => {
            if [mounted, native].iter().any(|o| !matches!(o, Ok(_) | Err(Errno::ENXIO))) {
                return false;
            }
            let place = |o: &Outcome| o.as_ref().map_or(u64::MAX, |text| text.parse().unwrap_or(u64::MAX));
            let (here, there) = (place(mounted), place(native));
            if *whence == libc::SEEK_DATA {
                here <= there
            } else {
                here >= there
            }
        }
        _ => false,
    }
}

/// The first difference of two trees.
pub fn of_trees(here: &BTreeMap<String, String>, there: &BTreeMap<String, String>) -> Option<String> {
    let names = here.keys().chain(there.keys());
    let differ = names.into_iter().find(|name| here.get(*name) != there.get(*name))?;
    let told = |side: &BTreeMap<String, String>| side.get(differ).cloned().unwrap_or_else(|| "nothing".into());
    Some(format!("{differ}: {} here, {} there", told(here), told(there)))
}
