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
    Ok(format!("{heading}{}.\n\n{}\n{}\n{wide}", run.files, ratio_table(&ratios(run)), markdown::findings(&read)))
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
