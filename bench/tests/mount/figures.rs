//! What live programs tell of themselves: metrics over HTTP, `status` and `top`, of a guest and of a sandboxed host.

use crate::rig::{soon, Guest, Host, Peer, Scratch};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use tunnelfs_bench::session::sibling;

/// A port that nobody had a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The text that Prometheus would read.
fn scrape(port: u16) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    body.into()
}

/// The sum of a metric's values; each value must belong to a metric with HELP and TYPE lines.
fn sum(text: &str, metric: &str, label: &str) -> f64 {
    for word in ["HELP", "TYPE"] {
        assert!(text.contains(&format!("# {word} {metric} ")), "no {word} of {metric}:\n{text}");
    }
    let lines = text.lines().filter(|line| line.starts_with(metric) && line.contains(label));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

fn output(program: &str, args: &[&str], place: &Path) -> String {
    let output = Command::new(sibling(program).unwrap()).args(args).arg(place).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{program} {args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn a_mount_tells_its_figures() {
    let Some(scratch) = Scratch::new() else { return };
    let (host, port) = (Host::start(&scratch, Peer::Ours), free_port());
    let guest = Guest::mount(&scratch, &host, &format!("transport=ring,metrics=127.0.0.1:{port}"));
    fs::write(guest.point.join("file"), "x").unwrap();
    let text = scrape(port);
    assert_eq!(sum(&text, "tunnelfs_guest_requests_total", "operation=\"WRITE\""), 1.0, "{text}");
    assert_eq!(sum(&text, "tunnelfs_guest_host_up", ""), 1.0);
    assert_eq!(sum(&text, "tunnelfs_guest_copied_bytes_total", ""), 0.0);
    for metric in
        ["slots", "slots_in_use", "waits_total", "notifications_total", "request_seconds", "request_errors_total"]
    {
        sum(&text, &format!("tunnelfs_guest_{metric}"), "queue=\"0\"");
    }
    let top = output("tunnelfs-guest", &["top", "--once"], &guest.point);
    assert!(top.contains("slots in use") && top.contains("WRITE") && top.contains("p99 us"), "{top}");
    guest.unmount();
}

#[test]
fn a_host_tells_its_figures_from_each_sandbox() {
    for sandbox in ["none", "chroot", "namespace"] {
        let Some(scratch) = Scratch::new() else { return };
        let port = free_port();
        let options = ["--sandbox", sandbox, "--metrics", &port.to_string()];
        let host = Host::start_with(&scratch, Peer::Ours, &options);
        let guest = Guest::mount(&scratch, &host, "transport=ring");
        fs::write(guest.point.join("file"), "x").unwrap();
        let text = soon("requests are counted", || {
            let text = scrape(port);
            (sum(&text, "tunnelfs_host_requests_total", "guest=") > 0.0).then_some(text)
        });
        assert_eq!(sum(&text, "tunnelfs_host_guests", ""), 1.0, "{sandbox}: {text}");
        let status = output("tunnelfs-host", &["status", "--socket-path"], &host.socket);
        assert!(status.contains("guests: 1") && status.contains("queue 1: "), "{sandbox}: {status}");
        let top = output("tunnelfs-host", &["top", "--once", "--socket-path"], &host.socket);
        assert!(top.contains("requests/s"), "{sandbox}: {top}");
        guest.unmount();
        soon("the guest is not counted any more", || {
            (sum(&scrape(port), "tunnelfs_host_guests", "") == 0.0).then_some(())
        });
    }
}
