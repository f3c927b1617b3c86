//! The log: lines with the time and the level on standard error, in colour on a terminal only.

use std::io::IsTerminal;
use tracing::Subscriber;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::prelude::*;
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::{EnvFilter, Registry};
use tunnelfs_settings::LogLevel;

/// The environment variable that goes before the settings: `warn`, or a list such as `info,tunnelfs_host=debug`.
pub const VARIABLE: &str = "RUST_LOG";

/// Changes what is logged while the program runs.
#[derive(Clone, Debug)]
pub struct Control(Handle<EnvFilter, Registry>);

impl Control {
    /// Sets the level; returns `false` where the environment has set it.
    pub fn set(&self, level: LogLevel) -> bool {
        from_environment().is_none() && self.0.reload(EnvFilter::new(level.name())).is_ok()
    }
}

fn from_environment() -> Option<EnvFilter> {
    let words = std::env::var(VARIABLE).ok().filter(|words| !words.trim().is_empty())?;
    EnvFilter::try_new(words).ok()
}

/// Starts the log of this process; `colour`: if it is on a terminal, and stays there.
pub fn start(level: LogLevel, colour: bool) -> Control {
    let (subscriber, control) = subscriber(level, colour && std::io::stderr().is_terminal(), std::io::stderr);
    // A program that embeds this one may have a log already.
    let _ = tracing::subscriber::set_global_default(subscriber);
    control
}

fn subscriber(
    level: LogLevel,
    colour: bool,
    writer: impl for<'a> MakeWriter<'a> + Send + Sync + 'static,
) -> (impl Subscriber + Send + Sync, Control) {
    let filter = from_environment().unwrap_or_else(|| EnvFilter::new(level.name()));
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer().with_ansi(colour).with_target(false).with_writer(writer);
    (tracing_subscriber::registry().with(filter).with(lines), Control(handle))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};

    #[test]
    fn a_file_gets_time_and_level_and_no_colours() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let (subscriber, control) = subscriber(LogLevel::Info, false, File::create(path.path()).unwrap());
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!("left out");
            tracing::warn!("one");
            assert!(control.set(LogLevel::Debug));
            tracing::debug!("two");
            assert!(control.set(LogLevel::Error));
            tracing::warn!("left out");
        });
        let text = fs::read_to_string(path.path()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].ends_with("WARN one") && lines[1].ends_with("DEBUG two"), "{text}");
        // 2026-11-26T03:09:24.000000Z
        assert!(lines[0].as_bytes()[4] == b'-' && lines[0].as_bytes()[10] == b'T' && !text.contains('\x1b'), "{text}");
    }
}
