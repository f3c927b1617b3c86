//! A shared directory that is a file system of its own, on a device that can be broken and repaired.

use crate::rig::{Scratch, Unmounted};
use crate::skip;
use nix::mount::{mount, MsFlags};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

/// linux/loop.h: `struct loop_info64`, and where `lo_sizelimit` lies in it.
const LOOP_SET_STATUS64: libc::Ioctl = 0x4c04;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4c05;
const INFO_BYTES: usize = 232;
const SIZE_LIMIT: usize = 32;

/// A loop device; detached when dropped, after what is mounted from it.
struct Loop(PathBuf);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// What is mounted on a scratch's `share`.
pub struct Disk {
    _mounted: Unmounted,
    device: Loop,
}

/// What a command has printed; `None` (and why) where it is missing or fails.
pub fn tell(command: &mut Command) -> Option<String> {
    match command.output() {
        Ok(output) if output.status.success() => Some(String::from_utf8_lossy(&output.stdout).trim().into()),
        Ok(output) => {
            let told = String::from_utf8_lossy(&output.stderr);
            skip::unsupported(format_args!("{command:?}: {}", told.trim()));
            None
        }
        Err(e) => {
            skip::lacking(format_args!("{command:?}: {e} (`make deps-conformance`)"));
            None
        }
    }
}

impl Disk {
    /// A file system made by `mkfs`, of type `kind`; `None` where the machine has none.
    pub fn new(scratch: &Scratch, bytes: u64, mkfs: &mut Command, kind: &str, options: &str) -> Option<Disk> {
        let (image, share) = (scratch.path("image"), scratch.path("share"));
        File::create(&image).unwrap().set_len(bytes).unwrap();
        tell(mkfs.arg(&image))?;
        let device = Loop(tell(Command::new("losetup").args(["--find", "--show"]).arg(&image))?.into());
        if let Err(e) = mount(Some(&device.0), &share, Some(kind), MsFlags::empty(), Some(options)) {
            skip::unsupported(format_args!("mounting {kind} with `{options}`: {e}"));
            return None;
        }
        Some(Disk { _mounted: Unmounted(share), device })
    }

    /// All of the device behind its first bytes is broken: an error for each access.
    pub fn break_behind(&self, bytes: u64) -> io::Result<()> {
        self.limit(bytes)
    }

    pub fn repair(&self) -> io::Result<()> {
        self.limit(0)
    }

    fn limit(&self, bytes: u64) -> io::Result<()> {
        let device = File::open(&self.device.0)?;
        let mut info = [0u8; INFO_BYTES];
        let call = |request, info: &mut [u8; INFO_BYTES]| {
            // SAFETY: as many bytes as the ioctl reads and writes.
            match unsafe { libc::ioctl(device.as_raw_fd(), request, info.as_mut_ptr()) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        call(LOOP_GET_STATUS64, &mut info)?;
        info[SIZE_LIMIT..SIZE_LIMIT + 8].copy_from_slice(&bytes.to_ne_bytes());
        call(LOOP_SET_STATUS64, &mut info)
    }
}

/// Takes a file's pages out of the machine's memory, so that the device is asked.
pub fn uncache(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    nix::fcntl::posix_fadvise(&file, 0, 0, advice).unwrap();
}
