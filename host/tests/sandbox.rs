//! What a host process can reach in each of its sandboxes, tried from inside:
//! this program starts itself, enters the sandbox as `tunnelfs-host` does, and
//! tries. Needs root; the unprivileged modes become another user first.

#[path = "../../bench/tests/common/skip.rs"]
mod skip;

use std::ffi::CString;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use tunnelfs_fuse_abi::{flags, OpenIn, ReleaseIn, ROOT_ID};
use tunnelfs_host::fs::{Context, FileSystem, Passthrough};
use tunnelfs_host::{fs_builder, sandbox};
use tunnelfs_settings::{Cache, FileHandles, Host, Sandbox, Seccomp};
use vhost::vhost_user::Listener;

/// Something that a serving process has no business to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Try {
    /// Opens a file beside the shared directory by its path.
    Open,
    /// The same by `..`.
    DotDot,
    /// Lists the machine's processes.
    Proc,
    /// Attaches to the process that started it.
    Ptrace,
    /// Connects to a TCP port of the machine.
    Connect,
    /// Mounts a file system.
    Mount,
    /// Starts a program.
    Exec,
    /// Makes a namespace.
    Unshare,
    /// Gives itself another CPU, and its thread its own directory: what serving needs. Must work.
    Serve,
    /// Watches for changes, and keeps data under a lease. Must work.
    Watch,
}

use Try::*;

const TRIES: [Try; 10] = [Open, DotDot, Proc, Ptrace, Connect, Mount, Exec, Unshare, Serve, Watch];

/// A sandbox, and what must fail in it.
struct Case {
    name: &'static str,
    sandbox: Sandbox,
    seccomp: Seccomp,
    /// Another user than root.
    user: bool,
    fails: &'static [Try],
}

/// With `none` the checks of names alone keep a guest inside; and without seccomp a root in a chroot has the network.
const CASES: [Case; 6] = [
    Case {
        name: "namespace",
        sandbox: Sandbox::Namespace,
        seccomp: Seccomp::Kill,
        user: false,
        fails: &[Open, DotDot, Proc, Ptrace, Connect, Mount, Exec, Unshare],
    },
    Case {
        name: "namespace without seccomp",
        sandbox: Sandbox::Namespace,
        seccomp: Seccomp::None,
        user: false,
        fails: &[Open, DotDot, Proc, Ptrace, Connect, Mount, Exec, Unshare],
    },
    Case {
        name: "namespace of a user",
        sandbox: Sandbox::Namespace,
        seccomp: Seccomp::Kill,
        user: true,
        fails: &[Open, DotDot, Proc, Ptrace, Connect, Mount, Exec, Unshare],
    },
    Case {
        name: "chroot",
        sandbox: Sandbox::Chroot,
        seccomp: Seccomp::Kill,
        user: false,
        fails: &[Open, DotDot, Proc, Ptrace, Connect, Mount, Exec, Unshare],
    },
    Case {
        name: "chroot without seccomp",
        sandbox: Sandbox::Chroot,
        seccomp: Seccomp::None,
        user: false,
        fails: &[Open, DotDot, Proc, Ptrace, Mount, Exec, Unshare],
    },
    Case {
        name: "none",
        sandbox: Sandbox::None,
        seccomp: Seccomp::Kill,
        user: false,
        fails: &[Ptrace, Connect, Mount, Exec, Unshare],
    },
];

/// The user of the unprivileged cases (`nobody`).
const USER: u32 = 65534;

fn main() -> ExitCode {
    if let Ok(words) = std::env::var("TUNNELFS_TRY") {
        inside(&words);
    }
    if !nix::unistd::geteuid().is_root() {
        println!("test all ... ok");
        skip::lacking("the sandboxes are for root to try");
        return ExitCode::SUCCESS;
    }
    let scratch = tempfile::tempdir().unwrap();
    std::fs::create_dir(scratch.path().join("share")).unwrap();
    std::fs::write(scratch.path().join("secret"), "no guest's").unwrap();
    for (path, mode) in [("", 0o755), ("share", 0o777), ("secret", 0o644)] {
        let path = scratch.path().join(path);
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    }
    // A lease on it needs this user, or CAP_LEASE.
    let file = scratch.path().join("share/f");
    std::fs::write(&file, "x").unwrap();
    std::os::unix::fs::chown(&file, Some(USER), Some(USER)).unwrap();
    // Another user can neither read the build's folders nor be expected to.
    let program = scratch.path().join("program");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (mut good, mut wrong) = (0, 0);
    for (number, case) in CASES.iter().enumerate() {
        for what in TRIES {
            let mut command = Command::new(&program);
            let words = format!("{number} {what:?} {} {}", scratch.path().display(), port.local_addr().unwrap().port());
            command.env("TUNNELFS_TRY", words).current_dir("/");
            if case.user {
                command.uid(USER).gid(USER);
            }
            let output = command.output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            if !text.contains("inside") {
                let told = String::from_utf8_lossy(&output.stderr).into_owned();
                if case.user && told.contains("Unshare") {
                    println!("test {} ... ok", case.name);
                    skip::note(case.name, &"this system gives users no namespaces");
                    good += 1;
                    break;
                }
                println!("{told}test {}: entering ... FAILED", case.name);
                wrong += 1;
                break;
            }
            let (done, must_fail) = (text.contains("done"), case.fails.contains(&what));
            let how = if done {
                "works"
            } else if text.contains("refused") {
                "refused"
            } else {
                "killed"
            };
            let verdict = if done != must_fail { "ok" } else { "FAILED" };
            println!("test {}: {what:?}, {how} ... {verdict}", case.name);
            good += usize::from(done != must_fail);
            wrong += usize::from(done == must_fail);
        }
    }
    // As the usual harness has it, for `.ci/test`.
    let verdict = if wrong == 0 { "ok" } else { "FAILED" };
    println!("test result: {verdict}. {good} passed; {wrong} failed");
    ExitCode::from(u8::from(wrong > 0))
}

/// A guest that listens may keep names, attributes and data.
fn watch(served: Passthrough) -> io::Result<()> {
    let (served, ctx) = (std::sync::Arc::new(served), Context::default());
    let listens = served.clone();
    let listener = std::thread::spawn(move || listens.changes(&mut |_| true));
    served.prepare_thread();
    let lasts = || served.lookup(&ctx, ROOT_ID, c"f").map(|entry| entry.entry_valid > 3600 && entry.attr_valid > 3600);
    while !lasts()? {
        if listener.is_finished() {
            return Err(listener.join().unwrap().unwrap_err());
        }
        std::thread::yield_now();
    }
    let node = served.lookup(&ctx, ROOT_ID, c"f")?.nodeid;
    let mut keeps = 0;
    for _ in 0..3 {
        let open = served.open(&ctx, node, &OpenIn::default())?;
        served.release(&ctx, node, &ReleaseIn { fh: open.fh, ..ReleaseIn::default() })?;
        keeps = open.open_flags & flags::fopen::KEEP_CACHE;
    }
    served.destroy();
    if keeps != 0 {
        Ok(())
    } else {
        Err(io::Error::other("no lease"))
    }
}

fn say(word: &str) {
    println!("{word}");
    let _ = io::stdout().flush();
}

/// Enters the sandbox, and tries one thing.
fn inside(words: &str) -> ! {
    let words: Vec<&str> = words.split(' ').collect();
    let case = &CASES[words[0].parse::<usize>().unwrap()];
    let scratch = Path::new(words[2]);
    let what = TRIES.into_iter().find(|t| format!("{t:?}") == words[1]).unwrap();
    let host = Host {
        shared_dir: scratch.join("share"),
        sandbox: case.sandbox,
        seccomp: case.seccomp,
        inode_file_handles: if case.user { FileHandles::Never } else { FileHandles::Prefer },
        rlimit_nofile: 0,
        cache: Cache::Coherent,
        ..Host::default()
    };
    let socket = scratch.join(format!("share/s{}", std::process::id()));
    let listener = Listener::new(&socket, true).unwrap();
    let parent = nix::unistd::getppid().as_raw();
    let confined = sandbox::enter(&host, listener).and_then(|(listener, dir)| {
        let builder = fs_builder::FsBuilder::new(&host, dir)?;
        sandbox::drop_privileges(&host)?;
        std::mem::forget(listener);
        builder.build(1)
    });
    let served = confined.unwrap_or_else(|e| {
        eprintln!("{e}");
        std::process::exit(1);
    });
    say("inside");
    // As a guest's request would be: on a thread of its own.
    let port = words[3].parse().unwrap();
    let secret = scratch.join("secret");
    let result = std::thread::spawn(move || attempt(what, served, &secret, parent, port)).join().unwrap();
    match result {
        Ok(()) => say("done"),
        Err(e) => say(&format!("refused: {e}")),
    }
    std::process::exit(0)
}

fn attempt(what: Try, served: Passthrough, secret: &Path, parent: i32, port: u16) -> io::Result<()> {
    let sys = |result: i64| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    match what {
        Open => std::fs::read(secret).map(drop),
        DotDot => {
            let up: PathBuf =
                ["../../../../../../..", secret.to_str().unwrap().trim_start_matches('/')].iter().collect();
            std::fs::read(up).map(drop)
        }
        Proc => std::fs::read("/proc/1/stat").map(drop),
        // SAFETY: plain system calls without memory.
        Ptrace => sys(unsafe { libc::ptrace(libc::PTRACE_ATTACH, parent, 0, 0) }),
        Connect => std::net::TcpStream::connect(("127.0.0.1", port)).map(drop),
        Mount => nix::mount::mount(Some("none"), "/", Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>)
            .map_err(io::Error::from),
        Exec => {
            let program = CString::new("/bin/true").unwrap();
            nix::unistd::execv(&program, &[&program])?;
            Ok(())
        }
        // SAFETY: as above.
        Unshare => sys(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into()),
        Serve => {
            tunnelfs_ring::set_affinity(&tunnelfs_ring::allowed_cpus()).map_err(io::Error::other)?;
            // SAFETY: as above.
            sys(unsafe { libc::unshare(libc::CLONE_FS) }.into())
        }
        Watch => watch(served),
    }
}
