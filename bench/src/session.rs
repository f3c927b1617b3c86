//! A guest and its host, ready to be measured; both are gone when it is dropped.

use crate::plan::{Pair, Placement, Via};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tunnelfs_guest::{connect, message, transport::call, GuestConfig, Transport, Wanted};
use tunnelfs_host::HostConfig;
use tunnelfs_ring::{Geometry, WaitConfig};

/// FUSE operation numbers (linux/fuse.h).
pub mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const INIT: u32 = 26;
}

/// Name of the file that is read and written.
pub const FILE: &str = "data";
/// Its bytes.
pub const FILE_BYTES: u64 = 64 << 20;
/// The sizes of every queue here.
pub const GEOMETRY: Geometry = Geometry { entries: 64, slots: 32, slot_size: 1 << 20 };

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

/// The wait settings of a benchmark.
pub fn wait(pair: &Pair) -> WaitConfig {
    WaitConfig { policy: pair.policy, spin_us: 10_000, auto_us: 200 }
}

impl Session {
    /// Starts a host for `pair` on `dir` and connects to it; sockets go into `scratch`.
    ///
    /// # Errors
    /// What could not be started or connected.
    pub fn open(pair: &Pair, dir: &Path, scratch: &Path, number: usize) -> io::Result<Session> {
        let socket = scratch.join(format!("s{number}"));
        let mut host = match (pair.transport, pair.placement) {
            (Via::Virtiofsd, _) => Host::Process(start_virtiofsd(&socket, dir)?),
            (_, Placement::Separate) => Host::Process(start_host(pair, &socket, dir)?),
            (_, Placement::InProcess) => Host::Thread(Some(start_thread(pair, &socket, dir))),
        };
        let config = GuestConfig {
            socket_path: socket,
            transport: match pair.transport {
                Via::Ring => Wanted::Ring,
                Via::Socket => Wanted::Socket,
                _ => Wanted::Virtqueue,
            },
            queues: 1,
            geometry: GEOMETRY,
            huge_pages: false,
            wait: wait(pair),
            cpus: Vec::new(),
        };
        let mut queues = connect_soon(&config, &mut host)?;
        let file = open_file(|head| reply_word(queues[0].as_mut(), head)).map_err(io::Error::other)?;
        Ok(Session { queues, file, host })
    }

    /// CPU time of the host so far: of its process, or of this one's other threads.
    pub fn host_cpu(&self) -> Duration {
        match &self.host {
            Host::Process(child) => process_cpu(child.id()),
            Host::Thread(_) => cpu_clock(libc::CLOCK_PROCESS_CPUTIME_ID).saturating_sub(thread_cpu()),
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

fn start_host(pair: &Pair, socket: &Path, dir: &Path) -> io::Result<Child> {
    let program = sibling("tunnelfs-host")?;
    let mut command = Command::new(&program);
    command.arg("--socket-path").arg(socket).arg("--shared-dir").arg(dir);
    command.args(["--once", "--wait", &pair.policy.to_string()]);
    if pair.transport == Via::Socket {
        command.arg("--stream");
    }
    command.stdin(Stdio::null()).spawn().map_err(|e| io::Error::other(format!("{}: {e}", program.display())))
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
    let given = std::env::var_os("VIRTIOFSD").map(PathBuf::from);
    given.or_else(|| Some(PathBuf::from(".deps/bin/virtiofsd"))).filter(|p| p.exists())
}

fn start_virtiofsd(socket: &Path, dir: &Path) -> io::Result<Child> {
    let program = virtiofsd().ok_or_else(|| io::Error::other("virtiofsd is not installed: run `make deps`"))?;
    let mut command = Command::new(program);
    command.arg("--socket-path").arg(socket).arg("--shared-dir").arg(dir);
    command.args(["--tag", "tunnelfs", "--sandbox", "none", "--log-level", "error"]);
    command.stdin(Stdio::null()).spawn()
}

fn start_thread(pair: &Pair, socket: &Path, dir: &Path) -> JoinHandle<()> {
    let config = HostConfig {
        shared_dir: dir.into(),
        socket_path: socket.into(),
        tag: "tunnelfs".into(),
        queues: 1,
        transport: match pair.transport {
            Via::Socket => tunnelfs_host::Transport::Socket,
            _ => tunnelfs_host::Transport::VhostUser,
        },
        wait: wait(pair),
        workers: 4,
        once: true,
    };
    std::thread::spawn(move || {
        if let Err(e) = tunnelfs_host::serve(&config) {
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

/// Run time of all threads of a process, from their schedstat (nanoseconds).
fn process_cpu(pid: u32) -> Duration {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Duration::ZERO };
    let run_time = |task: std::fs::DirEntry| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    };
    Duration::from_nanos(tasks.flatten().filter_map(run_time).sum())
}
