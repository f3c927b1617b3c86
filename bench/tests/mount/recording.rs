//! `tunnelfs-bench record`: a live mount's workload, without names and data, that `tune` takes.

use crate::life::ours;
use crate::rig::Guest;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use tunnelfs_ring::Region;

fn bench(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tunnelfs-bench")).args(args).output().unwrap()
}

fn words(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
}

#[test]
fn a_live_mount_is_recorded_and_tuned_for() {
    let Some((scratch, host)) = ours() else { return };
    let guest = Guest::mount(&scratch, &host, "");
    let point = scratch.path("mnt");
    std::fs::write(scratch.path("share/secret-name"), vec![7; 1 << 20]).unwrap();
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(point.join("secret-name")).unwrap();
    let (output, stop) = (scratch.path("work.json"), AtomicBool::new(false));
    let output = output.to_str().unwrap();
    let record = |point: &str| bench(&["record", point, "--seconds", "2", "--output", output]);
    let recorded = std::thread::scope(|scope| {
        scope.spawn(|| {
            let memory = Region::new(16 << 10, false).unwrap();
            // SAFETY: private to this thread, as long as the region is.
            let buffer = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr(), 16 << 10) };
            while !stop.load(Ordering::Relaxed) {
                file.read_exact_at(buffer, 0).unwrap();
            }
        });
        let recorded = record(point.to_str().unwrap());
        stop.store(true, Ordering::Relaxed);
        recorded
    });
    assert!(recorded.status.success(), "{}", words(&recorded));
    let text = std::fs::read_to_string(output).unwrap();
    assert!(!text.contains("secret"), "names are not kept: {text}");
    let work: serde_json::Value = serde_json::from_str(&text).unwrap();
    let most = &work["parts"][0];
    assert_eq!((most["op"].as_str(), most["size"].as_u64()), (Some("read"), Some(16 << 10)), "{text}");
    assert!(most["share"].as_f64().unwrap() > 0.5, "{text}");
    // Nobody asks now.
    let idle = record(point.to_str().unwrap());
    assert!(!idle.status.success() && words(&idle).contains("nothing was asked"), "{}", words(&idle));
    let nowhere = record(scratch.path("share").to_str().unwrap());
    assert!(
        !nowhere.status.success() && words(&nowhere).contains("no tunnelfs-guest serves it"),
        "{}",
        words(&nowhere)
    );
    // A process that a signal would end is left alone.
    let own = std::process::id().to_string();
    drop(file);
    let other = bench(&["record", "--pid", &own, "--output", output]);
    assert!(!other.status.success() && words(&other).contains("is not a tunnelfs-guest"), "{}", words(&other));
    guest.unmount();
    let tuned = bench(&["tune", "--workload", output, "--time", "2"]);
    assert!(tuned.status.success() && words(&tuned).contains("settings were tried"), "{}", words(&tuned));
}
