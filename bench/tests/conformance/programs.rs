//! Many programs at work at once, each of which says whether its files are whole.

use crate::{ignored, run, Mounted, Rng};
use std::fmt::Write;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

/// A load: runs in `dir` on the mount, has `source`, a tree outside of it, and does `times` as much.
pub type Load = fn(dir: &Path, source: &Path, times: usize);

pub const LOADS: [(&str, Load); 6] = [
    ("trees", copied_moved_and_removed_trees),
    ("tar", archives),
    ("git", a_repository),
    ("journal", a_data_base_with_a_journal),
    ("wal", a_data_base_with_a_shared_log),
    ("log", a_log_of_many_writers),
];

/// A tree of files, empty to some 100 kB, with links of both kinds and odd modes.
pub fn plant(dir: &Path, files: usize) {
    let mut rng = Rng::new(files as u64);
    for i in 0..files {
        let dir = dir.join(format!("d{}/e{}", i % 7, i % 31));
        fs::create_dir_all(&dir).unwrap();
        let most = if i % 20 == 0 { 100_000 } else { 4_000 };
        let mut data = vec![0; rng.below(most)];
        rng.fill(&mut data);
        let path = dir.join(format!("file {i}"));
        fs::write(&path, &data).unwrap();
        match i % 10 {
            0 => symlink(format!("file {i}"), dir.join(format!("link{i}"))).unwrap(),
            1 => fs::hard_link(&path, dir.join(format!("again{i}"))).unwrap(),
            2 => run(Command::new("chmod").arg("0741").arg(&path)).status.success().then_some(()).unwrap(),
            _ => {}
        }
    }
}

/// Runs a script in `dir`; `$1` is `source`, `$2` the number.
fn sh(script: &str, dir: &Path, source: &Path, number: usize) {
    let mut command = Command::new("sh");
    command.args(["-euc", script, "sh"]).arg(source).arg(number.to_string()).current_dir(dir);
    run(command.env("HOME", dir).env("GIT_CONFIG_NOSYSTEM", "1"));
}

/// The same script in so many processes.
fn all_at_once(processes: usize, script: &str, dir: &Path, source: &Path) {
    std::thread::scope(|scope| {
        for number in 0..processes {
            scope.spawn(move || sh(script, dir, source, number));
        }
    });
}

fn copied_moved_and_removed_trees(dir: &Path, source: &Path, times: usize) {
    let script = format!(
        "for round in $(seq {times}); do
           cp -a \"$1\" tree$2.$round
           mv tree$2.$round moved$2
           diff -r --no-dereference \"$1\" moved$2
           mkdir -p common; mv -T moved$2 common/$2
           find common/$2 -type f -name '*3' -delete
           rm -rf common/$2
         done"
    );
    all_at_once(3, &script, dir, source);
    assert_eq!(fs::read_dir(dir.join("common")).unwrap().count(), 0);
}

fn archives(dir: &Path, source: &Path, times: usize) {
    let script = format!(
        "mkdir work$2; cd work$2
         for round in $(seq {times}); do
           tar cf all.tar -C \"$1\" .
           mkdir out; tar xpf all.tar -C out; tar df all.tar -C out
           diff -r --no-dereference \"$1\" out
           tar cf - -C out . | cat > again.tar; tar df again.tar -C out
           rm -rf out
         done"
    );
    all_at_once(2, &script, dir, source);
}

/// A stream for `git fast-import`: so many commits, each of which changes a few files of many.
fn history(commits: usize) -> Vec<u8> {
    let (mut stream, mut rng) = (Vec::new(), Rng::new(1));
    for i in 1..=commits {
        let mut head = String::new();
        writeln!(head, "commit refs/heads/main\ncommitter A <a@example.org> {} +0000\ndata 2\nc\n", i + 1_000_000)
            .unwrap();
        stream.extend(head.as_bytes());
        for _ in 0..3 {
            let mut data = vec![0; rng.below(3000)];
            rng.fill(&mut data);
            let path = format!("d{}/f{}", rng.below(20), rng.below(50));
            stream.extend(format!("M 100644 inline {path}\ndata {}\n", data.len()).as_bytes());
            stream.extend(data);
            stream.push(b'\n');
        }
    }
    stream
}

fn a_repository(dir: &Path, source: &Path, times: usize) {
    run(Command::new("git").args(["init", "-q", "--bare", "-b", "main", "origin"]).current_dir(dir));
    let mut import = Command::new("git");
    import.args(["fast-import", "--quiet"]).current_dir(dir.join("origin")).stdin(Stdio::piped());
    let mut import = import.spawn().unwrap();
    import.stdin.take().unwrap().write_all(&history(300 * times)).unwrap();
    assert!(import.wait().unwrap().success());
    let script = "git clone -q --no-local origin clone$2; cd clone$2
         git config user.email a@example.org; git config user.name A$2
         git fsck --full --strict; test -z \"$(git status --porcelain)\"
         cp -a \"$1\" added; git add added; git commit -qm added; git checkout -q HEAD~5; git checkout -q -
         git repack -qad; git gc -q --prune=now; git fsck --full --strict
         git push -q origin HEAD:refs/heads/$2";
    all_at_once(2, script, dir, source);
    run(Command::new("git").args(["fsck", "--full", "--strict"]).current_dir(dir.join("origin")));
}

/// Several processes write transactions; all of them are there in the end.
fn data_base(dir: &Path, mode: &str, times: usize) {
    if Command::new("sqlite3").arg("--version").output().is_err() {
        return crate::skip::lacking("sqlite3 is not installed (`make deps-conformance`)");
    }
    const WRITERS: usize = 3;
    let (file, each) = (dir.join("data"), 30 * times);
    let sqlite = |script: String| {
        let mut command = Command::new("sqlite3");
        command.arg("-bail").args(["-cmd", ".timeout 120000"]).arg(&file).arg(script);
        String::from_utf8(run(&mut command).stdout).unwrap()
    };
    let tables = "CREATE TABLE t (writer, n, filler); CREATE TABLE sum (n); INSERT INTO sum VALUES (0);";
    assert_eq!(sqlite(format!("PRAGMA journal_mode={mode}; {tables}")).trim(), mode);
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let transaction = |n| {
                format!(
                    "BEGIN IMMEDIATE; INSERT INTO t VALUES ({writer}, {n}, hex(randomblob(2000)));
                     UPDATE sum SET n = n + 1; COMMIT;"
                )
            };
            let script = format!("PRAGMA synchronous=NORMAL; {}", (0..each).map(transaction).collect::<String>());
            scope.spawn(move || sqlite(script));
        }
    });
    let said = sqlite("PRAGMA integrity_check; SELECT count(*), (SELECT n FROM sum) FROM t;".into());
    assert_eq!(said, format!("ok\n{0}|{0}\n", WRITERS * each));
}

fn a_data_base_with_a_journal(dir: &Path, _: &Path, times: usize) {
    data_base(dir, "delete", times);
}

fn a_data_base_with_a_shared_log(dir: &Path, _: &Path, times: usize) {
    data_base(dir, "wal", times);
}

fn a_log_of_many_writers(dir: &Path, source: &Path, times: usize) {
    let script = format!("for line in $(seq {}); do echo \"$2 $line end\" >> log; done", 200 * times);
    all_at_once(4, &script, dir, source);
    let log = fs::read_to_string(dir.join("log")).unwrap();
    let lines: std::collections::BTreeSet<_> = log.lines().collect();
    assert!(lines.len() == 800 * times && lines.iter().all(|l| l.ends_with(" end")), "{} lines", lines.len());
}

/// All loads at the same time on one mount.
fn at_once(mounted: Option<Mounted>, through: &str, times: usize) {
    let Some(mounted) = mounted else { return };
    let source = mounted.scratch.path("source");
    plant(&source, 150 * times);
    std::thread::scope(|scope| {
        for (name, load) in LOADS {
            let (dir, source) = (mounted.path(name), &source);
            fs::create_dir(&dir).unwrap();
            std::thread::Builder::new()
                .name(name.into())
                .spawn_scoped(scope, move || load(&dir, source, times))
                .unwrap();
        }
    });
    // Both sides see the same.
    let (here, there) = (mounted.path(""), mounted.scratch.path("share"));
    run(Command::new("diff").args(["-r", "--no-dereference"]).args([here, there]));
    println!("{through}: no file was damaged");
    mounted.guest.unmount();
}

#[test]
fn at_work_at_once() {
    at_once(Mounted::new("uring", "ring", &[], ""), "uring, ring", 1);
}

/// Four times as much, about a minute each.
fn long(channel: &str, transport: &str, options: &[&str], words: &str) {
    let through = format!("{channel}, {transport} {options:?}{words}");
    at_once(Mounted::new(channel, transport, options, words), &through, 4);
}

const NEVER: [&str; 2] = ["--cache=never", "--allow-mmap"];
const WRITEBACK: [&str; 2] = ["--cache=always", "--writeback"];

ignored! {
    uring_ring: long("uring", "ring", &[], "");
    uring_virtqueue: long("uring", "virtqueue", &[], "");
    uring_socket: long("uring", "socket", &[], "");
    uring_without_cache: long("uring", "ring", &NEVER, "");
    uring_writeback: long("uring", "ring", &WRITEBACK, ",writeback");
    fuse_ring: long("fuse", "ring", &[], "");
    fuse_virtqueue: long("fuse", "virtqueue", &[], "");
    fuse_socket: long("fuse", "socket", &[], "");
    fuse_without_cache: long("fuse", "ring", &NEVER, "");
    fuse_writeback: long("fuse", "ring", &WRITEBACK, ",writeback");
    build_on_uring: a_build_of_this_workspace("uring");
    build_on_fuse: a_build_of_this_workspace("fuse");
    large_directory_uring_ring: a_directory_of_100_000_entries("uring", "ring");
    large_directory_uring_virtqueue: a_directory_of_100_000_entries("uring", "virtqueue");
    large_directory_uring_socket: a_directory_of_100_000_entries("uring", "socket");
    large_directory_fuse_ring: a_directory_of_100_000_entries("fuse", "ring");
    large_directory_fuse_virtqueue: a_directory_of_100_000_entries("fuse", "virtqueue");
    large_directory_fuse_socket: a_directory_of_100_000_entries("fuse", "socket");
}

/// This workspace, from source to tests, all of it on the mount.
fn a_build_of_this_workspace(channel: &str) {
    let Some(mounted) = Mounted::new(channel, "ring", &["--cache=always"], "") else { return };
    let (here, there) = (concat!(env!("CARGO_MANIFEST_DIR"), "/.."), mounted.path("workspace"));
    run(Command::new("git").args(["-C", here, "clone", "-q", "--no-local", "."]).arg(&there));
    let cargo = |words: &[&str]| {
        let mut command = Command::new("cargo");
        command.args(words).arg("--offline").current_dir(&there).env_remove("CARGO_TARGET_DIR");
        run(&mut command)
    };
    cargo(&["build", "--workspace", "--quiet"]);
    cargo(&["test", "--quiet", "-p", "tunnelfs-ring", "-p", "tunnelfs-settings"]);
    // Nothing has changed: nothing is built again.
    let again = cargo(&["build", "--workspace"]);
    assert!(!String::from_utf8_lossy(&again.stderr).contains("Compiling"));
    mounted.guest.unmount();
}

fn a_directory_of_100_000_entries(channel: &str, transport: &str) {
    let Some(mounted) = Mounted::new(channel, transport, &[], "") else { return };
    let dir = mounted.path("d");
    fs::create_dir(&dir).unwrap();
    for i in 0..100_000 {
        fs::File::create(dir.join(format!("{i}"))).unwrap();
    }
    let numbers = |dir: &Path| {
        let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut numbers: Vec<u32> = names.map(|n| n.parse().unwrap()).collect();
        numbers.sort_unstable();
        numbers
    };
    assert!(numbers(&dir).into_iter().eq(0..100_000));
    assert!(numbers(&mounted.scratch.path("share/d")).into_iter().eq(0..100_000));
    fs::remove_dir_all(&dir).unwrap();
    mounted.guest.unmount();
}
