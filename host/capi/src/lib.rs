//! The C interface of `include/tunnelfs.h`, which documents it. No panic leaves a function.

use nix::sched::{unshare, CloneFlags};
use std::cell::RefCell;
use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::io;
use std::os::fd::BorrowedFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::sync::mpsc::{channel, Sender};
use std::thread::JoinHandle;
use tunnelfs_host::in_process::{Device, MemoryRegion, Queue, FEATURES};
use tunnelfs_host::{fs::Passthrough, Counted, Daemon, Guests, Host, Meter, Server, Stopper};
use tunnelfs_settings::{Loader, Settings};

/// The settings that a share has.
const SECTIONS: &[&str] = &["transport.kind", "transport.socket_path", "transport.queues", "wait", "host"];

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// `struct tunnelfs_memory`.
#[repr(C)]
pub struct Memory {
    guest_address: u64,
    start: *mut c_void,
    length: usize,
}

/// `struct tunnelfs_queue`.
#[repr(C)]
pub struct QueueSetup {
    number: u32,
    size: u16,
    next: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    event_idx: u32,
    kick: c_int,
    call: c_int,
}

/// `struct tunnelfs_statistics`.
#[repr(C)]
pub struct Statistics {
    requests: u64,
    errors: u64,
    bytes_in: u64,
    bytes_out: u64,
}

// As the C compiler has them: `examples/share.c` asserts the same.
const _: () = assert!(size_of::<Memory>() == 24 && size_of::<QueueSetup>() == 48 && size_of::<Statistics>() == 32);

enum Served {
    Socket { stopper: Stopper, thread: Option<JoinHandle<()>> },
    InProcess(Device<Counted<Server<Passthrough>>>),
}

/// `struct tunnelfs_share`.
pub struct Share {
    meter: Meter,
    served: Served,
}

impl Drop for Share {
    fn drop(&mut self) {
        if let Served::Socket { stopper, thread } = &mut self.served {
            if stopper.stop().is_ok() {
                let _ = thread.take().map(JoinHandle::join);
            }
        }
    }
}

impl Share {
    fn device(&self) -> io::Result<&Device<Counted<Server<Passthrough>>>> {
        match &self.served {
            Served::InProcess(device) => Ok(device),
            Served::Socket { .. } => Err(io::Error::other("this share is on a socket: its front end has the queues")),
        }
    }
}

/// Runs `work`; an error or a panic becomes `failed` and the last error's text.
fn guarded<T>(failed: T, work: impl FnOnce() -> io::Result<T>) -> T {
    let text = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => return value,
        Ok(Err(e)) => e.to_string(),
        Err(_) => "a bug of the library: it has panicked".into(),
    };
    let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
    LAST_ERROR.with(|last| last.replace(text));
    failed
}

fn required<'a, T>(pointer: *const T, what: &str) -> io::Result<&'a T> {
    // SAFETY: by the header's contract it is NULL or points at what it says, for the length of the call.
    unsafe { pointer.as_ref() }.ok_or_else(|| io::Error::other(format!("{what} is NULL")))
}

fn settings(options: *const c_char) -> io::Result<Settings> {
    required(options, "options")?;
    // SAFETY: not NULL, so a string that ends with a NUL.
    let options = unsafe { CStr::from_ptr(options) }.to_str().map_err(io::Error::other)?;
    let mut words = options.split(',').filter(|word| !word.is_empty()).peekable();
    let file = words.next_if(|word| word.starts_with("config=")).map(|word| &word["config=".len()..]);
    // A library reads no file that it was not told of.
    let mut loader = Loader::new(Some(Path::new(file.unwrap_or("/dev/null")))).map_err(io::Error::other)?;
    for word in words {
        if !loader.mount_word(SECTIONS, word).map_err(io::Error::other)? {
            return Err(io::Error::other(format!("{word}: no option of a share; docs/tunnelfs.toml has them")));
        }
    }
    loader.finish().map_err(io::Error::other)
}

/// Listens and serves; tells `started` once it listens, or why it does not. The thread has a umask of its own, which
/// making the socket needs.
fn listen(settings: &Settings, meter: &Meter, started: &Sender<io::Result<Stopper>>) -> io::Result<()> {
    unshare(CloneFlags::CLONE_FS)?;
    let (host, daemon, meter) = (Host::in_process(settings)?, Daemon::bind(settings)?, meter.clone());
    let _ = started.send(daemon.stopper());
    daemon.run(move || Ok(meter.count(host.server()?)), Guests::Forever)
}

/// See `tunnelfs.h`.
///
/// # Safety
/// The header's contract: pointers are NULL or point at what it says.
#[no_mangle]
pub unsafe extern "C" fn tunnelfs_listen(options: *const c_char) -> *mut Share {
    guarded(std::ptr::null_mut(), || {
        let (settings, meter, (tell, told)) = (settings(options)?, Meter::default(), channel());
        let its = meter.clone();
        let serve = move || {
            if let Err(e) = listen(&settings, &its, &tell) {
                let _ = tell.send(Err(e));
            }
        };
        let thread = std::thread::Builder::new().name("tunnelfs".into()).spawn(serve)?;
        let stopper = told.recv().map_err(io::Error::other)??;
        let served = Served::Socket { stopper, thread: Some(thread) };
        Ok(Box::into_raw(Box::new(Share { meter, served })))
    })
}

/// See `tunnelfs.h`.
///
/// # Safety
/// The header's contract: pointers are NULL or point at what it says.
#[no_mangle]
pub unsafe extern "C" fn tunnelfs_in_process(
    options: *const c_char,
    memory: *const Memory,
    count: usize,
) -> *mut Share {
    guarded(std::ptr::null_mut(), || {
        let (settings, meter) = (settings(options)?, Meter::default());
        required(memory, "memory")?;
        // SAFETY: by the header's contract there are `count` of them.
        let memory = unsafe { std::slice::from_raw_parts(memory, count) };
        let region = |m: &Memory| MemoryRegion { guest_address: m.guest_address, start: m.start.cast(), len: m.length };
        let regions: Vec<_> = memory.iter().map(region).collect();
        let handler = meter.count(Host::in_process(&settings)?.server()?);
        // SAFETY: by the header's contract it stays mapped until `tunnelfs_stop`.
        let device = unsafe { Device::new(&settings, handler, &regions)? };
        Ok(Box::into_raw(Box::new(Share { meter, served: Served::InProcess(device) })))
    })
}

/// See `tunnelfs.h`.
#[no_mangle]
pub extern "C" fn tunnelfs_features() -> u64 {
    FEATURES
}

/// See `tunnelfs.h`.
///
/// # Safety
/// The header's contract: pointers are NULL or point at what it says.
#[no_mangle]
pub unsafe extern "C" fn tunnelfs_queues(share: *const Share) -> c_int {
    guarded(-1, || Ok(required(share, "share")?.device()?.queues() as c_int))
}

/// See `tunnelfs.h`.
///
/// # Safety
/// The header's contract: pointers are NULL or point at what it says.
#[no_mangle]
pub unsafe extern "C" fn tunnelfs_start_queue(share: *mut Share, queue: *const QueueSetup) -> c_int {
    guarded(-1, || {
        let (device, q) = (required(share, "share")?.device()?, required(queue, "queue")?);
        let copy = |fd: c_int, what: &str| {
            if fd < 0 {
                return Err(io::Error::other(format!("queue {}: no {what}", q.number)));
            }
            // SAFETY: only duplicated, and it is checked to be an eventfd.
            unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
        };
        let queue = Queue {
            size: q.size,
            descriptors: q.descriptors,
            available: q.available,
            used: q.used,
            event_idx: q.event_idx != 0,
            next: q.next,
            kick: copy(q.kick, "kick")?,
            call: copy(q.call, "call")?,
        };
        device.start_queue(q.number as usize, queue).map(|()| 0)
    })
}

/// See `tunnelfs.h`.
///
/// # Safety
/// The header's contract: pointers are NULL or point at what it says.
#[no_mangle]
pub unsafe extern "C" fn tunnelfs_stop_queue(share: *mut Share, number: u32) -> c_int {
    guarded(-1, || required(share, "share")?.device()?.stop_queue(number as usize).map(c_int::from))
}

/// See `tunnelfs.h`.
///
/// # Safety
/// The header's contract: pointers are NULL or point at what it says.
#[no_mangle]
pub unsafe extern "C" fn tunnelfs_reset(share: *mut Share) -> c_int {
    guarded(-1, || {
        required(share, "share")?.device()?.reset();
        Ok(0)
    })
}

/// See `tunnelfs.h`.
///
/// # Safety
/// The header's contract: pointers are NULL or point at what it says.
#[no_mangle]
pub unsafe extern "C" fn tunnelfs_get_statistics(share: *const Share, out: *mut Statistics) -> c_int {
    guarded(-1, || {
        let s = required(share, "share")?.meter.statistics();
        required(out, "out")?;
        let s = Statistics { requests: s.requests, errors: s.errors, bytes_in: s.bytes_in, bytes_out: s.bytes_out };
        // SAFETY: not NULL, and by the header's contract there is room.
        unsafe { out.write(s) };
        Ok(0)
    })
}

/// See `tunnelfs.h`.
///
/// # Safety
/// The header's contract: pointers are NULL or point at what it says.
#[no_mangle]
pub unsafe extern "C" fn tunnelfs_stop(share: *mut Share) {
    guarded((), || {
        if !share.is_null() {
            // SAFETY: from `Box::into_raw`, and by the header's contract nobody uses it any more.
            drop(unsafe { Box::from_raw(share) });
        }
        Ok(())
    });
}

/// See `tunnelfs.h`.
#[no_mangle]
pub extern "C" fn tunnelfs_last_error() -> *const c_char {
    LAST_ERROR.with(|last| last.borrow().as_ptr())
}
