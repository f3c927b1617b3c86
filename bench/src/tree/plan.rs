//! Which trees are worked on, and how often.

use crate::mount::Peer;
use std::path::PathBuf;

/// What is to be compared.
#[derive(Clone, Debug)]
pub struct TreePlan {
    /// Rounds of all jobs on all systems.
    pub rounds: usize,
    /// Files of the tree that is unpacked, listed, searched and removed.
    pub files: usize,
    /// Files of the tree that git works on.
    pub git_files: usize,
    /// C files of the build.
    pub c_files: usize,
    /// Packages of the tree of tiny files.
    pub packages: usize,
    /// Jobs by name; none: all.
    pub jobs: Vec<String>,
    /// Systems by name; none: all.
    pub systems: Vec<String>,
    /// Other FUSE programs.
    pub peers: Vec<Peer>,
    /// Where the files come from; `None`: the sources of this workspace's dependencies.
    pub source: Option<PathBuf>,
}

impl TreePlan {
    /// The planned run, about a quarter of an hour; `quick` takes about two minutes.
    pub fn new(quick: bool) -> Self {
        let (rounds, files, git_files, c_files, packages) =
            if quick { (1, 300, 500, 12, 40) } else { (3, 3000, 10_000, 80, 400) };
        TreePlan {
            rounds,
            files,
            git_files,
            c_files,
            packages,
            jobs: Vec::new(),
            systems: Vec::new(),
            peers: Vec::new(),
            source: None,
        }
    }
}
