//! Queues that the front end stops: at a reset, and when the VM pauses.

use crate::guest::{op, request, sqe, Hostile};
use crate::rig::{soon, Target};
use std::fs::File;
use std::time::Duration;
use tunnelfs_fuse_abi::control::OP_NOOP;
use vhost::vhost_user::VhostUserFrontend;
use vhost::VhostBackend;

/// Copied by one request, which the pool has for long.
const BYTES: u64 = 64 << 20;

/// An INITed session, and a request that copies a large file.
fn slow_request(target: &Target, guest: &mut Hostile) -> Vec<u8> {
    let handle = |guest: &mut Hostile, name: &[u8], flags: u32| {
        let node = guest.call(1, &request(op::LOOKUP, 1, name)).unwrap().word(0);
        (node, guest.call(1, &request(op::OPEN, node, &op::words(&[flags, 0]))).unwrap().word(0))
    };
    File::create(target.path("share/from")).unwrap().set_len(BYTES).unwrap();
    File::create(target.path("share/to")).unwrap();
    assert_eq!(guest.call(1, &request(op::INIT, 0, &op::init_body())).unwrap().error, 0);
    let from = handle(guest, b"from\0", libc::O_RDONLY as u32);
    let to = handle(guest, b"to\0", libc::O_WRONLY as u32);
    // struct fuse_copy_file_range_in: fh_in, off_in, nodeid_out, fh_out, off_out, len, flags.
    let body = [from.1, 0, to.0, to.1, 0, BYTES, 0].iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<_>>();
    request(op::COPY_FILE_RANGE, from.0, &body)
}

/// The answer to a stop comes after that of each request under way, also of those in the pool.
#[test]
fn a_stop_waits_for_what_is_under_way() {
    let mut target = Target::in_memory(&[]);
    let mut guest = target.guest();
    let copy = slow_request(&target, &mut guest);
    let used = guest.used(1);
    guest.send(1, &copy);
    soon("the copy begins", || (target.path("share/to").metadata().unwrap().len() > 0).then_some(()));
    assert_eq!(guest.used(1), used, "a copy that is too fast shows nothing");
    guest.front.get_vring_base(1).unwrap();
    assert_eq!(guest.used(1), used + 1, "stopped while a request was under way");
    drop(guest);

    let mut guest = target.guest();
    let copy = slow_request(&target, &mut guest);
    let mut ring = guest.ring(1);
    ring.submit(&guest, &sqe(&guest, 1, 0, &copy));
    soon("the copy begins", || (target.path("share/to").metadata().unwrap().len() > 0).then_some(()));
    assert!(ring.reap(Duration::ZERO).is_none(), "a copy that is too fast shows nothing");
    guest.front.set_vring_enable(1, false).unwrap();
    guest.settle();
    assert!(ring.reap(Duration::ZERO).is_some(), "stopped while a request was under way");
    drop(guest);
    target.check("stops");
}

/// What a VMM does around a pause: the same driver goes on, with all that it has open, and its ring.
#[test]
fn a_pause_is_no_new_driver() {
    for wait in ["park", "spin", "auto"] {
        let mut target = Target::new(&["--wait", wait]);
        let mut guest = target.guest();
        assert_eq!(guest.call(2, &request(op::INIT, 0, &op::init_body())).unwrap().error, 0);
        let mut ring = guest.ring(1);
        let node = ring.call(&guest, &request(op::LOOKUP, 1, b"words\0")).unwrap().word(0);
        let handle = ring.call(&guest, &request(op::OPEN, node, &op::words(&[0, 0]))).unwrap().word(0);
        for round in 0..20 {
            let read = request(op::READ, node, &op::read_body(handle, 0, 4096));
            assert_eq!(ring.call(&guest, &read).unwrap().error, 0, "{wait}, ring, round {round}");
            assert_eq!(guest.call(2, &read).unwrap().error, 0, "{wait}, virtqueue, round {round}");
            std::thread::sleep(Duration::from_millis(round % 3 * 8));
            let bases = [0, 1, 2].map(|queue| guest.front.get_vring_base(queue).unwrap() as u16);
            // Submitted by a guest that then stood still.
            ring.submit_politely(&guest, &sqe(&guest, 1, 1, &read));
            std::thread::sleep(Duration::from_millis(round % 2 * 8));
            assert!(ring.reap(Duration::ZERO).is_none(), "{wait}: a stopped queue was served");
            let region = guest.region();
            let features = guest.front.get_features().unwrap();
            guest.front.set_features(features & !(1 << 29)).unwrap();
            guest.front.set_mem_table(&[region]).unwrap();
            for (queue, base) in bases.into_iter().enumerate() {
                guest.start_queue_at(queue, base).unwrap();
            }
            assert!(ring.reap(Duration::from_secs(5)).is_some(), "{wait}: round {round}, the ring does not go on");
        }
        drop(guest);
        target.check("pauses");
    }
}

/// After a reset the next driver begins at the beginning: the ring's memory is not the host's any more.
#[test]
fn a_new_driver_has_no_ring() {
    let mut target = Target::new(&["--wait", "spin"]);
    let mut guest = target.guest();
    let mut ring = guest.ring(1);
    assert_eq!(ring.call(&guest, &request(OP_NOOP, 1, b"")).unwrap().error, 0);
    guest.front.get_vring_base(1).unwrap();
    guest.begin_anew(1);
    guest.settle();
    ring.submit(&guest, &sqe(&guest, 1, 0, &request(OP_NOOP, 1, b"")));
    assert!(ring.reap(Duration::from_millis(50)).is_none(), "the old driver's ring is still served");
    let before = guest.bytes(Hostile::ring_at(1), 512);
    assert_eq!(guest.call(1, &request(OP_NOOP, 1, b"")).unwrap().error, 0, "the new driver's virtqueue");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.bytes(Hostile::ring_at(1), 512), before, "the host wrote to the old driver's memory");
    drop(guest);
    target.check("new drivers");
}
