//! A guest and its host, ready to be measured; both are gone when it is dropped.

use crate::plan::{Cpus, HostLocation, Pair, TransportKind};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
pub use tunnelfs_fuse_abi::opcode;
use tunnelfs_guest::{connect, fuse::message, transport::call, GuestConfig, Transport};
use tunnelfs_ring::{allowed_cpus, set_affinity};
use tunnelfs_settings::{self as settings, Sandbox, Seccomp, Settings};

/// Name of the file that is read and written.
pub const FILE: &str = "data";
enum Host {
    Process(Child),
    Thread(Option<JoinHandle<()>>),
}

/// One open connection to one host.
pub struct Session {
    /// One driver per queue.
    pub queues: Vec<Box<dyn Transport>>,
    /// The opened file.
    pub file: OpenFile,
    /// The CPU of each queue's thread while a load runs; none: wherever the kernel likes.
    pub pinned: Vec<usize>,
    host: Host,
}

/// A file as FUSE messages name it.
#[derive(Clone, Copy, Debug)]
pub struct OpenFile {
    /// Its node.
    pub node: u64,
    /// Its handle.
    pub handle: u64,
}

/// What sessions are opened with: the directory, a folder for sockets, and the
/// settings (transport, policy and the like are each pair's own).
#[derive(Clone, Debug)]
pub struct Bench {
    /// The shared directory, which has [`FILE`].
    pub dir: PathBuf,
    /// Where sockets go.
    pub scratch: PathBuf,
    /// Sizes, budgets and host options.
    pub settings: Settings,
}

impl Bench {
    fn settings_of(&self, pair: &Pair, socket: &Path) -> Settings {
        let mut settings = self.settings.clone();
        settings.transport.kind = match pair.transport {
            TransportKind::Ring => settings::TransportKind::Ring,
            TransportKind::Socket => settings::TransportKind::Socket,
            _ => settings::TransportKind::Virtqueue,
        };
        settings.transport.socket_path = socket.into();
        settings.wait.policy = pair.policy;
        // What is compared is transports.
        (settings.host.sandbox, settings.host.seccomp) = (Sandbox::None, Seccomp::None);
        settings.host.shared_dir = self.dir.clone();
        // Nothing is mounted in there, and our INIT does not ask.
        settings.host.announce_submounts = false;
        settings
    }
}

impl Session {
    /// Starts a host for `pair` and connects to it; `number` tells its socket from others'.
    ///
    /// # Errors
    /// What could not be started or connected.
    pub fn open(bench: &Bench, pair: &Pair, number: usize) -> io::Result<Session> {
        let socket = bench.scratch.join(format!("s{number}"));
        let settings = bench.settings_of(pair, &socket);
        let all = allowed_cpus();
        if pair.cpus == Cpus::One {
            set_affinity(&all[..1]).map_err(io::Error::other)?;
        }
        let host = match (pair.transport, pair.placement) {
            (TransportKind::Virtiofsd, _) => start_virtiofsd(&socket, &bench.dir).map(Host::Process),
            (_, HostLocation::Separate) => start_host(&settings, &socket).map(Host::Process),
            (_, HostLocation::InProcess) => Ok(Host::Thread(Some(start_thread(settings.clone())))),
        };
        set_affinity(&all).map_err(io::Error::other)?;
        let mut host = host?;
        let mut queues = connect_soon(&GuestConfig::from(&settings), &mut host)?;
        let file = open_file(|head| reply_word(queues[0].as_mut(), head)).map_err(io::Error::other)?;
        Ok(Session { queues, file, pinned: Vec::new(), host })
    }

    /// CPU time so far of the host's process, or of this one's threads, the guest's too, where the host is here.
    pub fn process_cpu(&self) -> Duration {
        match &self.host {
            Host::Process(child) => process_cpu(child.id()),
            Host::Thread(_) => cpu_clock(libc::CLOCK_PROCESS_CPUTIME_ID),
        }
    }

    /// Process id of a separate host.
    pub fn host_pid(&self) -> Option<u32> {
        match &self.host {
            Host::Process(child) => Some(child.id()),
            Host::Thread(_) => None,
        }
    }

    /// Kills a separate host, as a crash would.
    ///
    /// # Errors
    /// When there is none, or it cannot be killed.
    pub fn kill_host(&mut self) -> io::Result<()> {
        match &mut self.host {
            Host::Process(child) => child.kill().and_then(|()| child.wait().map(drop)),
            Host::Thread(_) => Err(io::Error::other("the host is a thread")),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // A host that serves one guest ends with the connection.
        self.queues.clear();
        match &mut self.host {
            Host::Process(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            Host::Thread(thread) => {
                let _ = thread.take().map(JoinHandle::join);
            }
        }
    }
}

/// The host gets all settings as a file, as a user would give them.
fn start_host(settings: &Settings, socket: &Path) -> io::Result<Child> {
    let program = sibling("tunnelfs-host")?;
    let file = socket.with_extension("toml");
    std::fs::write(&file, toml::to_string(settings).map_err(io::Error::other)?)?;
    let mut command = Command::new(&program);
    command.arg("--once").arg("--config").arg(file).stdin(Stdio::null());
    command.spawn().map_err(|e| io::Error::other(format!("{}: {e}", program.display())))
}

/// A program built beside this one (tests run one folder below).
///
/// # Errors
/// When it is not there; says what to do.
pub fn sibling(name: &str) -> io::Result<PathBuf> {
    let me = std::env::current_exe()?;
    let found = me.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|p| p.exists());
    found.ok_or_else(|| io::Error::other(format!("{name} is not built: run `cargo build` in the same profile")))
}

/// Stock virtiofsd as `make deps` installs it, if it is there.
pub fn virtiofsd() -> Option<PathBuf> {
    if let Some(given) = std::env::var_os("VIRTIOFSD") {
        return Some(PathBuf::from(given)).filter(|p| p.exists());
    }
    installed("virtiofsd")
}

/// A program that `make deps` and the like have put into `.deps`.
pub fn installed(name: &str) -> Option<PathBuf> {
    // Tests run in their crate's folder.
    let here = std::env::current_dir().ok()?;
    here.ancestors().map(|dir| dir.join(".deps/bin").join(name)).find(|p| p.exists())
}

fn start_virtiofsd(socket: &Path, dir: &Path) -> io::Result<Child> {
    let program = virtiofsd().ok_or_else(|| io::Error::other("virtiofsd is not installed: run `make deps`"))?;
    let mut command = Command::new(program);
    command.arg("--socket-path").arg(socket).arg("--shared-dir").arg(dir);
    command.args(["--tag", "tunnelfs", "--sandbox", "none", "--log-level", "error", "--no-announce-submounts"]);
    command.stdin(Stdio::null()).spawn()
}

fn start_thread(settings: Settings) -> JoinHandle<()> {
    std::thread::spawn(move || {
        if let Err(e) = tunnelfs_host::serve(&settings, tunnelfs_host::Guests::One) {
            eprintln!("in-process host: {e}");
        }
    })
}

/// Connects as soon as the host listens.
fn connect_soon(config: &GuestConfig, host: &mut Host) -> io::Result<Vec<Box<dyn Transport>>> {
    let start = Instant::now();
    loop {
        match connect(config) {
            Ok(connection) => return Ok(connection.queues),
            Err(tunnelfs_guest::Error::Connect { source, .. })
                if start.elapsed() < Duration::from_secs(5)
                    && matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(e) => return Err(io::Error::other(e)),
        }
        if let Host::Process(child) = host {
            if let Some(status) = child.try_wait()? {
                return Err(io::Error::other(format!("the host ended at once: {status}")));
            }
        }
    }
}

/// INIT, LOOKUP and OPEN of the benchmark's file; `word` makes a request and
/// returns the first word of its reply.
///
/// # Errors
/// Those of `word`.
pub fn open_file<E>(mut word: impl FnMut(&[u8]) -> Result<u64, E>) -> Result<OpenFile, E> {
    let words = |words: &[u32]| words.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
    // Protocol 7.38, 1 MiB of read-ahead, no options.
    word(&message::request(opcode::INIT, 0, 1, &words(&[7, 38, 1 << 20, 0]), 0))?;
    let node = word(&message::request(opcode::LOOKUP, 1, 2, format!("{FILE}\0").as_bytes(), 0))?;
    let handle = word(&message::request(opcode::OPEN, node, 3, &words(&[libc::O_RDWR as u32, 0]), 0))?;
    Ok(OpenFile { node, handle })
}

/// Makes a request and returns the first word of its reply.
///
/// # Errors
/// The transport's, or a negative answer.
pub fn reply_word(t: &mut dyn Transport, head: &[u8]) -> Result<u64, tunnelfs_guest::Error> {
    let done = call(t, head, 0, 4096)?;
    if done.error() != 0 {
        return Err(std::io::Error::from_raw_os_error(-done.error()).into());
    }
    let mut word = [0; 8];
    if done.inline().len() >= 8 {
        word.copy_from_slice(&done.inline()[..8]);
    } else {
        // SAFETY: eight bytes of a slot that is ours now.
        word = unsafe { t.slot(done.slot).0.cast::<[u8; 8]>().read_volatile() };
    }
    Ok(u64::from_ne_bytes(word))
}

/// CPU time of the calling thread.
pub fn thread_cpu() -> Duration {
    cpu_clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn cpu_clock(id: libc::clockid_t) -> Duration {
    nix::time::clock_gettime(id.into()).map_or(Duration::ZERO, Duration::from)
}

/// Run time of all threads of a process and of the processes that it started: a sandbox is one.
pub fn process_cpu(pid: u32) -> Duration {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Duration::ZERO };
    let with_children = |task: PathBuf| {
        let children = std::fs::read_to_string(task.join("children")).unwrap_or_default();
        let below = children.split_whitespace().filter_map(|child| child.parse().ok()).map(process_cpu);
        run_time(&task).unwrap_or_default() + below.sum()
    };
    tasks.flatten().map(|task| with_children(task.path())).sum()
}

/// Run time of this process's threads whose names start with one of `names`.
pub fn threads_cpu(names: &[&str]) -> Duration {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return Duration::ZERO };
    let named = |task: &PathBuf| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|comm| names.iter().any(|name| comm.starts_with(name)))
    };
    tasks.flatten().map(|task| task.path()).filter(named).filter_map(|task| run_time(&task)).sum()
}

/// Run time of a thread of this process.
pub fn thread_run_time(tid: i32) -> Duration {
    run_time(&PathBuf::from(format!("/proc/self/task/{tid}"))).unwrap_or_default()
}

/// The first word of a thread's schedstat, nanoseconds.
fn run_time(task: &Path) -> Option<Duration> {
    let text = std::fs::read_to_string(task.join("schedstat")).ok()?;
    text.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}
