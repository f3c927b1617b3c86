//! What a guest that does not ask to open files may keep, and what it cannot reach. As root: others' hosts have files
//! opened.

use super::coherence::LASTING;
use super::coherence_tests::{listening, others, until, Guest, LONG};
use super::tests::ROOT;
use super::*;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::changes::kind;
use tunnelfs_fuse_abi::*;

fn one(leases: usize, test: impl FnOnce(&Guest<'_>, &Path) + Send) {
    if !credentials::opens_all() || !sys::has_exact_times() {
        return println!("skipped: needs root, and Linux 6.13");
    }
    let change = |config: &mut Config| {
        config.exact_times = true;
        config.coherence = Some(Budget { marks: 100, leases, mounts: None });
    };
    listening(1, change, |guests, dir| {
        if guests[0].fs.skips_open() {
            test(&guests[0], dir);
        } else {
            println!("skipped: the temporary directory is on a file system that is not known");
        }
    });
}

fn errno_of<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

impl Guest<'_> {
    /// Asks for the attributes until they last, which takes that it drops the data that nothing has covered.
    fn lasts_when_clean(&self, node: u64) {
        let mut dropped = 0;
        until("attributes that last", || {
            let lasts = self.attr_valid(node) == LASTING.as_secs();
            let is_it = |change: &Change| (change.kind, change.node) == (kind::CLEAN, node);
            let told = self.seen.lock().iter().filter(|change| is_it(change)).count();
            (dropped..told).for_each(|_| self.fs.dropped(node));
            dropped = told;
            lasts
        });
        assert!(dropped > 0, "stores through a mapping change no time");
        self.seen.lock().clear();
    }

    /// Reads, and does what it is told to meanwhile.
    fn reads_and_answers(&self, node: u64, told: u32) {
        std::thread::scope(|scope| {
            let read = scope.spawn(|| drop(self.fs.readable(0, node).unwrap()));
            self.wait_for_kind(told, node);
            self.fs.dropped(node);
            read.join().unwrap();
        });
        self.seen.lock().clear();
    }
}

#[test]
fn opening_is_not_needed_and_files_alone_are_reached() {
    one(10, |guest, dir| {
        others(dir, "echo x > f; mkdir d; mkfifo fifo; ln -s f link");
        let f = guest.node(ROOT_ID, "f");
        let args = OpenIn::default();
        assert_eq!(errno_of(FileSystem::open(guest.fs, &ROOT, f, &args)), Some(libc::ENOSYS));
        assert_eq!(errno_of(FileSystem::opendir(guest.fs, &ROOT, ROOT_ID, &args)), Some(libc::ENOSYS));
        assert_eq!(errno_of(FileSystem::flush(guest.fs, &ROOT, f, &FlushIn::default())), Some(libc::ENOSYS));
        guest.fs.readable(0, f).unwrap();
        guest.fs.writable(0, f).unwrap();
        for name in ["d", "fifo", "link"] {
            let node = guest.node(ROOT_ID, name);
            assert_eq!(errno_of(guest.fs.readable(0, node)), Some(libc::EBADF), "{name}");
            assert_eq!(errno_of(guest.fs.writable(0, node)), Some(libc::EBADF), "{name}");
        }
        assert_eq!(errno_of(guest.fs.any(0, guest.node(ROOT_ID, "fifo"))), Some(libc::EBADF));
        guest.fs.listing(0, guest.node(ROOT_ID, "d")).unwrap();
        assert_eq!(errno_of(guest.fs.listing(0, f)), Some(libc::ENOTDIR));
    });
}

#[test]
fn attributes_last_only_while_a_lease_covers_what_was_read() {
    one(10, |guest, dir| {
        others(dir, "echo x > f");
        let f = guest.node(ROOT_ID, "f");
        assert_eq!(guest.attr_valid(f), LASTING.as_secs(), "nothing has been read");
        guest.fs.readable(0, f).unwrap();
        assert_eq!((guest.attr_valid(f), guest.fs.coherence.leases()), (LASTING.as_secs(), 1));
        let path = dir.join("f");
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| File::options().append(true).open(&path).unwrap());
            guest.wait_for_kind(kind::DROP_DATA, f);
            guest.fs.dropped(f);
            let writer = writer.join().unwrap();
            guest.reads_and_answers(f, kind::EXPIRE);
            assert_eq!(guest.attr_valid(f), 0, "somebody has it open for writing");
            guest.fs.readable(0, f).unwrap();
            // It need not be told that again; what others store by a mapping changes no time.
            guest.wait_for_kind(kind::MODIFIED, f);
            assert!(guest.seen.lock().iter().all(|change| change.kind == kind::MODIFIED));
            drop(writer);
        });
        guest.lasts_when_clean(f);
    });
}

#[test]
fn the_guests_own_writer_is_closed_when_it_is_idle() {
    one(10, |guest, dir| {
        others(dir, "echo x > f");
        let f = guest.node(ROOT_ID, "f");
        guest.fs.readable(0, f).unwrap();
        let writer = guest.fs.writable(0, f).unwrap();
        // By its cache the guest may write without asking for the attributes afterwards.
        std::thread::scope(|scope| {
            let write = scope.spawn(|| guest.fs.coherence.writes(&writer.held.inode, &writer.held.pin, true));
            guest.wait_for_kind(kind::EXPIRE, f);
            guest.fs.dropped(f);
            write.join().unwrap();
        });
        drop(writer);
        assert_eq!((guest.attr_valid(f), guest.fs.coherence.leases()), (0, 0));
        guest.lasts_when_clean(f);
        // A program that is being executed cannot be open for writing.
        drop(guest.fs.writable(0, f).unwrap());
        assert_eq!((guest.attr_valid(f), guest.fs.coherence.leases()), (0, 0), "no lease covers what it writes");
        until("its end", || others_can_lease(&dir.join("f")));
    });
}

/// Whether nobody has the file open for writing.
fn others_can_lease(path: &Path) -> bool {
    use std::os::fd::AsRawFd;
    let file = File::open(path).unwrap();
    // SAFETY: a descriptor, a command and a number.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) == 0 }
}

#[test]
fn a_guest_that_does_not_answer_is_not_waited_for_long() {
    one(10, |guest, dir| {
        others(dir, "echo x > f");
        let f = guest.node(ROOT_ID, "f");
        let _writer = File::options().append(true).open(dir.join("f")).unwrap();
        let start = Instant::now();
        guest.fs.readable(0, f).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(90), "it was not waited for");
        assert!(start.elapsed() < LONG);
        assert_eq!(guest.attr_valid(f), 0);
        // Its answer comes later, and is not one to another question.
        guest.fs.dropped(f);
        assert_eq!(guest.attr_valid(f), 0);
    });
}

#[test]
fn what_there_is_no_lease_for_is_dropped_first() {
    one(3, |guest, dir| {
        others(dir, "for i in 0 1 2 3 4; do echo $i > f$i; done");
        let files: Vec<u64> = (0..5).map(|i| guest.node(ROOT_ID, &format!("f{i}"))).collect();
        files.iter().for_each(|f| drop(guest.fs.readable(0, *f).unwrap()));
        for f in &files[..2] {
            guest.wait_for_kind(kind::DROP_DATA, *f);
            guest.fs.dropped(*f);
        }
        assert_eq!(guest.fs.coherence.leases(), 3);
        assert!(files.iter().all(|f| guest.attr_valid(*f) == LASTING.as_secs()), "what it has is covered, or nothing");
        files.iter().for_each(|f| guest.fs.forget(*f, 1));
        assert_eq!(guest.fs.coherence.leases(), 0);
    });
}
