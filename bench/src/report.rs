//! A run for people: its targets, and what pages say of it.

use crate::page::{markdown, recorded};
use crate::ratios::{ratios, Bound, Ratio};
use crate::record::Run;
use std::fmt::Write;

/// What a terminal shows, and what `--report` writes: the targets, then every load's usual rows.
///
/// # Errors
/// None that is expected: a run is a run.
pub fn summary(run: &Run) -> std::io::Result<String> {
    let read = recorded::parse(&serde_json::to_vec(run)?, "run").map_err(std::io::Error::other)?;
    let heading = run.origin.heading(&run.limits);
    let wide = markdown::side_by_side(&read);
    let (table, findings) = (ratio_table(&ratios(run)), markdown::findings(&read));
    Ok(format!("{heading}{}.\n\n{table}\n{findings}\n{wide}\n{}", run.files, echo_table(run)))
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

/// The run as a Markdown page, with the names of `plots` beside it; what is not in it is in the JSON.
///
/// # Errors
/// None that is expected.
pub fn page(run: &Run, plots: &[String]) -> std::io::Result<String> {
    let mut out = summary(run)?;
    for plot in plots {
        let _ = writeln!(out, "\n![{plot}]({plot})");
    }
    Ok(out + "\nEvery case, with the other wait policies and one core, its rounds and percentiles: the JSON beside this.\n")
}

/// The targets, and what has come of them; of a missed one also why.
pub fn ratio_table(ratios: &[Ratio]) -> String {
    let mut out = String::from("## Targets\n\n| what | ratio | wanted | reached |\n|---|--:|--:|---|\n");
    for ratio in ratios {
        let Ratio { what, value, bound, why } = ratio;
        let bound = match bound {
            Bound::AtMost(limit) => format!("at most {limit}"),
            Bound::AtLeast(limit) => format!("at least {limit}"),
        };
        let reached = if ratio.reached() { "yes".into() } else { format!("**no**: {why}") };
        let digits = if *value < 0.01 { 4 } else { 2 };
        let _ = writeln!(out, "| {what} | {value:.digits$} | {bound} | {reached} |");
    }
    out
}
