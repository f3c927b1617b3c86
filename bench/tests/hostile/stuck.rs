//! A file system below the share that does not answer: what is stuck in it holds up nothing else, can be interrupted,
//! and does not keep a queue from being stopped and started.

use crate::guest::{op, request, slot_at, sqe, Answer, Hostile, Ring};
use crate::rig::{soon, Target, PATIENCE};
use crate::stream::Stream;
use crate::stuck_fs::StuckFs;
use std::io::Write;
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::control::OP_NOOP;
use vhost::VhostBackend;

/// One queue of a guest, by any transport. What is submitted has the number `unique`, and may come back later.
trait Channel {
    fn submit(&mut self, unique: u64, message: &[u8]);
    /// The next answer, within some time.
    fn answer(&mut self, within: Duration) -> Option<(u64, Answer)>;
}

fn numbered(unique: u64, message: &[u8]) -> Vec<u8> {
    let mut message = message.to_vec();
    message[8..16].copy_from_slice(&unique.to_ne_bytes());
    message
}

const INTERRUPT: u32 = op::INTERRUPT;

struct OnRing<'a>(&'a Hostile, Ring);

impl Channel for OnRing<'_> {
    fn submit(&mut self, unique: u64, message: &[u8]) {
        let entry = sqe(self.0, 1, unique as u32 % 16, &numbered(unique, message));
        assert!(self.1.submit(self.0, &entry));
    }

    fn answer(&mut self, within: Duration) -> Option<(u64, Answer)> {
        let cqe = self.1.reap(within)?;
        let mut payload = cqe.inline[16..(cqe.inline_len as usize).clamp(16, cqe.inline.len())].to_vec();
        payload.extend(self.0.bytes(slot_at(1, cqe.user_data), cqe.payload_len as usize));
        let word = |at: usize| i32::from_ne_bytes(cqe.inline[at..at + 4].try_into().unwrap());
        let unique = u64::from_ne_bytes(cqe.inline[8..16].try_into().unwrap());
        Some((unique, Answer { error: word(4), payload }))
    }
}

struct OnVirtqueue<'a>(&'a mut Hostile, u16);

impl Channel for OnVirtqueue<'_> {
    fn submit(&mut self, unique: u64, message: &[u8]) {
        self.0.send_in(1, unique as u16 % 16, &numbered(unique, message));
    }

    fn answer(&mut self, within: Duration) -> Option<(u64, Answer)> {
        let start = Instant::now();
        while self.0.used(1) == self.1 {
            if start.elapsed() > within {
                return None;
            }
            std::thread::yield_now();
        }
        let place = self.0.used_place(1, self.1);
        self.1 = self.1.wrapping_add(1);
        Some(self.0.answer_in(1, place))
    }
}

struct OnSocket(Stream);

impl Channel for OnSocket {
    fn submit(&mut self, unique: u64, message: &[u8]) {
        self.0 .0.write_all(&numbered(unique, message)).unwrap();
    }

    fn answer(&mut self, within: Duration) -> Option<(u64, Answer)> {
        self.0 .0.set_read_timeout(Some(within.max(Duration::from_millis(1)))).unwrap();
        self.0.receive().ok()
    }
}

fn call(channel: &mut dyn Channel, unique: u64, message: &[u8]) -> Answer {
    channel.submit(unique, message);
    let (answered, answer) = channel.answer(PATIENCE).expect("an answer");
    assert_eq!(answered, unique);
    answer
}

/// What can get stuck: an opcode, its node, and its body.
fn stuck_requests(channel: &mut dyn Channel) -> Vec<(u32, u64, Vec<u8>)> {
    assert_eq!(call(channel, 1, &request(op::INIT, 0, &op::init_body())).error, 0);
    let root = call(channel, 1, &request(op::LOOKUP, 1, b"stuck\0")).word(0);
    let mut node = |name: &[u8]| call(channel, 1, &request(op::LOOKUP, root, name)).word(0);
    let (file, link, dir) = (node(b"file\0"), node(b"link\0"), node(b"dir\0"));
    let handle = call(channel, 1, &request(op::OPEN, file, &op::words(&[libc::O_RDWR as u32, 0]))).word(0);
    let list = call(channel, 1, &request(op::OPENDIR, dir, &op::words(&[0, 0]))).word(0);
    let longs = |words: &[u64]| words.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<_>>();
    let named = |fixed: &[u32], names: &[u8]| [op::words(fixed), names.to_vec()].concat();
    let mode: u32 = 0o100644;
    // struct fuse_setattr_in: FATTR_MODE.
    let mut setattr = vec![0; 88];
    setattr[0] = 1;
    setattr[68..72].copy_from_slice(&mode.to_ne_bytes());
    vec![
        (op::LOOKUP, root, b"file\0".to_vec()),
        (op::GETATTR, file, vec![0; 16]),
        (op::SETATTR, file, setattr),
        (op::READLINK, link, Vec::new()),
        (op::SYMLINK, root, b"new\0target\0".to_vec()),
        (op::MKNOD, root, named(&[mode, 0, 0, 0], b"new\0")),
        (op::MKDIR, root, named(&[0o755, 0], b"new\0")),
        (op::UNLINK, root, b"file\0".to_vec()),
        (op::RMDIR, root, b"dir\0".to_vec()),
        (op::RENAME, root, [longs(&[root]), b"file\0new\0".to_vec()].concat()),
        (op::RENAME2, root, [longs(&[root, 0]), b"file\0new\0".to_vec()].concat()),
        (op::LINK, root, [longs(&[file]), b"new\0".to_vec()].concat()),
        (op::OPEN, file, op::words(&[0, 0])),
        (op::CREATE, root, named(&[libc::O_RDWR as u32, mode, 0, 0], b"new\0")),
        (op::READ, file, op::read_body(handle, 0, 4096)),
        (op::WRITE, file, [longs(&[handle, 0]), op::words(&[8, 0, 0, 0, 0, 0]), vec![7; 8]].concat()),
        (op::STATFS, root, Vec::new()),
        (op::FSYNC, file, longs(&[handle, 0])),
        (op::FLUSH, file, longs(&[handle, 0, 0])),
        (op::OPENDIR, dir, op::words(&[0, 0])),
        (op::READDIR, dir, op::read_body(list, 0, 4096)),
        (op::READDIRPLUS, dir, op::read_body(list, 0, 4096)),
        (op::FSYNCDIR, dir, longs(&[list, 0])),
        (op::FALLOCATE, file, longs(&[handle, 0, 4096, 0])),
        (op::LSEEK, file, longs(&[handle, 0, 3])),
        (op::ACCESS, file, op::words(&[4, 0])),
        (op::SYNCFS, root, longs(&[0])),
    ]
}

/// Others' latencies beside each.
fn each_opcode(transport: &str, target: &Target, channel: &mut dyn Channel) {
    let Some(fs) = StuckFs::mount(target.path("share/stuck")) else { return };
    let requests = stuck_requests(channel);
    let (mut stuck, mut times) = (Vec::new(), Vec::new());
    for (opcode, node, body) in requests {
        fs.hold();
        channel.submit(1, &request(opcode, node, &body));
        let mut early = None;
        // Some file systems' calls do not ask this one.
        let start = Instant::now();
        while fs.held() == 0 && early.is_none() && start.elapsed() < PATIENCE {
            early = channel.answer(Duration::from_millis(5));
        }
        if early.is_some() {
            fs.release(None);
            continue;
        }
        for _ in 0..50 {
            let begin = Instant::now();
            let answer = call(channel, 2, &request(op::GETATTR, 1, &[0; 16]));
            assert_eq!(answer.error, 0, "{transport}: beside opcode {opcode}");
            times.push(begin.elapsed());
        }
        assert!(fs.held() > 0, "{transport}: opcode {opcode} was not stuck");
        stuck.push(opcode);
        let mut late = None;
        while late.is_none() {
            // What goes on asks for more.
            fs.release(None);
            late = channel.answer(Duration::from_millis(20));
            assert!(start.elapsed() < 3 * PATIENCE, "{transport}: opcode {opcode} is never answered");
        }
        assert_eq!(late.unwrap().0, 1);
    }
    times.sort_unstable();
    let p99 = times[times.len() * 99 / 100];
    println!("{transport}: beside {} stuck opcodes: median {:?}, p99 {p99:?}", stuck.len(), times[times.len() / 2]);
    assert!(stuck.len() >= 22, "{transport}: only {stuck:?} were stuck");
    assert!(p99 < Duration::from_secs(2), "{transport}: p99 {p99:?}");
}

#[test]
fn a_stuck_request_of_each_opcode_holds_up_no_other() {
    let target = Target::new(&[]);
    let mut guest = target.guest();
    let ring = guest.ring(1);
    each_opcode("ring", &target, &mut OnRing(&guest, ring));
    drop(guest);

    let target = Target::new(&[]);
    let mut guest = target.guest();
    let used = guest.used(1);
    each_opcode("virtqueue", &target, &mut OnVirtqueue(&mut guest, used));
    drop(guest);

    let target = Target::new(&["--transport", "socket"]);
    each_opcode("socket", &target, &mut OnSocket(Stream::connect(&target.socket())));
}

/// As many requests as there may be threads for are stuck, and one more: then the next ones wait, and go on later.
#[test]
fn more_stuck_requests_than_threads_wait() {
    let mut target = Target::new(&["--thread-pool-size", "2"]);
    let mut guest = target.guest();
    let mut channel = {
        let ring = guest.ring(1);
        OnRing(&guest, ring)
    };
    let Some(fs) = StuckFs::mount(target.path("share/stuck")) else { return };
    let requests = stuck_requests(&mut channel);
    let getattr = requests.iter().find(|r| r.0 == op::GETATTR).unwrap();
    fs.hold();
    for unique in 3..12 {
        channel.submit(unique, &request(getattr.0, getattr.1, &getattr.2));
    }
    soon("some are stuck", || (fs.held() >= 2).then_some(()));
    assert!(channel.answer(Duration::from_millis(50)).is_none());
    let start = Instant::now();
    let mut answered = 0;
    while answered < 9 {
        fs.release(None);
        answered += usize::from(channel.answer(Duration::from_millis(20)).is_some());
        assert!(start.elapsed() < PATIENCE, "{answered} of 9 were answered");
    }
    assert_eq!(call(&mut channel, 2, &request(OP_NOOP, 1, b"")).error, 0);
    drop(fs);
    drop(guest);
    target.check("many stuck requests");
}

/// INTERRUPT, by the control queue, ends a stuck request: before and after it is late.
#[test]
fn a_stuck_request_is_interrupted() {
    let mut target = Target::new(&[]);
    let mut guest = target.guest();
    let used = guest.used(1);
    let Some(fs) = StuckFs::mount(target.path("share/stuck")) else { return };
    let requests = stuck_requests(&mut OnVirtqueue(&mut guest, used));
    let mut used = guest.used(1);
    for (round, opcode) in [op::READ, op::GETATTR, op::LOOKUP, op::WRITE].into_iter().enumerate() {
        let (_, node, body) = requests.iter().find(|r| r.0 == opcode).unwrap();
        // The host keeps an INTERRUPT for a while: it must not meet the next request.
        let id = 33 + round as u64;
        fs.hold_only(opcode);
        OnVirtqueue(&mut guest, used).submit(id, &request(opcode, *node, body));
        if round % 2 == 0 {
            soon("it is stuck", || (fs.held() > 0).then_some(()));
            std::thread::sleep(Duration::from_millis(20));
        }
        guest.send(0, &request(INTERRUPT, 0, &id.to_ne_bytes()));
        let mut channel = OnVirtqueue(&mut guest, used);
        let (unique, answer) = channel.answer(PATIENCE).expect("an interrupted request is answered");
        used = channel.1;
        assert_eq!((unique, answer.error), (id, -libc::EINTR), "opcode {opcode}");
        fs.release(None);
    }
    // INTERRUPTs of what is not there do no harm.
    for unique in 0..1000u64 {
        let before = guest.used(0);
        guest.send(0, &request(INTERRUPT, 0, &unique.to_ne_bytes()));
        soon("INTERRUPT gives its chain back", || (guest.used(0) != before).then_some(()));
    }
    let mut channel = OnVirtqueue(&mut guest, used);
    assert_eq!(call(&mut channel, 2, &request(op::GETATTR, 1, &[0; 16])).error, 0);
    drop(fs);
    drop(guest);
    target.check("interrupts");
}

/// Stops the queues as a VMM does for a pause; where each is to go on.
fn stop(guest: &mut Hostile) -> [u16; 3] {
    [0, 1, 2].map(|queue| guest.front.get_vring_base(queue).unwrap() as u16)
}

fn go_on(guest: &mut Hostile, bases: [u16; 3]) {
    let (region, features) = (guest.region(), guest.front.get_features().unwrap());
    guest.front.set_features(features & !(1 << 29)).unwrap();
    guest.front.set_mem_table(&[region]).unwrap();
    for (queue, base) in bases.into_iter().enumerate() {
        guest.start_queue_at(queue, base).unwrap();
    }
}

/// A pause of ten seconds with a request that is stuck throughout: the queue goes on beside it, and it is answered in
/// the end, once. Then the same with an answer that comes during the pause.
#[test]
fn a_pause_with_a_stuck_request() {
    let mut target = Target::new(&[]);
    let mut guest = target.guest();
    let ring = guest.ring(1);
    let Some(fs) = StuckFs::mount(target.path("share/stuck")) else { return };
    let mut channel = OnRing(&guest, ring);
    let mut requests = stuck_requests(&mut channel);
    // First in the list: READs of a file that is not read directly.
    let root = call(&mut channel, 1, &request(op::LOOKUP, 1, b"stuck\0")).word(0);
    let cached = call(&mut channel, 1, &request(op::LOOKUP, root, b"cached\0")).word(0);
    let handle = call(&mut channel, 1, &request(op::OPEN, cached, &op::words(&[0, 0]))).word(0);
    for offset in [1 << 19, 0] {
        requests.insert(0, (op::READ, cached, op::read_body(handle, offset, 4096)));
    }
    let mut ring = channel.1;
    // READ: by the kernel of the host's machine, into the slot. READLINK: by the host.
    for (during, opcode) in [(true, op::READ), (false, op::READ), (true, op::READLINK)] {
        let at = requests.iter().position(|r| r.0 == opcode).unwrap();
        let (_, node, body) = requests.remove(at);
        let len = if opcode == op::READ { 4096 } else { 1000 };
        fs.hold_only(opcode);
        let mut channel = OnRing(&guest, ring);
        channel.submit(5, &request(opcode, node, &body));
        soon("it is stuck", || (fs.held() > 0).then_some(()));
        ring = channel.1;
        let start = Instant::now();
        let bases = stop(&mut guest);
        assert!(start.elapsed() < PATIENCE, "the stop took {:?}", start.elapsed());
        let before = guest.bytes(slot_at(1, 5), 4096);
        if during {
            fs.release(Some(&[0xaa; 4096][..len]));
        }
        std::thread::sleep(Duration::from_secs(10).saturating_sub(start.elapsed()));
        assert!(ring.reap(Duration::ZERO).is_none(), "answered while stopped");
        assert_eq!(guest.bytes(slot_at(1, 5), 4096), before, "the host wrote to a stopped guest");
        go_on(&mut guest, bases);
        let mut channel = OnRing(&guest, ring);
        if !during {
            for _ in 0..20 {
                assert_eq!(call(&mut channel, 2, &request(op::GETATTR, 1, &[0; 16])).error, 0);
            }
            assert!(fs.held() > 0);
            fs.release(Some(&[0xaa; 4096][..len]));
        }
        let (unique, answer) = channel.answer(PATIENCE).expect("the stuck request is answered");
        assert_eq!((unique, answer.error), (5, 0));
        assert!(answer.payload == vec![0xaa; len]);
        assert!(channel.answer(Duration::from_millis(50)).is_none(), "answered twice");
        ring = channel.1;
    }
    drop(fs);
    drop(guest);
    target.check("pauses with stuck requests");
}

/// What is stuck for a driver that has been replaced is not answered to the next one, and does not touch its memory.
#[test]
fn a_new_driver_after_a_stuck_request() {
    let mut target = Target::new(&["--thread-pool-size", "1"]);
    let mut guest = target.guest();
    let Some(fs) = StuckFs::mount(target.path("share/stuck")) else { return };
    let used = guest.used(1);
    let requests = stuck_requests(&mut OnVirtqueue(&mut guest, used));
    let (opcode, node, body) = requests.iter().find(|r| r.0 == op::READLINK).unwrap().clone();
    fs.hold();
    // All threads that there may be.
    for unique in 5..9 {
        let used = guest.used(1);
        OnVirtqueue(&mut guest, used).submit(unique, &request(opcode, node, &body));
    }
    soon("they are stuck", || (fs.held() >= 2).then_some(()));
    guest.front.get_vring_base(1).unwrap();
    guest.begin_anew(1);
    guest.settle();
    let before = guest.used(1);
    let places: Vec<_> = (5..9).map(|place| guest.reply_bytes(1, place)).collect();
    assert_eq!(call(&mut OnVirtqueue(&mut guest, before), 1, &request(OP_NOOP, 1, b"")).error, 0, "the new driver");
    fs.release(Some(&[0xaa; 1000]));
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(guest.used(1), before.wrapping_add(1), "answers of a former driver");
    let now: Vec<_> = (5..9).map(|place| guest.reply_bytes(1, place)).collect();
    assert!(now == places, "the host wrote to the new driver's memory");
    drop(fs);
    drop(guest);
    target.check("new drivers with stuck requests");
}
