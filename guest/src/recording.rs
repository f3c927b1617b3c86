//! Recording of a mount's requests, for the benchmark's `record`: operations, sizes, requests in flight and pauses. It
//! has no names, data or inode numbers. Nothing is recorded until [`Recording::start`].

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longest pause between requests that counts as part of a load. In a longer pause the programs were idle.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Key of similar requests: opcode, bytes, and requests in flight. Bytes and requests are rounded up to powers of two.
type Kind = (u32, u32, u32);

#[derive(Clone, Copy, Default)]
struct Count {
    requests: u64,
    /// Number of these requests that came after a pause of the queue, and the sum of the pauses.
    pauses: u64,
    paused: Duration,
}

#[derive(Default)]
struct Counts {
    kinds: BTreeMap<Kind, Count>,
    last_answer: Option<Instant>,
}

/// One queue's part of a recording.
#[derive(Default)]
pub struct Recording {
    on: AtomicBool,
    counts: Mutex<Counts>,
}

impl Recording {
    /// Starts a new recording.
    pub fn start(&self) {
        *self.counts.lock() = Counts::default();
        self.on.store(true, Ordering::Relaxed);
    }

    /// Counts an answered request that took `took`, with `in_flight` requests in flight including it. Only loads a flag
    /// if no recording is on.
    pub fn count(&self, opcode: u32, bytes: u32, in_flight: usize, took: Duration) {
        if !self.on.load(Ordering::Relaxed) {
            return;
        }
        let now = Instant::now();
        let mut counts = self.counts.lock();
        let begun = now.checked_sub(took);
        let pause = begun.zip(counts.last_answer).and_then(|(begun, last)| begun.checked_duration_since(last));
        counts.last_answer = Some(now);
        let in_flight = u32::try_from(in_flight.max(1)).unwrap_or(1).next_power_of_two();
        let bytes = if bytes == 0 { 0 } else { bytes.checked_next_power_of_two().unwrap_or(bytes) };
        let count = counts.kinds.entry((opcode, bytes, in_flight)).or_default();
        count.requests += 1;
        if let Some(pause) = pause.filter(|pause| *pause < LONGEST_PAUSE) {
            count.pauses += 1;
            count.paused += pause;
        }
    }

    /// Returns `true` while a recording is on.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Ends the recording, and returns it as a JSON list of objects.
    fn stop(&self) -> String {
        self.on.store(false, Ordering::Relaxed);
        let counts = std::mem::take(&mut *self.counts.lock());
        let mut out = String::from("[");
        for ((opcode, bytes, in_flight), count) in &counts.kinds {
            let comma = if out.len() > 1 { "," } else { "" };
            let pause = count.paused.as_micros() as u64 / count.pauses.max(1);
            let _ = write!(
                out,
                "{comma}{{\"opcode\":{opcode},\"bytes\":{bytes},\"in_flight\":{in_flight},\"requests\":{},\"pause_us\":{pause}}}",
                count.requests
            );
        }
        out + "]"
    }
}

/// Ends the recordings of all queues, and returns them as one JSON object.
pub fn stop<'a>(queues: impl Iterator<Item = &'a Recording>) -> String {
    let lists: Vec<String> = queues.map(Recording::stop).collect();
    format!("{{\"kind\":\"recording\",\"format\":1,\"queues\":[{}]}}\n", lists.join(","))
}

/// Returns the file for the recording of a guest's process. Its directory is not writable for other users.
pub fn file(user: u32, process: i32) -> PathBuf {
    let directory = if user == 0 { "/run".into() } else { format!("/run/user/{user}") };
    Path::new(&directory).join(format!("tunnelfs-guest-{process}.recording"))
}

/// Writes a recording to the [`file()`] of this process.
///
/// # Errors
/// The file system's, with the file's name.
pub fn write(text: &str) -> io::Result<()> {
    let path = file(nix::unistd::geteuid().as_raw(), nix::unistd::getpid().as_raw());
    let told = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    // An earlier recording that was not fetched.
    let _ = std::fs::remove_file(&path);
    let mut new = OpenOptions::new();
    let mut file = new.write(true).create_new(true).mode(0o600).open(&path).map_err(told)?;
    file.write_all(text.as_bytes()).map_err(told)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_kept_until_it_is_asked_for() {
        let recording = Recording::default();
        let count = |bytes| recording.count(15, bytes, 3, Duration::from_micros(5));
        count(4096);
        recording.start();
        count(4096);
        count(5000);
        count(0);
        let text = stop(std::iter::once(&recording));
        let kind = |bytes, requests| {
            format!("{{\"opcode\":15,\"bytes\":{bytes},\"in_flight\":4,\"requests\":{requests},\"pause_us\":")
        };
        for kind in [kind(4096, 1), kind(8192, 1), kind(0, 1)] {
            assert!(text.contains(&kind), "{kind}: {text}");
        }
        count(4096);
        assert!(stop(std::iter::once(&recording)).contains("\"queues\":[[]]"), "it has ended");
    }
}
