//! INIT passes through here: each side is told what the other, and the slots
//! between them, can carry.

use super::abi::{init_flag::*, u32_at};
use crate::message::IN_HEADER;

/// What a mount wants of INIT.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Bytes of a slot: the largest READ or WRITE.
    pub slot_size: u32,
    /// FUSE-over-io_uring: `None` takes it when the kernel offers it.
    pub uring: Option<bool>,
    /// Cache writes in the kernel.
    pub writeback: bool,
    /// Another host may take over, which knows of no locks.
    pub reconnect: bool,
}

/// What was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The requests come over io_uring.
    pub uring: bool,
    /// Bytes of the largest WRITE.
    pub max_write: u32,
}

/// FUSE_KERNEL_VERSION, and the first of its minor versions that hosts have spoken over virtio-fs.
const MAJOR: u32 = 7;
const MIN_MINOR: u32 = 31;
/// Bytes of `struct fuse_init_in` behind the header, and offsets in it.
const IN_FLAGS: usize = 12;
const IN_FLAGS2: usize = 16;
/// Bytes of `struct fuse_init_out`, and offsets in it.
const OUT_BYTES: usize = 64;
const OUT_FLAGS: usize = 12;
const OUT_MAX_WRITE: usize = 20;
const OUT_MAX_PAGES: usize = 28;
const OUT_FLAGS2: usize = 32;

/// What no host of ours may be offered: it concerns the guest's kernel alone,
/// or brings messages that are not carried; and ATOMIC_O_TRUNC, by which the kernel
/// has a running program's file truncated before it finds out that it must not be (ETXTBSY).
const NOT_FOR_HOST: u64 = OVER_IO_URING
    | ATOMIC_O_TRUNC
    | MAP_ALIGNMENT
    | HAS_INODE_DAX
    | PASSTHROUGH
    | SECURITY_CTX
    | HAS_RESEND
    | ALLOW_IDMAP
    | REQUEST_TIMEOUT;

fn flags(body: &[u8], low: usize, high: usize) -> u64 {
    let first = u64::from(u32_at(body, low));
    let second = if first & INIT_EXT != 0 { u64::from(u32_at(body, high)) } else { 0 };
    first | second << 32
}

fn set_flags(body: &mut [u8], low: usize, high: usize, flags: u64) {
    put(body, low, flags as u32);
    put(body, high, (flags >> 32) as u32);
}

fn put(body: &mut [u8], at: usize, value: u32) {
    if let Some(place) = body.get_mut(at..at + 4) {
        place.copy_from_slice(&value.to_ne_bytes());
    }
}

/// The flags that the kernel offers in `fuse_init_in`.
pub fn offered(body: &[u8]) -> u64 {
    flags(body, IN_FLAGS, IN_FLAGS2)
}

/// Takes out of the kernel's `fuse_init_in` what the host must not see.
pub fn narrow_request(body: &mut [u8], wanted: Wanted) {
    let mut kept = offered(body) & !NOT_FOR_HOST;
    if !wanted.writeback {
        kept &= !WRITEBACK_CACHE;
    }
    if wanted.reconnect {
        // They are the guest's kernel's then.
        kept &= !(POSIX_LOCKS | FLOCK_LOCKS);
    }
    set_flags(body, IN_FLAGS, IN_FLAGS2, kept);
}

/// Adapts the host's `fuse_init_out` to the slots and the channel; `offered`
/// is what the kernel had offered.
///
/// # Errors
/// What the host answered that cannot be.
pub fn adapt_reply(body: &mut [u8], offered: u64, wanted: Wanted) -> Result<Agreed, String> {
    let (major, minor) = (u32_at(body, 0), u32_at(body, 4));
    if major != MAJOR || minor < MIN_MINOR || body.len() < OUT_BYTES {
        return Err(format!("it speaks FUSE {major}.{minor}, and must {MAJOR}.{MIN_MINOR} or a later {MAJOR}.x"));
    }
    let page = 4096;
    let max_pages = (wanted.slot_size / page).min(u32::from(u16::MAX)).min(kernel_pages_limit());
    let max_write = u32_at(body, OUT_MAX_WRITE).min(max_pages * page).max(page);
    let uring = wanted.uring.unwrap_or(true) && offered & OVER_IO_URING != 0;
    // The host chose from what it was shown; the rest is between the kernel and us.
    let mut agreed = flags(body, OUT_FLAGS, OUT_FLAGS2) & offered & !NOT_FOR_HOST;
    agreed |= offered & (MAX_PAGES | INIT_EXT);
    if uring {
        agreed |= OVER_IO_URING;
    }
    if !wanted.writeback {
        agreed &= !WRITEBACK_CACHE;
    }
    set_flags(body, OUT_FLAGS, OUT_FLAGS2, agreed);
    put(body, OUT_MAX_WRITE, max_write);
    body[OUT_MAX_PAGES..OUT_MAX_PAGES + 2].copy_from_slice(&((max_write / page) as u16).to_ne_bytes());
    Ok(Agreed { uring, max_write })
}

/// What was agreed on with one host, for the next one to agree on.
#[derive(Clone, Debug)]
pub struct Replay {
    request: Vec<u8>,
    flags: u64,
    minor: u32,
    max_write: u32,
}

impl Replay {
    /// After a `request` (header and all) as the host saw it, and its `reply`.
    pub fn new(request: &[u8], reply: &[u8], agreed: Agreed) -> Replay {
        let mut request = request.to_vec();
        let body = &mut request[IN_HEADER..];
        // Nor may the next host do more: the kernel would not know.
        let flags = flags(reply, OUT_FLAGS, OUT_FLAGS2) & offered(body);
        set_flags(body, IN_FLAGS, IN_FLAGS2, flags);
        Replay { request, flags, minor: u32_at(reply, 4), max_write: agreed.max_write }
    }

    /// The request for the next host.
    pub fn request(&self) -> &[u8] {
        &self.request
    }

    /// Whether its reply (without header) will do.
    ///
    /// # Errors
    /// What it lacks.
    pub fn check(&self, reply: &[u8]) -> Result<(), String> {
        let (major, minor) = (u32_at(reply, 0), u32_at(reply, 4));
        if major != MAJOR || minor < self.minor || reply.len() < OUT_BYTES {
            return Err(format!("it speaks FUSE {major}.{minor}, the one before it {MAJOR}.{}", self.minor));
        }
        let lacking = self.flags & !flags(reply, OUT_FLAGS, OUT_FLAGS2);
        if lacking != 0 {
            return Err(format!("it does not agree to what the one before it did: INIT flags {lacking:#x}; is it started with other options?"));
        }
        if u32_at(reply, OUT_MAX_WRITE) < self.max_write {
            return Err(format!("its largest write is smaller than {} bytes", self.max_write));
        }
        Ok(())
    }
}

/// Pages that the kernel lets one request have (`fs.fuse.max_pages_limit`, kernel 6.13 and later).
fn kernel_pages_limit() -> u32 {
    let text = std::fs::read_to_string("/proc/sys/fs/fuse/max_pages_limit").unwrap_or_default();
    text.trim().parse().unwrap_or(256)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted = Wanted { slot_size: 64 << 10, uring: None, writeback: false, reconnect: false };

    fn reply(flags: u64, max_write: u32) -> [u8; OUT_BYTES] {
        let mut body = [0; OUT_BYTES];
        put(&mut body, 0, MAJOR);
        put(&mut body, 4, MIN_MINOR);
        set_flags(&mut body, OUT_FLAGS, OUT_FLAGS2, flags);
        put(&mut body, OUT_MAX_WRITE, max_write);
        body
    }

    #[test]
    fn the_host_does_not_see_what_it_cannot_carry() {
        let mut body = [0; 64];
        set_flags(&mut body, IN_FLAGS, IN_FLAGS2, INIT_EXT | OVER_IO_URING | WRITEBACK_CACHE | 1);
        narrow_request(&mut body, WANTED);
        assert_eq!(offered(&body), INIT_EXT | 1);
    }

    #[test]
    fn writes_are_capped_to_the_slots() {
        let mut body = reply(INIT_EXT | MAX_PAGES, 1 << 20);
        let agreed = adapt_reply(&mut body, INIT_EXT | MAX_PAGES | OVER_IO_URING, WANTED).unwrap();
        assert_eq!(agreed, Agreed { uring: true, max_write: 64 << 10 });
        assert_eq!((u32_at(&body, OUT_MAX_WRITE), u32_at(&body, OUT_MAX_PAGES) & 0xffff), (64 << 10, 16));
    }

    #[test]
    fn a_host_cannot_switch_on_what_the_kernel_did_not_offer() {
        let mut body = reply(INIT_EXT | PASSTHROUGH | WRITEBACK_CACHE | 1 | 2, 4096);
        let agreed = adapt_reply(&mut body, INIT_EXT | 1, WANTED).unwrap();
        assert!(!agreed.uring);
        assert_eq!(flags(&body, OUT_FLAGS, OUT_FLAGS2), INIT_EXT | 1);
    }

    #[test]
    fn the_next_host_must_agree_to_no_less_and_is_offered_no_more() {
        let mut request = vec![0; IN_HEADER + 64];
        set_flags(&mut request[IN_HEADER..], IN_FLAGS, IN_FLAGS2, INIT_EXT | 0b1011 | 1 << 34);
        let agreed = Agreed { uring: true, max_write: 64 << 10 };
        let replay = Replay::new(&request, &reply(INIT_EXT | 0b1101, 1 << 20), agreed);
        assert_eq!(offered(&replay.request()[IN_HEADER..]), INIT_EXT | 0b1001);
        assert!(replay.check(&reply(INIT_EXT | 0b1111, 64 << 10)).is_ok());
        assert!(replay.check(&reply(INIT_EXT | 0b1000, 64 << 10)).unwrap_err().contains("0x1"));
        assert!(replay.check(&reply(INIT_EXT | 0b1001, 32 << 10)).is_err());
        assert!(replay.check(&reply(INIT_EXT | 0b1001, 64 << 10)[..40]).is_err());
    }

    #[test]
    fn other_versions_are_refused() {
        for (major, minor) in [(6, 40), (7, 30), (8, 0), (0, 0)] {
            let mut body = reply(0, 4096);
            put(&mut body, 0, major);
            put(&mut body, 4, minor);
            let refused = adapt_reply(&mut body, 0, WANTED).unwrap_err();
            assert!(refused.contains(&format!("FUSE {major}.{minor}")), "{refused}");
        }
        assert!(adapt_reply(&mut reply(0, 4096)[..24], 0, WANTED).is_err());
    }
}
