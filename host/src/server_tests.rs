use super::*;
use crate::fs::Context;
use std::ffi::CStr;
use tunnelfs_fuse_abi::changes::{kind, Records};
use zerocopy::FromBytes;

/// One file of 5 bytes, whose data is in no file.
struct Words;

impl FileSystem for Words {
    fn lookup(&self, _ctx: &Context, node: u64, name: &CStr) -> io::Result<EntryOut> {
        assert!(!name.to_bytes().starts_with(b"."), "not asked for");
        if node == ROOT_ID && name == c"words" {
            return Ok(EntryOut { nodeid: 2, ..EntryOut::default() });
        }
        Err(io::Error::from_raw_os_error(libc::ENOENT))
    }

    fn read(&self, _ctx: &Context, _node: u64, args: &ReadIn, out: &ZeroCopyBuf<'_>) -> io::Result<usize> {
        let words = &b"words"[(args.offset as usize).min(5)..];
        let n = words.len().min(args.size as usize).min(out.len());
        out.write_bytes(0, &words[..n]).map(|()| n)
    }

    fn copy_file_range(&self, _ctx: &Context, _node: u64, args: &CopyFileRangeIn) -> io::Result<u64> {
        Ok(args.len)
    }

    fn statfs(&self, _ctx: &Context, _node: u64) -> io::Result<Kstatfs> {
        panic!("a bug");
    }
}

/// Opcode 47 answers with 32 bits: a copy of more is cut, to whole pages, and never wraps to little or nothing.
#[test]
fn a_large_copy_is_cut_to_what_the_reply_can_tell() {
    for (len, told) in [(100, 100), (1 << 32, 0xffff_f000), (u64::MAX, 0xffff_f000)] {
        let args = CopyFileRangeIn { len, ..CopyFileRangeIn::default() };
        let (body, _) = ask(47, 2, args.as_bytes(), &mut []).unwrap();
        assert_eq!(WriteOut::read_from_bytes(&body).unwrap().size, told);
    }
}

fn ask(opcode: u32, node: u64, body: &[u8], room: &mut [u8]) -> Result<(Vec<u8>, usize), i32> {
    let header = InHeader { len: (40 + body.len()) as u32, opcode, nodeid: node, ..InHeader::default() };
    let iovs = [libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() }];
    // SAFETY: the iovec lies in `room`; there is no payload.
    let (payload, out) = unsafe { (GuestBuf::new(&[]), GuestBuf::new(&iovs)) };
    match Server::new(Words).handle(&[header.as_bytes(), body].concat(), payload, out, None) {
        Outcome::Reply(reply) if reply.error == 0 => Ok((reply.body().to_vec(), reply.payload_len)),
        Outcome::Reply(reply) => Err(reply.error),
        Outcome::NoReply => Err(0),
    }
}

#[test]
fn a_file_system_of_three_operations() {
    let mut room = [0; 4096];
    let (entry, _) = ask(Opcode::Lookup as u32, ROOT_ID, b"words\0", &mut room).unwrap();
    assert_eq!(EntryOut::read_from_bytes(&entry).unwrap().nodeid, 2);
    let read = ReadIn { offset: 1, size: 100, ..ReadIn::default() };
    let (_, n) = ask(Opcode::Read as u32, 2, read.as_bytes(), &mut room).unwrap();
    assert_eq!(&room[..n], b"ords");
    assert_eq!(ask(Opcode::Getattr as u32, 2, &[0; 16], &mut room), Err(-libc::ENOSYS));
    assert_eq!(ask(9999, 2, &[], &mut room), Err(-libc::ENOSYS));
    assert_eq!(ask(Opcode::Forget as u32, 2, &[1; 8], &mut room), Err(0), "no reply");
}

#[test]
fn names_that_lead_elsewhere_are_not_asked_for() {
    for name in [&b"..\0"[..], b".\0", b"a/b\0", b"\0", b"words"] {
        assert_eq!(ask(Opcode::Lookup as u32, ROOT_ID, name, &mut []), Err(-libc::EINVAL), "{name:?}");
    }
}

#[test]
fn a_bug_costs_the_request() {
    assert_eq!(ask(Opcode::Statfs as u32, ROOT_ID, &[], &mut []), Err(-libc::EIO));
}

/// Has changed twice for each call.
#[derive(Default)]
struct Restless {
    dropped: Mutex<Vec<u64>>,
}

impl FileSystem for Restless {
    fn changes(&self, sink: &mut crate::fs::ChangeSink<'_>) -> io::Result<()> {
        let change =
            |node| Change { kind: kind::DELETED, parent: ROOT_ID, node, name: b"name".into(), ..Change::default() };
        let _ = sink(&change(7)) && sink(&change(8));
        Ok(())
    }

    fn dropped(&self, node: u64) {
        self.dropped.lock().push(node);
    }
}

#[test]
fn changes_are_listed_whole_and_one_request_waits_for_them() {
    let server = Server::new(Restless::default());
    let ask = |opcode, body: &[u8], room: &mut [u8]| {
        let header = InHeader { len: (40 + body.len()) as u32, opcode, ..InHeader::default() };
        let iovs = [libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() }];
        // SAFETY: the iovec lies in `room`; there is no payload.
        let (payload, out) = unsafe { (GuestBuf::new(&[]), GuestBuf::new(&iovs)) };
        match server.handle(&[header.as_bytes(), body].concat(), payload, out, None) {
            Outcome::Reply(reply) => (reply.error, reply.payload_len),
            Outcome::NoReply => panic!("no reply"),
        }
    };
    let mut room = [0; 4096];
    for (bytes, wanted) in [(4096, &[7, 8][..]), (95, &[7]), (47, &[])] {
        let (error, n) = ask(OP_CHANGES, &[], &mut room[..bytes]);
        let got: Vec<_> = Records(&room[..n]).map(|(record, name, _)| (record.node, name.to_vec())).collect();
        let wanted: Vec<_> = wanted.iter().map(|&node| (node, b"name".to_vec())).collect();
        assert_eq!((error, got), (0, wanted));
    }
    let waiting = server.one_waits.lock();
    assert_eq!(ask(OP_CHANGES, &[], &mut room).0, -libc::EBUSY);
    drop(waiting);
    let nodes = [3u64, 4].map(u64::to_ne_bytes).concat();
    assert_eq!((ask(OP_DROPPED, &nodes, &mut []), server.fs.dropped.lock().clone()), ((0, 0), vec![3, 4]));
}

#[test]
fn init_agrees_to_what_both_know() {
    let init = InitInCompat { major: MAJOR, minor: MINOR, max_readahead: 7, flags: !0 };
    let ext = InitInExt { flags2: !0, ..InitInExt::default() };
    let body = [init.as_bytes(), ext.as_bytes()].concat();
    let (reply, _) = ask(Opcode::Init as u32, 0, &body, &mut []).unwrap();
    let out = InitOut::read_from_bytes(&reply).unwrap();
    assert_eq!((out.major, out.minor, out.max_readahead), (MAJOR, MINOR, 7));
    let agreed = u64::from(out.flags2) << 32 | u64::from(out.flags);
    assert_eq!(agreed, init::BIG_WRITES | init::MAX_PAGES | init::INIT_EXT);
    let old = InitInCompat { minor: 30, ..init };
    assert_eq!(ask(Opcode::Init as u32, 0, old.as_bytes(), &mut []), Err(-libc::EPROTO));
}
