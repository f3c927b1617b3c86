//! What fsx lacks: O_DIRECT, mixed with buffered reads and writes, truncations
//! and mappings of the same file, checked against a copy in memory.

use crate::rig::Scratch;
use crate::{ignored, Mounted, Rng};
use nix::sys::mman::{mmap, munmap, MapFlags, ProtFlags};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

const BLOCK: usize = 4096;
const LARGEST: usize = 4 << 20;

/// Page-aligned, as O_DIRECT wants it.
struct Buffer(Vec<u8>);

impl Buffer {
    fn new() -> Self {
        Buffer(vec![0; LARGEST + BLOCK])
    }

    fn get(&mut self, len: usize) -> &mut [u8] {
        let start = (self.0.as_ptr() as usize).wrapping_neg() % BLOCK;
        &mut self.0[start..start + len]
    }
}

struct Exerciser {
    direct: File,
    buffered: File,
    good: Vec<u8>,
    buffer: Buffer,
    rng: Rng,
}

impl Exerciser {
    fn new(path: &Path, seed: u64) -> Self {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true);
        let buffered = options.open(path).unwrap();
        let direct = options.custom_flags(libc::O_DIRECT).open(path).unwrap();
        Exerciser { direct, buffered, good: Vec::new(), buffer: Buffer::new(), rng: Rng::new(seed) }
    }

    /// Any part of the largest file, or of whole blocks.
    fn range(&mut self, unit: usize) -> (usize, usize) {
        let at = self.rng.below(LARGEST / unit) * unit;
        let most = if self.rng.below(4) == 0 { LARGEST } else { 64 << 10 };
        (at, (self.rng.below(most.min(LARGEST - at) / unit) + 1) * unit)
    }

    fn write(&mut self, direct: bool) {
        let (at, len) = self.range(if direct { BLOCK } else { 1 });
        let data = self.buffer.get(len);
        self.rng.fill(data);
        let file = if direct { &self.direct } else { &self.buffered };
        file.write_all_at(data, at as u64).unwrap();
        self.good.resize(self.good.len().max(at + len), 0);
        self.good[at..at + len].copy_from_slice(data);
    }

    fn read(&mut self, direct: bool) {
        let (at, len) = self.range(if direct { BLOCK } else { 1 });
        let data = self.buffer.get(len);
        let file = if direct { &self.direct } else { &self.buffered };
        let (mut n, expected) = (0, self.good.len().saturating_sub(at).min(len));
        while n < expected {
            let more = file.read_at(&mut data[n..], (at + n) as u64).unwrap();
            assert!(more > 0, "the file ends early");
            n += more;
        }
        assert!(
            data[..n] == self.good[at.min(self.good.len())..][..expected],
            "read of {len} at {at}, direct: {direct}"
        );
    }

    fn read_mapped(&mut self) {
        let Some(len) = std::num::NonZeroUsize::new(self.good.len()) else { return };
        // SAFETY: a new mapping as long as the file, which this thread alone changes; unmapped before that.
        unsafe {
            let map = mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &self.buffered, 0).unwrap();
            let same = std::slice::from_raw_parts(map.as_ptr().cast::<u8>(), len.get()) == self.good;
            munmap(map, len.get()).unwrap();
            assert!(same, "the mapping has other bytes");
        }
    }

    fn step(&mut self) {
        match self.rng.below(12) {
            0..=2 => self.write(true),
            3..=4 => self.write(false),
            5..=7 => self.read(true),
            8..=9 => self.read(false),
            10 => self.read_mapped(),
            _ => {
                let len = self.rng.below(LARGEST);
                self.buffered.set_len(len as u64).unwrap();
                self.good.resize(len, 0);
            }
        }
        assert_eq!(self.direct.metadata().unwrap().len(), self.good.len() as u64);
    }
}

fn over(channel: &str, options: &[&str], words: &str, in_memory: bool, steps: u32) {
    let Some(scratch) = Scratch::for_channel(channel) else { return };
    let scratch = if in_memory { scratch.in_memory("100m") } else { scratch };
    let mounted = Mounted::on(scratch, (channel, "ring"), options, words);
    let seed = Rng::seed();
    println!("{channel}, {options:?}{words}: SEED={seed}");
    let mut exerciser = Exerciser::new(&mounted.path("file"), seed);
    for step in 0..steps {
        let stepped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| exerciser.step()));
        assert!(stepped.is_ok(), "step {step} with {channel}, {options:?}{words}, SEED={seed}");
    }
    drop(exerciser);
    mounted.guest.unmount();
}

fn all(steps: u32) {
    for channel in ["uring", "fuse"] {
        over(channel, &["--cache=auto"], "", true, steps);
        over(channel, &["--cache=always", "--writeback"], ",writeback", true, steps);
        over(channel, &["--cache=never", "--allow-mmap"], "", true, steps);
        // The host's own files are opened with O_DIRECT, on a disk.
        over(channel, &["--cache=auto", "--allow-direct-io"], "", false, steps / 4);
    }
}

#[test]
fn direct_and_buffered() {
    all(400);
}

ignored! {
    for_long: all(40_000);
}
