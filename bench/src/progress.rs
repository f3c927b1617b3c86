//! The bar that long work shows.

use indicatif::{ProgressBar, ProgressStyle};
use std::io;
use std::time::Duration;

/// A bar for `steps` steps of a long work.
///
/// # Errors
/// None that is expected: the template is fixed.
pub fn progress(steps: usize) -> io::Result<ProgressBar> {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {eta} left  {msg}").map_err(io::Error::other)?;
    Ok(ProgressBar::new(steps as u64).with_style(style))
}

/// A bar for a work that takes at most `time`: its position is in milliseconds.
///
/// # Errors
/// None that is expected: the template is fixed.
pub fn timed(time: Duration) -> io::Result<ProgressBar> {
    let style = ProgressStyle::with_template("{bar:40} at most {eta} left  {msg}").map_err(io::Error::other)?;
    Ok(ProgressBar::new(time.as_millis() as u64).with_style(style))
}
