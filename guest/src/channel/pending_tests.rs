//! What a queue does with the answers of a host that the test plays.

use super::pending::PendingQueue;
use super::WriteOrder;
use crate::fuse::message::tests::transfer;
use crate::fuse::message::{reply_header, OUT_HEADER};
use crate::stats::QueueStats;
use crate::transport::socket::SocketTransport;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_fuse_abi::opcode;
use tunnelfs_ring::{Geometry, WaitConfig};

/// A request's header and `fuse_read_in` or `fuse_write_in`: both have 40 bytes.
const MESSAGE: usize = 80;
const NODE: u64 = 5;

/// A queue, and the host's end of its stream.
fn queue() -> (PendingQueue, UnixStream) {
    let (ours, host) = UnixStream::pair().unwrap();
    host.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let geometry = Geometry { entries: 4, slots: 4, slot_size: 8192 };
    let transport = SocketTransport::new(ours, WaitConfig::default(), geometry, None).unwrap();
    let stats = Arc::new(QueueStats::new(4));
    (PendingQueue::new(Box::new(transport), stats, None, Arc::<WriteOrder>::default()), host)
}

fn answer(host: &mut UnixStream, unique: u64, error: i32, payload: &[u8]) {
    let header = reply_header(OUT_HEADER + payload.len(), error, unique);
    host.write_all(&[&header, payload].concat()).unwrap();
}

/// The `unique` of the next request, which has so many bytes of payload.
fn receive(host: &mut UnixStream, payload: usize) -> u64 {
    let mut message = vec![0; MESSAGE + payload];
    host.read_exact(&mut message).expect("a request");
    u64::from_ne_bytes(message[8..16].try_into().unwrap())
}

#[test]
fn a_read_that_overtook_a_write_is_sent_again() {
    let (mut queue, mut host) = queue();
    queue.submit(0, &transfer(opcode::WRITE, NODE, 2, 0, 4), 4).unwrap();
    queue.submit(1, &transfer(opcode::READ, NODE, 4, 0, 4), 0).unwrap();
    assert_eq!((receive(&mut host, 4), receive(&mut host, 0)), (2, 4));
    answer(&mut host, 4, 0, b"old!");
    assert!(queue.reap().unwrap().is_none(), "bytes from before the WRITE are no answer");
    assert_eq!(receive(&mut host, 0), 4);
    answer(&mut host, 2, 0, &[0; 8]);
    assert_eq!(queue.reap().unwrap().unwrap().slot, 0);
    // It was sent for the second time before the WRITE was answered.
    answer(&mut host, 4, 0, b"new?");
    assert!(queue.reap().unwrap().is_none());
    assert_eq!(receive(&mut host, 0), 4);
    answer(&mut host, 4, 0, b"new!");
    let reply = queue.reap().unwrap().unwrap();
    assert_eq!((reply.slot, reply.payload_len(), queue.pending()), (1, 4, 0));
}

#[test]
fn a_read_that_failed_is_answered_at_once() {
    let (mut queue, mut host) = queue();
    queue.submit(0, &transfer(opcode::WRITE, NODE, 2, 0, 4), 4).unwrap();
    queue.submit(1, &transfer(opcode::READ, NODE, 4, 0, 4), 0).unwrap();
    answer(&mut host, 4, -libc::EIO, &[]);
    assert_eq!(queue.reap().unwrap().unwrap().slot, 1);
}
