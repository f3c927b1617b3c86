//! Tests that cannot run here say so, and why. `make test` collects it: the test harness shows nothing of a test that
//! passes.

use std::fmt::Display;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

/// The file to which a line is added for each skip: the test's name, a tab, the reason. Set by `.ci/test`.
const FILE: &str = "TUNNELFS_SKIPS";

/// Something is not there that `make test` installs, or that a machine for tests must have: a program, root,
/// `/dev/fuse`. With `CI=true` that is a failure.
#[allow(dead_code)] // Shared: not every test program has a use for all.
pub fn lacking(reason: impl Display) {
    let on_ci = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(!on_ci, "skipped on CI, which must have all that tests need: {reason}");
    note(&this_test(), &reason);
}

/// This kernel or machine does not have it, and no package would give it.
#[allow(dead_code)]
pub fn unsupported(reason: impl Display) {
    note(&this_test(), &reason);
}

/// The harness names a test's thread after the test.
#[allow(dead_code)]
fn this_test() -> String {
    std::thread::current().name().unwrap_or("?").into()
}

/// Notes that `test` was skipped.
pub fn note(test: &str, reason: &dyn Display) {
    println!("skipped: {reason}");
    let Some(path) = std::env::var_os(FILE).map(PathBuf::from) else { return };
    let reason = reason.to_string().replace(['\n', '\t'], " ");
    // One write: tests on several threads add to it.
    let line = format!("{test}\t{reason}\n");
    let file = File::options().append(true).create(true).open(&path);
    file.and_then(|mut file| file.write_all(line.as_bytes())).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}
