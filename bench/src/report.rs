//! A run for people: the table, and the ratios that the project is held to.

use crate::plan::{Op, Placement, Via};
use crate::record::{Row, Run};
use std::fmt::Write;
use tunnelfs_ring::Policy;

/// The run as a Markdown page.
pub fn markdown(run: &Run) -> String {
    let l = run.limits;
    let mut out = format!(
        "# {}\n\n{}, kernel {}, commit {}. {}\n\nLimits in this run: cache-line round trip {} ns, eventfd round trip {} ns, \
         memcpy {:.1} GB/s.\n\n## Ratios\n\n| what | ratio | wanted |\n|---|---|---|\n",
        run.command,
        run.machine,
        run.kernel,
        run.commit,
        run.config,
        l.cacheline_rtt_ns,
        l.eventfd_rtt_ns,
        l.memcpy_bytes_per_s as f64 / 1e9
    );
    for (what, ratio, wanted) in ratios(run) {
        let _ = writeln!(out, "| {what} | {ratio:.2} | {wanted} |");
    }
    out += "\n## All cases\n\n| op | size | depth | transport | placement | policy | kops/s | MB/s | p50 us | p99 us | p99.9 us \
            | guest CPU us | host CPU us | copied B/op |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
    for r in &run.rows {
        let _ = writeln!(
            out,
            "| {:?} | {} | {} | {:?} | {:?} | {} | {:.1} | {:.0} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.0} |",
            r.op,
            r.size,
            r.depth,
            r.transport,
            r.placement,
            r.policy,
            r.ops_per_s / 1e3,
            r.bytes_per_s / 1e6,
            r.p50_ns as f64 / 1e3,
            r.p99_ns as f64 / 1e3,
            r.p999_ns as f64 / 1e3,
            r.guest_cpu_ns_per_op / 1e3,
            r.host_cpu_ns_per_op / 1e3,
            r.copied_bytes_per_op
        );
    }
    out
}

/// The targets' ratios, as far as the run has their rows.
fn ratios(run: &Run) -> Vec<(String, f64, &'static str)> {
    let find = |via, policy, op, size, depth: u32| {
        run.rows.iter().find(|r| {
            let place = if via == Via::Direct { Placement::InProcess } else { Placement::Separate };
            r.transport == via
                && r.placement == place
                && r.policy == policy
                && r.op == op
                && r.size == size
                && r.depth == depth
        })
    };
    let p50 = |r: &Row| r.p50_ns as f64;
    let line = run.limits.cacheline_rtt_ns as f64;
    let mut out = Vec::new();
    let ring = find(Via::Ring, Policy::Spin, Op::Noop, 0, 1);
    if let Some(r) = ring.filter(|_| line > 0.0) {
        out.push(("no-op p50: ring / cache-line round trip".into(), p50(r) / line, "at most 2.0"));
    }
    for policy in [Policy::Spin, Policy::Park, Policy::Auto] {
        let pair = (find(Via::Ring, policy, Op::Noop, 0, 1), find(Via::Virtqueue, policy, Op::Noop, 0, 1));
        if let (Some(r), Some(v)) = pair {
            out.push((format!("no-op p50, {policy}: ring / virtqueue"), p50(r) / p50(v), "at most 0.5 (spin)"));
        }
    }
    if let (Some(r), Some(s)) =
        (find(Via::Ring, Policy::Auto, Op::Noop, 0, 1), find(Via::Socket, Policy::Auto, Op::Noop, 0, 1))
    {
        out.push(("no-op p50, auto: socket / ring".into(), p50(s) / p50(r), "at least 20 with a spare core"));
    }
    let read = (find(Via::Ring, Policy::Spin, Op::Read, 4096, 1), find(Via::Direct, Policy::Spin, Op::Read, 4096, 1));
    if let (Some(r), Some(d)) = read {
        out.push((
            "READ 4 KiB p50: ring / (direct + 3 round trips)".into(),
            p50(r) / (p50(d) + 3.0 * line),
            "at most 1.0",
        ));
    }
    let read =
        (find(Via::Ring, Policy::Spin, Op::Read, 1 << 20, 8), find(Via::Direct, Policy::Spin, Op::Read, 1 << 20, 8));
    if let (Some(r), Some(d)) = read {
        out.push((
            "READ 1 MiB depth 8: ring / direct bandwidth".into(),
            r.bytes_per_s / d.bytes_per_s,
            "at least 0.95",
        ));
    }
    let rows = run.rows.iter().filter(|r| r.transport == Via::Ring && r.placement == Placement::Separate);
    for auto in rows.filter(|r| r.policy == Policy::Auto) {
        let other = |policy| find(Via::Ring, policy, auto.op, auto.size, auto.depth).map(|r| r.ops_per_s);
        if let (Some(spin), Some(park)) = (other(Policy::Spin), other(Policy::Park)) {
            let what = format!("{:?} {} depth {}: auto / better of spin and park", auto.op, auto.size, auto.depth);
            out.push((what, auto.ops_per_s / spin.max(park), "at least 0.9"));
        }
    }
    out
}
