//! What the share was like when: each read of the guest must have been right at some time between a bound before its
//! start, and its end.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// What a name stands for, as stat(2) has it: which file (0: none), links, size and mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    pub exists: bool,
    pub links: u64,
    pub size: u64,
    pub mode: u32,
}

/// One value's life: it began between the first two instants.
#[derive(Clone, Debug)]
struct Life<V> {
    begun: Instant,
    there: Instant,
    value: V,
}

/// The lives of one thing's values, in order; the last one lasts.
#[derive(Debug)]
struct Lives<V>(Vec<Life<V>>);

/// How a read is explained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// By a state while it took place.
    Current,
    /// By one that had ended so long before its start.
    Stale(Duration),
    /// By none.
    Wrong,
}

impl<V: PartialEq> Lives<V> {
    /// How old a value is that was read between two instants.
    fn judge(&self, value: &V, from: Instant, to: Instant) -> Verdict {
        let mut best = Verdict::Wrong;
        for (i, life) in self.0.iter().enumerate().rev() {
            if life.value != *value || life.begun > to {
                continue;
            }
            // It may have lasted until the next one was there.
            match self.0.get(i + 1).map(|next| from.saturating_duration_since(next.there)) {
                None | Some(Duration::ZERO) => return Verdict::Current,
                Some(age) if best == Verdict::Wrong => best = Verdict::Stale(age),
                Some(_) => {}
            }
        }
        best
    }
}

/// The history of a share with a few names: name to state, name to file, file to content.
#[derive(Default)]
pub struct History {
    stats: HashMap<String, Lives<Stat>>,
    files: HashMap<String, Lives<u64>>,
    contents: HashMap<u64, Lives<Vec<u8>>>,
}

fn add<K: Hash + Eq + Clone, V: PartialEq>(all: &mut HashMap<K, Lives<V>>, key: &K, value: V, at: (Instant, Instant)) {
    let lives = &mut all.entry(key.clone()).or_insert_with(|| Lives(Vec::new())).0;
    if lives.last().is_none_or(|last| last.value != value) {
        lives.push(Life { begun: at.0, there: at.1, value });
    }
}

impl History {
    /// What a name is from a change on that took place between two instants.
    pub fn name(&mut self, name: &str, stat: Stat, file: u64, at: (Instant, Instant)) {
        add(&mut self.stats, &name.to_owned(), stat, at);
        add(&mut self.files, &name.to_owned(), file, at);
    }

    /// What a file has in it from then on.
    pub fn content(&mut self, file: u64, content: &[u8], at: (Instant, Instant)) {
        add(&mut self.contents, &file, content.to_vec(), at);
    }

    /// Drops what had ended before an instant.
    pub fn forget_before(&mut self, until: Instant) {
        fn cut<V>(lives: &mut Lives<V>, until: Instant) {
            let keep = lives.0.iter().rposition(|life| life.there < until).unwrap_or(0);
            lives.0.drain(..keep);
        }
        self.stats.values_mut().for_each(|lives| cut(lives, until));
        self.files.values_mut().for_each(|lives| cut(lives, until));
        self.contents.values_mut().for_each(|lives| cut(lives, until));
    }

    /// Whether a stat of a name is explained.
    pub fn judge_stat(&self, name: &str, stat: Stat, from: Instant, to: Instant) -> Verdict {
        self.stats.get(name).map_or(Verdict::Wrong, |lives| lives.judge(&stat, from, to))
    }

    /// Whether what was read after an open is explained: a file that the name stood for had it. The worse of both.
    pub fn judge_content(&self, name: &str, content: &[u8], from: Instant, to: Instant) -> Verdict {
        let Some(names) = self.files.get(name) else { return Verdict::Wrong };
        let mut files: Vec<u64> = names.0.iter().map(|life| life.value).collect();
        files.sort_unstable();
        files.dedup();
        let both = files.into_iter().filter_map(|file| {
            let of_content = self.contents.get(&file)?.judge(&content.to_vec(), from, to);
            Some(worse(names.judge(&file, from, to), of_content))
        });
        both.fold(Verdict::Wrong, better)
    }

    /// For people, when something is wrong.
    pub fn tell(&self, name: &str, origin: Instant) -> String {
        let at = |instant: Instant| instant.saturating_duration_since(origin).as_micros();
        let lives = self.stats.get(name).map_or(&[][..], |lives| &lives.0);
        let lines = lives.iter().rev().take(8).map(|l| format!("{}..{} us: {:?}", at(l.begun), at(l.there), l.value));
        lines.collect::<Vec<_>>().join("\n")
    }
}

fn rank(verdict: Verdict) -> Duration {
    match verdict {
        Verdict::Current => Duration::ZERO,
        Verdict::Stale(age) => age,
        Verdict::Wrong => Duration::MAX,
    }
}

fn worse(a: Verdict, b: Verdict) -> Verdict {
    if rank(a) >= rank(b) {
        a
    } else {
        b
    }
}

fn better(a: Verdict, b: Verdict) -> Verdict {
    if rank(a) <= rank(b) {
        a
    } else {
        b
    }
}

#[test]
fn the_checker_tells_right_from_stale_and_wrong() {
    let origin = Instant::now();
    let at = |ms| origin + Duration::from_millis(ms);
    let size = |size| Stat { exists: true, links: 1, size, mode: 0o600 };
    let mut history = History::default();
    history.name("a", size(1), 7, (at(0), at(1)));
    history.content(7, b"x", (at(0), at(1)));
    history.name("a", size(2), 8, (at(10), at(12)));
    history.content(8, b"yy", (at(10), at(12)));
    let judge = |value, from, to| history.judge_stat("a", size(value), at(from), at(to));
    assert_eq!(judge(1, 5, 6), Verdict::Current);
    assert_eq!(judge(1, 11, 20), Verdict::Current, "the change was under way");
    assert_eq!(judge(1, 15, 20), Verdict::Stale(Duration::from_millis(3)));
    assert_eq!(judge(2, 5, 9), Verdict::Wrong, "it was not there yet");
    assert_eq!(judge(3, 15, 20), Verdict::Wrong);
    let content = |bytes: &[u8], from, to| history.judge_content("a", bytes, at(from), at(to));
    assert_eq!(content(b"yy", 15, 20), Verdict::Current);
    assert_eq!(content(b"x", 15, 20), Verdict::Stale(Duration::from_millis(3)));
    assert_eq!(content(b"xy", 15, 20), Verdict::Wrong);
    history.forget_before(at(14));
    assert_eq!(history.judge_stat("a", size(1), at(5), at(6)), Verdict::Wrong);
    assert_eq!(history.judge_stat("a", size(2), at(15), at(20)), Verdict::Current);
}
