//! Workloads: which loads, with which pauses, and what share of the time each has.

use crate::plan::Op;
use crate::record::FORMAT;
use crate::workload::FILE_BYTES;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;

/// One load of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// The operation.
    pub op: Op,
    /// Payload bytes of one.
    pub size: u32,
    /// Requests in flight, over all threads.
    pub depth: u32,
    /// Threads that ask.
    pub threads: u32,
    /// Microseconds between an answer and the next request.
    pub pause_us: u32,
    /// How much it counts.
    pub share: f64,
}

/// A workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mix {
    /// The version of the file.
    pub format: u32,
    /// `workload`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// What it consists of; no names of files, and no data.
    pub parts: Vec<Part>,
}

/// The built-in ones, with what they stand for.
pub const BUILT_IN: [(&str, &str); 4] = [
    ("mixed", "names, attributes, small and large data, one and several at a time"),
    ("small", "4 KiB reads and writes, names and attributes, one at a time"),
    ("large", "1 MiB reads and writes"),
    ("parallel", "4 KiB reads and writes, many at a time, a thread on each CPU"),
];

impl Mix {
    /// Of these parts.
    pub fn new(name: &str, parts: Vec<Part>) -> Mix {
        Mix { format: FORMAT, kind: "workload".into(), name: name.into(), parts }
    }

    /// A built-in one by name, for so many CPUs.
    pub fn built_in(name: &str, cpus: u32) -> Option<Mix> {
        let part = |op, size, depth, share| Part { op, size, depth, threads: 1, pause_us: 0, share };
        let wide = |op, depth, share| Part { threads: cpus, depth: depth * cpus, ..part(op, 4096, depth, share) };
        let small = [
            part(Op::Lookup, 0, 1, 1.0),
            part(Op::Getattr, 0, 1, 1.0),
            part(Op::Read, 4096, 1, 2.0),
            part(Op::Write, 4096, 1, 1.0),
        ];
        let large = [part(Op::Read, 1 << 20, 4, 1.0), part(Op::Write, 1 << 20, 4, 1.0)];
        let parallel = [wide(Op::Read, 8, 1.0), wide(Op::Write, 8, 1.0)];
        let pause = Part { pause_us: 300, ..part(Op::Read, 4096, 1, 1.0) };
        let parts: Vec<Part> = match name {
            "mixed" => small.into_iter().chain(large).chain([parallel[0], pause]).collect(),
            "small" => small.into(),
            "large" => large.into(),
            "parallel" => parallel.into(),
            _ => return None,
        };
        Some(Mix::new(name, parts))
    }

    /// A built-in one, or a file of `tunnelfs-bench record`.
    ///
    /// # Errors
    /// What is wrong with the name or the file.
    pub fn find(text: &str, cpus: u32) -> io::Result<Mix> {
        if let Some(mix) = Mix::built_in(text, cpus) {
            return Ok(mix);
        }
        let told = |e: &dyn std::fmt::Display| io::Error::other(format!("--workload {text}: {e}"));
        if !Path::new(text).exists() {
            let names = BUILT_IN.map(|(name, _)| name).join(", ");
            return Err(told(&format!("neither a file of `tunnelfs-bench record` nor built in ({names})")));
        }
        let bytes = std::fs::read(text).map_err(|e| told(&e))?;
        Mix::parse(&bytes).map_err(|e| told(&e))
    }

    /// Of a file's bytes.
    ///
    /// # Errors
    /// The reason in words.
    pub fn parse(bytes: &[u8]) -> Result<Mix, String> {
        let mix: Mix =
            serde_json::from_slice(bytes).map_err(|e| format!("not a workload of `tunnelfs-bench record`: {e}"))?;
        if mix.kind != "workload" || mix.format > FORMAT {
            return Err(format!("kind `{}`, format {}: not a workload that this version reads", mix.kind, mix.format));
        }
        let fits = |p: &Part| {
            let data = matches!(p.op, Op::Read | Op::Write);
            (1..=4096).contains(&p.depth)
                && (1..=62).contains(&p.threads)
                && p.pause_us <= 1_000_000
                && p.share.is_finite()
                && p.share > 0.0
                && (!data || (8..=FILE_BYTES as u32 / 4).contains(&p.size) && p.size % 8 == 0)
                && (data || p.size == 0)
        };
        match mix.parts.iter().find(|p| !fits(p)) {
            Some(part) => Err(format!("a part that cannot be: {part:?}")),
            None if mix.parts.is_empty() => Err("a workload without parts".into()),
            None => Ok(mix),
        }
    }

    /// The largest payload.
    pub fn largest(&self) -> u32 {
        self.parts.iter().map(|p| p.size).max().unwrap_or(0)
    }

    /// The most threads.
    pub fn threads(&self) -> u32 {
        self.parts.iter().map(|p| p.threads).max().unwrap_or(1)
    }

    /// The sum of the shares.
    pub fn shares(&self) -> f64 {
        self.parts.iter().map(|p| p.share).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_are_read_back_and_checked() {
        for (name, _) in BUILT_IN {
            let mix = Mix::built_in(name, 2).expect("built in");
            let text = serde_json::to_vec(&mix).expect("JSON");
            assert_eq!(Mix::parse(&text), Ok(mix));
        }
        let mut mix = Mix::built_in("small", 2).expect("built in");
        mix.parts[0].depth = 0;
        let text = serde_json::to_vec(&mix).expect("JSON");
        assert!(Mix::parse(&text).is_err_and(|e| e.contains("cannot be")));
        assert!(Mix::parse(b"{}").is_err_and(|e| e.contains("not a workload")));
        let missing = Mix::find("/nowhere/at-all", 2).expect_err("no such file");
        assert!(missing.to_string().contains("built in (mixed"), "{missing}");
    }
}
