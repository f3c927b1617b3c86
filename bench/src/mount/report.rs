//! A run on mounts for people.

use super::ratios::ratios;
use super::record::{MountRun, Row};
use crate::report::ratio_table;
use std::fmt::Write;

/// The run as a Markdown page: ratios, the systems side by side, all rows.
pub fn page(run: &MountRun) -> String {
    let heading = format!("{}Jobs by {}.\n", run.origin.heading(&run.limits), run.tool);
    format!("{heading}\n{}\n{}\n{}", ratio_table(&ratios(run)), side_by_side(run), all_rows(run))
}

fn distinct(rows: &[Row], key: fn(&Row) -> &str) -> Vec<&str> {
    let mut found: Vec<&str> = Vec::new();
    for row in rows {
        if !found.contains(&key(row)) {
            found.push(key(row));
        }
    }
    found
}

/// Rates of every system, for each job.
fn side_by_side(run: &MountRun) -> String {
    let (systems, ops) = (distinct(&run.rows, |r| &r.system), distinct(&run.rows, |r| &r.op));
    let mut out =
        String::from("## Side by side\n\nThousands of operations a second, or GB/s of 1 MiB requests.\n\n| job |");
    let _ = writeln!(out, " {} |\n|---|{}", systems.join(" | "), "--:|".repeat(systems.len()));
    for op in ops {
        let cells = systems.iter().map(|system| {
            let row = run.rows.iter().find(|r| r.op == op && r.system == *system);
            row.map_or(String::new(), |r| match r.size {
                s if s >= 1 << 20 => format!("{:.2} GB/s", r.bytes_per_s / 1e9),
                _ => format!("{:.1} k/s", r.ops_per_s / 1e3),
            })
        });
        let _ = writeln!(out, "| {op} | {} |", cells.collect::<Vec<_>>().join(" | "));
    }
    out
}

fn all_rows(run: &MountRun) -> String {
    let mut out = String::from(
        "## All rows\n\n| job | system | channel | kops/s | MB/s | p50 µs | p99 µs | p99.9 µs | max µs | guest CPU µs/op \
         | host CPU µs/op |\n|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    for r in &run.rows {
        let us = |ns: u64| ns as f64 / 1e3;
        let _ = writeln!(
            out,
            "| {} | {} | {} | {:.1} | {:.0} | {:.1} | {:.1} | {:.1} | {:.1} | {:.2} | {:.2} |",
            r.op,
            r.system,
            r.channel,
            r.ops_per_s / 1e3,
            r.bytes_per_s / 1e6,
            us(r.p50_ns),
            us(r.p99_ns),
            us(r.p999_ns),
            us(r.max_ns),
            r.guest_cpu_ns_per_op / 1e3,
            r.host_cpu_ns_per_op / 1e3
        );
    }
    out
}
