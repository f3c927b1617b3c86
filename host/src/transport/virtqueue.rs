//! Device side of a plain split virtqueue, as virtio-fs has it: each chain is
//! a request in readable buffers and room for the reply in writable ones.

use crate::guest_buf::{GuestBuf, OwnedGuestBuf};
use crate::handler::{Handler, Outcome};
use crate::memory::Memory;
use crate::vring::Vring;
use libc::iovec;
use std::io;
use std::sync::Arc;
use tunnelfs_ring::RingSetup;
use vhost_user_backend::VringT;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemory, GuestMemoryMmap};

/// `fuse_in_header`, and `fuse_out_header`, bytes.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// Bytes of a request that are copied out before they are looked at.
const HEAD: usize = 128;

/// Most buffers of a chain: one each for a virtqueue's entries.
const MOST_BUFFERS: usize = 1024;

type Chain = DescriptorChain<Arc<GuestMemoryMmap>>;

/// Whether a chain waits.
pub fn ready(vring: &Vring, memory: &Memory) -> bool {
    let state = vring.get_ref();
    let queue = state.get_queue();
    let memory = memory.memory();
    let avail = || queue.avail_idx(&*memory, std::sync::atomic::Ordering::Acquire);
    queue.ready() && avail().is_ok_and(|idx| idx.0 != queue.next_avail())
}

/// One request: its chain, resolved to mapped buffers, and a private copy of its first bytes.
pub struct ChainRequest {
    head_index: u16,
    head: [u8; HEAD],
    /// Bytes of `head` that the handler gets: it ends where the operation's structure does, so that WRITE's data starts
    /// in the buffers.
    head_len: usize,
    input: OwnedGuestBuf,
    output: OwnedGuestBuf,
    payload: OwnedGuestBuf,
    out: OwnedGuestBuf,
    /// Keeps the buffers mapped.
    _memory: Arc<GuestMemoryMmap>,
}

/// What a look at the available ring finds.
pub enum Next {
    /// Nothing.
    Empty,
    /// A chain that cannot be read: it has been given back unanswered, for the guest broke it.
    Broken,
    /// A request.
    Request(Box<ChainRequest>),
}

/// Chains that the caller may serve before it looks round: the guest may add them as fast as they are served.
pub fn lap(vring: &Vring) -> u16 {
    vring.get_ref().get_queue().size()
}

/// Takes the next chain.
///
/// # Errors
/// The guest's available ring is not in its memory, or its index is out of range.
pub fn pop(vring: &Vring, memory: &Arc<GuestMemoryMmap>) -> io::Result<Next> {
    let chain = vring.get_mut().get_queue_mut().iter(memory.clone()).map_err(io::Error::other)?.next();
    let Some(chain) = chain else { return Ok(Next::Empty) };
    let head_index = chain.head_index();
    let request = gather(memory, chain).and_then(|buffers| ChainRequest::new(head_index, memory, buffers));
    Ok(request.map_or_else(
        |_| {
            finish(vring, head_index, 0);
            Next::Broken
        },
        |request| Next::Request(Box::new(request)),
    ))
}

impl ChainRequest {
    fn new(
        head_index: u16,
        memory: &Arc<GuestMemoryMmap>,
        (input, output): (OwnedGuestBuf, OwnedGuestBuf),
    ) -> io::Result<Self> {
        let mut head = [0; HEAD];
        // SAFETY: `gather` has checked each buffer against the memory, which `memory` keeps mapped.
        let whole = unsafe { GuestBuf::new(&input.0) };
        let len = whole.len().min(HEAD);
        if len < IN_HEADER {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        whole.read(0, &mut head[..len])?;
        let head_len = len.min(IN_HEADER + 40);
        let payload = OwnedGuestBuf(skip(&input.0, head_len));
        let out = OwnedGuestBuf(skip(&output.0, OUT_HEADER));
        Ok(ChainRequest { head_index, head, head_len, input, output, payload, out, _memory: memory.clone() })
    }

    /// The request's first bytes.
    pub fn head(&self) -> &[u8] {
        &self.head[..self.head_len]
    }

    /// What the guest wants, if this asks for a ring.
    pub fn setup(&self) -> Option<io::Result<RingSetup>> {
        // SAFETY: as in `new`.
        (self.head[4..8] == RingSetup::OPCODE.to_ne_bytes())
            .then(|| setup_message(unsafe { GuestBuf::new(&self.input.0) }))
    }

    /// Answers a set-up message.
    pub fn accept(&self, vring: &Vring, result: &io::Result<()>) {
        let error = if result.is_ok() { 0 } else { -libc::EINVAL };
        finish(vring, self.head_index, write_header(&self.output, error, &[], 0, &self.head));
    }

    /// Handles the request.
    pub fn handle<H: Handler>(&self, handler: &H) -> Outcome {
        // SAFETY: parts of the checked buffers, which `_memory` keeps mapped.
        let (payload, out) = unsafe { (GuestBuf::new(&self.payload.0), GuestBuf::new(&self.out.0)) };
        handler.handle(self.head(), payload, out, None)
    }

    /// Gives the chain back, with the answer.
    pub fn complete(&self, vring: &Vring, outcome: Outcome) {
        // SAFETY: as in `handle`.
        let out = unsafe { GuestBuf::new(&self.out.0) };
        finish(vring, self.head_index, write_reply(&self.output, outcome, out, &self.head));
    }
}

/// A private, checked copy of a set-up message.
fn setup_message(whole: GuestBuf<'_>) -> io::Result<RingSetup> {
    let mut body = vec![0; (whole.len() - IN_HEADER).min(RingSetup::MAX_BYTES)];
    whole.read(IN_HEADER, &mut body)?;
    RingSetup::from_bytes(&body).map_err(io::Error::other)
}

/// Resolves a chain's descriptors to mapped buffers: readable ones, writable ones.
fn gather(memory: &GuestMemoryMmap, chain: Chain) -> io::Result<(OwnedGuestBuf, OwnedGuestBuf)> {
    let (mut input, mut output) = (OwnedGuestBuf(Vec::with_capacity(4)), OwnedGuestBuf(Vec::with_capacity(4)));
    for desc in chain {
        if input.0.len() + output.0.len() == MOST_BUFFERS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let list = if desc.is_write_only() { &mut output.0 } else { &mut input.0 };
        let slice = memory.get_slice(desc.addr(), desc.len() as usize).map_err(io::Error::other)?;
        list.push(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: desc.len() as usize });
    }
    Ok((input, output))
}

fn skip(iovs: &[iovec], mut bytes: usize) -> Vec<iovec> {
    let mut rest = Vec::with_capacity(iovs.len());
    for v in iovs {
        let cut = bytes.min(v.iov_len);
        bytes -= cut;
        if cut < v.iov_len {
            // SAFETY: `cut` is less than the buffer's length.
            let base = unsafe { v.iov_base.cast::<u8>().add(cut) };
            rest.push(iovec { iov_base: base.cast(), iov_len: v.iov_len - cut });
        }
    }
    rest
}

fn write_reply(output: &OwnedGuestBuf, outcome: Outcome, out: GuestBuf<'_>, head: &[u8; HEAD]) -> u32 {
    let Outcome::Reply(reply) = outcome else { return 0 };
    let body = reply.body();
    if out.write(0, body).is_err() {
        return write_header(output, -libc::EINVAL, &[], 0, head);
    }
    write_header(output, reply.error, body, reply.payload_len, head)
}

/// Writes `fuse_out_header`; the bytes used of the reply's buffers, 0 when not even that fits.
fn write_header(output: &OwnedGuestBuf, error: i32, body: &[u8], payload_len: usize, head: &[u8; HEAD]) -> u32 {
    let len = (OUT_HEADER + body.len() + payload_len) as u32;
    let mut header = [0; OUT_HEADER];
    header[..4].copy_from_slice(&len.to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..].copy_from_slice(&head[8..16]);
    // SAFETY: `gather` has checked the buffers.
    match unsafe { GuestBuf::new(&output.0) }.write(0, &header) {
        Ok(()) => len,
        Err(_) => 0,
    }
}

fn finish(vring: &Vring, head_index: u16, len: u32) {
    if let Err(e) = vring.add_used(head_index, len) {
        tracing::warn!("the guest's used ring cannot be written: {e}");
        return;
    }
    if vring.needs_notification().unwrap_or(true) {
        let _ = vring.signal_used_queue();
    }
}
