//! A program that is stuck in the share can be killed: the guest's INTERRUPT reaches the host past what is stuck.

use crate::rig::{soon, Guest, Host, Peer, Scratch, PROMPT};
use crate::stuck_fs::StuckFs;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tunnelfs_fuse_abi::opcode;

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

    /// Starts a program.
    fn run(&self, program: &[&str], input: impl Into<Stdio>) -> Child {
        let mut command = Command::new(program[0]);
        command.args(&program[1..]).stdin(input).stdout(Stdio::null()).stderr(Stdio::null());
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
        let file = setup.file();
        setup.stuck.hold_only(opcode);
        let child = setup.run(program, file);
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

/// Requests are stuck in all slots that there are: an INTERRUPT still gets through. (Over io_uring it has a queue of its
/// own.)
#[test]
fn sigkill_ends_more_stuck_programs_than_there_are_slots() {
    for transport in ["ring", "virtqueue", "socket"] {
        let Some(setup) = Setup::new("fuse", transport, ",slots=4") else { return };
        setup.stuck.hold_only(opcode::READ);
        // Each opens the file itself: closing it here would be a request that no slot is left for.
        let input = format!("if={}", setup.guest.point.join("stuck/file").display());
        let reader = [READER, &[&input, "iflag=direct"]].concat();
        let readers: Vec<_> = (0..6).map(|_| setup.run(&reader, Stdio::null())).collect();
        soon("the slots are full", || (setup.stuck.held() >= 3).then_some(()));
        ends_promptly(&format!("{transport}: six readers"), readers);
        setup.stuck.release(None);
        setup.guest.unmount();
    }
}

/// The second reader's request waits in the guest for room (a stream carries one large one at a time): it can be killed
/// there.
#[test]
fn sigkill_ends_a_program_whose_request_waits_for_room() {
    for channel in ["uring", "fuse"] {
        let Some(setup) = Setup::new(channel, "socket", "") else { return };
        let (reader, files) = (["dd", "bs=64k", "count=1"], [setup.file(), setup.file()]);
        setup.stuck.hold_only(opcode::READ);
        let [first, second] = files;
        let first = setup.run(&reader, first);
        soon("one is stuck", || (setup.stuck.held() > 0).then_some(()));
        let second = setup.run(&reader, second);
        // Its request reaches the guest at some moment that nothing shows.
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(setup.stuck.held(), 1);
        ends_promptly(&format!("{channel}: the one that waits"), vec![second]);
        assert_eq!(setup.stuck.held(), 1);
        ends_promptly(&format!("{channel}: the one before"), vec![first]);
        setup.stuck.release(None);
        setup.guest.unmount();
    }
}
