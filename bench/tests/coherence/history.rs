//! What the share was like when: each read of the guest must have been right at some time between a bound before its
//! start, and its end.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// What a file is, as stat(2) has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stat {
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

impl<V> Lives<V> {
    /// The values that were there between two instants, and how long before that each had ended.
    fn between(&self, from: Instant, to: Instant) -> impl Iterator<Item = (&V, Duration)> {
        let lives = self.0.iter().enumerate().filter(move |(_, life)| life.begun <= to);
        // It may have lasted until the next one was there.
        let age = move |next: Option<&Life<V>>| {
            next.map_or(Duration::ZERO, |next| from.saturating_duration_since(next.there))
        };
        lives.map(move |(i, life)| (&life.value, age(self.0.get(i + 1))))
    }
}

impl<V: PartialEq> Lives<V> {
    /// How old a value is that was read between two instants.
    fn judge(&self, value: &V, from: Instant, to: Instant) -> Verdict {
        let ages = self.between(from, to).filter(|(of_life, _)| *of_life == value).map(|(_, age)| age);
        ages.min().map_or(Verdict::Wrong, Verdict::of)
    }
}

impl Lives<Vec<u8>> {
    /// The same for content, which is not read at once: its length is that of one value, each of its bytes too.
    fn judge_bytes(&self, content: &[u8], from: Instant, to: Instant) -> Verdict {
        let mut ages: Vec<_> = self.between(from, to).map(|(_, age)| age).collect();
        ages.sort_unstable();
        let explained = |most: Duration| {
            let values: Vec<_> =
                self.between(from, to).filter(|(_, age)| *age <= most).map(|(value, _)| value.as_slice()).collect();
            // Behind the end of a file that grows there are zeros.
            let byte = |at: usize| values.iter().any(|value| value.get(at).copied().unwrap_or(0) == content[at]);
            values.iter().any(|value| value.len() == content.len()) && (0..content.len()).all(byte)
        };
        ages.into_iter().find(|age| explained(*age)).map_or(Verdict::Wrong, Verdict::of)
    }
}

impl Verdict {
    fn of(age: Duration) -> Verdict {
        if age.is_zero() {
            Verdict::Current
        } else {
            Verdict::Stale(age)
        }
    }
}

/// The history of a share with a few names: name to file (0: none), file to attributes and to content.
///
/// A stat is a look-up and a look at what it found, an open and a read too: between the two the name may be another's, as
/// in any file system.
#[derive(Default)]
pub struct History {
    names: HashMap<String, Lives<u64>>,
    stats: HashMap<u64, Lives<Stat>>,
    contents: HashMap<u64, Lives<Vec<u8>>>,
}

fn add<K: Hash + Eq + Clone, V: PartialEq>(all: &mut HashMap<K, Lives<V>>, key: &K, value: V, at: (Instant, Instant)) {
    let lives = &mut all.entry(key.clone()).or_insert_with(|| Lives(Vec::new())).0;
    if lives.last().is_none_or(|last| last.value != value) {
        lives.push(Life { begun: at.0, there: at.1, value });
    }
}

impl History {
    /// The names, and the files that they stand for, after a change that took place between two instants. A file that
    /// has no name any more has no links.
    pub fn names(&mut self, names: &[(String, u64, Stat)], at: (Instant, Instant)) {
        for (name, file, stat) in names {
            add(&mut self.names, name, *file, at);
            if *file != 0 {
                add(&mut self.stats, file, *stat, at);
            }
        }
        for (file, lives) in &mut self.stats {
            let last = lives.0.last().map_or(Stat::default(), |life| life.value);
            if last.links > 0 && names.iter().all(|(_, of_name, _)| of_name != file) {
                lives.0.push(Life { begun: at.0, there: at.1, value: Stat { links: 0, ..last } });
            }
        }
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
        self.names.values_mut().for_each(|lives| cut(lives, until));
        let gone = |lives: &Lives<Stat>| lives.0.last().is_some_and(|life| life.value.links == 0 && life.there < until);
        let contents = &mut self.contents;
        self.stats.retain(|file, lives| {
            let keep = !gone(lives);
            if !keep {
                contents.remove(file);
            }
            keep
        });
        self.stats.values_mut().for_each(|lives| cut(lives, until));
        self.contents.values_mut().for_each(|lives| cut(lives, until));
    }

    /// Whether a stat of a name is explained; `None`: there was no such name.
    pub fn judge_stat(&self, name: &str, stat: Option<Stat>, from: Instant, to: Instant) -> Verdict {
        match stat {
            Some(stat) => self.judge(name, from, to, |file| Some(self.stats.get(&file)?.judge(&stat, from, to))),
            None => self.names.get(name).map_or(Verdict::Wrong, |lives| lives.judge(&0, from, to)),
        }
    }

    /// Whether what was read after an open is explained.
    pub fn judge_content(&self, name: &str, content: &[u8], from: Instant, to: Instant) -> Verdict {
        self.judge(name, from, to, |file| Some(self.contents.get(&file)?.judge_bytes(content, from, to)))
    }

    /// The best explanation by a file that the name stood for: the worse of both parts.
    fn judge(&self, name: &str, from: Instant, to: Instant, of: impl Fn(u64) -> Option<Verdict>) -> Verdict {
        let Some(names) = self.names.get(name) else { return Verdict::Wrong };
        let mut files: Vec<u64> = names.0.iter().map(|life| life.value).collect();
        files.sort_unstable();
        files.dedup();
        let both = files.into_iter().filter_map(|file| Some(worse(names.judge(&file, from, to), of(file)?)));
        both.fold(Verdict::Wrong, better)
    }

    /// For people, when something is wrong.
    pub fn tell(&self, name: &str, origin: Instant) -> String {
        let at = |instant: Instant| instant.saturating_duration_since(origin).as_micros();
        let mut text = String::new();
        for life in self.names.get(name).iter().flat_map(|lives| lives.0.iter().rev().take(6)) {
            text += &format!("{}..{} us: file {}\n", at(life.begun), at(life.there), life.value);
            for stat in self.stats.get(&life.value).iter().flat_map(|lives| lives.0.iter().rev().take(6)) {
                text += &format!("    {}..{} us: {:?}\n", at(stat.begun), at(stat.there), stat.value);
            }
            for content in self.contents.get(&life.value).iter().flat_map(|lives| lives.0.iter().rev().take(6)) {
                let (begun, there) = (at(content.begun), at(content.there));
                text += &format!("    {begun}..{there} us: {}\n", content.value.escape_ascii());
            }
        }
        text
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
    let stat = |size| Stat { links: 1, size, mode: 0o600 };
    let mut history = History::default();
    history.names(&[("a".into(), 7, stat(1))], (at(0), at(1)));
    history.content(7, b"x", (at(0), at(1)));
    history.names(&[("a".into(), 8, stat(2))], (at(10), at(12)));
    history.content(8, b"yy", (at(10), at(12)));
    let judge = |size, from, to| history.judge_stat("a", Some(stat(size)), at(from), at(to));
    assert_eq!(judge(1, 5, 6), Verdict::Current);
    assert_eq!(judge(1, 11, 20), Verdict::Current, "the change was under way");
    assert_eq!(judge(1, 15, 20), Verdict::Stale(Duration::from_millis(3)));
    assert_eq!(judge(2, 5, 9), Verdict::Wrong, "it was not there yet");
    assert_eq!(judge(3, 15, 20), Verdict::Wrong);
    assert_eq!(history.judge_stat("a", None, at(5), at(20)), Verdict::Wrong);
    let unlinked = Stat { links: 0, ..stat(1) };
    assert_eq!(history.judge_stat("a", Some(unlinked), at(5), at(20)), Verdict::Current, "found, then replaced");
    assert_eq!(history.judge_stat("a", Some(unlinked), at(5), at(9)), Verdict::Wrong);
    let content = |bytes: &[u8], from, to| history.judge_content("a", bytes, at(from), at(to));
    assert_eq!(content(b"yy", 15, 20), Verdict::Current);
    assert_eq!(content(b"x", 15, 20), Verdict::Stale(Duration::from_millis(3)));
    assert_eq!(content(b"xy", 15, 20), Verdict::Wrong);
    history.content(8, b"zzzz", (at(30), at(40)));
    let content = |bytes: &[u8], from, to| history.judge_content("a", bytes, at(from), at(to));
    assert_eq!(content(b"zy", 31, 35), Verdict::Current, "read while it was written");
    assert_eq!(content(b"zzy", 31, 35), Verdict::Wrong, "no length that it had");
    assert_eq!(content(b"zy", 43, 45), Verdict::Stale(Duration::from_millis(3)));
    history.forget_before(at(14));
    assert_eq!(history.judge_stat("a", Some(stat(1)), at(5), at(6)), Verdict::Wrong);
    assert_eq!(history.judge_stat("a", Some(stat(2)), at(15), at(20)), Verdict::Current);
}
