//! What people are told when a mount cannot be: always, soon, and with what to do.

use crate::life::ours;
use crate::rig::{is_mounted, mount_command, Guest, Host, Peer, Scratch};
use nix::sys::signal::Signal;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use tunnelfs_bench::session::sibling;

/// It ends in error within the patience of the guest and a little more, and says `told`.
pub fn assert_refused(command: &mut Command, told: &str) {
    let output =
        Command::new("timeout").arg("60").arg(command.get_program()).args(command.get_args()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code().filter(|&c| c != 0 && c != 124), output.status.code(), "{command:?}: {said}");
    assert!(said.contains(told), "{command:?} says: {said}");
}

#[test]
fn no_host() {
    let Some(scratch) = Scratch::new() else { return };
    let socket = scratch.path("socket");
    let command = |words: &str| mount_command(&scratch, &socket, words);
    for transport in ["transport=ring", "transport=socket"] {
        assert_refused(&mut command(transport), "is tunnelfs-host running there?");
    }
    // One that listens, and never answers: another guest's host, for example.
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for transport in ["transport=virtqueue", "transport=socket"] {
        assert_refused(&mut command(transport), "does not answer within");
        assert!(!is_mounted(&scratch.path("mnt")));
    }
    // One that says something else.
    drop(listener);
    fs::remove_file(&socket).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let chatter = std::thread::spawn(move || {
        for stream in listener.incoming().take(1) {
            let _ = stream.unwrap().write_all(b"220 mail.example ESMTP\r\n");
        }
    });
    assert_refused(&mut command("transport=ring"), "does a vhost-user-fs host listen there");
    chatter.join().unwrap();
    // A socket file whose listener has gone.
    assert_refused(&mut command("transport=ring"), "is tunnelfs-host running there?");
}

/// A host over a stream that answers INIT with `error` or the first `words` of `fuse_init_out`, and hangs up
/// when it is joined.
pub fn answer_init(socket: &Path, error: i32, words: &[u32]) -> std::thread::JoinHandle<Vec<UnixStream>> {
    let _ = fs::remove_file(socket);
    let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
    let words = words.to_vec();
    std::thread::spawn(move || {
        // The control connection comes first, then the queue's and the one for changes.
        let mut streams: Vec<_> = listener.incoming().take(3).map(Result::unwrap).map(let_join).collect();
        let mut request = [0; 104];
        streams[1].read_exact(&mut request).unwrap();
        let mut reply = vec![0; if error == 0 { 80 } else { 16 }];
        let len = reply.len() as u32;
        reply[..4].copy_from_slice(&len.to_ne_bytes());
        reply[4..8].copy_from_slice(&error.to_ne_bytes());
        reply[8..16].copy_from_slice(&request[8..16]);
        for (place, number) in reply[16..].chunks_mut(4).zip(words) {
            place.copy_from_slice(&number.to_ne_bytes());
        }
        streams[1].write_all(&reply).unwrap();
        // A guest that goes on asks whether anything may be changed.
        let _ = answer_next(&mut streams[1], 48, -libc::ENOSYS);
        streams
    })
}

/// Answers a connection's first message.
fn let_join(mut stream: UnixStream) -> UnixStream {
    answer_next(&mut stream, 56, 0).unwrap();
    stream
}

/// Answers the next message, of so many bytes, without a body.
fn answer_next(stream: &mut UnixStream, bytes: usize, error: i32) -> std::io::Result<()> {
    let mut request = vec![0; bytes];
    stream.read_exact(&mut request)?;
    let mut reply = [0; 16];
    reply[0] = 16;
    reply[4..8].copy_from_slice(&error.to_ne_bytes());
    reply[8..].copy_from_slice(&request[8..16]);
    stream.write_all(&reply)
}

#[test]
fn hosts_of_other_versions() {
    let Some(scratch) = Scratch::new() else { return };
    let socket = scratch.path("socket");
    for (error, version, told) in [
        (0, [8, 1], "speaks FUSE 8.1"),
        (0, [7, 9], "speaks FUSE 7.9"),
        (-libc::EPROTO, [0, 0], "refuses this kernel's version"),
    ] {
        let host = answer_init(&socket, error, &version);
        assert_refused(&mut mount_command(&scratch, &socket, "transport=socket,queues=1"), told);
        host.join().unwrap();
        assert!(!is_mounted(&scratch.path("mnt")));
    }
}

#[test]
fn mount_points_that_cannot_be() {
    let Some((scratch, host)) = ours() else { return };
    let to = |point: &str, words: &str| {
        let mut command = Command::new(sibling("tunnelfs-guest").unwrap());
        command.args(["mount", "-o", words, "--socket-path"]).arg(&host.socket).arg(scratch.path(point));
        command
    };
    fs::write(scratch.path("file"), "").unwrap();
    assert_refused(&mut to("file", "rw"), "it is not a directory");
    assert_refused(&mut to("nowhere", "rw"), "it does not exist; make the directory first");
    assert_refused(&mut to("file/below", "rw"), "Not a directory");

    let other = Scratch::new().unwrap();
    let other_host = Host::start(&other, Peer::Ours);
    let mut guest = Guest::mount(&other, &other_host, "transport=ring");
    fs::create_dir(other.path("link's")).unwrap();
    symlink(&guest.point, other.path("link's/target")).unwrap();
    for point in [guest.point.clone(), other.path("link's/target"), other.path("mnt/../mnt/.")] {
        assert_refused(&mut to(point.to_str().unwrap(), "rw"), "is mounted there already");
    }
    guest.signal(Signal::SIGKILL);
    guest.ended();
    assert_refused(&mut to(guest.point.to_str().unwrap(), "rw"), "`umount` it first");
}

#[test]
fn machines_that_cannot_mount() {
    let Some((scratch, host)) = ours() else { return };
    // Without the device, in mounts of its own.
    let mut words = vec!["-m".to_string(), "sh".into(), "-c".into(), "mount -t tmpfs none /dev; exec \"$@\"".into()];
    let command = mount_command(&scratch, &host.socket, "rw");
    let all = [command.get_program()].into_iter().chain(command.get_args());
    words.push("sh".into());
    words.extend(all.map(|w| w.to_str().unwrap().to_string()));
    assert_refused(Command::new("unshare").args(words), "load the FUSE module (`modprobe fuse`)");

    // Without privilege: first the socket says no, then the mount.
    let as_nobody = || {
        let command = mount_command(&scratch, &host.socket, "transport=ring");
        let mut all = Command::new("setpriv");
        all.args(["--reuid=12345", "--clear-groups", "--inh-caps=-all"]).arg(command.get_program());
        all.args(command.get_args());
        all
    };
    assert_refused(&mut as_nobody(), "the socket is its owner's");
    std::os::unix::fs::chown(&host.socket, Some(12345), None).unwrap();
    assert_refused(&mut as_nobody(), "mounting needs root");
}

/// By the programs themselves: one that used only a part of the checks would go on, and panic or run wrong.
#[test]
fn settings_that_cannot_be() {
    let nowhere = tempfile::tempdir().unwrap();
    let at = |name: &str| nowhere.path().join(name).display().to_string();
    let host = |words: [&str; 2]| {
        let mut command = Command::new(sibling("tunnelfs-host").unwrap());
        command.args(["--shared-dir", &at("")]).args(words);
        if words[0] != "--socket-path" {
            command.args(["--socket-path", &at("socket")]);
        }
        command
    };
    let long = at(&"x".repeat(120));
    for (words, told) in [
        (["--thread-pool-size", "1000000"], "host.thread_pool_size = 1000000: must be from 0 to 1024"),
        (["--cpus", "99999"], "host.cpus = [99999]: this process cannot run on CPU 99999"),
        (["--rlimit-nofile", "9000000000000000000"], "sysctl fs.nr_open"),
        (["--socket-path", ""], "must be the path of a UNIX socket (set by --socket-path)"),
        (["--socket-path", &at("")], "is a directory"),
        (["--socket-path", &long], "a UNIX socket's path may have 107 bytes"),
        (["--tag", ""], "host.tag"),
    ] {
        assert_refused(&mut host(words), told);
    }
    for (words, told) in [
        ("cpus=99999", "mount.cpus = [99999]: this process cannot run on CPU 99999"),
        ("socket_path=", "must be the path of a UNIX socket (set by -o socket_path=)"),
        ("timeout=9000000000000000000", "mount.timeout"),
        ("slot_size=1M,slots=0", "transport.slots = 0"),
    ] {
        let mut command = Command::new(sibling("tunnelfs-guest").unwrap());
        assert_refused(command.args(["mount", "-o", words]).arg(at("")), told);
    }
}
