//! Which jobs run on which mounts, and how long.

use std::str::FromStr;
use std::time::Duration;

/// What is to be compared, and how long.
#[derive(Clone, Debug)]
pub struct MountPlan {
    /// Rounds of all jobs on all systems.
    pub rounds: usize,
    /// Length of a timed job.
    pub runtime: Duration,
    /// Bytes of each file.
    pub file_bytes: u64,
    /// Files of the metadata jobs.
    pub files: usize,
    /// Jobs by name; none: all.
    pub jobs: Vec<String>,
    /// Systems by name; none: all.
    pub systems: Vec<String>,
    /// Other FUSE programs.
    pub peers: Vec<Peer>,
}

impl MountPlan {
    /// The planned run; `quick` takes about a minute and a half.
    pub fn new(quick: bool) -> Self {
        let (rounds, runtime_ms, files) = if quick { (1, 400, 1000) } else { (5, 1000, 10_000) };
        MountPlan {
            rounds,
            runtime: Duration::from_millis(runtime_ms),
            file_bytes: 256 << 20,
            files,
            jobs: Vec::new(),
            systems: Vec::new(),
            peers: Vec::new(),
        }
    }

    /// Whether a list by name has this one, or is empty.
    pub(crate) fn wants(list: &[String], name: &str) -> bool {
        list.is_empty() || list.iter().any(|n| n == name)
    }
}

/// Another FUSE program: `NAME=COMMAND` with `{src}` and `{mnt}` in the command, which stays in the foreground.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub(crate) name: String,
    pub(super) command: String,
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, command) = text.split_once('=').filter(|(name, _)| !name.is_empty()).unwrap_or_default();
        if command.contains("{src}") && command.contains("{mnt}") {
            return Ok(Peer { name: name.into(), command: command.into() });
        }
        Err("must be NAME=COMMAND, with {src} and {mnt} in the command".into())
    }
}
