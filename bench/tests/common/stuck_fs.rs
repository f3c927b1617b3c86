//! A FUSE file system that does not answer while it is told to hold, and that ends a request when an INTERRUPT asks so.

use nix::mount::{mount, umount2, MntFlags, MsFlags};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use tunnelfs_fuse_abi::opcode;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

/// FUSE_INIT and those without an answer.
const INIT: u32 = 26;
const SILENT: [u32; 2] = [2, 42];
const INTERRUPT: u32 = 36;
/// GETXATTR, LISTXATTR and STATX, which the kernel does without when a server does not know them.
const OPTIONAL: [u32; 3] = [22, 23, 52];

/// A FUSE file system with `file`, `cached`, `link` and `dir`, which answers nothing while it is told to hold.
pub struct StuckFs {
    point: PathBuf,
    device: Arc<File>,
    shared: Arc<Shared>,
    server: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    holding: AtomicBool,
    /// Only this opcode is held; 0: all are.
    only: AtomicU32,
    /// `unique` and opcode of what is held.
    held: Mutex<Vec<(u64, u32)>>,
}

impl StuckFs {
    /// Mounts it on a new directory; `None` where nothing can be mounted.
    pub fn mount(point: PathBuf) -> Option<StuckFs> {
        fs::create_dir(&point).unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let Ok(device) = device.inspect_err(|e| println!("skipped: /dev/fuse: {e}")) else { return None };
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        if let Err(e) = mount(Some("stuck"), &point, Some("fuse"), MsFlags::empty(), Some(data.as_str())) {
            println!("skipped: mounting: {e}");
            return None;
        }
        let (device, shared) = (Arc::new(device), Arc::new(Shared::default()));
        let its = (device.clone(), shared.clone());
        let server = Some(std::thread::spawn(move || serve(&its.0, &its.1)));
        Some(StuckFs { point, device, shared, server })
    }

    /// Holds requests of one opcode, and answers the others.
    pub fn hold_only(&self, opcode: u32) {
        self.shared.only.store(opcode, Ordering::SeqCst);
        self.hold();
    }

    pub fn hold(&self) {
        self.shared.holding.store(true, Ordering::SeqCst);
    }

    pub fn held(&self) -> usize {
        self.shared.held.lock().unwrap().len()
    }

    /// Answers what is held, with an error or with data.
    pub fn release(&self, data: Option<&[u8]>) {
        self.shared.holding.store(false, Ordering::SeqCst);
        for (unique, _) in std::mem::take(&mut *self.shared.held.lock().unwrap()) {
            match data {
                Some(data) => answer(&self.device, unique, 0, data),
                None => answer(&self.device, unique, -libc::EIO, &[]),
            }
        }
    }
}

impl Drop for StuckFs {
    fn drop(&mut self) {
        self.release(None);
        let _ = umount2(&self.point, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

fn serve(device: &File, shared: &Shared) {
    let mut room = vec![0u8; (1 << 20) + 4096];
    let mut device_ref = device;
    loop {
        let n = match device_ref.read(&mut room) {
            Ok(n) => n,
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::ENOENT)) => continue,
            Err(_) => return,
        };
        let word = |at: usize| u64::from_ne_bytes(room[at..at + 8].try_into().unwrap());
        let (opcode, unique, node) = (word(0) >> 32, word(8), word(16));
        let opcode = opcode as u32;
        if opcode == INTERRUPT {
            // struct fuse_interrupt_in.
            let about = word(40);
            let mut held = shared.held.lock().unwrap();
            let before = held.len();
            held.retain(|(unique, _)| *unique != about);
            if held.len() < before {
                answer(device, about, -libc::EINTR, &[]);
            }
        } else if SILENT.contains(&opcode) {
        } else if shared.holding.load(Ordering::SeqCst) && [0, opcode].contains(&shared.only.load(Ordering::SeqCst)) {
            shared.held.lock().unwrap().push((unique, opcode));
        } else {
            let (error, reply) = reply(opcode, node, &room[40..n]);
            answer(device, unique, error, &reply);
        }
    }
}

fn answer(mut device: &File, unique: u64, error: i32, body: &[u8]) {
    let mut message = words(&[16 + body.len() as u32, error as u32]);
    message.extend(unique.to_ne_bytes());
    message.extend_from_slice(body);
    let _ = device.write(&message);
}

fn attributes(node: u64) -> Vec<u8> {
    let (mode, size) = match node {
        2 | 5 => (libc::S_IFREG | 0o644, 1 << 20),
        3 => (libc::S_IFLNK | 0o777, 4),
        _ => (libc::S_IFDIR | 0o755, 0),
    };
    let mut attr: Vec<u8> = [node, size, 0, 0, 0, 0].iter().flat_map(|w| w.to_ne_bytes()).collect();
    attr.extend(words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0]));
    attr
}

fn reply(opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
    match opcode {
        // Version 7.31, read-ahead, flags, background, max_write, time_gran; zeros.
        INIT => (0, [words(&[7, 31, 4096, 0, 64 | 64 << 16, 1 << 20, 1]), vec![0; 36]].concat()),
        opcode::LOOKUP => match body {
            b"file\0" => (0, entry(2)),
            b"cached\0" => (0, entry(5)),
            b"link\0" => (0, entry(3)),
            b"dir\0" => (0, entry(4)),
            _ => (-libc::ENOENT, Vec::new()),
        },
        opcode::GETATTR => (0, [vec![0; 16], attributes(node)].concat()),
        opcode::OPEN if node == 5 => (0, vec![0; 16]),
        // FOPEN_DIRECT_IO: each READ and WRITE comes here.
        opcode::OPEN | opcode::OPENDIR => (0, [1u64.to_ne_bytes(), 1u64.to_ne_bytes()].concat()),
        opcode::STATFS => (0, vec![0; 80]),
        opcode::READ | opcode::READDIR | opcode::FLUSH | opcode::RELEASE | opcode::RELEASEDIR | opcode::ACCESS => {
            (0, Vec::new())
        }
        _ if OPTIONAL.contains(&opcode) => (-libc::ENOSYS, Vec::new()),
        _ => (-libc::EIO, Vec::new()),
    }
}

fn entry(node: u64) -> Vec<u8> {
    [node.to_ne_bytes().to_vec(), vec![0; 32], attributes(node)].concat()
}
