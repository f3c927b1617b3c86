//! The systems that are compared: each is a directory with the same files in
//! it, and all that was mounted or started for it is gone when it is dropped.
//! Separate hosts, ours and stock virtiofsd, run in their default sandbox.

use super::floor::Floor;
use super::patience::await_that;
use super::plan::{MountPlan, Peer};
use super::requests::{self, Requests};
use crate::in_process::InProcess;
use crate::session::{process_cpu, sibling, threads_cpu, virtiofsd};
use nix::mount::{umount2, MntFlags};
use std::fs::{self, File, Permissions};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tunnelfs_guest::fuse::device::{uring_enabled, MountOptions};
use tunnelfs_guest::mount::{Mount, MountConfig, WORKERS};
use tunnelfs_guest::Connection;
use tunnelfs_guest::Transport;
use tunnelfs_host::fs_builder;
use tunnelfs_host::handler::Handler;
use tunnelfs_host::Server;
use tunnelfs_settings::{Cache, Channel, Settings, TransportKind};

/// Ours, and stock virtiofsd. `floor` is a FUSE server that does nothing, `-fuse` the channel over `/dev/fuse`.
const NAMES: [&str; 9] =
    ["native", "floor", "floor-fuse", "in-process", "ring", "ring-fuse", "virtqueue", "socket", "virtiofsd"];

/// One system under test.
pub struct System {
    pub name: String,
    /// Where jobs work.
    pub dir: PathBuf,
    pub transport: String,
    pub placement: &'static str,
    pub policy: String,
    pub channel: String,
    mounted: Option<PathBuf>,
    /// A mount in this process.
    inside: Option<Mount>,
    guest: Option<Child>,
    host: Option<Child>,
    /// What the guest tells.
    log: Option<PathBuf>,
}

/// All systems of a phase.
pub struct Systems {
    /// In the order of the report.
    pub list: Vec<System>,
}

impl Systems {
    /// Starts and mounts what the plan wants, over one source directory with a directory for each system. `data` in them
    /// is one and the same file: where its pages lie makes a third of the time that reading them takes.
    ///
    /// # Errors
    /// The first that does not come up.
    pub fn start(plan: &MountPlan, scratch: &Path, cache: Cache, settings: &Settings) -> io::Result<Systems> {
        let (source, file_bytes) = (scratch.join("source"), plan.file_bytes);
        let setup = Setup { source, scratch: scratch.into(), cache, settings, file_bytes, count: false };
        let mut systems = Systems { list: Vec::new() };
        for name in NAMES {
            let absent = match name {
                "ring-fuse" | "floor-fuse" => (!uring_enabled()).then_some("every mount uses /dev/fuse here"),
                "virtiofsd" => virtiofsd().is_none().then_some("`make deps` installs stock virtiofsd"),
                _ => None,
            };
            if !MountPlan::wants(&plan.systems, name) {
                continue;
            }
            match absent {
                Some(why) => eprintln!("{name} is left out: {why}"),
                None => {
                    systems.list.push(setup.system(name, name).map_err(|e| io::Error::other(format!("{name}: {e}")))?)
                }
            }
        }
        for peer in &plan.peers {
            let told = |e: io::Error| io::Error::other(format!("{}: {e}", peer.name));
            systems.list.push(setup.peer(peer).map_err(told)?);
        }
        fs::create_dir_all(&setup.source)?;
        write_random(&setup.source.join("data"), plan.file_bytes)?;
        for system in &systems.list {
            fs::create_dir_all(setup.source.join(&system.name))?;
            fs::hard_link(setup.source.join("data"), setup.source.join(&system.name).join("data"))?;
        }
        Ok(systems)
    }

    /// Unmounts everything and ends what was started.
    ///
    /// # Errors
    /// The first that does not go.
    pub fn stop(self) -> io::Result<()> {
        self.list.into_iter().try_for_each(System::stop)
    }
}

/// A file of bytes that no file system can leave out, which any user may write.
fn write_random(path: &Path, bytes: u64) -> io::Result<()> {
    let mut source = File::open("/dev/urandom")?.take(bytes);
    let mut file = File::create(path)?;
    file.set_permissions(Permissions::from_mode(0o666))?;
    io::copy(&mut source, &mut file).map(drop)
}

/// What systems are started with.
pub struct Setup<'a> {
    /// The directory that is shared; it has one of its own for each system.
    pub source: PathBuf,
    /// For sockets, settings and mount points.
    pub scratch: PathBuf,
    /// What our hosts and virtiofsd let the kernel keep.
    pub cache: Cache,
    /// For all of them.
    pub settings: &'a Settings,
    /// Bytes of each file of `floor`.
    pub file_bytes: u64,
    /// Whether guests keep their log in a file, so that [`System::requests`] can count.
    pub count: bool,
}

impl Setup<'_> {
    /// Starts one of ours, or virtiofsd: `kind` says how it works, `name` is its own.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn system(&self, kind: &str, name: &str) -> io::Result<System> {
        fs::create_dir_all(&self.source)?;
        let mut settings = self.settings.clone();
        // As its peers are started.
        settings.host.shared_dir.clone_from(&self.source);
        settings.host.cache = self.cache;
        settings.host.announce_submounts = false;
        settings.transport.socket_path = self.scratch.join(format!("{name}.sock"));
        settings.transport.kind = match kind {
            "virtqueue" | "virtiofsd" => TransportKind::Virtqueue,
            "socket" => TransportKind::Socket,
            _ => TransportKind::Ring,
        };
        if kind.ends_with("-fuse") {
            settings.mount.channel = Channel::Fuse;
        }
        let fuse = settings.mount.channel == Channel::Fuse || !uring_enabled();
        let mut system = System {
            name: name.into(),
            dir: self.scratch.join("mnt").join(name).join(name),
            transport: format!("{:?}", settings.transport.kind).to_lowercase(),
            placement: "separate",
            policy: settings.wait.policy.to_string(),
            channel: if fuse { "fuse" } else { "uring" }.into(),
            mounted: None,
            inside: None,
            guest: None,
            host: None,
            log: None,
        };
        let point = self.scratch.join("mnt").join(name);
        fs::create_dir_all(&point)?;
        match kind {
            "native" => {
                system.dir = self.source.join(name);
                (system.transport, system.channel, system.policy) = ("native".into(), String::new(), String::new());
            }
            "in-process" | "floor" | "floor-fuse" => {
                (system.transport, system.placement) = ("direct".into(), "in-process");
                let server: Arc<dyn Handler> = match kind {
                    "in-process" => Arc::new(Server::new(fs_builder::open(&settings.host)?)),
                    _ => Arc::new(Server::new(Floor::new(name, self.file_bytes, self.cache)?)),
                };
                system.inside = Some(mount_inside(server, &settings, &point)?);
                system.mounted = Some(point);
            }
            _ => {
                let file = self.scratch.join(format!("{name}.toml"));
                fs::write(&file, toml::to_string(&settings).map_err(io::Error::other)?)?;
                if kind == "virtiofsd" {
                    system.transport = kind.into();
                }
                // Of a host before.
                let _ = fs::remove_file(&settings.transport.socket_path);
                system.host = Some(start_host(kind, &file, &settings)?);
                system.log = self.count.then(|| self.scratch.join(format!("{name}.log")));
                await_that("the host listens", || settings.transport.socket_path.exists())?;
                system.guest = Some(mount_outside(&file, &point, system.log.as_deref())?);
                system.mounted = Some(point);
            }
        }
        Ok(system)
    }

    /// Starts another FUSE program.
    ///
    /// # Errors
    /// When it does not mount.
    pub fn peer(&self, peer: &Peer) -> io::Result<System> {
        let point = self.scratch.join("mnt").join(&peer.name);
        fs::create_dir_all(&point)?;
        let words = |text: &str| {
            text.replace("{src}", &self.source.display().to_string()).replace("{mnt}", &point.display().to_string())
        };
        let child =
            Command::new("sh").arg("-c").arg(format!("exec {}", words(&peer.command))).stdin(Stdio::null()).spawn()?;
        let system = System {
            name: peer.name.clone(),
            dir: point.join(&peer.name),
            transport: peer.name.clone(),
            placement: "in-process",
            policy: String::new(),
            channel: String::new(),
            mounted: Some(point.clone()),
            inside: None,
            guest: Some(child),
            host: None,
            log: None,
        };
        await_that("it mounts", || is_mounted(&point))?;
        Ok(system)
    }
}

fn start_host(kind: &str, file: &Path, settings: &Settings) -> io::Result<Child> {
    if kind != "virtiofsd" {
        return Command::new(sibling("tunnelfs-host")?).arg("--config").arg(file).stdin(Stdio::null()).spawn();
    }
    let program = virtiofsd().ok_or_else(|| io::Error::other("it is not installed"))?;
    let mut command = Command::new(program);
    command.arg("--socket-path").arg(&settings.transport.socket_path);
    command.arg("--shared-dir").arg(&settings.host.shared_dir);
    command.arg("--cache").arg(format!("{:?}", settings.host.cache).to_lowercase());
    command.args(["--tag", "tunnelfs", "--log-level", "error", "--no-announce-submounts"]);
    command.stdin(Stdio::null()).spawn()
}

/// `tunnelfs-guest mount` as a process of its own, which writes what it tells into `log`.
fn mount_outside(file: &Path, point: &Path, log: Option<&Path>) -> io::Result<Child> {
    let mut command = Command::new(sibling("tunnelfs-guest")?);
    command.args(["mount", "-f", "--config"]).arg(file).arg(point).stdin(Stdio::null()).stdout(Stdio::piped());
    if let Some(log) = log {
        command.stderr(File::create(log)?);
    }
    let mut child = command.spawn()?;
    let mut line = String::new();
    // It says so when the mount is complete; if it fails, it has told why itself.
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line)?;
    if line.contains(" mounted: ") {
        return Ok(child);
    }
    child.wait()?;
    let told = log.and_then(|log| fs::read_to_string(log).ok()).unwrap_or_default();
    Err(io::Error::other(format!("tunnelfs-guest did not mount {told}")))
}

/// A server in this process, on the threads that read the kernel's requests. Mounted by a thread of its own: one that
/// serves gets another working directory.
fn mount_inside(server: Arc<dyn Handler>, settings: &Settings, point: &Path) -> io::Result<Mount> {
    let config = MountConfig::new(settings, point, MountOptions::default());
    let queue = || InProcess::new(server.clone(), config.guest.geometry).map(|q| Box::new(q) as Box<dyn Transport>);
    let queues = (0..config.guest.queues).map(|_| queue()).collect::<Result<_, _>>().map_err(io::Error::other)?;
    let connection = Connection { hiprio: queue().map_err(io::Error::other)?, queues, changes: None, retained: None };
    let mount = std::thread::scope(|scope| scope.spawn(|| Mount::with_connection(connection, &config)).join());
    mount.map_err(|_| io::Error::other("a panic"))?.map_err(io::Error::other)
}

fn is_mounted(point: &Path) -> bool {
    let point = format!(" {} ", point.display());
    fs::read_to_string("/proc/mounts").is_ok_and(|mounts| mounts.contains(&point))
}

impl System {
    /// CPU time so far of the guest's processes and of the host's.
    pub fn cpu(&self) -> [Duration; 2] {
        let of = |child: &Option<Child>| child.as_ref().map_or(Duration::ZERO, |c| process_cpu(c.id()));
        let inside = self.inside.as_ref().map_or(Duration::ZERO, |_| threads_cpu(WORKERS));
        [of(&self.guest) + inside, of(&self.host)]
    }

    /// What the kernel has asked the guest so far; `None` where nobody counts.
    ///
    /// # Errors
    /// When the guest does not tell.
    pub fn requests(&self) -> io::Result<Option<Requests>> {
        match (&self.inside, &self.guest, &self.log) {
            (Some(mount), ..) => Ok(Some(requests::parse(&mount.statistics()))),
            (None, Some(guest), Some(log)) => requests::ask(guest.id(), log).map(Some),
            _ => Ok(None),
        }
    }

    /// Unmounts it, and ends what was started for it.
    ///
    /// # Errors
    /// When it does not go.
    pub fn stop(mut self) -> io::Result<()> {
        let Some(point) = self.mounted.take() else { return Ok(()) };
        umount2(&point, MntFlags::empty())?;
        if let Some(mount) = self.inside.take() {
            mount.finish().map_err(io::Error::other)?;
        }
        if let Some(guest) = &mut self.guest {
            await_that("the guest ends", || guest.try_wait().is_ok_and(|status| status.is_some()))?;
        }
        Ok(())
    }
}

impl Drop for System {
    fn drop(&mut self) {
        if let Some(point) = &self.mounted {
            let _ = umount2(point, MntFlags::MNT_DETACH);
        }
        for child in [&mut self.guest, &mut self.host].into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
