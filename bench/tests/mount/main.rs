//! A mount behaves as a local directory does: over both channels to the
//! kernel, over each transport, and when things go wrong. About two minutes.
//!
//! Needs root and `/dev/fuse`; skips without them.

mod figures;
mod files;
mod helpers;
mod interrupt;
mod life;
mod names;
mod negotiation;
mod recording;
mod refusals;
mod reload;
#[allow(dead_code)] // Shared: not every test program has a use for all of it.
mod rig;
mod rights;
#[path = "../common/skip.rs"]
mod skip;
mod slow;
#[allow(dead_code)]
#[path = "../common/stuck_fs.rs"]
mod stuck_fs;
#[allow(dead_code)]
#[path = "../common/sys.rs"]
mod sys;
mod trees;

use rig::{Guest, Host, Peer, Place, Scratch};

/// A check runs in a directory of its own, which it leaves to the rig.
type Check = (&'static str, fn(&Place));

fn run_checks(place: &Place, through: &str) {
    for (name, check) in [files::CHECKS, names::CHECKS, rights::CHECKS].concat() {
        let place = place.enter(name);
        let result = std::panic::catch_unwind(|| check(&place));
        assert!(result.is_ok(), "{name}: failed over {through}");
        place.remove().unwrap_or_else(|e| panic!("{name}: cleaning up over {through}: {e}"));
    }
}

/// A check that fails here is wrong itself.
#[test]
fn a_local_directory() {
    let Some(scratch) = Scratch::new() else { return };
    run_checks(&Place::local(&scratch), "a local directory");
}

fn mounted(channel: &str, transport: &str) {
    let Some(scratch) = Scratch::for_channel(channel) else { return };
    let peer = if transport == "socket" { Peer::Stream } else { Peer::Ours };
    let host = Host::start(&scratch, peer);
    let guest = Guest::mount(&scratch, &host, &format!("channel={channel},transport={transport}"));
    run_checks(&guest.place(&host), &format!("{channel}, {transport}"));
    let copied = guest.copied();
    match transport {
        "socket" => assert!(copied > 0, "a stream copies"),
        _ => assert_eq!(copied, 0, "bytes copied in user space over {transport}"),
    }
    guest.unmount();
}

#[test]
fn io_uring_over_the_ring() {
    mounted("uring", "ring");
}

#[test]
fn io_uring_over_virtqueues() {
    mounted("uring", "virtqueue");
}

#[test]
fn io_uring_over_a_socket() {
    mounted("uring", "socket");
}

#[test]
fn the_device_over_the_ring() {
    mounted("fuse", "ring");
}

#[test]
fn the_device_over_virtqueues() {
    mounted("fuse", "virtqueue");
}

#[test]
fn the_device_over_a_socket() {
    mounted("fuse", "socket");
}

/// Our guest with the host that everybody has, which declines the ring.
fn with_stock_virtiofsd(channel: &str) {
    let Some(scratch) = Scratch::for_channel(channel) else { return };
    if tunnelfs_bench::session::virtiofsd().is_none() {
        return skip::lacking("virtiofsd is not installed (`make deps`)");
    }
    let host = Host::start(&scratch, Peer::Virtiofsd);
    let guest = Guest::mount(&scratch, &host, &format!("channel={channel},transport=ring"));
    run_checks(&guest.place(&host), &format!("{channel}, stock virtiofsd"));
    guest.unmount();
}

/// Without a tag it has no config space, and so does not say how many queues it has.
#[test]
fn stock_virtiofsd_without_a_tag() {
    let Some(scratch) = Scratch::new() else { return };
    let Some(program) = tunnelfs_bench::session::virtiofsd() else {
        return skip::lacking("no stock virtiofsd: make deps");
    };
    let (socket, share) = (scratch.path("socket"), scratch.path("share"));
    let mut command = std::process::Command::new(program);
    command.arg("--socket-path").arg(&socket).arg("--shared-dir").arg(&share).args(["--sandbox", "none"]);
    let host = Host::spawn(&scratch, &mut command);
    let guest = Guest::mount(&scratch, &host, "transport=virtqueue");
    std::fs::write(guest.point.join("file"), "x").unwrap();
    assert_eq!(std::fs::read(share.join("file")).unwrap(), b"x");
    guest.unmount();
}

#[test]
fn io_uring_with_stock_virtiofsd() {
    with_stock_virtiofsd("uring");
}

#[test]
fn the_device_with_stock_virtiofsd() {
    with_stock_virtiofsd("fuse");
}
