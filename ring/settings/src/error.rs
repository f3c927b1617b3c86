//! Why a setting is refused.

use std::path::PathBuf;

/// A setting that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The file is not what it should be; the text shows the line.
    #[error("{}: {text}", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// What and where.
        text: String,
    },
    /// A value is out of range.
    #[error("{key} = {value}: {allowed} (set by {origin})")]
    Value {
        /// Table and key.
        key: String,
        /// The refused value.
        value: String,
        /// What would be accepted.
        allowed: String,
        /// The option, the file and line, or that it is the default.
        origin: String,
    },
}
