//! Completions and manual pages, from a program's own command line.

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgMatches, Command};
use clap_complete::Shell;
use std::io::{self, Write};

/// Shells that completions can be had for.
const SHELLS: [&str; 5] = ["bash", "elvish", "fish", "powershell", "zsh"];

/// The subcommands `completions` and `man`.
pub fn subcommands() -> [Command; 2] {
    let shell = Arg::new("shell").value_name("SHELL").required(true).value_parser(PossibleValuesParser::new(SHELLS));
    let page = Arg::new("page").value_name("SUBCOMMAND").help("Of this subcommand");
    [
        Command::new("completions").about("Print a script that completes this command line in a shell").arg(shell),
        Command::new("man").about("Print the manual page, for man(1): `... man | man -l -`").arg(page),
    ]
}

/// Runs what [`subcommands`] has; `false`: something else is asked for.
///
/// # Errors
/// The output cannot be written, or there is no such page.
pub fn run(command: &Command, matches: &ArgMatches) -> io::Result<bool> {
    let text = match matches.subcommand() {
        Some(("completions", asked)) => completions(command, asked.get_one::<String>("shell").map_or("", |s| s)),
        Some(("man", asked)) => man(command, asked.get_one::<String>("page").map(String::as_str))?,
        _ => return Ok(false),
    };
    io::stdout().write_all(&text)?;
    Ok(true)
}

fn completions(command: &Command, shell: &str) -> Vec<u8> {
    let mut text = Vec::new();
    let (mut command, shell) = (command.clone(), shell.parse().unwrap_or(Shell::Bash));
    let name = command.get_name().to_owned();
    clap_complete::generate(shell, &mut command, name, &mut text);
    text
}

fn man(command: &Command, page: Option<&str>) -> io::Result<Vec<u8>> {
    let mut command = command.clone();
    command.build();
    let shown = match page {
        None => command.clone(),
        Some(page) => {
            let found = command.find_subcommand(page).cloned();
            let name: &'static str = format!("{}-{page}", command.get_name()).leak();
            let found = found.ok_or_else(|| io::Error::other(format!("{page}: no subcommand of this program")))?;
            found.name(name)
        }
    };
    let mut text = Vec::new();
    clap_mangen::Man::new(shown).section("8").manual("TunnelFS").render(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program() -> Command {
        let mount = Command::new("mount").about("Mounts").arg(Arg::new("slots").long("slots"));
        Command::new("tunnelfs-test").about("Tests").subcommand(mount).subcommands(subcommands())
    }

    #[test]
    fn each_shell_completes() {
        for shell in SHELLS {
            let text = String::from_utf8(completions(&program(), shell)).unwrap();
            assert!(text.contains("slots") && text.contains("completions"), "{shell}");
        }
    }

    #[test]
    fn pages_of_the_program_and_of_a_subcommand() {
        let page = |name| String::from_utf8(man(&program(), name).unwrap()).unwrap();
        assert!(page(None).contains("tunnelfs\\-test") && page(None).contains(".TH"));
        assert!(page(Some("mount")).contains("slots"));
        assert!(man(&program(), Some("nothing")).is_err());
    }
}
