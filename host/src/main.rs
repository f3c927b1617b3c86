//! `tunnelfs-host`: shares a directory.

mod cli;
mod compat;
mod doctor;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
