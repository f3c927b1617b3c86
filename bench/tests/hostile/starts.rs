//! How a host starts and ends: its socket's file, signals, and several guests at once.

use crate::guest::{op, request, Hostile};
use crate::rig::{soon, Target};
use crate::stream::Stream;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tunnelfs_bench::session::sibling;
use tunnelfs_fuse_abi::control::{JOIN_TOKEN_BYTES, OP_JOIN, OP_NOOP};

/// A host of its own, killed when it is dropped.
struct Host(Child);

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("share")).unwrap();
        Place(dir)
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("socket")
    }

    fn command(&self, options: &[&str]) -> Command {
        let mut command = Command::new(sibling("tunnelfs-host").unwrap());
        command.arg("--socket-path").arg(self.socket()).arg("--shared-dir").arg(self.0.path().join("share"));
        command.args(["--num-request-queues", "2"]).args(options).stdin(Stdio::null());
        command
    }

    fn host(&self, options: &[&str]) -> Host {
        let host = Host(self.command(options).stderr(Stdio::null()).spawn().unwrap());
        soon("the host listens", || UnixStream::connect(self.socket()).ok());
        host
    }

    /// Starts a host that must not start; what it says.
    fn refusal(&self, options: &[&str]) -> String {
        let log = self.0.path().join("log");
        let mut command = self.command(options);
        command.stdout(Stdio::null()).stderr(fs::File::create(&log).unwrap());
        let mut host = Host(command.spawn().unwrap());
        let status = soon("it refuses to start", || host.0.try_wait().unwrap());
        let told = fs::read_to_string(&log).unwrap();
        fs::remove_file(&log).unwrap();
        assert!(!status.success(), "{told}");
        told
    }

    fn files(&self) -> usize {
        fs::read_dir(self.0.path()).unwrap().count()
    }
}

fn is_running(host: &mut Host) -> bool {
    host.0.try_wait().unwrap().is_none()
}

fn ends(host: &mut Host) {
    soon("the host ends", || host.0.try_wait().unwrap());
}

fn noop(socket: &Path) -> bool {
    let mut guest = Hostile::connect(socket);
    guest.call(1, &request(OP_NOOP, 1, b"")).is_some()
}

#[test]
fn a_path_that_is_somebody_elses_is_left_alone() {
    let place = Place::new();
    fs::write(place.socket(), "precious").unwrap();
    for options in [&["--sandbox", "none"][..], &["--sandbox", "none", "--replace"]] {
        let told = place.refusal(options);
        assert!(told.contains("regular file") && told.contains("socket"), "{told}");
    }
    assert_eq!(fs::read(place.socket()).unwrap(), b"precious");
    fs::remove_file(place.socket()).unwrap();
    std::os::unix::fs::symlink("elsewhere", place.socket()).unwrap();
    assert!(place.refusal(&["--replace"]).contains("symbolic link"));
    assert!(fs::symlink_metadata(place.socket()).unwrap().is_symlink());
}

#[test]
fn a_second_host_is_refused_unless_it_replaces_the_first() {
    let place = Place::new();
    let mut first = place.host(&["--sandbox", "none"]);
    let told = place.refusal(&["--sandbox", "none"]);
    assert!(told.contains(&format!("process {}", first.0.id())) && told.contains("--replace"), "{told}");
    let mut guest = Hostile::connect(&place.socket());
    let mut second = place.host(&["--sandbox", "none", "--replace"]);
    soon("the second host has the path", || (place.refusal(&[]).contains(&second.0.id().to_string())).then_some(()));
    assert!(guest.call(1, &request(OP_NOOP, 1, b"")).is_some(), "the first one's guest stays");
    kill(Pid::from_raw(first.0.id() as i32), Signal::SIGTERM).unwrap();
    ends(&mut first);
    assert!(place.socket().exists(), "the first host has removed the second one's socket");
    assert!(noop(&place.socket()) && is_running(&mut second));
}

#[test]
fn signals_end_a_host_or_do_nothing_and_its_socket_goes() {
    for sandbox in ["none", "chroot", "namespace"] {
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            let place = Place::new();
            let mut host = place.host(&["--sandbox", sandbox]);
            let pids = family(host.0.id());
            for harmless in [Signal::SIGHUP, Signal::SIGUSR1] {
                pids.iter().for_each(|&pid| kill(Pid::from_raw(pid as i32), harmless).unwrap());
            }
            assert!(noop(&place.socket()) && is_running(&mut host), "{sandbox}: ended by a harmless signal");
            assert_eq!(place.files(), 2, "{sandbox}: beside the socket and the share something has stayed");
            kill(Pid::from_raw(host.0.id() as i32), signal).unwrap();
            ends(&mut host);
            assert_eq!(place.files(), 1, "{sandbox}: the socket has stayed after {signal}");
            soon("its processes end", || {
                pids.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists()).then_some(())
            });
        }
    }
}

/// A process and its children, and theirs.
fn family(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    std::iter::once(pid).chain(children.split_whitespace().flat_map(|child| family(child.parse().unwrap()))).collect()
}

/// One that was killed leaves a socket that nobody answers on.
#[test]
fn a_dead_hosts_socket_is_replaced() {
    let place = Place::new();
    drop(place.host(&["--sandbox", "none"]));
    assert!(place.socket().exists());
    let _host = place.host(&["--sandbox", "none"]);
    assert!(noop(&place.socket()));
    drop(UnixListener::bind(place.0.path().join("other")).unwrap());
}

/// Who only looks whether somebody listens is no guest; while the one guest is there, others are refused at once.
#[test]
fn a_host_for_one_guest() {
    for transport in ["ring", "socket"] {
        let place = Place::new();
        let mut host = place.host(&["--sandbox", "none", "--once", "--transport", transport]);
        for _ in 0..3 {
            drop(UnixStream::connect(place.socket()).unwrap());
            assert!(place.refusal(&["--sandbox", "none"]).contains("listens there"));
        }
        assert!(is_running(&mut host));
        if transport == "ring" {
            let mut guest = Hostile::connect(&place.socket());
            assert!(guest.call(1, &request(OP_NOOP, 1, b"")).is_some());
            soon("others are refused", || UnixStream::connect(place.socket()).err());
            drop(guest);
        } else {
            assert!(Stream::connect(&place.socket()).call(&request(OP_NOOP, 1, b"")).is_some());
        }
        ends(&mut host);
        assert_eq!(place.files(), 1, "{transport}: the socket has stayed");
    }
}

/// Each guest has files and rings of its own.
#[test]
fn guests_at_the_same_time() {
    for sandbox in ["none", "namespace", "chroot"] {
        let mut target = Target::inside(sandbox, &[]);
        let (mut one, mut other) = (target.guest(), target.guest());
        let (mut rings, mut handles) = ((one.ring(1), other.ring(1)), Vec::new());
        for (guest, ring) in [(&one, &mut rings.0), (&other, &mut rings.1)] {
            assert_eq!(ring.call(guest, &request(op::INIT, 0, &op::init_body())).unwrap().error, 0);
        }
        let node = rings.0.call(&one, &request(op::LOOKUP, 1, b"words\0")).unwrap().word(0);
        for _ in 0..3 {
            handles.push(rings.0.call(&one, &request(op::OPEN, node, &op::words(&[0, 0]))).unwrap().word(0));
        }
        for handle in handles {
            let read = request(op::READ, node, &op::read_body(handle, 0, 4096));
            assert_eq!(rings.0.call(&one, &read).unwrap().error, 0);
            assert_ne!(rings.1.call(&other, &read).unwrap().error, 0, "{sandbox}: another guest's handle");
        }
        // One that leaves takes nothing of the other with it.
        drop(other);
        assert_eq!(rings.0.call(&one, &request(op::GETATTR, node, &[0; 16])).unwrap().error, 0);
        let mut third = target.guest();
        assert!(third.call(1, &request(op::INIT, 0, &op::init_body())).is_some());
        assert_eq!(rings.0.call(&one, &request(op::GETATTR, node, &[0; 16])).unwrap().error, 0);
        drop((one, third));
        target.check("guests at the same time");
    }
}

/// One more than there may be sees its connection closed at once; a place that is free is given again.
#[test]
fn too_many_guests_are_refused() {
    let mut target = Target::new(&[]);
    let guests: Vec<_> = (0..70).map(|_| UnixStream::connect(target.socket()).unwrap()).collect();
    guests.iter().for_each(|guest| guest.set_nonblocking(true).unwrap());
    let open = || guests.iter().filter(|guest| (&mut &**guest).read(&mut [0]).is_err()).count();
    // Those that were there before may still be leaving.
    soon("some are refused", || (open() <= 64).then_some(()));
    assert!(open() >= 60, "{} of 64 are served", open());
    drop(guests);
    soon("places are free again", || {
        let mut next = UnixStream::connect(target.socket()).unwrap();
        next.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        next.read(&mut [0]).err()
    });
    target.check("too many guests");
}

fn join(target: &Target, token: u8) -> Stream {
    let mut stream = Stream::connect(&target.socket());
    assert_eq!(stream.call(&request(OP_JOIN, 0, &[token; JOIN_TOKEN_BYTES])).unwrap().error, 0);
    stream
}

/// Connections with one token are one guest; its last connection ends what it had, and nothing of others.
#[test]
fn streams_are_grouped_by_guest() {
    let mut target = Target::new(&["--transport", "socket"]);
    let (mut first, mut second, mut other) = (join(&target, 1), join(&target, 1), join(&target, 2));
    for stream in [&mut first, &mut other] {
        assert_eq!(stream.call(&request(op::INIT, 0, &op::init_body())).unwrap().error, 0);
    }
    let node = first.call(&request(op::LOOKUP, 1, b"words\0")).unwrap().word(0);
    let handle = second.call(&request(op::OPEN, node, &op::words(&[0, 0]))).unwrap().word(0);
    let read = request(op::READ, node, &op::read_body(handle, 0, 4096));
    assert_eq!(first.call(&read).unwrap().error, 0);
    assert_ne!(other.call(&read).unwrap().error, 0, "another guest's handle");
    drop(other);
    drop(first);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(second.call(&read).unwrap().error, 0, "the session ends with its last connection only");
    drop(second);
    target.check("grouped streams");
}

/// A guest that writes all it has before it reads a word: the host goes on reading.
#[test]
fn both_sides_write_large_messages() {
    const EACH: usize = 1 << 20;
    let mut target = Target::new(&["--transport", "socket"]);
    fs::write(target.path("share/large"), vec![5; EACH]).unwrap();
    let mut stream = join(&target, 1);
    assert_eq!(stream.call(&request(op::INIT, 0, &op::init_body())).unwrap().error, 0);
    let node = stream.call(&request(op::LOOKUP, 1, b"large\0")).unwrap().word(0);
    let handle = stream.call(&request(op::OPEN, node, &op::words(&[libc::O_RDWR as u32, 0]))).unwrap().word(0);
    let read = request(op::READ, node, &op::read_body(handle, 0, EACH as u32));
    // struct fuse_write_in, then the data.
    let mut write = handle.to_ne_bytes().to_vec();
    write.extend(0u64.to_ne_bytes());
    write.extend(op::words(&[EACH as u32, 0, 0, 0, 0, 0]));
    write.extend(vec![5; EACH]);
    let write = request(op::WRITE, node, &write);
    let start = Instant::now();
    for _ in 0..24 {
        for message in [&read, &write] {
            if let Err(e) = stream.0.write_all(message) {
                assert_ne!(e.kind(), ErrorKind::WouldBlock, "both sides wait for each other");
                panic!("{e}");
            }
        }
    }
    let mut bytes = 0;
    for _ in 0..48 {
        let (_, answer) = stream.receive().unwrap();
        assert_eq!(answer.error, 0);
        bytes += if answer.payload.len() == EACH { EACH } else { 0 };
    }
    assert_eq!(bytes, 24 * EACH);
    println!("{:?}", start.elapsed());
    drop(stream);
    let _ = fs::remove_file(target.path("share/large"));
    target.check("large messages");
}

/// The log says where the host listens and who comes and goes, without colours in a file.
#[test]
fn the_log_tells_of_guests() {
    let place = Place::new();
    // Fewer descriptors than wanted would be a warning.
    let options = ["--sandbox", "none", "--rlimit-nofile", "0"];
    let (path, mut command) = (place.0.path().join("log"), place.command(&options));
    let host = Host(command.env_remove("RUST_LOG").stderr(fs::File::create(&path).unwrap()).spawn().unwrap());
    let log = || fs::read_to_string(&path).unwrap();
    let says = |what: &str| soon(what, || log().contains(what).then_some(()));
    says(&format!("listening on {}", place.socket().display()));
    drop(UnixStream::connect(place.socket()).unwrap());
    let guest = Hostile::connect(&place.socket());
    says("guest 1 has come");
    drop(guest);
    says("guest 1 has gone");
    let text = log();
    assert!(!text.contains('\x1b') && !text.contains("guest 2") && !text.contains("WARN"), "{text}");
    // 2026-11-26T03:09:24.000000Z
    assert!(text.lines().all(|line| line.as_bytes()[10] == b'T'), "{text}");
    drop(host);
}

/// What a host says without serving.
#[test]
fn questions_to_the_program() {
    let place = Place::new();
    let asked = |words: &[&str]| {
        let mut command = Command::new(sibling("tunnelfs-host").unwrap());
        let out = command.args(words).stdin(Stdio::null()).output().unwrap();
        (
            out.status.success(),
            String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr),
        )
    };
    let (good, text) = asked(&["--print-config", "--cache", "never"]);
    assert!(good && text.contains("cache = \"never\"  # --cache\n"), "{text}");
    assert!(asked(&["--check-config", "--cache", "never"]).0);
    let (good, text) = asked(&["--check-config", "--cache", "sometimes"]);
    assert!(!good && text.contains("host.cache"), "{text}");
    let (good, text) = asked(&["completions", "bash"]);
    assert!(good && text.contains("--shared-dir"), "{text}");
    let (good, text) = asked(&["man"]);
    assert!(good && text.contains("shared\\-dir"), "{text}");
    let (share, socket) = (place.0.path().join("share"), place.socket());
    let words = ["doctor", "--sandbox", "none", "--socket-path", socket.to_str().unwrap(), "--shared-dir"];
    let (good, text) = asked(&[&words[..], &[share.to_str().unwrap()]].concat());
    assert!(good && text.contains("0 problems"), "{text}");
    let (good, text) = asked(&[&words[..], &["/no/such/directory"]].concat());
    assert!(!good && text.contains("PROBLEM") && text.contains("-> "), "{text}");
}

/// As systemd starts a host whose socket it has made.
#[test]
fn a_socket_from_systemd() {
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).unwrap();
    let command = place.command(&["--sandbox", "none"]);
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\""]);
    shell.arg(command.get_program()).args(command.get_args()).stdin(std::os::fd::OwnedFd::from(listener));
    let mut host = Host(shell.stderr(Stdio::null()).spawn().unwrap());
    assert!(noop(&place.socket()) && is_running(&mut host));
}

/// A host that the system gives too few threads says what it lacks, and what may be done; it does not stand there.
#[test]
fn a_host_without_threads_says_so() {
    const USER: u32 = 54_321;
    if !nix::unistd::geteuid().is_root() {
        return crate::skip::lacking("another user's limits need root");
    }
    let place = Place::new();
    let program = place.0.path().join("host");
    fs::copy(sibling("tunnelfs-host").unwrap(), &program).unwrap();
    for file in ["", "share", "host"] {
        std::os::unix::fs::chown(place.0.path().join(file), Some(USER), Some(USER)).unwrap();
    }
    let (mut refused, mut serves) = (0, false);
    // Of processes and threads.
    for limit in 1..=40 {
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={USER}"), &format!("--regid={USER}"), "--clear-groups", "prlimit"]);
        command.arg(format!("--nproc={limit}")).arg(&program).args(place.command(&["--sandbox", "none"]).get_args());
        let log = place.0.path().join("log");
        command.stderr(fs::File::create(&log).unwrap()).stdin(Stdio::null());
        let mut host = Host(command.spawn().unwrap());
        let ended = soon("it serves or says why not", || {
            if let Some(status) = host.0.try_wait().unwrap() {
                return Some(Some(status.code()));
            }
            // It goes on, and refuses who comes.
            if fs::read_to_string(&log).unwrap().contains("gives no thread") {
                return Some(Some(None));
            }
            answers(&place.socket()).then_some(None)
        });
        let told = fs::read_to_string(&log).unwrap();
        println!("{limit}: {ended:?}: {told}");
        let Some(code) = ended else {
            serves = true;
            break;
        };
        assert!(code.is_none_or(|code| code == 1), "{limit}: {code:?}: {told}");
        assert!(told.contains("gives no thread") && told.contains("raise the limit"), "{limit}: {told}");
        refused += 1;
    }
    assert!(serves && refused > 0, "{refused} times refused");
}

/// Whether a host there answers a front end's first question, VHOST_USER_GET_FEATURES.
fn answers(socket: &Path) -> bool {
    let Ok(mut stream) = UnixStream::connect(socket) else { return false };
    stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let question: Vec<u8> = [1u32, 1, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
    stream.write_all(&question).is_ok() && stream.read_exact(&mut [0; 20]).is_ok()
}
