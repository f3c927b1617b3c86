//! What INIT agreed on, as it shows through the mount: mostly by the requests
//! that come of one and the same work.

use crate::files::open;
use crate::refusals::answer_init;
use crate::rig::{all_threads, errno, mount_command, soon, Guest, Host, Peer, Scratch, Stopped, Unmounted, PATIENCE};
use crate::skip;
use nix::mount::{mount, MsFlags};
use nix::sys::mman::{mmap, munmap, MapFlags, ProtFlags};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// One queue, so that all requests are counted in one place.
fn mounted(options: &[&str], words: &str) -> Option<(Scratch, Host, Guest)> {
    let scratch = Scratch::new()?;
    let host = Host::start_with(&scratch, Peer::Ours, options);
    let guest = Guest::mount(&scratch, &host, &format!("channel=fuse,queues=1{words}"));
    Some((scratch, host, guest))
}

/// Requests answered so far, by the operation's name.
fn counts(guest: &Guest) -> BTreeMap<String, u64> {
    let said = guest.statistics();
    let lines = said.lines().filter_map(|line| line.split_once(" done "));
    lines
        .map(|(left, _)| left.trim().rsplit_once(' ').unwrap())
        .map(|(name, n)| (name.trim().into(), n.parse().unwrap()))
        .collect()
}

/// The requests that `work` causes.
fn requests(guest: &Guest, work: impl FnOnce()) -> Box<dyn Fn(&str) -> u64> {
    let before = counts(guest);
    work();
    let after = counts(guest);
    Box::new(move |name| after.get(name).unwrap_or(&0) - before.get(name).unwrap_or(&0))
}

/// Most slots that have been in use at a time.
fn most_at_a_time(guest: &Guest) -> u64 {
    let said = guest.statistics();
    said.lines().find_map(|line| line.rsplit_once("at most ")?.1.parse().ok()).expect("a queue's line")
}

fn open_direct(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .unwrap()
}

/// 4 MiB of whole pages, as O_DIRECT wants them.
fn pages(memory: &mut Vec<u8>) -> &mut [u8] {
    const BYTES: usize = 4 << 20;
    memory.resize(BYTES + 4096, 7);
    let start = (memory.as_ptr() as usize).wrapping_neg() % 4096;
    &mut memory[start..start + BYTES]
}

/// The kernel's limit of a request, as it was when dropped.
struct PagesLimit(String);

const PAGES_LIMIT: &str = "/proc/sys/fs/fuse/max_pages_limit";

impl PagesLimit {
    fn set(pages: u32) -> Option<PagesLimit> {
        let was = fs::read_to_string(PAGES_LIMIT).ok()?;
        fs::write(PAGES_LIMIT, pages.to_string()).ok()?;
        Some(PagesLimit(was))
    }
}

impl Drop for PagesLimit {
    fn drop(&mut self) {
        let _ = fs::write(PAGES_LIMIT, &self.0);
    }
}

/// WRITE and READ requests that 4 MiB take.
fn requests_for_4_mib(words: &str) -> Option<(u64, u64)> {
    let (_scratch, _host, guest) = mounted(&[], words)?;
    let mut memory = Vec::new();
    let pages = pages(&mut memory);
    let file = open_direct(&guest.point.join("f"));
    let written = requests(&guest, || file.write_all_at(pages, 0).unwrap());
    let read = requests(&guest, || file.read_exact_at(pages, 0).unwrap());
    drop(file);
    guest.unmount();
    Some((written("WRITE"), read("READ")))
}

#[test]
fn requests_are_as_large_as_slots_and_kernel_allow() {
    for (words, requests) in [("", 4), (",slot_size=65536", 64), (",slot_size=8192", 512)] {
        let Some(taken) = requests_for_4_mib(words) else { return };
        assert_eq!(taken, (requests, requests), "{words}");
    }
    let Some(_limit) = PagesLimit::set(1024) else {
        return skip::unsupported(format_args!("{PAGES_LIMIT} cannot be set; it came with Linux 6.13"));
    };
    assert_eq!(requests_for_4_mib(",slots=8,slot_size=4194304"), Some((1, 1)));
    // The kernel allows more than the slots have, and the slots have more than the kernel allows.
    assert_eq!(requests_for_4_mib(""), Some((4, 4)));
    let Some(_limit) = PagesLimit::set(512) else { return };
    assert_eq!(requests_for_4_mib(",slots=8,slot_size=4194304"), Some((2, 2)));
}

/// A host that takes only small writes is not sent larger ones.
#[test]
fn a_host_s_limit_is_kept() {
    let Some(scratch) = Scratch::new() else { return };
    let socket = scratch.path("socket");
    for (max_write, told) in [(32 << 10, "writes up to 32 KiB"), (1 << 30, "writes up to 1024 KiB")] {
        let host = answer_init(&socket, 0, &[7, 38, 0, 0, 0, max_write]);
        let mut guest = mount_command(&scratch, &socket, "transport=socket,queues=1,channel=fuse,noreconnect");
        let mut guest = guest.arg("-f").stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(guest.stdout.take().unwrap()), &mut line).unwrap();
        assert!(line.contains(told), "{line}");
        guest.kill().unwrap();
        guest.wait().unwrap();
        host.join().unwrap();
        nix::mount::umount2(&scratch.path("mnt"), nix::mount::MntFlags::empty()).unwrap();
    }
}

fn list_100(options: &[&str]) -> Option<(u64, u64, u64)> {
    let (scratch, _host, guest) = mounted(options, "")?;
    fs::create_dir(scratch.path("share/d")).unwrap();
    (0..100).for_each(|i| fs::write(scratch.path(&format!("share/d/{i}")), "").unwrap());
    let asked = requests(&guest, || {
        fs::read_dir(guest.point.join("d")).unwrap().for_each(|e| assert!(e.unwrap().metadata().unwrap().is_file()));
    });
    guest.unmount();
    Some((asked("READDIRPLUS").min(1), asked("READDIR").min(1), asked("LOOKUP") / 100))
}

#[test]
fn readdirplus() {
    let Some(with) = list_100(&[]) else { return };
    assert_eq!((with.0, with.2), (1, 0), "names come with their attributes");
    assert_eq!(list_100(&["--no-readdirplus"]), Some((0, 1, 1)));
    // Attributes that must not be kept are not sent.
    assert_eq!(list_100(&["--cache=never"]), Some((0, 1, 1)));
}

/// The kernel's count of a mount's requests that are not answered.
struct Waiting {
    count: PathBuf,
    _control: Unmounted,
}

impl Waiting {
    fn new(scratch: &Scratch, guest: &Guest) -> Waiting {
        let control = scratch.path("fusectl");
        fs::create_dir(&control).unwrap();
        mount(Some("none"), &control, Some("fusectl"), MsFlags::empty(), None::<&str>).unwrap();
        // A connection's number is its device's.
        let number = nix::sys::stat::minor(fs::metadata(&guest.point).unwrap().dev());
        Waiting { count: control.join(format!("{number}/waiting")), _control: Unmounted(control) }
    }

    /// Waits until there are `wanted`, or a minute; and until the guest has sent on all that it can: its threads sleep.
    fn await_sent(&self, wanted: u64, guest: &Guest) {
        let count = || fs::read_to_string(&self.count).unwrap().trim().parse::<u64>().unwrap();
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE && count() < wanted {
            std::thread::sleep(Duration::from_millis(10));
        }
        println!("{} requests, of {wanted} that are wanted", count());
        soon("the guest sleeps", || {
            let asleep = || all_threads(guest.pid(), 'S');
            let first = asleep();
            std::thread::sleep(Duration::from_millis(50));
            (first && asleep()).then_some(())
        });
    }
}

/// Most requests under way at a time when `n` threads work while the host is stopped; each has a file of 1 MiB that was
/// opened with `flags` before. Waits until there are `wanted`.
fn sent_at_once(
    n: usize,
    words: &str,
    flags: i32,
    wanted: u64,
    work: impl Fn(&Path, usize, File) + Sync,
) -> Option<u64> {
    let (scratch, host, guest) = mounted(&[], words)?;
    let open = |i: usize| {
        fs::write(scratch.path(&format!("share/{i}")), vec![1; 1 << 20]).unwrap();
        OpenOptions::new().read(true).custom_flags(flags).open(guest.point.join(i.to_string())).unwrap()
    };
    let files: Vec<_> = (0..n).map(open).collect();
    let requests = Waiting::new(&scratch, &guest);
    let stopped = Stopped::new(host.server());
    std::thread::scope(|scope| {
        let (point, work) = (&guest.point, &work);
        let start = |(i, file)| scope.spawn(move || work(point, i, file));
        let threads: Vec<_> = files.into_iter().enumerate().map(start).collect();
        requests.await_sent(wanted, &guest);
        let waits = threads.iter().all(|t| !t.is_finished());
        drop(stopped);
        assert!(waits, "a stopped host answers");
    });
    let most = most_at_a_time(&guest);
    guest.unmount();
    Some(most)
}

#[test]
fn parallel_dirops() {
    let look = |dir: &Path, i, _| assert_eq!(errno(fs::metadata(dir.join(format!("no{i}")))), libc::ENOENT);
    let Some(most) = sent_at_once(6, "", 0, 6, look) else { return };
    assert!(most >= 6, "{most} lookups in one directory at a time");
}

#[test]
fn async_read_and_dio() {
    let read = |_: &Path, _, file: File| assert_eq!(file.read_at(pages(&mut Vec::new()), 0).unwrap(), 1 << 20);
    let Some(most) = sent_at_once(1, ",slot_size=8192", 0, 8, read) else { return };
    assert!(most >= 8, "{most} requests of one reader at a time");
    let most = sent_at_once(1, ",slot_size=65536", libc::O_DIRECT, 16, read).unwrap();
    assert!(most >= 16, "{most} requests of one direct read at a time");
}

/// Without it the guest's kernel looks for capabilities to drop before each write.
#[test]
fn killpriv_v2() {
    for (option, looks) in [("--killpriv-v2", 0), ("--no-killpriv-v2", 10)] {
        let Some((_scratch, _host, guest)) = mounted(&["--xattr", option], "") else { return };
        let mut file = File::create(guest.point.join("f")).unwrap();
        file.write_all(b"x").unwrap();
        let asked = requests(&guest, || (0..10).for_each(|_| file.write_all(b"x").unwrap()));
        assert_eq!((asked("WRITE"), asked("GETXATTR")), (10, looks), "{option}");
        drop(file);
        guest.unmount();
    }
}

/// With ATOMIC_O_TRUNC the kernel says so after the file has been emptied.
#[test]
fn a_running_program_cannot_be_truncated() {
    let Some((_scratch, _host, guest)) = mounted(&[], "") else { return };
    let path = guest.point.join("sleep");
    let bytes = fs::copy("/bin/sleep", &path).unwrap();
    let mut running = std::process::Command::new(&path).arg("60").spawn().unwrap();
    assert_eq!(errno(OpenOptions::new().write(true).truncate(true).open(&path)), libc::ETXTBSY);
    assert_eq!(fs::metadata(&path).unwrap().len(), bytes);
    running.kill().unwrap();
    running.wait().unwrap();
    guest.unmount();
}

fn set_xattr(path: &Path, name: &std::ffi::CStr, value: &[u8]) -> std::io::Result<()> {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: NUL-ended strings, and a value of the length that is told.
    match unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// `rights.rs` has what they do; here it is whether they are there.
#[test]
fn xattrs_and_acls_by_option() {
    // An ACL that says no more than the mode 0640.
    let acl: Vec<u8> = [2u32, 6 << 16 | 1, u32::MAX, 4 << 16 | 4, u32::MAX, 0x20, u32::MAX]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect();
    for (options, xattr, posix_acl) in [
        (&[][..], false, false),
        (&["--xattr"], true, false),
        (&["--posix-acl=auto"], true, true),
        (&["--xattr", "--posix-acl=never"], true, false),
        // Modes that are kept in an attribute are not linked with ACLs.
        (&["--xattr", "--posix-acl=auto", "--owners=xattr"], true, false),
    ] {
        let Some((_scratch, _host, guest)) = mounted(options, "") else { return };
        let path = guest.point.join("f");
        fs::write(&path, "x").unwrap();
        let set = |name, value: &[u8]| set_xattr(&path, name, value).map_err(|e| e.raw_os_error());
        let refused = Err(Some(libc::EOPNOTSUPP));
        assert_eq!(set(c"user.a", b"b"), if xattr { Ok(()) } else { refused }, "{options:?}");
        assert_eq!(set(c"system.posix_acl_access", &acl), if posix_acl { Ok(()) } else { refused }, "{options:?}");
        guest.unmount();
    }
}

#[test]
fn writeback_if_both_sides_want_it() {
    for (options, words, collected) in [
        (&["--cache=always", "--writeback"][..], ",writeback", true),
        (&["--cache=always", "--writeback"], "", false),
        (&[], ",writeback", false),
    ] {
        let Some((_scratch, _host, guest)) = mounted(options, words) else { return };
        let mut file = File::create(guest.point.join("f")).unwrap();
        let asked = requests(&guest, || {
            (0..1000).for_each(|_| file.write_all(&[1; 128]).unwrap());
            file.sync_all().unwrap();
        });
        // The kernel may write what it has collected at any time.
        let writes = asked("WRITE");
        assert!(if collected { (1..100).contains(&writes) } else { writes == 1000 }, "{options:?}{words}: {writes}");
        drop(file);
        guest.unmount();
    }
}

/// What reading a file and its attributes twice asks of the host: GETATTR, LOOKUP, OPEN, READ the second time.
struct Cached {
    attributes: bool,
    data_while_open: bool,
    data_when_opened_again: bool,
    shared_mapping: bool,
}

fn assert_cache(mode: &str, more: &[&str], expected: &Cached) {
    let cache = format!("--cache={mode}");
    let Some((scratch, _host, guest)) = mounted(&[&[cache.as_str()], more].concat(), "") else { return };
    let path = guest.point.join("f");
    fs::write(scratch.path("share/f"), vec![1; 5000]).unwrap();
    let read = |file: &File| file.read_at(&mut [0; 5000], 0).unwrap();
    let file = open(&path);
    read(&file);
    fs::metadata(&path).unwrap();
    let asked = requests(&guest, || assert!(fs::metadata(&path).unwrap().is_file()));
    assert_eq!(asked("LOOKUP") + asked("GETATTR") == 0, expected.attributes, "{mode}: attributes");
    let asked = requests(&guest, || assert_eq!(read(&file), 5000));
    assert_eq!(asked("READ") == 0, expected.data_while_open, "{mode}: data");
    drop(file);
    let asked = requests(&guest, || assert_eq!(read(&open(&path)), 5000));
    assert_eq!(asked("READ") == 0, expected.data_when_opened_again, "{mode}: data of a file opened again");

    let file = open(&path);
    let length = std::num::NonZeroUsize::new(5000).unwrap();
    // SAFETY: a new mapping of a file as long as it, never read.
    let mapped = unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &file, 0) };
    assert_eq!(mapped.is_ok(), expected.shared_mapping, "{mode}: {mapped:?}");
    if let Ok(area) = mapped {
        // SAFETY: the mapping of above.
        unsafe { munmap(area, 5000) }.unwrap();
    }
    drop(file);
    guest.unmount();
}

#[test]
fn cache_modes() {
    let never =
        Cached { attributes: false, data_while_open: false, data_when_opened_again: false, shared_mapping: false };
    assert_cache("never", &[], &Cached { shared_mapping: true, ..never });
    assert_cache("never", &["--no-allow-mmap"], &never);
    assert_cache("metadata", &["--no-allow-mmap"], &Cached { attributes: true, ..never });
    let auto = Cached { attributes: true, data_while_open: true, data_when_opened_again: false, shared_mapping: true };
    assert_cache("auto", &[], &auto);
    assert_cache("always", &[], &Cached { data_when_opened_again: true, ..auto });
}

/// What somebody else does to the files is seen at once, after a second, or when they are opened again.
#[test]
fn changes_behind_the_mount() {
    for mode in ["never", "auto"] {
        let cache = format!("--cache={mode}");
        let Some((scratch, _host, guest)) = mounted(&[&cache], "") else { return };
        let (here, there) = (guest.point.join("f"), scratch.path("share/f"));
        fs::write(&there, "first").unwrap();
        assert_eq!(fs::read(&here).unwrap(), b"first");
        fs::write(&there, "second!").unwrap();
        let mut text = String::new();
        if mode == "never" {
            File::open(&here).unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(text, "second!");
            assert_eq!(fs::metadata(&here).unwrap().len(), 7);
        }
        soon("the change shows", || (fs::read(&here).ok()? == b"second!").then_some(()));
        fs::remove_file(&there).unwrap();
        soon("the removal shows", || (!here.exists()).then_some(()));
        guest.unmount();
    }
}
