//! The host's file server, called as a function.

use std::ffi::CStr;
use std::io;
use std::path::Path;
use tunnelfs_fuse_abi::zerocopy::{FromBytes, Immutable, IntoBytes};
use tunnelfs_fuse_abi::*;
use tunnelfs_host::fs::Passthrough;
use tunnelfs_host::fs_builder;
use tunnelfs_host::guest_buf::GuestBuf;
use tunnelfs_host::handler::{Handler, Outcome, Reply};
use tunnelfs_host::Server;
use tunnelfs_settings::Host;

/// Bytes of the buffer behind a request.
pub(super) const BUFFER: usize = 64 << 10;

/// A server that is called as a function.
pub(super) struct Served {
    server: Server<Passthrough>,
    buffer: Vec<u8>,
    /// The request's first bytes, as a transport has copied them.
    head: Vec<u8>,
    unique: u64,
}

impl Served {
    pub(super) fn new(dir: &Path) -> io::Result<Served> {
        let host = Host { shared_dir: dir.into(), xattr: true, ..Host::default() };
        let server = Server::new(fs_builder::open(&host)?);
        let mut served = Served { server, buffer: vec![7; BUFFER], head: Vec::new(), unique: 0 };
        let init = InitInCompat { major: MAJOR, minor: MINOR, max_readahead: 1 << 20, flags: !0 };
        let ext = InitInExt { flags2: !flags::init::SUBMOUNTS as u32, ..InitInExt::default() };
        served.ask(Opcode::Init, ROOT_ID, &[init.as_bytes(), ext.as_bytes()].concat(), 0)?;
        Ok(served)
    }

    /// Bytes of the reply's structure; `payload`: bytes of WRITE data.
    pub(super) fn ask(&mut self, opcode: Opcode, node: u64, body: &[u8], payload: usize) -> io::Result<Reply> {
        self.unique += 1;
        let len = (size_of::<InHeader>() + body.len() + payload) as u32;
        let header = InHeader { len, opcode: opcode as u32, unique: self.unique, nodeid: node, ..InHeader::default() };
        self.head.clear();
        self.head.extend_from_slice(header.as_bytes());
        self.head.extend_from_slice(body);
        let part = |len| [libc::iovec { iov_base: self.buffer.as_ptr().cast_mut().cast(), iov_len: len }];
        let (input, output) = (part(payload), part(BUFFER));
        // SAFETY: both lie in this object's buffer, which nobody looks at meanwhile.
        let (input, output) = unsafe { (GuestBuf::new(&input), GuestBuf::new(&output)) };
        match self.server.handle(&self.head, input, output, None) {
            Outcome::Reply(reply) if reply.error == 0 => Ok(reply),
            Outcome::Reply(reply) => Err(io::Error::from_raw_os_error(-reply.error)),
            _ => Ok(Reply::ok()),
        }
    }

    pub(super) fn get<T: FromBytes>(&mut self, opcode: Opcode, node: u64, body: &[u8]) -> io::Result<T> {
        let reply = self.ask(opcode, node, body, 0)?;
        T::read_from_prefix(reply.body()).map(|(value, _)| value).map_err(|_| io::Error::other("a short reply"))
    }

    pub(super) fn lookup(&mut self, node: u64, name: &CStr) -> io::Result<u64> {
        Ok(self.get::<EntryOut>(Opcode::Lookup, node, name.to_bytes_with_nul())?.nodeid)
    }

    pub(super) fn release(&mut self, node: u64, fh: u64) -> io::Result<()> {
        self.ask(Opcode::Release, node, ReleaseIn { fh, ..ReleaseIn::default() }.as_bytes(), 0).map(drop)
    }

    pub(super) fn forget(&mut self, node: u64) -> io::Result<()> {
        self.ask(Opcode::Forget, node, ForgetIn { nlookup: 1 }.as_bytes(), 0).map(|_| ())
    }
}

/// A structure and what follows it.
pub(super) fn with<T: IntoBytes + Immutable>(value: &T, rest: &CStr) -> Vec<u8> {
    [value.as_bytes(), rest.to_bytes_with_nul()].concat()
}
