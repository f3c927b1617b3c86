//! The examples run to their ends; they check what they carry.

use std::process::Command;

fn run(example: &str, args: &[&str]) -> String {
    let cargo = Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--package", "tunnelfs-ring", "--example", example, "--"])
        .args(args)
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&cargo.stdout), String::from_utf8_lossy(&cargo.stderr));
    assert!(cargo.status.success(), "{out}{err}");
    out.into_owned()
}

#[test]
fn echo() {
    let out = run("echo", &[]);
    assert!(out.contains("hello -> HELLO"), "{out}");
}

#[test]
fn transfer() {
    let out = run("transfer", &["4"]);
    assert_eq!(out.matches("GB/s").count(), 4, "{out}");
}
