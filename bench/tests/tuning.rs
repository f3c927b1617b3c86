//! `tune` on a real guest and host, for a few seconds; that it finds what is best is tested where it searches.

use std::path::Path;
use std::process::{Command, Output};
use tunnelfs_settings::Settings;

fn bench(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tunnelfs-bench")).args(args).output().expect("runs")
}

fn words(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
}

#[test]
fn a_search_ends_with_a_file_that_the_programs_read() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let (file, page) = (path("tunnelfs.toml"), path("tuned.html"));
    let mut args = vec!["tune", "--time", "3", "--goal", "latency=2,cpu=1", "--workload", "small"];
    args.extend(["--output", &file, "--report", &page]);
    let out = bench(&args);
    let said = words(&out);
    assert!(out.status.success(), "{said}");
    let verdict = ["Better than the defaults: ", "The defaults are best: "];
    assert!(verdict.iter().any(|v| said.contains(v)), "{said}");
    assert!(said.contains("Further tries cannot matter") || said.contains("The time was over"), "{said}");
    assert!(said.contains("| the defaults | 1.000 |") || said.contains("| **the defaults** | 1.000 |"), "{said}");
    let text = std::fs::read_to_string(&file).expect("written");
    assert!(text.starts_with("# Settings for this machine") && text.contains("# Entries of each ring (default 64)."));
    let settings: Settings = toml::from_str(&text).expect("the programs' own settings");
    assert!(settings.transport.slots <= settings.transport.entries);
    let page = std::fs::read_to_string(&page).expect("written");
    assert!(page.contains("Rate against CPU") && page.contains("Latency against slots"));
    // The file is read by the program itself, too.
    let mut args = vec!["latency", "--quick", "--transport", "ring", "--policy", "auto", "--rw", "noop"];
    args.extend(["--placement", "separate", "--runtime", "6", "--config", &file]);
    let out = bench(&args);
    assert!(out.status.success(), "{}", words(&out));
}

#[test]
fn bad_input_is_told() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("written");
        path.to_str().expect("UTF-8").to_owned()
    };
    let run = Path::new(env!("CARGO_MANIFEST_DIR")).join("../results/quick.json");
    let cases = [
        (["--goal".into(), "speed".into()], "`speed` is no goal"),
        (["--goal".into(), "latency=0".into()], "must be a number above 0"),
        (["--workload".into(), "/no/such".into()], "neither a file"),
        (["--workload".into(), run.to_str().expect("UTF-8").into()], "not a workload"),
        (["--workload".into(), file("text", "hello")], "not a workload"),
        (["--slots".into(), "8,16".into()], "settings as lists"),
    ];
    for ([option, value], said) in &cases {
        let out = bench(&["tune", "--time", "1", option, value]);
        assert!(!out.status.success() && words(&out).contains(said), "{option} {value}: {}", words(&out));
    }
    assert!(words(&bench(&["tune", "--help"])).contains("Examples:"));
}
