//! Hosts, guests and scratch directories that are gone when they are dropped,
//! also when a test fails.

use crate::skip;
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tunnelfs_bench::session::{sibling, virtiofsd};

/// How long anything may take to come up or go away. Long: others may keep the machine busy.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long what happens at once may take on a busy machine: less than what it would take to wait for a time limit.
pub const PROMPT: Duration = Duration::from_secs(15);

/// Polls until `done` has a value.
pub fn soon<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A folder with `share`, `mnt` and sockets in it.
pub struct Scratch {
    /// Mounted on `share`.
    memory: Option<Unmounted>,
    dir: tempfile::TempDir,
}

/// What is mounted there goes with this.
pub struct Unmounted(pub PathBuf);

impl Drop for Unmounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

impl Scratch {
    /// `None` where nothing can be mounted.
    pub fn new() -> Option<Scratch> {
        if !nix::unistd::geteuid().is_root() {
            skip::lacking("mounting needs root");
            return None;
        }
        if let Err(e) = fs::File::open("/dev/fuse") {
            skip::lacking(format_args!("/dev/fuse: {e}"));
            return None;
        }
        let scratch = Scratch { memory: None, dir: tempfile::tempdir().unwrap() };
        for dir in ["", "share", "mnt"] {
            let dir = scratch.path(dir);
            fs::create_dir_all(&dir).unwrap();
            // Other users' checks pass through here.
            fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
        }
        Some(scratch)
    }

    /// With the shared directory in memory, of at most so many bytes (as tmpfs has it, for example `2m`).
    pub fn in_memory(mut self, size: &str) -> Scratch {
        let (share, size) = (self.path("share"), format!("mode=755,size={size}"));
        mount(Some("none"), &share, Some("tmpfs"), MsFlags::empty(), Some(size.as_str())).unwrap();
        self.memory = Some(Unmounted(share));
        self
    }

    /// `None` where the channel cannot be had either.
    pub fn for_channel(channel: &str) -> Option<Scratch> {
        let scratch = Scratch::new()?;
        if channel == "uring" {
            if let Err(e) = switch_on_uring() {
                skip::unsupported(format_args!("{URING}: {e}; FUSE-over-io_uring came with Linux 6.14"));
                return None;
            }
        }
        Some(scratch)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

const URING: &str = "/sys/module/fuse/parameters/enable_uring";

fn switch_on_uring() -> io::Result<()> {
    if fs::read_to_string(URING)?.trim() != "Y" {
        println!("switching {URING} on");
        fs::write(URING, "Y")?;
    }
    Ok(())
}

/// What listens on the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    Ours,
    /// Ours, with streamed messages.
    Stream,
    Virtiofsd,
}

/// A host on the scratch's `share`, not started.
pub fn host_command(scratch: &Scratch, peer: Peer, options: &[&str]) -> Command {
    let (socket, share) = (scratch.path("socket"), scratch.path("share"));
    let program = match peer {
        Peer::Virtiofsd => virtiofsd().expect("checked by the test"),
        _ => sibling("tunnelfs-host").unwrap(),
    };
    let mut command = Command::new(program);
    command.arg("--socket-path").arg(&socket).arg("--shared-dir").arg(&share).stdin(Stdio::null());
    match peer {
        Peer::Virtiofsd => command.args(["--sandbox", "none", "--log-level", "error", "--tag", "t"]),
        _ => command.args(["--num-request-queues", "2"]),
    };
    command.args(options);
    if peer == Peer::Stream {
        command.args(["--transport", "socket"]);
    }
    command
}

/// A host process on the scratch's `share`.
pub struct Host {
    pub child: Child,
    pub socket: PathBuf,
    share: PathBuf,
}

impl Host {
    pub fn start(scratch: &Scratch, peer: Peer) -> Host {
        Host::start_with(scratch, peer, FEATURES)
    }

    pub fn start_with(scratch: &Scratch, peer: Peer, options: &[&str]) -> Host {
        Host::spawn(scratch, &mut host_command(scratch, peer, options))
    }

    /// Starts a host of the scratch, and waits until it listens.
    pub fn spawn(scratch: &Scratch, command: &mut Command) -> Host {
        let (socket, share) = (scratch.path("socket"), scratch.path("share"));
        let child = command.spawn().unwrap();
        soon("the host listens", || is_listening(&socket).then_some(()));
        Host { child, socket, share }
    }

    /// One that a test has started in a way of its own.
    pub fn of(child: Child, socket: PathBuf, share: PathBuf) -> Host {
        Host { child, socket, share }
    }

    /// The process that serves.
    pub fn server(&self) -> Pid {
        server(self.child.id())
    }
}

/// The process of a host that serves: in a sandbox with its own processes it is a child.
pub fn server(host: u32) -> Pid {
    let children = fs::read_to_string(format!("/proc/{host}/task/{host}/children")).unwrap();
    Pid::from_raw(children.trim().parse().unwrap_or(host as i32))
}

/// Stops a process, and waits until each of its threads has.
pub fn stop(pid: Pid) {
    kill(pid, Signal::SIGSTOP).unwrap();
    soon("every thread stops", || all_threads(pid, 'T').then_some(()));
}

/// Whether all threads of a process are in a state, as proc_pid_stat(5) has it.
pub fn all_threads(pid: Pid, state: char) -> bool {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.flatten().all(|task| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(state))
    })
}

/// A stopped process goes on when this is dropped, also when a test fails: nothing that waits for it could end.
pub struct Stopped(Pid);

impl Stopped {
    pub fn new(pid: Pid) -> Stopped {
        stop(pid);
        Stopped(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// Whether connections to the socket are accepted; asking by connecting would be a guest's visit.
pub fn is_listening(socket: &Path) -> bool {
    let (flag, path) = (" 00010000 ", format!(" {}", socket.display()));
    let sockets = fs::read_to_string("/proc/net/unix").unwrap();
    sockets.lines().any(|line| line.contains(flag) && line.ends_with(&path))
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Options of either host that the checks count on.
pub const FEATURES: &[&str] = &["--xattr", "--posix-acl=auto", "--killpriv-v2"];

/// A mount's foreground process.
pub struct Guest {
    child: Child,
    pub point: PathBuf,
    output: PathBuf,
}

/// `tunnelfs-guest mount` on the scratch's `mnt`, not started.
pub fn mount_command(scratch: &Scratch, socket: &Path, options: &str) -> Command {
    let mut command = Command::new(sibling("tunnelfs-guest").unwrap());
    command.args(["mount", "--socket-path"]).arg(socket).arg(scratch.path("mnt"));
    command.args(["-o", options]).stdin(Stdio::null());
    command
}

/// CPU time of all threads of a process.
pub fn cpu_time(pid: Pid) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let texts = tasks.map(|task| fs::read_to_string(task.path().join("schedstat")).unwrap_or_default());
    Duration::from_nanos(texts.filter_map(|text| text.split(' ').next()?.parse::<u64>().ok()).sum())
}

/// Whether something of ours is mounted on `point`.
pub fn is_mounted(point: &Path) -> bool {
    let point = format!(" {} fuse.tunnelfs ", point.display());
    fs::read_to_string("/proc/mounts").unwrap().contains(&point)
}

impl Guest {
    pub fn mount(scratch: &Scratch, host: &Host, options: &str) -> Guest {
        Guest::spawn(scratch, mount_command(scratch, &host.socket, options))
    }

    /// Starts what [`mount_command`] has made, in the foreground, and waits until it is mounted.
    pub fn spawn(scratch: &Scratch, mut command: Command) -> Guest {
        let (point, output) = (scratch.path("mnt"), scratch.path("output"));
        command.arg("-f").stdout(Stdio::piped()).stderr(fs::File::create(&output).unwrap());
        let child = command.spawn().unwrap();
        let mut guest = Guest { child, point, output };
        // It says so when the mount is complete.
        let mut line = String::new();
        let mut stdout = io::BufReader::new(guest.child.stdout.take().unwrap());
        io::BufRead::read_line(&mut stdout, &mut line).unwrap();
        assert!(line.contains(" mounted: "), "{line}{}", guest.output());
        guest
    }

    pub fn place(&self, host: &Host) -> Place {
        Place { dir: self.point.clone(), behind: host.share.clone(), mounted: true }
    }

    /// What it has written to stderr.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.output).unwrap()
    }

    /// Stops the process, and waits until it has.
    pub fn stop(&self) {
        stop(self.pid());
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    pub fn statistics(&self) -> String {
        statistics(self.pid(), &self.output)
    }

    /// All queues' copied bytes, from the statistics.
    pub fn copied(&self) -> u64 {
        let statistics = self.statistics();
        let lines = statistics.lines().filter_map(|l| l.trim().strip_prefix(COPIED));
        lines.map(|l| l.split(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }

    /// Waits for the end of the process.
    pub fn ended(&mut self) -> ExitStatus {
        let child = &mut self.child;
        soon("the guest ends", || child.try_wait().unwrap())
    }

    /// As `umount` does; the process must end well.
    pub fn unmount(mut self) {
        // What another test starts has copies of our descriptors for a moment.
        let unmounted = soon("it is not busy any more", || {
            Some(umount2(&self.point, MntFlags::empty())).filter(|r| *r != Err(nix::Error::EBUSY))
        });
        unmounted.unwrap();
        let status = self.ended();
        assert!(status.success(), "{status}: {}", self.output());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if is_mounted(&self.point) {
            let _ = umount2(&self.point, MntFlags::MNT_DETACH);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const COPIED: &str = "payload copied in user space: ";

/// What a guest that logs to `log` says on SIGUSR1.
pub fn statistics(guest: Pid, log: &Path) -> String {
    let before = fs::metadata(log).unwrap().len() as usize;
    kill(guest, Signal::SIGUSR1).unwrap();
    soon("statistics", || {
        let new = fs::read_to_string(log).unwrap().split_off(before);
        (new.contains(COPIED) && new.ends_with('\n')).then_some(new)
    })
}

/// Where a check works.
pub struct Place {
    /// The directory under test.
    pub dir: PathBuf,
    /// The same directory as the host sees it.
    pub behind: PathBuf,
    /// Whether the two are not one.
    pub mounted: bool,
}

impl Place {
    pub fn local(scratch: &Scratch) -> Place {
        Place { dir: scratch.path("share"), behind: scratch.path("share"), mounted: false }
    }

    /// A new directory in this one.
    pub fn enter(&self, name: &str) -> Place {
        let place = Place { dir: self.dir.join(name), behind: self.behind.join(name), mounted: self.mounted };
        fs::create_dir(&place.dir).unwrap();
        fs::set_permissions(&place.dir, Permissions::from_mode(0o755)).unwrap();
        place
    }

    pub fn remove(&self) -> io::Result<()> {
        fs::remove_dir_all(&self.dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

/// Runs `work` on a thread with another user's identity (raw calls: the C
/// library's would change the whole process).
pub fn as_user<T: Send>(uid: u32, gid: u32, groups: &[u32], work: impl FnOnce() -> T + Send) -> T {
    let run = || {
        // SAFETY: plain system calls; `groups` is readable for its length.
        let ok = unsafe {
            libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) == 0
                && libc::syscall(libc::SYS_setresgid, gid, gid, gid) == 0
                && libc::syscall(libc::SYS_setresuid, uid, uid, uid) == 0
        };
        assert!(ok, "cannot become user {uid}");
        work()
    };
    std::thread::scope(|s| s.spawn(run).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The error number of what must fail.
pub fn errno<T>(result: io::Result<T>) -> i32 {
    match result {
        Ok(_) => panic!("succeeded"),
        Err(e) => e.raw_os_error().unwrap(),
    }
}
