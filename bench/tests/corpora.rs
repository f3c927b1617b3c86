//! The fuzz targets of `fuzz/` without coverage: each input that was kept, and each again with some bytes changed at
//! random, for a few seconds a target.

#[path = "../../fuzz/src/reply.rs"]
mod reply;
#[path = "../../fuzz/src/request.rs"]
mod request;
#[path = "../../fuzz/src/ring.rs"]
mod ring;
#[path = "../../fuzz/src/server.rs"]
mod server;
#[path = "../../fuzz/src/settings.rs"]
mod settings;
#[path = "../../fuzz/src/stream.rs"]
mod stream;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

const LENGTH: Duration = Duration::from_secs(5);

/// The servers leave their directories: below `target`.
fn within_a_folder(name: &str, target: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("corpora");
    fs::create_dir_all(&folder).unwrap();
    std::env::set_var("TMPDIR", &folder);
    go_through(name, target);
}

fn go_through(name: &str, target: fn(&[u8])) {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
    let mut inputs: Vec<_> = fs::read_dir(kept).unwrap().map(|e| fs::read(e.unwrap().path()).unwrap()).collect();
    inputs.sort();
    assert!(inputs.len() > 10 && inputs.len() <= 300, "{name}: {} inputs", inputs.len());
    inputs.iter().for_each(|input| target(input));
    let (start, mut number, mut changed) = (Instant::now(), 0x5eed_0007u64, 0u64);
    let mut next = || {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        number as usize
    };
    while start.elapsed() < LENGTH {
        let mut input = inputs[next() % inputs.len()].clone();
        let other = &inputs[next() % inputs.len()];
        match next() % 3 {
            0 => input.truncate(next() % (input.len() + 1)),
            1 => input.extend(&other[next() % (other.len() + 1)..]),
            _ => {}
        }
        for _ in 0..next() % 4 {
            let len = input.len().max(1);
            if let Some(byte) = input.get_mut(next() % len) {
                *byte = [0, 1, 0x7f, 0x80, 0xff, next() as u8][next() % 6];
            }
        }
        target(&input);
        changed += 1;
    }
    println!("{name}: {} inputs, and {changed} changed ones", inputs.len());
}

#[test]
fn rings() {
    go_through("ring", ring::once);
}

#[test]
fn settings_files() {
    go_through("settings", settings::once);
}

#[test]
fn replies() {
    go_through("reply", reply::once);
}

#[test]
fn requests() {
    within_a_folder("request", request::once);
}

#[test]
fn streams() {
    within_a_folder("stream", stream::once);
}
