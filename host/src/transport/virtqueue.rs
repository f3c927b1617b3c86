//! Device side of a plain split virtqueue, as virtio-fs has it: each chain is
//! a request in readable buffers and room for the reply in writable ones.

use crate::pool::Pool;
use crate::server::{Caller, Outcome, Server};
use crate::shared::{Shared, SharedBuf};
use crate::vring::Vring;
use libc::iovec;
use std::io;
use std::sync::Arc;
use tunnelfs_ring::RingSetup;
use vhost_user_backend::VringT;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use virtiofsd::filesystem::FileSystem;
use vm_memory::{GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryMmap};

/// `fuse_in_header`, and `fuse_out_header`, bytes.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// Bytes of a request that are copied out before they are looked at.
const HEAD: usize = 128;

/// Most buffers of a chain: one each for a virtqueue's entries.
const MOST_BUFFERS: usize = 1024;

/// The guest's memory table, which the front end may replace.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Chain = DescriptorChain<Arc<GuestMemoryMmap>>;

/// Whether a chain waits.
pub fn ready(vring: &Vring, memory: &Memory) -> bool {
    let state = vring.get_ref();
    let queue = state.get_queue();
    let memory = memory.memory();
    let avail = || queue.avail_idx(&*memory, std::sync::atomic::Ordering::Acquire);
    queue.ready() && avail().is_ok_and(|idx| idx.0 != queue.next_avail())
}

/// Serves the chains that wait; returns whether there were any. `setup` gets
/// a ring's set-up message and answers whether the ring was accepted.
pub fn serve<F>(
    vring: &Vring,
    memory: &Memory,
    server: &Arc<Server<F>>,
    pool: &Pool,
    setup: &mut dyn FnMut(RingSetup) -> io::Result<()>,
) -> io::Result<bool>
where
    F: FileSystem + Send + Sync + 'static,
{
    let snapshot: Arc<GuestMemoryMmap> = memory.memory().clone().into_inner();
    // The guest may add chains as fast as they are served: after each lap the caller looks round.
    let lap = vring.get_ref().get_queue().size();
    for served in 0..lap {
        let chain = vring.get_mut().get_queue_mut().iter(snapshot.clone()).map_err(io::Error::other)?.next();
        let Some(chain) = chain else { return Ok(served > 0) };
        let head_index = chain.head_index();
        match gather(&snapshot, chain) {
            // A chain that cannot be read is given back unanswered: the guest broke it.
            Err(_) => finish(vring, head_index, 0),
            Ok((input, output)) => {
                serve_chain(vring, head_index, &snapshot, (input, output), server, pool, setup);
            }
        }
    }
    Ok(true)
}

fn serve_chain<F>(
    vring: &Vring,
    head_index: u16,
    snapshot: &Arc<GuestMemoryMmap>,
    (input, output): (SharedBuf, SharedBuf),
    server: &Arc<Server<F>>,
    pool: &Pool,
    setup: &mut dyn FnMut(RingSetup) -> io::Result<()>,
) where
    F: FileSystem + Send + Sync + 'static,
{
    let mut head = [0; HEAD];
    // SAFETY: `gather` has checked each buffer against the memory, which `snapshot` keeps mapped.
    let whole = unsafe { Shared::new(&input.0) };
    let len = whole.len().min(HEAD);
    if len < IN_HEADER || whole.read(0, &mut head[..len]).is_err() {
        return finish(vring, head_index, 0);
    }
    if head[4..8] == RingSetup::OPCODE.to_ne_bytes() {
        let result = setup_message(whole).and_then(setup);
        let error = if result.is_ok() { 0 } else { -libc::EINVAL };
        return finish(vring, head_index, write_header(&output, error, &[], 0, &head));
    }
    // The private head must end where the operation's structure does, so that WRITE's data starts in the buffers.
    let head_len = len.min(IN_HEADER + 40);
    let payload = SharedBuf(skip(&input.0, head_len));
    let out = SharedBuf(skip(&output.0, OUT_HEADER));
    // SAFETY: parts of the checked buffers.
    let (p, o) = unsafe { (Shared::new(&payload.0), Shared::new(&out.0)) };
    match server.handle(&head[..head_len], p, o, Caller::Queue(None)) {
        Outcome::WouldBlock => {
            // More than the queue has entries: it is given back unanswered.
            let Some(share) = vring.handed_over.take() else { return finish(vring, head_index, 0) };
            let (vring, server, keep) = (vring.clone(), server.clone(), snapshot.clone());
            pool.run(Box::new(move || {
                let (payload, out, output, share) = (payload, out, output, share);
                if share.is_abandoned() {
                    return;
                }
                // SAFETY: as above; `keep` holds the mapping.
                let (p, o) = unsafe { (Shared::new(&payload.0), Shared::new(&out.0)) };
                let outcome = server.handle(&head[..head_len], p, o, Caller::Patient);
                if !share.is_abandoned() {
                    finish(&vring, head_index, deliver(&output, outcome, o, &head));
                }
                drop(keep);
            }));
        }
        outcome => finish(vring, head_index, deliver(&output, outcome, o, &head)),
    }
}

/// A private, checked copy of a set-up message.
fn setup_message(whole: Shared<'_>) -> io::Result<RingSetup> {
    let mut body = vec![0; (whole.len() - IN_HEADER).min(RingSetup::MAX_BYTES)];
    whole.read(IN_HEADER, &mut body)?;
    RingSetup::from_bytes(&body).map_err(io::Error::other)
}

/// Resolves a chain's descriptors to mapped buffers: readable ones, writable ones.
fn gather(memory: &GuestMemoryMmap, chain: Chain) -> io::Result<(SharedBuf, SharedBuf)> {
    let (mut input, mut output) = (SharedBuf(Vec::with_capacity(4)), SharedBuf(Vec::with_capacity(4)));
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

fn deliver(output: &SharedBuf, outcome: Outcome, out: Shared<'_>, head: &[u8; HEAD]) -> u32 {
    let Outcome::Reply(reply) = outcome else { return 0 };
    let fixed = reply.fixed();
    if out.write(0, fixed).is_err() {
        return write_header(output, -libc::EINVAL, &[], 0, head);
    }
    write_header(output, reply.error, fixed, reply.in_place, head)
}

/// Writes `fuse_out_header`; the bytes used of the reply's buffers, 0 when not even that fits.
fn write_header(output: &SharedBuf, error: i32, fixed: &[u8], in_place: usize, head: &[u8; HEAD]) -> u32 {
    let len = (OUT_HEADER + fixed.len() + in_place) as u32;
    let mut header = [0; OUT_HEADER];
    header[..4].copy_from_slice(&len.to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..].copy_from_slice(&head[8..16]);
    // SAFETY: `gather` has checked the buffers.
    match unsafe { Shared::new(&output.0) }.write(0, &header) {
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
