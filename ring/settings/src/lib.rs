//! One configuration for all programs: `tunnelfs.toml`, which the command line overrides.

mod limits;
mod load;
mod numbers;
mod schema;
mod words;

pub use load::{Loader, SYSTEM_FILE};
pub use numbers::parse_bytes;
pub use schema::*;
pub use words::{Word, WORDS};

use std::path::PathBuf;
use words::Form;

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

/// The command-line options of the settings in `sections`: whole tables or single keys, and `--config`.
pub fn args(sections: &'static [&'static str]) -> Vec<clap::Arg> {
    let option = |word: &Word| {
        let arg = clap::Arg::new(word.option).long(word.option).help(word.help);
        match word.form {
            Form::Switch(_) => arg.action(clap::ArgAction::SetTrue),
            Form::Value(name) | Form::List(name) => arg.value_name(name),
        }
    };
    let config = clap::Arg::new("config")
        .long("config")
        .value_name("FILE")
        .value_parser(clap::value_parser!(PathBuf))
        .help(format!("Settings file [default: {SYSTEM_FILE}, if there is one]"));
    words::of(sections).map(option).chain([config]).collect()
}

/// What a command line made with [`args`] and the file that it names say.
///
/// # Errors
/// [`Error`].
pub fn load(sections: &'static [&'static str], matches: &clap::ArgMatches) -> Result<Loader, Error> {
    let mut loader = Loader::new(matches.get_one::<PathBuf>("config").map(PathBuf::as_path))?;
    loader.command_line(sections, matches)?;
    Ok(loader)
}
