//! What a mount through the ring is held to, within one run.

use super::record::{MountRun, Row};
use crate::ratios::{Bound, Ratio};

/// Systems (also the peers of `make bench-mount`), jobs, and how much of their rate the ring with a separate host must reach.
const TARGETS: [(&str, &str, f64); 17] = [
    ("in-process", "randread-4k", 0.9),
    ("in-process", "randread-4k-qd16", 0.95),
    ("in-process", "read-1m", 0.95),
    ("in-process", "write-1m", 0.95),
    ("in-process", "randwrite-4k", 0.9),
    ("in-process", "randread-4k-2jobs", 0.65),
    ("in-process", "read-1m-buffered", 0.9),
    ("in-process", "write-1m-buffered", 0.9),
    ("in-process", "create+stat+unlink", 0.9),
    ("hp-uring", "randread-4k", 1.5),
    ("hp-uring", "randread-4k-qd16", 1.3),
    ("hp-uring", "read-1m", 1.3),
    ("hp-uring", "write-1m", 1.3),
    ("hp-uring", "randwrite-4k", 1.5),
    ("hp-uring", "randread-4k-2jobs", 0.7),
    ("hp-uring", "create+stat+unlink", 1.3),
    ("hp-fuse", "randread-4k", 6.0),
];

/// The targets' ratios, as far as the run has their rows.
pub fn ratios(run: &MountRun) -> Vec<Ratio> {
    let mut out = Vec::new();
    let mut add = |of: &Row, other: &str, limit: f64| {
        if let Some(other) = find(run, other, &of.op) {
            out.push(Ratio {
                what: format!("{}: {} / {}", of.op, of.system, other.system),
                value: of.ops_per_s / other.ops_per_s,
                bound: Bound::AtLeast(limit),
                why: why(of, other) + &floor(run, &of.op),
            });
        }
    };
    for (other, op, limit) in TARGETS {
        if let Some(ring) = find(run, "ring", op) {
            add(ring, other, limit);
        }
    }
    for ring in run.rows.iter().filter(|r| r.system == "ring") {
        let small = ring.size == 4096 && (ring.depth, ring.queues) == (1, 1);
        add(ring, "virtiofsd", if small { 5.0 } else { 1.0 });
    }
    for ring in run.rows.iter().filter(|r| r.system == "ring" && r.op.ends_with("buffered")) {
        add(ring, "ring-fuse", 1.0);
    }
    out
}

/// What lies between the two, in a clause.
fn why(ring: &Row, other: &Row) -> String {
    let (ours, theirs) = (ring.p50_ns as f64 / 1e3, other.p50_ns as f64 / 1e3);
    let cpu = |row: &Row| (row.guest_cpu_ns_per_op + row.host_cpu_ns_per_op) / 1e3;
    match other.placement {
        "in-process" if cpu(other) > 0.0 => format!(
            "it asks another process: p50 {ours:.1} µs against {theirs:.1}, CPU {:.1} µs against {:.1}",
            cpu(ring),
            cpu(other)
        ),
        _ => format!("p50 {ours:.1} µs against {theirs:.1}"),
    }
}

/// What the kernel's FUSE takes alone, for loads of one request at a time.
fn floor(run: &MountRun, op: &str) -> String {
    let row = find(run, "floor", op).filter(|row| row.depth <= 1);
    row.map_or(String::new(), |row| {
        format!("; a FUSE server that does nothing takes {:.1} µs", row.p50_ns as f64 / 1e3)
    })
}

fn find<'a>(run: &'a MountRun, system: &str, op: &str) -> Option<&'a Row> {
    run.rows.iter().find(|r| r.system == system && r.op == op)
}
