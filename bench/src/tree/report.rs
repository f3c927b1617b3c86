//! A run on trees for people.

use super::ratios::ratios;
use super::record::{Row, TreeRun};
use crate::report::ratio_table;
use std::fmt::Write;

/// The run as a Markdown page: targets, the systems side by side, what was asked, and what it cost.
pub fn page(run: &TreeRun) -> String {
    let heading = format!("{}Trees: {}.\n", run.origin.heading(&run.limits), run.trees);
    let seconds = table(
        run,
        "Seconds",
        "Medians of the rounds. \"-again\": once more on the same mount; \"-third\": after that.",
        |r| Some(format!("{:.3}", r.seconds)),
    );
    let asked = table(run, "Requests per file", "What the kernel asked the guest, FORGET not counted.", |r| {
        r.requests_per_file.map(|n| format!("{n:.2}"))
    });
    let cpu = table(run, "CPU seconds, guest + host", "Of the file system's own processes.", |r| {
        let (guest, host) = (r.guest_cpu_ns_per_op / 1e9, r.host_cpu_ns_per_op / 1e9);
        (guest + host > 0.0).then(|| format!("{guest:.2} + {host:.2}"))
    });
    format!("{heading}\n{}\n{seconds}\n{asked}\n{}\n{cpu}", ratio_table(&ratios(run)), opcodes(run))
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

fn table(run: &TreeRun, title: &str, note: &str, cell: impl Fn(&Row) -> Option<String>) -> String {
    let (systems, ops) = (distinct(&run.rows, |r| &r.system), distinct(&run.rows, |r| &r.op));
    let named = systems.iter().map(|system| match run.rows.iter().find(|r| r.system == *system) {
        Some(r) if !r.cache.is_empty() && !r.system.ends_with(&r.cache) => format!("{system} ({})", r.cache),
        _ => (*system).to_owned(),
    });
    let mut out = format!("## {title}\n\n{note}\n\n| job | {} |\n", named.collect::<Vec<_>>().join(" | "));
    let _ = writeln!(out, "|---|{}", "--:|".repeat(systems.len()));
    for op in ops {
        let cells = systems.iter().map(|system| {
            let row = run.rows.iter().find(|r| r.op == op && r.system == *system);
            row.and_then(&cell).unwrap_or_default()
        });
        let _ = writeln!(out, "| {op} | {} |", cells.collect::<Vec<_>>().join(" | "));
    }
    out
}

/// What was asked most, for each job and system.
fn opcodes(run: &TreeRun) -> String {
    let mut out = String::from("## Requests per file by opcode\n\n| job | system | requests |\n|---|---|---|\n");
    for row in run.rows.iter().filter(|r| !r.opcodes_per_file.is_empty()) {
        let mut all: Vec<_> = row.opcodes_per_file.iter().filter(|(_, n)| **n >= 0.005).collect();
        all.sort_by(|a, b| b.1.total_cmp(a.1));
        let words: Vec<_> = all.iter().map(|(name, n)| format!("{name} {n:.2}")).collect();
        let _ = writeln!(out, "| {} | {} | {} |", row.op, row.system, words.join(", "));
    }
    out
}
