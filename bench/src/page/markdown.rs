//! The report as Markdown.

use super::figures;
use super::recorded::{Recorded, Role, Row};
use super::words;
use std::fmt::Write;

/// All runs, one after the other.
pub fn page(runs: &[Recorded]) -> String {
    runs.iter().map(one).collect::<Vec<_>>().join("\n")
}

fn one(run: &Recorded) -> String {
    let mut out = format!("# {}\n\n", run.name);
    for finding in words::findings(run) {
        let _ = writeln!(out, "- {finding}");
    }
    let _ = writeln!(out, "\n{}.", run.machine);
    if let Some(limits) = words::limits(run) {
        let _ = writeln!(out, "{limits}");
    }
    let _ = writeln!(out, "\nCommand: `{}`", run.command);
    let changed = words::changed(run);
    if !changed.is_empty() {
        let _ = writeln!(out, "\nSettings other than the defaults: `{}`.", changed.join("`, `"));
    }
    for load in run.loads() {
        out += &table(run, load);
    }
    out
}

/// A load's rows; the unusual ones only where there are no others.
fn table(run: &Recorded, load: &str) -> String {
    let mut rows: Vec<&Row> = run.usual(load).collect();
    if rows.is_empty() {
        rows = run.rows.iter().filter(|r| r.load == load).collect();
    }
    let ours = run.ours(load).map(Row::shown);
    let mut out = format!(
        "\n## {load}\n\n| | result | spread | p50 | p99 | p99.9 | CPU of one | the ring is |\n|---|--:|--:|--:|--:|--:|--:|--:|\n"
    );
    for row in rows {
        let shown = row.shown();
        let time = |ns: Option<f64>| ns.map_or(String::new(), figures::time);
        let spread = words::spread(if shown.lower && row.seconds.is_none() { &row.p50s } else { &row.rates });
        let times = ours.as_ref().filter(|_| row.role != Role::Ours).and_then(|o| o.times(&shown));
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {} | {} |",
            row.series,
            shown.text,
            spread.map_or(String::new(), |s| format!("±{s:.1} %")),
            time(row.at(50.0)),
            time(row.at(99.0)),
            time(row.at(99.9)),
            time(row.cpu_ns),
            times.map_or(String::new(), figures::times)
        );
    }
    out
}
