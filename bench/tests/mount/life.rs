//! From the mount to its end: ways in, ways out, and what is told meanwhile.

use crate::helpers::Helpers;
use crate::refusals::assert_refused;
use crate::rig::{as_user, cpu_time, errno, is_mounted, mount_command, soon, statistics, Guest, Host, Peer, Scratch};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;
use tunnelfs_bench::session::sibling;

pub fn ours() -> Option<(Scratch, Host)> {
    let scratch = Scratch::new()?;
    let host = Host::start(&scratch, Peer::Ours);
    Some((scratch, host))
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// The process that serves the scratch's mount, once it has detached itself.
fn daemon(scratch: &Scratch) -> Option<Pid> {
    let point = scratch.path("mnt").display().to_string();
    let processes = fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok());
    processes.map(Pid::from_raw).find(|pid| {
        // Its own child of `sh` and the like have the words too, but another program.
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let words = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        program.ends_with("tunnelfs-guest") && words.split('\0').any(|w| w == point)
    })
}

/// What is mounted there works, in both directions.
fn assert_works(scratch: &Scratch) {
    fs::write(scratch.path("mnt/to"), "host").unwrap();
    assert_eq!(fs::read(scratch.path("share/to")).unwrap(), b"host");
    fs::write(scratch.path("share/fro"), "guest").unwrap();
    assert_eq!(fs::read(scratch.path("mnt/fro")).unwrap(), b"guest");
}

/// Unmounts with umount(8) and waits for the daemon's end.
fn end_daemon(scratch: &Scratch) {
    let point = scratch.path("mnt");
    run(Command::new("umount").arg(&point));
    assert!(!is_mounted(&point));
    soon("the daemon ends", || daemon(scratch).is_none().then_some(()));
}

#[test]
fn a_daemon_serves_until_it_is_unmounted() {
    let Some((scratch, host)) = ours() else { return };
    let log = scratch.path("log");
    run(&mut mount_command(&scratch, &host.socket, &format!("log_file={}", log.display())));
    // Mounted when the command returns.
    assert_works(&scratch);
    let pid = daemon(&scratch).unwrap();
    let said = statistics(pid, &log);
    assert!(said.contains("CREATE") && said.contains("WRITE"), "{said}");
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.lines().next().unwrap().contains(" mounted: ring transport"), "{text}");
    assert!(!text.contains('\x1b') && !text.contains("WARN") && text.as_bytes()[10] == b'T', "{text}");
    let status = run(Command::new(sibling("tunnelfs-guest").unwrap()).arg("status").arg(scratch.path("mnt")));
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    for part in [" mounted: ring transport", "host: there", "CREATE"] {
        assert!(status.contains(part), "{part}: {status}");
    }
    // Nothing keeps a terminal, or the directory where it was started.
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), Path::new("/"));
    for fd in 0..2 {
        assert_eq!(fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap(), Path::new("/dev/null"));
    }
    end_daemon(&scratch);
    assert!(scratch.path("share/to").exists() && !scratch.path("mnt/to").exists());
}

/// What a guest says without mounting.
#[test]
fn questions_to_the_program() {
    let asked = |words: &[&str]| {
        let out = Command::new(sibling("tunnelfs-guest").unwrap()).args(words).output().unwrap();
        (
            out.status.success(),
            String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr),
        )
    };
    let (good, text) = asked(&["mount", "/x", "--print-config", "-o", "slots=16,log_level=debug"]);
    assert!(good && text.contains("slots = 16  # -o slots=16\n") && text.contains("level = \"debug\""), "{text}");
    assert!(asked(&["mount", "/x", "--check-config"]).0);
    let (good, text) = asked(&["mount", "/x", "--check-config", "--slots", "3000000"]);
    assert!(!good && text.contains("transport.slots"), "{text}");
    let (good, text) = asked(&["mount", "/x", "-o", "cpus=0,1"]);
    assert!(!good && text.contains("cpus=0:1"), "{text}");
    let (good, text) = asked(&["completions", "zsh"]);
    assert!(good && text.contains("--slot-size"), "{text}");
    let (good, text) = asked(&["man", "mount"]);
    assert!(good && text.contains("slot\\-size"), "{text}");
    let (good, text) = asked(&["doctor", "--socket-path", "/no/such/socket"]);
    assert!(!good && text.contains("PROBLEM  host's socket") && text.contains("-> start a host"), "{text}");
    let (good, text) = asked(&["status", "/"]);
    assert!(!good && text.contains("no TunnelFS mount"), "{text}");
}

/// What a mount without its guest, or a guest without its host, answers.
fn assert_dead(errno: i32) {
    assert!(matches!(errno, libc::ENOTCONN | libc::ECONNABORTED | libc::EIO), "errno {errno}");
}

#[test]
fn signals_unmount() {
    let Some((scratch, host)) = ours() else { return };
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut guest = Guest::mount(&scratch, &host, "transport=ring");
        assert_works(&scratch);
        guest.signal(signal);
        let status = guest.ended();
        assert!(status.success() && !is_mounted(&guest.point), "{signal}: {status} {}", guest.output());
    }
    // The host serves the next guest, also after one that was killed.
    let mut guest = Guest::mount(&scratch, &host, "transport=ring");
    guest.signal(Signal::SIGKILL);
    guest.ended();
    assert_dead(errno(fs::read_dir(&guest.point)));
    run(Command::new("umount").arg(&guest.point));
    Guest::mount(&scratch, &host, "transport=ring").unmount();
}

#[test]
fn a_busy_mount_goes_with_its_last_user() {
    let Some((scratch, host)) = ours() else { return };
    let mut guest = Guest::mount(&scratch, &host, "transport=ring");
    let in_use = File::create_new(guest.point.join("f")).unwrap();
    let status = Command::new("umount").arg(&guest.point).output().unwrap();
    assert!(!status.status.success() && String::from_utf8_lossy(&status.stderr).contains("busy"));
    guest.signal(Signal::SIGTERM);
    soon("it is detached", || (!is_mounted(&guest.point)).then_some(()));
    in_use.write_all_at(b"still served", 0).unwrap();
    assert_eq!(fs::read(scratch.path("share/f")).unwrap(), b"still served");
    drop(in_use);
    assert!(guest.ended().success());
    assert!(guest.output().contains("busy"), "{}", guest.output());

    // Whoever insists does not wait for the user.
    let mut guest = Guest::mount(&scratch, &host, "transport=ring");
    let in_use = File::open(guest.point.join("f")).unwrap();
    guest.signal(Signal::SIGTERM);
    soon("it is detached", || (!is_mounted(&guest.point)).then_some(()));
    guest.signal(Signal::SIGTERM);
    assert!(guest.ended().success());
    errno(in_use.metadata());
}

/// The options of what is mounted on `point`, from /proc/mounts.
fn options_of(point: &Path) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let line = mounts.lines().rev().find(|l| l.split(' ').nth(1) == point.to_str()).unwrap();
    line.split(' ').nth(3).unwrap().split(',').map(String::from).collect()
}

#[test]
fn words_of_mount_o() {
    let Some((scratch, host)) = ours() else { return };
    fs::write(scratch.path("share/f"), "x").unwrap();
    let guest = Guest::mount(&scratch, &host, "ro,nosuid,nodev,noexec,noatime,x-systemd.automount,queues=1,slots=8");
    let options = options_of(&guest.point);
    for word in ["ro", "nosuid", "nodev", "noexec", "noatime", "allow_other", "default_permissions"] {
        assert!(options.iter().any(|o| o == word), "{word}: {options:?}");
    }
    assert_eq!(errno(File::create(guest.point.join("g"))), libc::EROFS);
    assert_eq!(fs::read(guest.point.join("f")).unwrap(), b"x");
    assert!(guest.statistics().contains(" 8 slots"));
    guest.unmount();

    // With ACLs the kernel itself switches default_permissions on.
    let without_acls = Scratch::new().unwrap();
    let host = Host::start_with(&without_acls, Peer::Ours, &[]);
    let guest = Guest::mount(&without_acls, &host, "noallow_other,nodefault_permissions,sync,dirsync");
    let options = options_of(&guest.point);
    assert!(!options.iter().any(|o| o == "allow_other" || o == "default_permissions"), "{options:?}");
    assert_eq!(as_user(12345, 12345, &[], || errno(fs::read_dir(&guest.point))), libc::EACCES);
    guest.unmount();

    for (words, told) in [
        ("colour=blue", "-o colour=blue"),
        ("slots=3000", "transport.slots = 3000"),
        ("channel=pigeon", "mount.channel"),
        ("ro=1", "-o ro=1"),
    ] {
        assert_refused(&mut mount_command(&scratch, &host.socket, words), told);
    }
}

#[test]
fn mount_8_and_fstab() {
    let Some((scratch, host)) = ours() else { return };
    let Some(_helpers) = Helpers::install() else { return };
    let (point, socket) = (scratch.path("mnt"), &host.socket);
    run(Command::new("mount").args(["-t", "tunnelfs", "-o", "nosuid,queues=1"]).arg(socket).arg(&point));
    assert_works(&scratch);
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    assert!(mounts.contains(&format!("{} {} fuse.tunnelfs rw,nosuid,", socket.display(), point.display())));
    run(Command::new("mount").args(["-o", "remount,ro"]).arg(&point));
    assert_eq!(errno(File::create(point.join("g"))), libc::EROFS);
    assert!(options_of(&point).contains(&"nosuid".into()));
    run(Command::new("mount").args(["-o", "remount,rw"]).arg(&point));
    assert_works(&scratch);
    end_daemon(&scratch);

    let fstab = scratch.path("fstab");
    let words = "noauto,_netdev,nofail,slot_size=65536,x-mount.mkdir 0 0";
    fs::write(&fstab, format!("{} {} tunnelfs {words}\n", socket.display(), point.display())).unwrap();
    run(Command::new("mount").arg("-T").arg(&fstab).arg(&point));
    assert_works(&scratch);
    end_daemon(&scratch);

    // Only pretended; and what is refused.
    run(Command::new("mount").args(["-f", "-t", "tunnelfs"]).arg(socket).arg(&point));
    assert!(!is_mounted(&point));
    let mut wrong = Command::new("mount");
    assert_refused(wrong.args(["-t", "tunnelfs", "-o", "colour=blue"]).arg(socket).arg(&point), "colour=blue");
    run(Command::new("mount").args(["-s", "-t", "tunnelfs", "-o", "colour=blue"]).arg(socket).arg(&point));
    end_daemon(&scratch);
}

/// What `make install` lays down is whole, and the unit's host says when it is ready.
#[test]
fn installed_programs() {
    let Some(scratch) = Scratch::new() else { return };
    let (root, bin) = (scratch.path("root"), sibling("tunnelfs-guest").unwrap());
    let make = |target: &str| {
        let mut command = Command::new("make");
        command.arg("-C").arg(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).args([target, "PREFIX=/usr"]);
        run(command.arg(format!("BIN={}", bin.parent().unwrap().display())).arg(format!("DESTDIR={}", root.display())));
    };
    make("install");
    assert_eq!(fs::read_link(root.join("sbin/mount.tunnelfs")).unwrap(), Path::new("/usr/bin/tunnelfs-guest"));
    let unit = fs::read_to_string(root.join("usr/lib/systemd/system/tunnelfs-host@.service")).unwrap();
    let start = unit.lines().find_map(|l| l.strip_prefix("ExecStart=")).unwrap();
    let doc = unit.lines().find_map(|l| l.strip_prefix("Documentation=")).unwrap();
    let doc = doc.strip_prefix("man:tunnelfs-host(8) file:///").unwrap_or(doc);
    assert!(root.join(doc).exists(), "{doc}");
    for (file, part) in [
        ("usr/share/man/man8/tunnelfs-host.8", "shared\\-dir"),
        ("usr/share/man/man8/tunnelfs-guest-mount.8", "slot\\-size"),
        ("usr/share/bash-completion/completions/tunnelfs-guest", "--slot-size"),
        ("usr/lib/systemd/system/tunnelfs-host@.socket", "/run/tunnelfs-%i/socket"),
        ("usr/lib/sysusers.d/tunnelfs.conf", "tunnelfs"),
        ("usr/share/doc/tunnelfs/LICENSE-MIT", "MIT"),
        ("usr/share/doc/tunnelfs/SECURITY.md", "Security"),
    ] {
        let text = fs::read_to_string(root.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        assert!(text.contains(part), "{file} has no {part}");
    }

    // As systemd would: the unit's own words, with its names filled in.
    let (config, socket, ready) = (scratch.path("data.toml"), scratch.path("socket"), scratch.path("ready"));
    fs::write(&config, format!("[host]\nshared_dir = \"{}\"\n", scratch.path("share").display())).unwrap();
    let words = start.replace("/etc/tunnelfs/%i.toml", config.to_str().unwrap());
    let words = words.replace("/run/tunnelfs-%i/socket", socket.to_str().unwrap());
    let (program, words) = words.split_once(' ').unwrap();
    let manager = std::os::unix::net::UnixDatagram::bind(&ready).unwrap();
    let mut host = Command::new(root.join(&program[1..]));
    let mut host = host.args(words.split(' ')).env("NOTIFY_SOCKET", &ready).spawn().unwrap();
    manager.set_read_timeout(Some(crate::rig::PATIENCE)).unwrap();
    let mut said = [0; 20];
    let n = manager.recv(&mut said).unwrap();
    assert_eq!(&said[..n], b"READY=1");
    run(Command::new(root.join("usr/bin/tunnelfs-guest"))
        .args(["mount", "--socket-path"])
        .arg(&socket)
        .arg(scratch.path("mnt")));
    assert_works(&scratch);
    end_daemon(&scratch);
    kill(Pid::from_raw(host.id() as i32), Signal::SIGTERM).unwrap();
    host.wait().unwrap();

    make("uninstall");
    let left = run(Command::new("find").arg(&root).args(["!", "-type", "d"]));
    assert_eq!(String::from_utf8_lossy(&left.stdout), "");
}

#[test]
fn statistics_say_what_happened() {
    let Some((scratch, host)) = ours() else { return };
    let guest = Guest::mount(&scratch, &host, "wait=park,queues=1");
    fs::write(guest.point.join("f"), "x").unwrap();
    errno(fs::read(guest.point.join("nothing")));
    let said = guest.statistics();
    let line = |word: &str| said.lines().find(|l| l.contains(word)).unwrap_or_else(|| panic!("{word}: {said}"));
    assert!(line("queue 0: ring, 32 slots").contains("in use, at most"));
    assert!(line("waits for the host by policy park: 0 spun").contains("parked"));
    let numbers = |line: &str| -> Vec<f64> { line.split_whitespace().filter_map(|w| w.parse().ok()).collect() };
    // Done, failed, p50, p99, p99.9, max.
    assert!(numbers(line("LOOKUP"))[0] >= 2.0, "{said}");
    // A missing name is an answer like others, but a file without that attribute is not.
    assert!(numbers(line("GETXATTR"))[1] >= 1.0, "{said}");
    let write = numbers(line("WRITE"));
    assert_eq!(write[..2], [1.0, 0.0], "{said}");
    assert!(write[2] > 0.0 && write[2] <= write[5] && write[5] < 1e6, "{said}");
    guest.unmount();
}

#[test]
fn an_idle_mount_costs_nothing() {
    for words in
        ["channel=fuse", "channel=uring", "channel=fuse,transport=virtqueue", "channel=uring,transport=virtqueue"]
    {
        let channel = &words[8..words.find(',').unwrap_or(words.len())];
        let Some(scratch) = Scratch::for_channel(channel) else { return };
        let host = Host::start(&scratch, Peer::Ours);
        let guest = Guest::mount(&scratch, &host, words);
        assert_works(&scratch);
        let pids = [guest.pid(), host.server()];
        // What was asked before may still end on a busy machine: some two seconds are idle ones.
        soon(&format!("{words}: both processes use less than 2 ms in 2 s"), || {
            let before = pids.map(cpu_time);
            std::thread::sleep(Duration::from_secs(2));
            let used = [0, 1].map(|i| cpu_time(pids[i]).saturating_sub(before[i]));
            println!("{words}: used {used:?} in 2 s");
            used.iter().all(|&used| used < Duration::from_millis(2)).then_some(())
        });
        guest.unmount();
    }
}
