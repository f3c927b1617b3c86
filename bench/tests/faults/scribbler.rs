//! A host that writes where it must not: beside a real host somebody scribbles
//! over the completions, indices and flags that guest and host share.

use crate::liar::assert_ended_well;
use crate::{poke, start, unmount_what_is_left};
use memmap2::{MmapOptions, MmapRaw};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[test]
fn whatever_is_written_into_the_region() {
    for (channel, transport) in [("uring", "ring"), ("fuse", "ring"), ("uring", "virtqueue"), ("fuse", "virtqueue")] {
        for seed in 1..=3u64 {
            // Small queues: most of the region is indices and entries.
            let Some((_scratch, _host, mut guest)) =
                start(channel, transport, ",timeout=1,entries=8,slots=4,slot_size=16384,queues=2")
            else {
                continue;
            };
            let region = region_of(guest.pid());
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| scribble(&region, seed, &done));
                for _ in 0..3 {
                    poke(&guest.point);
                }
                done.store(true, Ordering::Release);
            });
            // Whatever it came to, the mount can be taken away.
            guest.signal(nix::sys::signal::Signal::SIGTERM);
            let status = guest.ended();
            assert_ended_well(status, &guest.output(), &format!("{channel}, {transport}, seed {seed}"));
            unmount_what_is_left(&guest.point);
        }
    }
}

/// The guest's shared memory, mapped here too.
fn region_of(pid: nix::unistd::Pid) -> MmapRaw {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|e| e.unwrap().path());
    let is_region =
        |path: &PathBuf| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("memfd:tunnelfs"));
    let path = descriptors.into_iter().find(is_region).expect("the guest's memory");
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let _ = file.read_at(&mut [0], 0);
    MmapOptions::new().map_raw(&file).unwrap()
}

fn scribble(region: &MmapRaw, seed: u64, done: &AtomicBool) {
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    while !done.load(Ordering::Acquire) {
        for _ in 0..64 {
            let at = next() as usize % (region.len() / 4) * 4;
            let word = [0, 1, 2, 7, 8, 16, 80, 0x8000_0000, u32::MAX, next() as u32][next() as usize % 10];
            // SAFETY: inside the mapping, aligned; races are the point.
            unsafe { region.as_mut_ptr().add(at).cast::<u32>().write_volatile(word) };
        }
        std::thread::sleep(Duration::from_micros(20));
    }
}
