//! SIGHUP: what the settings file says now holds at once, or is named as what needs a new start.

use crate::rig::{host_command, is_mounted, mount_command, soon, Guest, Host, Peer, Scratch};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use tunnelfs_bench::session::sibling;

/// A process with a settings file and a log.
struct Program {
    config: PathBuf,
    log: PathBuf,
}

impl Program {
    fn new(scratch: &Scratch, log: &str, settings: &str) -> Program {
        let (config, log) = (scratch.path("settings.toml"), scratch.path(log));
        fs::write(&config, settings).unwrap();
        Program { config, log }
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Puts another file in its place, as editors do, and waits until the log has the text.
    fn reload(&self, pid: Pid, settings: &str, expected: &str) {
        let new = self.config.with_extension("new");
        fs::write(&new, settings).unwrap();
        fs::rename(&new, &self.config).unwrap();
        kill(pid, Signal::SIGHUP).unwrap();
        println!("waiting for `{expected}` in {}", self.log.display());
        soon("the log", || self.log().contains(expected).then_some(()));
    }
}

fn start_host(scratch: &Scratch, program: &Program, sandbox: &str) -> Host {
    let mut command = host_command(scratch, Peer::Ours, &["--sandbox", sandbox]);
    command.arg("--config").arg(&program.config).stderr(File::create(&program.log).unwrap());
    Host::spawn(scratch, &mut command)
}

fn status(point: &Path) -> String {
    let output = Command::new(sibling("tunnelfs-guest").unwrap()).arg("status").arg(point).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_guest_takes_its_settings_file_over_without_unmounting() {
    let Some(scratch) = Scratch::new() else { return };
    let host = Host::start(&scratch, Peer::Ours);
    let program = Program::new(&scratch, "output", "[wait]\npolicy = \"park\"\n");
    let mut command = mount_command(&scratch, &host.socket, "spin_us=77");
    command.arg("--config").arg(&program.config);
    // Its log is the scratch's `output`.
    let mut guest = Guest::spawn(&scratch, command);
    let (point, pid) = (guest.point.clone(), guest.pid());
    assert!(status(&point).contains("by policy park"));
    program.reload(
        pid,
        "[wait]\npolicy = \"spin\"\nspin_us = 5\n[transport]\nslots = 16\n",
        "needs a remount: transport.slots",
    );
    // The command line goes before the file.
    assert!(program.log().contains("taken over: wait.policy\n"), "{}", program.log());
    assert!(status(&point).contains("by policy spin"), "{}", status(&point));
    program.reload(pid, "[wait]\npolicy = \"sleep\"\n", "nothing is changed");
    program.reload(pid, "[wait]\npolicy = \"spin\"\n[log]\nlevel = \"debug\"\n", "taken over: log.level");
    fs::write(point.join("file"), "still mounted").unwrap();
    assert!(is_mounted(&point));
    guest.signal(Signal::SIGTERM);
    assert!(guest.ended().success());
}

#[test]
fn a_host_takes_its_settings_file_over_in_each_sandbox() {
    for sandbox in ["none", "chroot", "namespace"] {
        let Some(scratch) = Scratch::new() else { return };
        let program = Program::new(&scratch, "log", "[wait]\npolicy = \"park\"\n");
        let host = start_host(&scratch, &program, sandbox);
        let guest = Guest::mount(&scratch, &host, "transport=ring");
        fs::write(guest.point.join("file"), "1").unwrap();
        let pid = Pid::from_raw(host.child.id() as i32);
        program.reload(
            pid,
            "[wait]\npolicy = \"spin\"\nspin_us = 50\n[host]\nreadonly = true\nthread_pool_size = 3\n",
            "needs a restart: host.readonly",
        );
        let log = program.log();
        assert!(log.contains("taken over: host.thread_pool_size, wait.policy, wait.spin_us\n"), "{sandbox}: {log}");
        program.reload(pid, "[nonsense]\n", "nothing is changed");
        fs::write(guest.point.join("file"), "2").unwrap();
        assert_eq!(fs::read(scratch.path("share").join("file")).unwrap(), b"2", "{sandbox}");
        guest.unmount();
    }
}
