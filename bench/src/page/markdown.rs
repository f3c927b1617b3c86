//! The report as Markdown.

use super::figures;
use super::recorded::{Recorded, Role, Row};
use super::words;
use std::fmt::Write;

/// The series of a FUSE server that does nothing.
const FLOOR: &str = "floor";

/// All runs, one after the other.
pub fn page(runs: &[Recorded]) -> String {
    runs.iter().map(one).collect::<Vec<_>>().join("\n")
}

fn one(run: &Recorded) -> String {
    let mut out = format!("# {}\n\n", run.name);
    out += &findings(run);
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

/// What matters first.
pub fn findings(run: &Recorded) -> String {
    words::findings(run).iter().map(|finding| format!("- {finding}\n")).collect()
}

/// The usual series in columns, a row for each load: what is shown of it, then the CPU time of one operation.
pub fn side_by_side(run: &Recorded) -> String {
    let mut series: Vec<&str> = Vec::new();
    for row in run.rows.iter().filter(|r| r.usual) {
        if !series.contains(&row.series.as_str()) {
            series.push(&row.series);
        }
    }
    let brackets = match series.contains(&FLOOR) {
        true => "In brackets: times what `floor` takes, a FUSE server that does nothing. ",
        false => "",
    };
    let mut out = format!(
        "## Side by side\n\nOne request at a time: p50; many: operations a second; 1 MiB and more: bytes a second. {brackets}± \
         is half of what the middle half of the rounds spans.\n\n"
    );
    out += &grid(run, &series, |load, row| {
        let floor = run.usual(load).find(|r| r.series == FLOOR && row.series != FLOOR).map(Row::shown);
        let over = floor.and_then(|floor| floor.times(&row.shown()));
        let over = over.map_or(String::new(), |times| format!("({})", figures::times(times)));
        let parts = [row.shown().text, over, spread(row), row.honest()];
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
    });
    if run.rows.iter().any(|row| row.cpu_ns.is_some()) {
        out += "\nCPU time of one operation, guest and host together:\n\n";
        out += &grid(run, &series, |_, row| row.cpu_ns.map_or(String::new(), figures::time));
    }
    out
}

/// A table with a column for each series and a row for each load.
fn grid(run: &Recorded, series: &[&str], cell: impl Fn(&str, &Row) -> String) -> String {
    let mut out = format!("| load | {} |\n|---|{}\n", series.join(" | "), "--:|".repeat(series.len()));
    for load in run.loads() {
        let row = |series: &&str| run.usual(load).find(|r| r.series == **series);
        let cells = series.iter().map(|series| row(series).map_or(String::new(), |row| cell(load, row)));
        let _ = writeln!(out, "| {load} | {} |", cells.collect::<Vec<_>>().join(" | "));
    }
    out
}

/// How far the rounds lie apart, of what is shown.
fn spread(row: &Row) -> String {
    let times = row.shown().lower && row.seconds.is_none();
    words::spread(if times { &row.p50s } else { &row.rates }).map_or(String::new(), |s| format!("±{s:.1} %"))
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
        let times = ours.as_ref().filter(|_| row.role != Role::Ours).and_then(|o| o.times(&shown));
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {} | {} |",
            row.series,
            shown.text,
            spread(row),
            time(row.at(50.0)),
            time(row.at(99.0)),
            time(row.at(99.9)),
            time(row.cpu_ns),
            times.map_or(String::new(), figures::times)
        );
    }
    out
}
