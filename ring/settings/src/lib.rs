//! One configuration for all programs: `tunnelfs.toml`, which the command line overrides.

mod changes;
mod error;
mod limits;
mod load;
mod numbers;
mod options;
mod schema;

pub use changes::changed_keys;
pub use error::Error;
pub use load::{args, load, Loader, SYSTEM_FILE};
pub use numbers::parse_bytes;
pub use options::{OptionSpec, OPTIONS};
pub use schema::*;
