//! Checks of what is in files.

use crate::rig::{errno, Place};
use crate::Check;
use nix::fcntl::{copy_file_range, fallocate, FallocateFlags};
use nix::sys::mman::{mmap, msync, munmap, MapFlags, MsFlags, ProtFlags};
use nix::unistd::{lseek, Whence};
use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

pub const CHECKS: &[Check] = &[
    ("tree", a_tree_is_the_same_on_both_sides),
    ("large", files_beyond_4_gib),
    ("sizes", reads_and_writes_of_odd_sizes),
    ("direct", direct_io),
    ("append", appends_do_not_tear),
    ("holes", holes_are_found),
    ("fallocate", space_is_allocated_and_punched),
    ("copy_range", ranges_are_copied),
    ("mmap", mappings_and_reads_agree),
    ("truncate", truncation_leaves_zeros),
    ("sync", everything_syncs),
    ("threads", writers_beside_each_other),
];

pub fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// Bytes that depend on their place and on `seed`.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| next().to_ne_bytes()).collect();
    bytes.truncate(len);
    bytes
}

/// Names, modes, sizes and contents of a tree.
fn digest(dir: &Path, into: &mut DefaultHasher) {
    let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(Result::unwrap).collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let meta = entry.metadata().unwrap();
        (entry.file_name(), meta.mode(), meta.len() * u64::from(meta.is_file())).hash(into);
        if meta.is_dir() {
            digest(&entry.path(), into);
        } else {
            fs::read(entry.path()).unwrap().hash(into);
        }
    }
}

fn a_tree_is_the_same_on_both_sides(p: &Place) {
    for (i, size) in [0, 1, 4095, 4096, 4097, 65_536, (1 << 20) - 1, 1 << 20, (3 << 20) + 7].into_iter().enumerate() {
        let dir = p.path(&format!("a/b{i}/c"));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("file"), pattern(size, i as u64)).unwrap();
    }
    let of = |dir: &Path| {
        let mut hasher = DefaultHasher::new();
        digest(dir, &mut hasher);
        hasher.finish()
    };
    assert_eq!(of(&p.dir), of(&p.behind));
}

fn files_beyond_4_gib(p: &Place) {
    let file = open(&p.path("f"));
    let far = (5 << 30) + 3;
    let data = pattern(10_000, 1);
    file.write_all_at(&data, far).unwrap();
    let mut back = vec![0; data.len()];
    file.read_exact_at(&mut back, far).unwrap();
    assert_eq!(back, data);
    file.read_exact_at(&mut back, far - 20_000).unwrap();
    assert!(back.iter().all(|&b| b == 0));
    let meta = fs::metadata(p.path("f")).unwrap();
    assert_eq!(meta.len(), far + data.len() as u64);
    assert!(meta.blocks() < 1000, "still sparse");
    assert_eq!(fs::metadata(p.behind.join("f")).unwrap().len(), meta.len());
}

fn reads_and_writes_of_odd_sizes(p: &Place) {
    let mut file = open(&p.path("f"));
    let data = pattern((9 << 20) + 13, 2);
    for chunk in data.chunks((2 << 20) + 511) {
        file.write_all(chunk).unwrap();
    }
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut back = Vec::new();
    file.read_to_end(&mut back).unwrap();
    assert!(back == data);
    for (at, len) in [(1, 1), (4095, 2), (65_535, 131_073), (1 << 20, 1 << 20), ((9 << 20) - 5, 100)] {
        let mut part = vec![0; len];
        let n = file.read_at(&mut part, at as u64).unwrap();
        assert_eq!(part[..n], data[at..data.len().min(at + len)]);
    }
    assert_eq!(file.read_at(&mut [0; 10], 100 << 20).unwrap(), 0);
    assert!(fs::read(p.behind.join("f")).unwrap() == data);
}

fn direct_io(p: &Place) {
    let file =
        OpenOptions::new().read(true).write(true).create(true).custom_flags(libc::O_DIRECT).open(p.path("f")).unwrap();
    let len = 3 << 20;
    let data = pattern(len, 3);
    // SAFETY: a new private mapping, unmapped below; both slices end before that.
    unsafe {
        let area = mmap_anonymous(len);
        let buffer = std::slice::from_raw_parts_mut(area.as_ptr().cast::<u8>(), len);
        buffer.copy_from_slice(&data);
        file.write_all_at(buffer, 0).unwrap();
        buffer.fill(0);
        file.read_exact_at(buffer, 0).unwrap();
        assert!(buffer == data);
        file.read_exact_at(&mut buffer[..4096], 8192).unwrap();
        assert_eq!(buffer[..4096], data[8192..12288]);
        munmap(area, len).unwrap();
    }
    assert!(fs::read(p.path("f")).unwrap() == data);
}

/// # Safety
/// The caller unmaps it.
unsafe fn mmap_anonymous(len: usize) -> std::ptr::NonNull<std::ffi::c_void> {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a mapping where the kernel likes.
    unsafe { nix::sys::mman::mmap_anonymous(None, len.try_into().unwrap(), protection, MapFlags::MAP_PRIVATE) }.unwrap()
}

fn appends_do_not_tear(p: &Place) {
    const RECORD: usize = 100;
    std::thread::scope(|s| {
        for writer in 0..4u8 {
            let path = p.path("log");
            s.spawn(move || {
                let mut log = OpenOptions::new().append(true).create(true).open(path).unwrap();
                for _ in 0..200 {
                    log.write_all(&[b'a' + writer; RECORD]).unwrap();
                }
            });
        }
    });
    let log = fs::read(p.path("log")).unwrap();
    assert_eq!(log.len(), 4 * 200 * RECORD);
    assert!(log.chunks(RECORD).all(|r| r.iter().all(|&b| b == r[0])), "a torn record");
}

fn holes_are_found(p: &Place) {
    let file = open(&p.path("f"));
    file.write_all_at(&[1; 4096], 0).unwrap();
    file.write_all_at(&[2; 4096], 512 << 10).unwrap();
    file.set_len(1 << 20).unwrap();
    file.sync_all().unwrap();
    assert_eq!(lseek(&file, 0, Whence::SeekHole).unwrap(), 4096);
    assert_eq!(lseek(&file, 4096, Whence::SeekData).unwrap(), 512 << 10);
    assert_eq!(lseek(&file, 512 << 10, Whence::SeekHole).unwrap(), (512 << 10) + 4096);
    assert_eq!(lseek(&file, (512 << 10) + 4096, Whence::SeekData), Err(nix::Error::ENXIO));
    assert_eq!(lseek(&file, 2 << 20, Whence::SeekHole), Err(nix::Error::ENXIO));
}

fn space_is_allocated_and_punched(p: &Place) {
    let file = open(&p.path("f"));
    let size = || file.metadata().unwrap().len();
    fallocate(&file, FallocateFlags::empty(), 0, 1 << 20).unwrap();
    assert_eq!(size(), 1 << 20);
    fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 1 << 20, 1 << 20).unwrap();
    assert_eq!(size(), 1 << 20);
    file.write_all_at(&[7; 1 << 20], 0).unwrap();
    let before = fs::metadata(p.path("f")).unwrap().blocks();
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, punch, 4096 + 100, 512 << 10).unwrap();
    file.sync_all().unwrap();
    let data = fs::read(p.path("f")).unwrap();
    let hole = 4196..4196 + (512 << 10);
    assert!(data.iter().enumerate().all(|(i, &b)| b == if hole.contains(&i) { 0 } else { 7 }));
    assert!(fs::metadata(p.path("f")).unwrap().blocks() < before);
    assert_eq!(fallocate(&file, punch, 0, 0), Err(nix::Error::EINVAL));
}

fn ranges_are_copied(p: &Place) {
    let (from, to) = (open(&p.path("from")), open(&p.path("to")));
    let data = pattern(300_000, 4);
    from.write_all_at(&data, 0).unwrap();
    to.write_all_at(&[9; 100], 0).unwrap();
    let (mut at, mut target) = (1000, 50);
    while at < 201_000 {
        let left = 201_000 - at as usize;
        let n = copy_file_range(&from, Some(&mut at), &to, Some(&mut target), left).unwrap();
        assert!(n > 0);
    }
    let copy = fs::read(p.path("to")).unwrap();
    assert_eq!(copy.len(), 200_050);
    assert!(copy[..50] == [9; 50] && copy[50..] == data[1000..201_000]);
    assert_eq!(fs::copy(p.path("from"), p.path("third")).unwrap(), 300_000);
    assert!(fs::read(p.path("third")).unwrap() == data);
}

fn mappings_and_reads_agree(p: &Place) {
    let file = open(&p.path("f"));
    let len = 128 << 10;
    file.write_all_at(&pattern(len, 5), 0).unwrap();
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping of a file as long as it; the slice ends before it is unmapped.
    unsafe {
        let area = mmap(None, len.try_into().unwrap(), protection, MapFlags::MAP_SHARED, &file, 0).unwrap();
        let bytes = std::slice::from_raw_parts_mut(area.as_ptr().cast::<u8>(), len);
        assert!(bytes == pattern(len, 5));
        file.write_all_at(b"written", 5000).unwrap();
        assert_eq!(&bytes[5000..5007], b"written");
        bytes[70_000..70_006].copy_from_slice(b"mapped");
        msync(area, len, MsFlags::MS_SYNC).unwrap();
        munmap(area, len).unwrap();
    }
    for path in [p.path("f"), p.behind.join("f")] {
        let data = fs::read(path).unwrap();
        assert_eq!((&data[5000..5007], &data[70_000..70_006]), (&b"written"[..], &b"mapped"[..]));
    }
}

fn truncation_leaves_zeros(p: &Place) {
    let file = open(&p.path("f"));
    file.write_all_at(&[5; 10_000], 0).unwrap();
    file.set_len(5000).unwrap();
    file.set_len(20_000).unwrap();
    let data = fs::read(p.path("f")).unwrap();
    assert!(data.len() == 20_000 && data.iter().enumerate().all(|(i, &b)| b == if i < 5000 { 5 } else { 0 }));
    // By name, with nothing open, then on opening.
    nix::unistd::truncate(&p.path("f"), 3).unwrap();
    assert_eq!(fs::read(p.path("f")).unwrap(), [5; 3]);
    OpenOptions::new().write(true).truncate(true).open(p.path("f")).unwrap();
    assert_eq!(fs::metadata(p.behind.join("f")).unwrap().len(), 0);
    assert_eq!(errno(File::open(p.path("f")).unwrap().set_len(1)), libc::EINVAL);
}

fn everything_syncs(p: &Place) {
    let file = open(&p.path("f"));
    file.write_all_at(&[1; 100_000], 0).unwrap();
    file.sync_data().unwrap();
    file.sync_all().unwrap();
    File::open(&p.dir).unwrap().sync_all().unwrap();
    nix::unistd::syncfs(&file).unwrap();
}

/// Each thread owns every fourth block: what it wrote last is what it reads.
fn writers_beside_each_other(p: &Place) {
    const BLOCK: usize = 3000;
    let file = open(&p.path("f"));
    std::thread::scope(|s| {
        for thread in 0..4usize {
            let file = &file;
            s.spawn(move || {
                for round in 0..200 {
                    let block = thread + 4 * (round * 7 % 25);
                    let data = pattern(BLOCK, (block * 1000 + round) as u64);
                    file.write_all_at(&data, (block * BLOCK) as u64).unwrap();
                    let mut back = vec![0; BLOCK];
                    file.read_exact_at(&mut back, (block * BLOCK) as u64).unwrap();
                    assert!(back == data);
                }
            });
        }
    });
}
