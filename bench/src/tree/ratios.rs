//! What a mount with caches that last is held to, within one run.

use super::record::{Row, TreeRun};
use crate::ratios::{Bound, Ratio};

/// Requests for each file, at most. What a directory or the whole mount costs may be among them.
const REQUESTS: [(&str, f64); 9] = [
    ("find-again", 0.0),
    ("find-third", 0.0),
    ("grep-again", 0.0),
    ("grep-third", 0.0),
    ("git-status-again", 0.0),
    ("find", 1.0),
    ("grep", 2.0),
    ("untar", 3.0),
    ("rm", 1.2),
];
/// Seconds as a multiple of the bare directory's, at most.
const NATIVE: [(&str, f64); 5] =
    [("find-again", 1.3), ("find-third", 1.3), ("grep-again", 1.5), ("grep-third", 1.5), ("git-status-again", 1.3)];
/// How many times as fast as others, at least.
const FASTER: [(&str, &str, f64); 8] = [
    ("find", "hp", 1.5),
    ("find", "virtiofsd", 2.5),
    ("grep", "hp", 1.5),
    ("grep", "virtiofsd", 2.5),
    ("untar", "hp", 2.0),
    ("untar", "virtiofsd", 3.0),
    ("git-add", "virtiofsd", 2.5),
    ("rm", "hp", 1.3),
];

/// The targets' ratios, as far as the run has their rows.
pub fn ratios(run: &TreeRun) -> Vec<Ratio> {
    let mut out = Vec::new();
    let Some(ours) = best(run) else { return out };
    let mut add = |what: String, value: Option<f64>, bound: Bound| {
        let why = what.split_once(':').and_then(|(op, _)| find(run, ours, op)).map_or(String::new(), why);
        out.extend(value.map(|value| Ratio { what, value, bound, why }));
    };
    for (op, limit) in REQUESTS {
        let requests = find(run, ours, op).and_then(|r| r.requests_per_file);
        add(format!("{op}: requests per file of {ours}"), requests, Bound::AtMost(limit));
    }
    let times = |op: &str, slow: &str, fast: &str| Some(find(run, slow, op)?.seconds / find(run, fast, op)?.seconds);
    for (op, limit) in NATIVE {
        add(format!("{op}: seconds of {ours} / native"), times(op, ours, "native"), Bound::AtMost(limit));
    }
    for (op, other, limit) in FASTER {
        add(format!("{op}: seconds of {other} / {ours}"), times(op, other, ours), Bound::AtLeast(limit));
    }
    out
}

/// The system whose caches last: coherent ones, or those of a directory that nobody else changes.
fn best(run: &TreeRun) -> Option<&str> {
    let with = |cache: &str| run.rows.iter().find(|r| r.cache == cache).map(|r| r.system.as_str());
    with("coherent").or_else(|| with("always"))
}

/// What a file is mostly asked, in a clause.
fn why(row: &Row) -> String {
    let mut asked: Vec<(&String, &f64)> = row.opcodes_per_file.iter().collect();
    asked.sort_by(|a, b| b.1.total_cmp(a.1));
    let most: Vec<String> = asked.iter().take(3).map(|(name, count)| format!("{count:.1} {name}")).collect();
    match most.is_empty() {
        true => format!("it took {:.2} s", row.seconds),
        false => format!("each file is asked {}", most.join(", ")),
    }
}

fn find<'a>(run: &'a TreeRun, system: &str, op: &str) -> Option<&'a Row> {
    run.rows.iter().find(|r| r.system == system && r.op == op)
}
