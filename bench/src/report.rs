//! A run for people.

use crate::plan::{Cpus, HostLocation, TransportKind};
use crate::ratios::{ratios, Bound, Ratio};
use crate::record::{Row, Run};
use std::fmt::Write;
use tunnelfs_ring::Policy;

/// What a terminal shows: the ratios, and the transports side by side.
pub fn summary(run: &Run) -> String {
    let heading = run.origin.heading(&run.limits);
    format!("{heading}{}.\n\n{}\n{}\n{}", run.files, ratio_table(&ratios(run)), side_by_side(run), echo_table(run))
}

/// What the safe ends cost.
fn echo_table(run: &Run) -> String {
    let mut out = String::from(
        "## The ring as a library\n\nA message of 80 bytes echoed by another thread of one process, p50 in ns.\n\n\
         | policy | raw queues | endpoint |\n|---|--:|--:|\n",
    );
    for pair in run.echo.chunks_exact(2) {
        let _ = writeln!(out, "| {} | {} | {} |", pair[0].policy, pair[0].p50_ns, pair[1].p50_ns);
    }
    out
}

/// The run as a Markdown page, with the names of `plots` beside it.
pub fn page(run: &Run, plots: &[String]) -> String {
    let mut out = summary(run);
    for plot in plots {
        let _ = writeln!(out, "\n![{plot}]({plot})");
    }
    out + &all_cases(run)
}

/// The targets, and what has come of them.
pub fn ratio_table(ratios: &[Ratio]) -> String {
    let mut out = String::from("## Ratios\n\n| what | ratio | bound | reached |\n|---|--:|--:|---|\n");
    for ratio in ratios {
        let Ratio { what, value, bound } = ratio;
        let bound = match bound {
            Bound::AtMost(limit) => format!("at most {limit}"),
            Bound::AtLeast(limit) => format!("at least {limit}"),
        };
        let reached = if ratio.reached() { "yes" } else { "**no**" };
        let digits = if *value < 0.01 { 4 } else { 2 };
        let _ = writeln!(out, "| {what} | {value:.digits$} | {bound} | {reached} |");
    }
    out
}

/// The columns that people compare first, under `auto`.
const COLUMNS: [(&str, TransportKind, HostLocation); 6] = [
    ("ring", TransportKind::Ring, HostLocation::Separate),
    ("virtqueue", TransportKind::Virtqueue, HostLocation::Separate),
    ("socket", TransportKind::Socket, HostLocation::Separate),
    ("virtiofsd", TransportKind::Virtiofsd, HostLocation::Separate),
    ("ring, in-process", TransportKind::Ring, HostLocation::InProcess),
    ("direct call", TransportKind::Direct, HostLocation::InProcess),
];

/// p50 of single requests, and rates of many, by transport.
fn side_by_side(run: &Run) -> String {
    let mut out = String::from(
        "## Side by side\n\nPolicy auto, all cores: p50 in µs of one request at a time, thousands of requests per \
         second of many.\n\n| load |",
    );
    let _ = writeln!(out, " {} |", COLUMNS.map(|c| c.0).join(" | "));
    out += "|---|";
    out += &"--:|".repeat(COLUMNS.len());
    out.push('\n');
    let mut loads: Vec<&Row> = Vec::new();
    for row in &run.rows {
        if !loads.iter().any(|l| l.load() == row.load()) {
            loads.push(row);
        }
    }
    for load in loads {
        let cell = |(_, via, placement): (&str, TransportKind, HostLocation)| {
            let policy = if via == TransportKind::Direct { Policy::Spin } else { Policy::Auto };
            let bound = (via, placement, policy, Cpus::All);
            let row = run
                .rows
                .iter()
                .find(|r| r.load() == load.load() && (r.transport, r.placement, r.policy, r.cpus) == bound);
            row.map_or("".into(), |r| match (r.depth, r.queues) {
                (1, 1) => format!("{:.2} µs", r.p50_ns as f64 / 1e3),
                _ => format!("{:.1} k/s", r.ops_per_s / 1e3),
            })
        };
        let _ = writeln!(out, "| {} | {} |", load.load_name(), COLUMNS.map(cell).join(" | "));
    }
    out
}

fn all_cases(run: &Run) -> String {
    let mut out = String::from(
        "\n## All cases\n\n| load | transport | placement | policy | cpus | kops/s | MB/s | p50 µs | p99 µs | p99.9 µs \
         | max µs | guest CPU µs/op | host CPU µs/op | copied B/op |\n\
         |---|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    for r in &run.rows {
        let us = |ns: u64| ns as f64 / 1e3;
        let placement = if r.placement == HostLocation::Separate { "separate" } else { "in-process" };
        let _ = writeln!(
            out,
            "| {} | {:?} | {placement} | {} | {:?} | {:.1} | {:.0} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.0} |",
            r.load_name(),
            r.transport,
            r.policy,
            r.cpus,
            r.ops_per_s / 1e3,
            r.bytes_per_s / 1e6,
            us(r.p50_ns),
            us(r.p99_ns),
            us(r.p999_ns),
            us(r.max_ns),
            r.guest_cpu_ns_per_op / 1e3,
            r.host_cpu_ns_per_op / 1e3,
            r.copied_bytes_per_op
        );
    }
    out
}
