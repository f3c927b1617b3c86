//! Settings that are given as lists, `--slots 8,16`: every combination is measured, all by turns in one run.

use std::ffi::OsString;

/// The options that may have lists.
pub const LISTS: [&str; 5] = ["--entries", "--slots", "--slot-size", "--spin-us", "--auto-us"];

/// The command lines that a command line with lists stands for: one where there are none.
pub fn expand(args: &[OsString]) -> Vec<Vec<OsString>> {
    let mut lines = vec![Vec::new()];
    let mut list_follows = false;
    for arg in args {
        let text = arg.to_string_lossy();
        let joined = LISTS.iter().find(|name| text.strip_prefix(**name).is_some_and(|rest| rest.starts_with('=')));
        let values: Vec<OsString> = match joined {
            Some(name) => text[name.len() + 1..].split(',').map(|value| format!("{name}={value}").into()).collect(),
            None if list_follows => text.split(',').map(OsString::from).collect(),
            None => vec![arg.clone()],
        };
        list_follows = joined.is_none() && !list_follows && LISTS.contains(&text.as_ref());
        let longer = |line: &Vec<OsString>| {
            values.iter().map(|value| line.iter().chain([value]).cloned().collect()).collect::<Vec<Vec<OsString>>>()
        };
        lines = lines.iter().flat_map(longer).collect();
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::expand;
    use std::ffi::OsString;

    fn lines(text: &str) -> Vec<String> {
        let args: Vec<OsString> = text.split(' ').map(OsString::from).collect();
        let joined = |line: Vec<OsString>| line.iter().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" ");
        expand(&args).into_iter().map(joined).collect()
    }

    #[test]
    fn lists_stand_for_every_combination() {
        assert_eq!(lines("all --bs 4k,1m --quick"), ["all --bs 4k,1m --quick"]);
        assert_eq!(lines("all --slots 8,16"), ["all --slots 8", "all --slots 16"]);
        let four =
            ["--slots=8 --auto-us 0", "--slots=8 --auto-us 9", "--slots=16 --auto-us 0", "--slots=16 --auto-us 9"];
        assert_eq!(lines("--slots=8,16 --auto-us 0,9"), four);
    }
}
