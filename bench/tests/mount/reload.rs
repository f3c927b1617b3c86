//! SIGHUP: what the settings file says now holds at once, or is named as what needs a new start.

use crate::rig::{is_mounted, mount_command, soon, Host, Scratch};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tunnelfs_bench::session::sibling;

/// A process with a settings file and a log.
struct Program {
    config: PathBuf,
    log: PathBuf,
}

impl Program {
    fn new(scratch: &Scratch, name: &str, settings: &str) -> Program {
        let (config, log) = (scratch.path(&format!("{name}.toml")), scratch.path(&format!("{name}.log")));
        fs::write(&config, settings).unwrap();
        Program { config, log }
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    fn output(&self) -> Stdio {
        File::create(&self.log).unwrap().into()
    }

    /// Puts another file in its place, as editors do, and waits until the log has the text.
    fn reload(&self, pid: u32, settings: &str, expected: &str) {
        let new = self.config.with_extension("new");
        fs::write(&new, settings).unwrap();
        fs::rename(&new, &self.config).unwrap();
        kill(Pid::from_raw(pid as i32), Signal::SIGHUP).unwrap();
        println!("waiting for `{expected}` in {}", self.log.display());
        soon("the log", || self.log().contains(expected).then_some(()));
    }
}

fn start_host(scratch: &Scratch, program: &Program, sandbox: &str) -> Host {
    let (socket, share) = (scratch.path("socket"), scratch.path("share"));
    let mut command = Command::new(sibling("tunnelfs-host").unwrap());
    command.arg("--config").arg(&program.config).arg("--socket-path").arg(&socket).arg("--shared-dir").arg(&share);
    command.args(["--sandbox", sandbox, "--num-request-queues", "2"]).stderr(program.output());
    let child = command.spawn().unwrap();
    soon("the host listens", || crate::rig::is_listening(&socket).then_some(()));
    Host::of(child, socket, share)
}

fn start_guest(scratch: &Scratch, host: &Host, program: &Program) -> Child {
    let mut command = mount_command(scratch, &host.socket, "spin_us=77");
    command.arg("-f").arg("--config").arg(&program.config).stdout(Stdio::piped()).stderr(program.output());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains(" mounted: "), "{line}{}", program.log());
    child
}

fn status(point: &Path) -> String {
    let output = Command::new(sibling("tunnelfs-guest").unwrap()).arg("status").arg(point).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_guest_takes_its_settings_file_over_without_unmounting() {
    let Some(scratch) = Scratch::new() else { return };
    let host = Host::start(&scratch, crate::rig::Peer::Ours);
    let program = Program::new(&scratch, "guest", "[wait]\npolicy = \"park\"\n");
    let point = scratch.path("mnt");
    let mut guest = start_guest(&scratch, &host, &program);
    let _unmounted = crate::rig::Unmounted(point.clone());
    assert!(status(&point).contains("by policy park"));
    let pid = guest.id();
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
    kill(Pid::from_raw(pid as i32), Signal::SIGTERM).unwrap();
    assert!(soon("the guest ends", || guest.try_wait().unwrap()).success());
}

#[test]
fn a_host_takes_its_settings_file_over_in_each_sandbox() {
    for sandbox in ["none", "chroot", "namespace"] {
        let Some(scratch) = Scratch::new() else { return };
        let program = Program::new(&scratch, "host", "[wait]\npolicy = \"park\"\n");
        let host = start_host(&scratch, &program, sandbox);
        let guest = crate::rig::Guest::mount(&scratch, &host, "transport=ring");
        fs::write(guest.point.join("file"), "1").unwrap();
        let pid = host.child.id();
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
