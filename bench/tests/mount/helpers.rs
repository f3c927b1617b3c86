//! The programs in /sbin by which mount(8) finds us.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};
use tunnelfs_bench::session::sibling;

const LINKS: [&str; 2] = ["/sbin/mount.tunnelfs", "/sbin/mount.fuse.tunnelfs"];
/// For another test that has them for a while.
const PATIENCE: Duration = Duration::from_secs(60);

/// Taken away again when dropped.
pub struct Helpers(Vec<&'static str>);

impl Helpers {
    /// `None` where others are installed: tests must not use them, nor replace them.
    pub fn install() -> Option<Helpers> {
        let mut ours = Helpers(Vec::new());
        for link in LINKS {
            let start = Instant::now();
            while let Err(e) = symlink(sibling("tunnelfs-guest").unwrap(), link) {
                assert_eq!(e.kind(), ErrorKind::AlreadyExists, "{link}: {e}");
                if start.elapsed() > PATIENCE {
                    let target = fs::read_link(Path::new(link));
                    crate::skip::unsupported(format_args!("{link} is installed, as {target:?}"));
                    return None;
                }
                std::thread::sleep(PATIENCE / 100);
            }
            ours.0.push(link);
        }
        Some(ours)
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        for link in &self.0 {
            let _ = fs::remove_file(link);
        }
    }
}
