//! `report` and `compare` on recorded runs, as a user calls them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn results(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../results").join(name)
}

fn bench(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tunnelfs-bench")).args(args).output().expect("runs")
}

fn words(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
}

/// Writes a report of `runs`: the page and the Markdown.
fn report(runs: &[&Path]) -> (String, String) {
    let dir = tempfile::tempdir().expect("a directory");
    let page = dir.path().join("page.html");
    let mut args = vec!["report", "--output", page.to_str().expect("UTF-8")];
    args.extend(runs.iter().map(|r| r.to_str().expect("UTF-8")));
    let out = bench(&args);
    assert!(out.status.success(), "{}", words(&out));
    let read = |path: &Path| std::fs::read_to_string(path).expect("written");
    (read(&page), read(&page.with_extension("md")))
}

#[test]
fn every_recorded_run_gives_a_page_that_needs_no_network() {
    for name in ["quick.json", "full.json", "mount.json", "mount-dear-wakeups.json", "vm.json"] {
        let (page, text) = report(&[&results(name)]);
        let outside = page.replace("http://www.w3.org/2000/svg", "");
        for word in ["http://", "https://", "src=", "@import", "url("] {
            assert!(!outside.contains(word), "{name}: {word}");
        }
        assert!(page.contains("prefers-color-scheme:dark"), "{name}");
        assert!(page.matches("<svg").count() > 5, "{name}: too few pictures");
        let mut words = page.split(|c: char| !c.is_alphanumeric());
        assert!(!words.any(|word| matches!(word, "NaN" | "inf")), "{name}: a figure that is none");
        assert!(text.starts_with("# ") && text.contains("the ring is"), "{name}");
        assert!(text.contains("Command: `"), "{name}");
    }
}

#[test]
fn a_page_says_first_what_matters() {
    let (page, text) = report(&[&results("mount.json")]);
    for part in
        ["Side by side", "Latency by percentile", "Latency against load", "CPU per operation", "Waking another CPU"]
    {
        assert!(page.contains(part), "{part}");
    }
    let first = text.lines().find(|l| l.starts_with("- ")).expect("findings");
    assert!(first.contains("the ring takes") && first.contains("virtiofsd"), "{first}");
    assert!(text.contains("Slower than a peer in:"), "what is behind is told, too");
}

#[test]
fn several_runs_stand_beside_each_other() {
    let (page, _) = report(&[&results("quick.json"), &results("full.json")]);
    assert!(page.contains("The runs beside each other"));
    let (page, _) = report(&[&results("quick.json"), &results("mount.json")]);
    assert!(!page.contains("The runs beside each other"), "runs of different kinds have nothing in common");
}

#[test]
fn requests_per_file_and_ring_sizes_are_drawn() {
    let dir = tempfile::tempdir().expect("a directory");
    let row = |system: &str, requests: f64| {
        format!(r#"{{"system":"{system}","op":"grep -r","seconds":{requests},"requests_per_file":{requests}}}"#)
    };
    let tree = dir.path().join("tree.json");
    let rows = [row("ring", 1.5), row("virtiofsd", 4.0)].join(",");
    let text = format!(r#"{{"format":2,"kind":"tree","command":"c","commit":"","kernel":"k","rows":[{rows}]}}"#);
    std::fs::write(&tree, text).expect("written");
    let (page, _) = report(&[&tree]);
    assert!(page.contains("Requests per file") && page.contains("4.00 s"));
    let ring = dir.path().join("ring.json");
    let row = |slots: u32, rate: f64| {
        format!(
            r#"{{"transport":"ring","placement":"separate","policy":"auto","cpus":"all","op":"read","size":4096,
            "depth":16,"queues":1,"entries":64,"slots":{slots},"in_flight":{},"ops_per_s":{rate},"p50_ns":900}}"#,
            slots.min(16)
        )
    };
    let rows = [row(8, 1e5), row(16, 2e5), row(32, 2.1e5)].join(",");
    let text = format!(r#"{{"format":2,"kind":"transports","command":"c","commit":"","kernel":"k","rows":[{rows}]}}"#);
    std::fs::write(&ring, text).expect("written");
    let (page, _) = report(&[&ring]);
    assert!(page.contains("Rate against ring size") && page.contains("ring, 8 slots"), "{page}");
}

#[test]
fn bad_input_is_told_by_name() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("written");
        path.to_str().expect("UTF-8").to_owned()
    };
    let page = dir.path().join("page.html").to_str().expect("UTF-8").to_owned();
    let missing = dir.path().join("none.json").to_str().expect("UTF-8").to_owned();
    let good = results("quick.json").to_str().expect("UTF-8").to_owned();
    let cases = [
        (missing, "none.json: No such file"),
        (file("text.json", "hello"), "text.json: not JSON"),
        (file("other.json", r#"{"rows": 3}"#), "other.json: not a run of tunnelfs-bench"),
        (file("later.json", r#"{"format": 99, "rows": []}"#), "written by a later tunnelfs-bench (format 99"),
        (file("empty.json", r#"{"command":"","commit":"","kernel":"","rows":[]}"#), "nothing was measured"),
    ];
    for (path, said) in &cases {
        let out = bench(&["report", path, "--output", &page]);
        assert!(!out.status.success() && words(&out).contains(said), "{}", words(&out));
    }
    let out = bench(&["report", &good, "--output", "page.txt"]);
    assert!(!out.status.success() && words(&out).contains("must end in .html"), "{}", words(&out));
    let out = bench(&["report", "--help"]);
    assert!(words(&out).contains("Examples:"));
}

/// A run of one row each of ours and of virtiofsd, with these rates of ours.
fn rates(dir: &Path, name: &str, kind: &str, ours: &[f64]) -> String {
    let row = |system: &str, rates: &[f64]| {
        format!(
            r#"{{"system":"{system}","op":"randread-4k-qd16","size":4096,"ops_per_s":{},"rates":{rates:?}}}"#,
            rates[0]
        )
    };
    let rows = [row("ring", ours), row("virtiofsd", &[50.0, 51.0, 49.5, 50.5])].join(",");
    let text = format!(r#"{{"format":2,"kind":"{kind}","command":"c","commit":"","kernel":"k","rows":[{rows}]}}"#);
    let path = dir.join(name);
    std::fs::write(&path, text).expect("written");
    path.to_str().expect("UTF-8").to_owned()
}

#[test]
fn compare_tells_better_worse_and_the_same_by_its_exit_status() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    let before = rates(dir, "before.json", "mount", &[100.0, 101.0, 99.0, 100.5]);
    let same = rates(dir, "same.json", "mount", &[100.5, 99.5, 101.0, 99.0]);
    let slower = rates(dir, "slower.json", "mount", &[80.0, 81.0, 79.0, 80.5]);
    let once = rates(dir, "once.json", "mount", &[100.0]);
    let other = rates(dir, "other.json", "tree", &[100.0, 100.0]);
    let old = results("mount-dear-wakeups.json").to_str().expect("UTF-8").to_owned();
    let cases = [
        (&before, &same, 0, "0 worse, 0 better, 1 the same"),
        (&before, &slower, 1, "**worse**"),
        (&slower, &before, 0, "0 worse, 1 better"),
        (&before, &once, 0, "1 with too few rounds to tell"),
        (&before, &other, 2, "only the same kind"),
        (&old, &before, 2, "no row has two rounds"),
        (&before, &"nothing.json".to_owned(), 2, "nothing.json: No such file"),
    ];
    for (a, b, status, said) in cases {
        let out = bench(&["compare", a, b]);
        assert!(words(&out).contains(said), "{a} {b}: {}", words(&out));
        assert_eq!(out.status.code(), Some(status), "{a} {b}: {}", words(&out));
    }
    assert_eq!(bench(&["compare", &before]).status.code(), Some(2), "one run alone");
    assert!(words(&bench(&["compare", "--help"])).contains("Exit status:"));
}

#[test]
fn settings_as_lists_are_measured_by_turns_and_reported() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let (json, text) = (path("run.json"), path("run.md"));
    let mut args = vec!["throughput", "--quick", "--transport", "ring", "--policy", "auto", "--placement", "separate"];
    args.extend(["--rw", "read", "--bs", "4k,1m", "--iodepth", "2,6", "--slots", "4,8", "--runtime", "15"]);
    args.extend(["--json", &json, "--report", &text]);
    let out = bench(&args);
    assert!(out.status.success(), "{}", words(&out));
    let run: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).expect("written")).expect("JSON");
    let rows = run["rows"].as_array().expect("rows");
    let asked = |row: &serde_json::Value| (row["slots"].as_u64(), row["depth"].as_u64(), row["in_flight"].as_u64());
    for (slots, depth, in_flight) in [(4, 2, 2), (4, 6, 4), (8, 2, 2), (8, 6, 6)] {
        let wanted = (Some(slots), Some(depth), Some(in_flight));
        assert!(rows.iter().any(|r| asked(r) == wanted), "{slots} slots, depth {depth}: {rows:?}");
    }
    assert!(rows.iter().all(|r| r["rates"].as_array().is_some_and(|rates| rates.len() > 1)), "rounds are kept");
    assert!(rows.iter().all(|r| r["curve_ns"].as_array().is_some_and(|c| c.len() == 15)), "curves are kept");
    let text = std::fs::read_to_string(&text).expect("written");
    let cells = text.lines().find(|l| l.starts_with("| READ 1 MiB depth 6 ")).expect("a row of 1 MiB");
    assert!(cells.contains("B/s ±") && cells.contains("4 in flight"), "{cells}");
    let (page, _) = report(&[Path::new(&json)]);
    assert!(page.contains("Rate against ring size") && page.contains("Latency against load"));
    // A run beside itself has not changed.
    let out = bench(&["compare", &json, &json]);
    assert_eq!(out.status.code(), Some(0), "{}", words(&out));
    let out = bench(&["mount", "--slots", "4,8"]);
    assert!(!out.status.success() && words(&out).contains("settings as lists are for"), "{}", words(&out));
}

#[test]
fn make_bench_leaves_the_clone_clean() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for target in ["bench", "bench-full", "bench-calls", "bench-mount", "bench-tree", "vm-bench"] {
        // What it would do; what it needs is not made.
        let out = Command::new("make").args(["-n", target]).current_dir(&root).output().expect("make");
        assert!(words(&out).contains("target/bench/"), "{target}: {}", words(&out));
        assert!(!words(&out).contains(" results/"), "{target}: {}", words(&out));
    }
    let out = Command::new("make").args(["-n", "record"]).current_dir(&root).output().expect("make");
    assert!(words(&out).contains("RESULTS=results"), "{}", words(&out));
}
