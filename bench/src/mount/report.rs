//! A run on mounts for people.

use super::ratios::ratios;
use super::record::MountRun;
use crate::page::{markdown, recorded};
use crate::report::ratio_table;

/// The run as a Markdown page: targets, what matters first, the systems side by side; all else is in the JSON.
///
/// # Errors
/// None that is expected: a run is a run.
pub fn page(run: &MountRun) -> std::io::Result<String> {
    let read = recorded::parse(&serde_json::to_vec(run)?, "run").map_err(std::io::Error::other)?;
    let heading = format!("{}Jobs by {}.\n", run.origin.heading(&run.limits), run.tool);
    let (targets, findings) = (ratio_table(&ratios(run)), markdown::findings(&read));
    Ok(format!("{heading}\n{targets}\n{findings}\n{}", markdown::side_by_side(&read)))
}
