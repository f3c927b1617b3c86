//! `tunnelfs-bench tree`, in small: what it counts is what the kernel asked.

use crate::rig::{is_mounted, Scratch};
use std::fs;
use tunnelfs_bench::tree::{self, Row, TreePlan};
use tunnelfs_settings::Settings;

#[test]
fn trees_are_worked_on_and_requests_counted() {
    let Some(scratch) = Scratch::new() else { return };
    let (source, work) = (scratch.path("source"), scratch.path("work"));
    fs::create_dir_all(source.join("below")).unwrap();
    fs::create_dir(&work).unwrap();
    for number in 0..20 {
        fs::write(source.join(format!("below/file-{number}")), format!("text {number}\n")).unwrap();
    }
    let mut plan = TreePlan::new(true);
    (plan.source, plan.packages) = (Some(source), 5);
    plan.systems = ["native", "ring", "ring-always"].map(String::from).to_vec();
    plan.jobs = ["files", "install"].map(String::from).to_vec();
    let run = tree::run(&plan, &work, &Settings::default()).unwrap();

    let row = |system: &str, op: &str| -> &Row {
        run.rows.iter().find(|r| r.system == system && r.op == op).unwrap_or_else(|| panic!("{op} on {system}"))
    };
    for op in ["untar", "find", "find-again", "find-third", "grep", "grep-again", "grep-third", "rm", "install"] {
        assert_eq!(row("native", op).requests_per_file, None, "{op}");
        assert!(["native", "ring", "ring-always"].iter().all(|system| row(system, op).seconds > 0.0), "{op}");
    }
    let asked = |op: &str, opcode: &str| row("ring-always", op).opcodes_per_file.get(opcode).copied().unwrap_or(0.0);
    assert_eq!((row("ring-always", "untar").files, asked("untar", "CREATE")), (20, 1.0));
    assert_eq!((asked("grep", "READ"), asked("grep-again", "READ")), (1.0, 0.0), "data is cached");
    assert_eq!(asked("rm", "UNLINK"), 1.0);
    assert!(tree::page(&run).contains("| grep-again: requests per file of ring |"));
    assert!(!is_mounted(&work.join("mnt/ring")), "nothing stays mounted");
}
