//! A file whose device does not answer holds up no other file's requests, not
//! even on the same queue.

use crate::files::{open, pattern};
use crate::rig::{Guest, Host, Peer, Scratch, PATIENCE};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::signal::Signal;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A directory that is seen in another place too.
struct Bind(PathBuf);

impl Bind {
    fn new(from: &Path, to: PathBuf) -> Bind {
        mount(Some(from), &to, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        Bind(to)
    }
}

impl Drop for Bind {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn open_direct(path: PathBuf) -> File {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

/// Page-aligned, as O_DIRECT wants it.
fn read_page(file: &File, at: u64) -> io::Result<Vec<u8>> {
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    let mut page = Box::new(Page([0; 4096]));
    file.read_exact_at(&mut page.0, at)?;
    Ok(page.0.to_vec())
}

/// The slow device is a mount of ours that is stopped.
#[test]
fn a_slow_file_holds_up_no_other() {
    let (Some(device), Some(scratch)) = (Scratch::new(), Scratch::new()) else { return };
    let data = pattern(8 << 20, 11);
    fs::write(device.path("share/slow"), &data).unwrap();
    open(&scratch.path("share/fast")).write_all_at(&data, 0).unwrap();
    fs::create_dir(scratch.path("share/device")).unwrap();

    let device_host = Host::start(&device, Peer::Ours);
    let device_guest = Guest::mount(&device, &device_host, "channel=fuse");
    let _bind = Bind::new(&device.path("mnt"), scratch.path("share/device"));
    // Attributes stay known: asking for the slow file's would hold up the queue.
    let host = Host::start_with(&scratch, Peer::Ours, &["--cache=metadata"]);
    let guest = Guest::mount(&scratch, &host, "channel=fuse,queues=1");
    let (slow, fast) = (open_direct(guest.point.join("device/slow")), open_direct(guest.point.join("fast")));

    device_guest.stop();
    // By then other caches would have forgotten.
    std::thread::sleep(Duration::from_millis(1500));
    let reader = std::thread::spawn(move || read_page(&slow, 4 << 20));
    std::thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    for i in 0..50 {
        assert!(read_page(&fast, i * 4096).unwrap() == data[i as usize * 4096..][..4096]);
    }
    let took = start.elapsed();
    assert!(!reader.is_finished(), "the slow file was not slow");
    device_guest.signal(Signal::SIGCONT);
    assert!(reader.join().unwrap().unwrap() == data[4 << 20..][..4096]);
    assert!(took < PATIENCE, "50 reads of the fast file took {took:?}");
    drop((fast, guest));
}
