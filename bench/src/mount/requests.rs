//! What the kernel has asked a guest of ours, by opcode.

use super::patience::await_that;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

/// Requests that were answered, by opcode, without those that nobody waits for: FORGET and BATCH_FORGET.
pub type Requests = BTreeMap<String, u64>;

/// Asks a guest, whose messages go into `log`, for its statistics.
///
/// # Errors
/// When it does not tell.
pub fn ask(pid: u32, log: &Path) -> io::Result<Requests> {
    let before = fs::metadata(log)?.len() as usize;
    kill(Pid::from_raw(pid as i32), Signal::SIGUSR1)?;
    let (mut text, mut last) = (String::new(), 0);
    // All of it is there when it no longer grows.
    await_that("the guest tells its statistics", || {
        text = fs::read_to_string(log).unwrap_or_default().split_off(before);
        let same = text.len() == last;
        last = text.len();
        same && text.contains("queue 0") && text.ends_with('\n')
    })?;
    Ok(parse(&text))
}

/// Sums up the queues' lines, as `NAME COUNT done ...`.
pub fn parse(statistics: &str) -> Requests {
    let mut all = Requests::new();
    for line in statistics.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(count), Some("done")) = (words.next(), words.next(), words.next()) else { continue };
        if name.ends_with("FORGET") {
            continue;
        }
        if let Ok(count) = count.parse::<u64>() {
            *all.entry(name.into()).or_default() += count;
        }
    }
    all
}

/// What has been asked `since`.
pub fn asked(now: &Requests, since: &Requests) -> Requests {
    let part = |(name, count): (&String, &u64)| {
        let new = count - since.get(name).unwrap_or(&0).min(count);
        (new > 0).then(|| (name.clone(), new))
    };
    now.iter().filter_map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_all_queues_are_summed_up() {
        let text = "queue 0: ring, 16 slots, of which 1.0 in use, at most 1\n  \
                    LOOKUP                   10 done        3 failed  p50       1.0 us\n\
                    queue 1: ring, 16 slots\n  payload copied in user space: 0 bytes\n  \
                    LOOKUP                    5 done        0 failed\n  READ  7 done 0 failed\n  BATCH_FORGET 2 done 0 failed\n";
        let all = parse(text);
        assert_eq!(all, Requests::from([("LOOKUP".into(), 15), ("READ".into(), 7)]));
        let since = Requests::from([("LOOKUP".into(), 15), ("READ".into(), 2)]);
        assert_eq!(asked(&all, &since), Requests::from([("READ".into(), 5)]));
    }
}
