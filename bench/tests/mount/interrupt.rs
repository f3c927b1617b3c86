//! A program that is stuck in the share can be killed: the guest's INTERRUPT reaches the host past what is stuck.

use crate::rig::{soon, Guest, Host, Peer, Scratch, PROMPT};
use crate::stuck_fs::StuckFs;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, Stdio};
use std::time::Instant;
use tunnelfs_guest::fuse::abi::opcode;

/// A mount whose share has a file system that can be held.
struct Setup {
    guest: Guest,
    _host: Host,
    stuck: StuckFs,
    _scratch: Scratch,
}

impl Setup {
    fn new(channel: &str, transport: &str, options: &str) -> Option<Setup> {
        let scratch = Scratch::for_channel(channel)?;
        let stuck = StuckFs::mount(scratch.path("share/stuck"))?;
        let peer = if transport == "socket" { Peer::Stream } else { Peer::Ours };
        let host = Host::start_with(&scratch, peer, &["--cache=never"]);
        let options = format!("channel={channel},transport={transport},queues=1{options}");
        let guest = Guest::mount(&scratch, &host, &options);
        Some(Setup { guest, _host: host, stuck, _scratch: scratch })
    }

    fn file(&self) -> File {
        let path = self.guest.point.join("stuck/file");
        OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
    }

    #[allow(dead_code)]
    /// A program whose standard input is the file, opened for it alone: reads by one open file wait for each other in the
    /// kernel.
    fn start(&self, program: &[&str]) -> Child {
        self.run(program, self.file())
    }

    /// The same, with requests of an opcode held from then on.
    fn start_held(&self, program: &[&str], opcode: u32) -> Child {
        let file = self.file();
        self.stuck.hold_only(opcode);
        self.run(program, file)
    }

    fn run(&self, program: &[&str], file: File) -> Child {
        let mut command = Command::new(program[0]);
        command.args(&program[1..]).stdin(file).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    }
}

const READER: &[&str] = &["dd", "bs=4096", "count=1"];
/// fstat(2): FUSE_GETATTR, and nothing before it.
const ASKER: &[&str] = &["stat", "-"];

fn ends_promptly(what: &str, mut children: Vec<Child>) {
    for child in &mut children {
        child.kill().unwrap();
    }
    let start = Instant::now();
    for child in &mut children {
        let status = soon(what, || child.try_wait().unwrap());
        assert!(!status.success(), "{what}: {status}");
    }
    let took = start.elapsed();
    assert!(took < PROMPT, "{what}: killed programs ended after {took:?}");
}

fn kill_stuck_programs(channel: &str, transport: &str) {
    let Some(setup) = Setup::new(channel, transport, "") else { return };
    for (opcode, program) in [(opcode::READ, READER), (opcode::GETATTR, ASKER)] {
        let child = setup.start_held(program, opcode);
        let what = format!("{channel}, {transport}: {program:?}");
        soon(&what, || (setup.stuck.held() > 0).then_some(()));
        ends_promptly(&what, vec![child]);
        setup.stuck.release(None);
    }
    setup.guest.unmount();
}

#[test]
fn sigkill_ends_a_stuck_program_over_io_uring() {
    ["ring", "virtqueue", "socket"].into_iter().for_each(|transport| kill_stuck_programs("uring", transport));
}

#[test]
fn sigkill_ends_a_stuck_program_over_the_device() {
    ["ring", "virtqueue", "socket"].into_iter().for_each(|transport| kill_stuck_programs("fuse", transport));
}
