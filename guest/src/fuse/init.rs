//! INIT filtering. The guest passes INIT between kernel and host, and removes the features that the other side or the
//! slots do not support.

use super::message::{u32_at, IN_HEADER};
use tunnelfs_fuse_abi::flags::init::*;

/// A mount's options for INIT.
#[derive(Clone, Copy, Debug)]
pub struct InitOptions {
    /// Bytes of a slot: the largest READ or WRITE.
    pub slot_size: u32,
    /// Whether to use FUSE-over-io_uring; `None`: if the kernel offers it.
    pub uring: Option<bool>,
    /// Whether the kernel caches writes.
    pub writeback: bool,
    /// Whether the kernel checks modes and owners.
    pub default_permissions: bool,
}

/// Result of INIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitResult {
    /// Whether requests come over io_uring.
    pub uring: bool,
    /// Bytes of the largest WRITE.
    pub max_write: u32,
    /// Whether the host keeps the file locks. They end with the host, so no other host may take over.
    pub shared_locks: bool,
}

/// FUSE_KERNEL_VERSION, and the lowest minor version of a virtio-fs host.
const MAJOR: u32 = 7;
const MIN_MINOR: u32 = 31;
/// Offsets in `struct fuse_init_in`, from the end of the header.
const IN_FLAGS: usize = 12;
const IN_FLAGS2: usize = 16;
/// Bytes of `struct fuse_init_out`, and offsets in it.
const OUT_BYTES: usize = 64;
const OUT_FLAGS: usize = 12;
const OUT_MAX_WRITE: usize = 20;
const OUT_MAX_PAGES: usize = 28;
const OUT_MAP_ALIGNMENT: usize = 30;
const OUT_FLAGS2: usize = 32;

/// The flags that pass between kernel and host, and why each may. A flag that is not here passes in neither direction:
/// it might need messages, memory or descriptors that a transport does not carry.
///
/// Left out for a reason: ATOMIC_O_TRUNC (the kernel would have a running program's file truncated before its check for
/// ETXTBSY); MAP_ALIGNMENT and HAS_INODE_DAX (they map the host's memory into the guest's files); PASSTHROUGH
/// (descriptors of the guest's own kernel); ABORT_ERROR, HAS_RESEND, REQUEST_TIMEOUT, SPLICE_* and OVER_IO_URING
/// (between this program and the kernel).
const CARRIED: [(u64, &str); 30] = [
    // How the kernel may send requests; their format stays the same.
    (ASYNC_READ, "ASYNC_READ"),
    (ASYNC_DIO, "ASYNC_DIO"),
    (BIG_WRITES, "BIG_WRITES"),
    (MAX_PAGES, "MAX_PAGES"),
    (PARALLEL_DIROPS, "PARALLEL_DIROPS"),
    (INIT_EXT, "INIT_EXT"),
    // Data that the kernel caches, or requests that it saves.
    (AUTO_INVAL_DATA, "AUTO_INVAL_DATA"),
    (EXPLICIT_INVAL_DATA, "EXPLICIT_INVAL_DATA"),
    (WRITEBACK_CACHE, "WRITEBACK_CACHE"),
    (CACHE_SYMLINKS, "CACHE_SYMLINKS"),
    (NO_OPEN_SUPPORT, "NO_OPEN_SUPPORT"),
    (NO_OPENDIR_SUPPORT, "NO_OPENDIR_SUPPORT"),
    (DO_READDIRPLUS, "DO_READDIRPLUS"),
    (READDIRPLUS_AUTO, "READDIRPLUS_AUTO"),
    // The kernel reports which notifications it supports; this changes nothing until one is sent.
    (HAS_EXPIRE_ONLY, "HAS_EXPIRE_ONLY"),
    // Which side checks access and drops set-user-id bits: flags in fields that every host gets.
    (DONT_MASK, "DONT_MASK"),
    (POSIX_ACL, "POSIX_ACL"),
    (HANDLE_KILLPRIV, "HANDLE_KILLPRIV"),
    (HANDLE_KILLPRIV_V2, "HANDLE_KILLPRIV_V2"),
    // A longer SETXATTR, and extensions behind a request's names: both are in the slot like any payload.
    (SETXATTR_EXT, "SETXATTR_EXT"),
    (SECURITY_CTX, "SECURITY_CTX"),
    (CREATE_SUPP_GROUP, "CREATE_SUPP_GROUP"),
    // Whether LOOKUP of "." and ".." resolves NFS file handles, or the mount has no file handles at all.
    (EXPORT_SUPPORT, "EXPORT_SUPPORT"),
    (NO_EXPORT_SUPPORT, "NO_EXPORT_SUPPORT"),
    // A flag in an entry's attributes.
    (SUBMOUNTS, "SUBMOUNTS"),
    // IOCTL on directories.
    (HAS_IOCTL_DIR, "HAS_IOCTL_DIR"),
    // Shared mappings of files without a page cache: only READs and WRITEs.
    (DIRECT_IO_ALLOW_MMAP, "DIRECT_IO_ALLOW_MMAP"),
    // Requests have the ids as the idmapped mount maps them. Without `default_permissions` the kernel refuses this
    // flag.
    (ALLOW_IDMAP, "ALLOW_IDMAP"),
    // Locks that the host keeps. They end with the host: see `InitResult::shared_locks`.
    (POSIX_LOCKS, "POSIX_LOCKS"),
    (FLOCK_LOCKS, "FLOCK_LOCKS"),
];

/// Returns the bits of [`CARRIED`] that a mount with these options uses.
fn carried(wanted: InitOptions) -> u64 {
    let mut all = CARRIED.iter().fold(0, |all, (bit, _)| all | bit);
    if !wanted.writeback {
        all &= !WRITEBACK_CACHE;
    }
    if !wanted.default_permissions {
        all &= !ALLOW_IDMAP;
    }
    all
}

/// Names the flags, for a message.
fn names(flags: u64) -> String {
    let known = CARRIED.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| *name);
    known.collect::<Vec<_>>().join(", ")
}

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

/// Returns the flags that the kernel offers in `fuse_init_in`.
pub fn offered(body: &[u8]) -> u64 {
    flags(body, IN_FLAGS, IN_FLAGS2)
}

/// Removes the flags from the kernel's `fuse_init_in` that the host must not see.
pub fn filter_init_in(body: &mut [u8], wanted: InitOptions) {
    let kept = offered(body) & carried(wanted);
    set_flags(body, IN_FLAGS, IN_FLAGS2, kept);
}

/// Adapts the host's `fuse_init_out` to the slots and the channel. `offered` are the kernel's flags.
///
/// # Errors
/// If the host's FUSE version is not supported; the text says why.
pub fn filter_init_out(body: &mut [u8], offered: u64, wanted: InitOptions) -> Result<InitResult, String> {
    let (major, minor) = (u32_at(body, 0), u32_at(body, 4));
    if major != MAJOR || minor < MIN_MINOR || body.len() < OUT_BYTES {
        return Err(format!("it speaks FUSE {major}.{minor}, and must {MAJOR}.{MIN_MINOR} or a later {MAJOR}.x"));
    }
    let page = 4096;
    let max_pages = (wanted.slot_size / page).min(u32::from(u16::MAX)).min(kernel_pages_limit());
    let max_write = u32_at(body, OUT_MAX_WRITE).min(max_pages * page).max(page);
    let uring = wanted.uring.unwrap_or(true) && offered & OVER_IO_URING != 0;
    // The host chose from the filtered flags; MAX_PAGES, INIT_EXT and OVER_IO_URING are for the guest to decide.
    let mut agreed = flags(body, OUT_FLAGS, OUT_FLAGS2) & offered & carried(wanted);
    agreed |= offered & (MAX_PAGES | INIT_EXT);
    if uring {
        agreed |= OVER_IO_URING;
    }
    set_flags(body, OUT_FLAGS, OUT_FLAGS2, agreed);
    // Clear the fields of flags that do not pass: DAX, passthrough, the request timeout.
    body[OUT_MAP_ALIGNMENT..OUT_FLAGS2].fill(0);
    body[OUT_FLAGS2 + 4..].fill(0);
    put(body, OUT_MAX_WRITE, max_write);
    body[OUT_MAX_PAGES..OUT_MAX_PAGES + 2].copy_from_slice(&((max_write / page) as u16).to_ne_bytes());
    let shared_locks = agreed & (POSIX_LOCKS | FLOCK_LOCKS) != 0;
    Ok(InitResult { uring, max_write, shared_locks })
}

/// The negotiation with the first host, to which the next host must agree.
#[derive(Clone, Debug)]
pub struct InitReplay {
    request: Vec<u8>,
    flags: u64,
    minor: u32,
    max_write: u32,
}

impl InitReplay {
    /// Makes it from the INIT request, with its header, as the host got it, and from the host's reply, without header.
    pub fn new(request: &[u8], reply: &[u8], agreed: InitResult) -> InitReplay {
        let mut request = request.to_vec();
        let body = &mut request[IN_HEADER..];
        // Offer the next host no other flags: the kernel would not know that they are on.
        let flags = flags(reply, OUT_FLAGS, OUT_FLAGS2) & offered(body);
        set_flags(body, IN_FLAGS, IN_FLAGS2, flags);
        InitReplay { request, flags, minor: u32_at(reply, 4), max_write: agreed.max_write }
    }

    /// Returns the INIT request for the next host.
    pub fn request(&self) -> &[u8] {
        &self.request
    }

    /// Checks the next host's reply, without header.
    ///
    /// # Errors
    /// The text says which part of the first host's reply it does not offer.
    pub fn check(&self, reply: &[u8]) -> Result<(), String> {
        let (major, minor) = (u32_at(reply, 0), u32_at(reply, 4));
        if major != MAJOR || minor < self.minor || reply.len() < OUT_BYTES {
            return Err(format!("it speaks FUSE {major}.{minor}, the one before it {MAJOR}.{}", self.minor));
        }
        let lacking = self.flags & !flags(reply, OUT_FLAGS, OUT_FLAGS2);
        if lacking != 0 {
            return Err(format!("it does not agree to what the one before it did: INIT flags {lacking:#x} ({}); is it started with other options?", names(lacking)));
        }
        if u32_at(reply, OUT_MAX_WRITE) < self.max_write {
            return Err(format!("its largest write is smaller than {} bytes", self.max_write));
        }
        Ok(())
    }
}

/// Returns the most pages of one request (`fs.fuse.max_pages_limit`, kernel 6.13 and later; 256 before).
fn kernel_pages_limit() -> u32 {
    let text = std::fs::read_to_string("/proc/sys/fs/fuse/max_pages_limit").unwrap_or_default();
    text.trim().parse().unwrap_or(256)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: InitOptions =
        InitOptions { slot_size: 64 << 10, uring: None, writeback: false, default_permissions: true };

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
        filter_init_in(&mut body, WANTED);
        assert_eq!(offered(&body), INIT_EXT | 1);
    }

    #[test]
    fn a_flag_passes_only_if_it_is_listed() {
        let all = InitOptions { writeback: true, ..WANTED };
        let listed = CARRIED.iter().fold(0, |all, (bit, _)| all | bit);
        for bit in (0..64).map(|n| 1u64 << n) {
            let mut request = [0; 64];
            set_flags(&mut request, IN_FLAGS, IN_FLAGS2, INIT_EXT | bit);
            filter_init_in(&mut request, all);
            assert_eq!(offered(&request), INIT_EXT | bit & listed, "{bit:#x} to the host");

            let mut body = reply(INIT_EXT | bit, 4096);
            let no_uring = InitOptions { uring: Some(false), ..all };
            filter_init_out(&mut body, INIT_EXT | bit, no_uring).unwrap();
            assert_eq!(flags(&body, OUT_FLAGS, OUT_FLAGS2), INIT_EXT | bit & listed, "{bit:#x} to the kernel");
        }
        // Nobody has given these bits a meaning yet (protocol 7.45).
        assert_eq!(listed >> 43, 0);
        assert_eq!(listed.count_ones() as usize, CARRIED.len(), "each is there once");
    }

    #[test]
    fn mapped_ids_need_the_kernels_checks() {
        for default_permissions in [true, false] {
            let wanted = InitOptions { default_permissions, ..WANTED };
            let passes = if default_permissions { INIT_EXT | ALLOW_IDMAP } else { INIT_EXT };
            let mut request = [0; 64];
            set_flags(&mut request, IN_FLAGS, IN_FLAGS2, INIT_EXT | ALLOW_IDMAP);
            filter_init_in(&mut request, wanted);
            assert_eq!(offered(&request), passes);
            let mut body = reply(INIT_EXT | ALLOW_IDMAP, 4096);
            filter_init_out(&mut body, INIT_EXT | ALLOW_IDMAP, wanted).unwrap();
            assert_eq!(flags(&body, OUT_FLAGS, OUT_FLAGS2), passes);
        }
    }

    #[test]
    fn shared_locks_are_noticed() {
        for (bit, shared) in [(POSIX_LOCKS, true), (FLOCK_LOCKS, true), (ASYNC_DIO, false)] {
            let agreed = filter_init_out(&mut reply(bit, 4096), bit, WANTED).unwrap();
            assert_eq!(agreed.shared_locks, shared, "{bit:#x}");
            // A host cannot have them where the kernel has not offered them.
            assert!(!filter_init_out(&mut reply(bit, 4096), 0, WANTED).unwrap().shared_locks);
        }
    }

    #[test]
    fn fields_of_flags_that_do_not_pass_are_empty() {
        let mut body = reply(INIT_EXT | PASSTHROUGH | REQUEST_TIMEOUT, 4096);
        body[OUT_MAP_ALIGNMENT..OUT_FLAGS2].fill(7);
        body[OUT_FLAGS2 + 4..].fill(7);
        filter_init_out(&mut body, u64::MAX, WANTED).unwrap();
        assert!(body[OUT_MAP_ALIGNMENT..OUT_FLAGS2].iter().chain(&body[OUT_FLAGS2 + 4..]).all(|b| *b == 0));
    }

    #[test]
    fn writes_are_capped_to_the_slots() {
        let mut body = reply(INIT_EXT | MAX_PAGES, 1 << 20);
        let agreed = filter_init_out(&mut body, INIT_EXT | MAX_PAGES | OVER_IO_URING, WANTED).unwrap();
        assert_eq!(agreed, InitResult { uring: true, max_write: 64 << 10, shared_locks: false });
        assert_eq!((u32_at(&body, OUT_MAX_WRITE), u32_at(&body, OUT_MAX_PAGES) & 0xffff), (64 << 10, 16));
    }

    #[test]
    fn a_host_cannot_switch_on_what_the_kernel_did_not_offer() {
        let mut body = reply(INIT_EXT | PASSTHROUGH | WRITEBACK_CACHE | 1 | 2, 4096);
        let agreed = filter_init_out(&mut body, INIT_EXT | 1, WANTED).unwrap();
        assert!(!agreed.uring);
        assert_eq!(flags(&body, OUT_FLAGS, OUT_FLAGS2), INIT_EXT | 1);
    }

    #[test]
    fn the_next_host_must_agree_to_no_less_and_is_offered_no_more() {
        let mut request = vec![0; IN_HEADER + 64];
        set_flags(&mut request[IN_HEADER..], IN_FLAGS, IN_FLAGS2, INIT_EXT | 0b1011 | 1 << 34);
        let agreed = InitResult { uring: true, max_write: 64 << 10, shared_locks: false };
        let replay = InitReplay::new(&request, &reply(INIT_EXT | 0b1101, 1 << 20), agreed);
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
            let refused = filter_init_out(&mut body, 0, WANTED).unwrap_err();
            assert!(refused.contains(&format!("FUSE {major}.{minor}")), "{refused}");
        }
        assert!(filter_init_out(&mut reply(0, 4096)[..24], 0, WANTED).is_err());
    }
}
