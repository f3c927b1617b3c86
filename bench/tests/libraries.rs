//! The examples of the host and of its C interface, served over real mounts.
//!
//! Needs root and `/dev/fuse`; is skipped without them. The examples and the C library are those that
//! `cargo build --workspace --all-targets` has left: building them here, of a package alone, would have other features.

#[allow(dead_code)]
#[path = "mount/rig.rs"]
mod rig;
#[path = "common/skip.rs"]
mod skip;

use rig::{is_listening, soon, Scratch, Unmounted};
use std::fs;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tunnelfs_bench::session::sibling;
use tunnelfs_host::{fs_builder, Daemon, Guests, Server};
use tunnelfs_settings::{Settings, TransportKind};

/// A process that is ended with this.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The example, which listens on the scratch's `socket`, as a mount.
fn mounted(scratch: &Scratch, example: &str, args: &[&Path]) -> (Ended, Ended, Unmounted) {
    let (socket, point) = (scratch.path("socket"), scratch.path("mnt"));
    let host = Command::new(sibling(&format!("examples/{example}")).unwrap()).args(args).arg(&socket).spawn();
    let host = Ended(host.unwrap());
    soon("the example listens", || is_listening(&socket).then_some(()));
    let unmounted = Unmounted(point.clone());
    let mut guest = Command::new(sibling("tunnelfs-guest").unwrap());
    let guest = Ended(guest.args(["mount", "-f", "--socket-path"]).arg(&socket).arg(&point).spawn().unwrap());
    soon("it is mounted", || rig::is_mounted(&point).then_some(()));
    (host, guest, unmounted)
}

#[test]
fn a_file_system_in_memory() {
    let Some(scratch) = Scratch::new() else { return };
    let _mounted = mounted(&scratch, "memory", &[]);
    let point = scratch.path("mnt");
    fs::create_dir_all(point.join("a/b")).unwrap();
    let text: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    fs::write(point.join("a/b/file"), &text).unwrap();
    assert!(fs::read(point.join("a/b/file")).unwrap() == text);
    assert!(fs::remove_dir(point.join("a/b")).is_err(), "it is not empty");
    let mut names: Vec<_> = (0..200).map(|n| format!("name{n}")).collect();
    for name in &names {
        fs::write(point.join(name), name).unwrap();
    }
    names.push("a".into());
    names.sort();
    let listed = || fs::read_dir(&point).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut seen: Vec<_> = listed().collect();
    seen.sort();
    assert_eq!(seen, names);
    // A file without a name stays until it is closed.
    let mut open = fs::File::options().read(true).write(true).open(point.join("name7")).unwrap();
    fs::remove_file(point.join("name7")).unwrap();
    open.write_all(b"still ").unwrap();
    open.rewind().unwrap();
    let mut said = String::new();
    open.read_to_string(&mut said).unwrap();
    assert_eq!(said, "still ");
    fs::File::options().write(true).open(point.join("a/b/file")).unwrap().set_len(5).unwrap();
    assert_eq!(fs::read(point.join("a/b/file")).unwrap(), text[..5]);
}

#[test]
fn a_tar_archive() {
    let Some(scratch) = Scratch::new() else { return };
    let (share, tar) = (scratch.path("share"), scratch.path("x.tar"));
    fs::create_dir_all(share.join("deep/er")).unwrap();
    let text: Vec<u8> = (0..2_000_001u32).map(|n| (n % 241) as u8).collect();
    fs::write(share.join("deep/er/large"), &text).unwrap();
    fs::write(share.join("small"), "small").unwrap();
    std::os::unix::fs::symlink("deep/er/large", share.join("link")).unwrap();
    let packed = Command::new("tar").arg("-C").arg(&share).arg("-cf").arg(&tar).arg(".").status();
    if !packed.is_ok_and(|status| status.success()) {
        return skip::lacking("tar");
    }
    let _mounted = mounted(&scratch, "archive", &[&tar]);
    let point = scratch.path("mnt");
    assert!(fs::read(point.join("link")).unwrap() == text, "by the link");
    assert_eq!(fs::read_to_string(point.join("small")).unwrap(), "small");
    let (ours, theirs) = (fs::metadata(share.join("small")).unwrap(), fs::metadata(point.join("small")).unwrap());
    assert_eq!((ours.mode(), ours.mtime(), ours.len()), (theirs.mode(), theirs.mtime(), theirs.len()));
    let mut names: Vec<_> = fs::read_dir(&point).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["deep", "link", "small"]);
    assert!(fs::write(point.join("small"), "x").is_err());
    assert!(fs::write(point.join("new"), "x").is_err());
}

/// A program that mounts by itself is told what becomes of its mount.
#[test]
fn a_guest_with_events() {
    let Some(scratch) = Scratch::new() else { return };
    let (share, socket, point) = (scratch.path("share"), scratch.path("socket"), scratch.path("mnt"));
    fs::write(share.join("hello"), "there").unwrap();
    let start_host = || {
        let mut host = Command::new(sibling("tunnelfs-host").unwrap());
        host.arg("--socket-path").arg(&socket).arg("--shared-dir").arg(&share).args(["--sandbox", "none"]);
        let host = Ended(host.spawn().unwrap());
        soon("the host listens", || is_listening(&socket).then_some(()));
        host
    };
    let host = start_host();
    let _unmounted = Unmounted(point.clone());
    let mut command = Command::new(sibling("examples/mount").unwrap());
    command.arg(&socket).arg(&point).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut guest = Ended(command.spawn().unwrap());
    let mut out = BufReader::new(guest.0.stdout.take().unwrap()).lines();
    let mut line = || out.next().map_or_else(String::new, |line| line.unwrap());
    assert_eq!(line(), "mounted");
    assert_eq!(fs::read_to_string(point.join("hello")).unwrap(), "there");
    drop(host);
    assert_eq!(line(), "host lost: whoever uses the mount waits");
    let _host = start_host();
    assert_eq!(line(), "host back");
    fs::write(point.join("back"), "again").unwrap();
    assert_eq!(fs::read_to_string(share.join("back")).unwrap(), "again");
    drop(guest.0.stdin.take());
    assert_eq!(line(), "ended");
    assert!(soon("the program ends", || guest.0.try_wait().unwrap()).success());
    assert!(!rig::is_mounted(&point));
}

/// A program that serves by itself stops serving when it likes: its guests lose their connections, and `run` returns.
#[test]
fn a_daemon_is_stopped() {
    let transports = [TransportKind::Ring, TransportKind::Virtqueue, TransportKind::Socket];
    for (transport, kind) in ["ring", "virtqueue", "socket"].into_iter().zip(transports) {
        let Some(scratch) = Scratch::new() else { return };
        let mut settings = Settings::default();
        settings.transport.socket_path = scratch.path("socket");
        settings.transport.kind = kind;
        settings.host.shared_dir = scratch.path("share");
        let daemon = Daemon::bind(&settings).unwrap();
        let stopper = daemon.stopper().unwrap();
        let host = settings.host.clone();
        let open = move || Ok(Server::new(fs_builder::open(&host)?));
        let serving = std::thread::spawn(move || daemon.run(open, Guests::Forever));
        let point = scratch.path("mnt");
        let _unmounted = Unmounted(point.clone());
        let mut command = Command::new(sibling("tunnelfs-guest").unwrap());
        command.args(["mount", "-f", "--transport", transport, "-o", "noreconnect", "--socket-path"]);
        let mut guest = Ended(command.arg(scratch.path("socket")).arg(&point).spawn().unwrap());
        soon("it is mounted", || rig::is_mounted(&point).then_some(()));
        fs::write(point.join("file"), transport).unwrap();
        assert_eq!(fs::read_to_string(scratch.path("share").join("file")).unwrap(), transport);
        stopper.stop().unwrap();
        let status = soon("the guest ends without its host", || guest.0.try_wait().unwrap());
        assert!(!status.success(), "{transport}: {status}");
        soon("the daemon ends", || serving.is_finished().then_some(()));
        serving.join().unwrap().unwrap();
        assert!(!scratch.path("socket").exists(), "{transport}: the socket's file stays");
    }
}

/// The names of functions that begin with `tunnelfs_`, sorted.
fn functions(text: &str, before: &str) -> Vec<String> {
    let starts = text.match_indices("tunnelfs_").filter(|(at, _)| text[..*at].ends_with(before));
    let names = starts.filter_map(|(at, _)| {
        let name: String = text[at..].chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
        text[at + name.len()..].starts_with('(').then_some(name)
    });
    let mut names: Vec<_> = names.collect();
    names.sort();
    names.dedup();
    names
}

/// The example in C, with the address sanitizer: in-process on memory of its own, then mounted over its socket.
#[test]
fn a_share_from_c() {
    let Some(scratch) = Scratch::new() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let (header, library) = (root.join("host/capi/include/tunnelfs.h"), root.join("host/capi/src/lib.rs"));
    let declared = fs::read_to_string(&header).unwrap();
    let code: String = declared.lines().filter(|line| !line.starts_with("/*") && !line.starts_with(" *")).collect();
    let exported = functions(&fs::read_to_string(library).unwrap(), "extern \"C\" fn ");
    assert_eq!(functions(&code, ""), exported, "the header has the library's functions");
    let program = scratch.path("program");
    let compiled = Command::new("cc")
        .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g", "-fsanitize=address"])
        .arg("-I")
        .arg(header.parent().unwrap())
        .arg(root.join("host/capi/examples/share.c"))
        .arg(sibling("libtunnelfs.a").unwrap())
        .args(["-lcap-ng", "-lpthread", "-ldl", "-lm", "-lrt", "-lutil", "-lgcc_s", "-o"])
        .arg(&program)
        .status();
    let Ok(compiled) = compiled else { return skip::lacking("cc, a C compiler") };
    assert!(compiled.success());
    let (share, socket, point) = (scratch.path("share"), scratch.path("socket"), scratch.path("mnt"));
    fs::write(share.join("hello"), "from C").unwrap();
    let mut command = Command::new(&program);
    command.arg(&share).arg(&socket).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut host = Ended(command.spawn().unwrap());
    let mut out = BufReader::new(host.0.stdout.take().unwrap()).lines();
    let mut line = || out.next().map_or_else(String::new, |line| line.unwrap());
    assert_eq!(line(), "in-process: requests, pause, reset, requests");
    assert_eq!(line(), "listening");
    let _unmounted = Unmounted(point.clone());
    let mut guest = Command::new(sibling("tunnelfs-guest").unwrap());
    let guest = guest.args(["mount", "-f", "-o", "noreconnect", "--socket-path"]).arg(&socket).arg(&point).spawn();
    let mut guest = Ended(guest.unwrap());
    soon("it is mounted", || rig::is_mounted(&point).then_some(()));
    assert_eq!(fs::read_to_string(point.join("hello")).unwrap(), "from C");
    fs::write(point.join("back"), "to C").unwrap();
    assert_eq!(fs::read_to_string(share.join("back")).unwrap(), "to C");
    // The program stops while its guest is there: the guest loses its host, and the program ends without a leak.
    drop(host.0.stdin.take());
    let counted = line();
    assert!(counted.ends_with(" requests") && !counted.starts_with("0 "), "{counted}");
    assert!(soon("the program ends", || host.0.try_wait().unwrap()).success());
    soon("the guest ends", || guest.0.try_wait().unwrap());
    assert!(!socket.exists(), "the socket's file is removed");
}
