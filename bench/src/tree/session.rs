//! One system's turn: mounted afresh as often as a job wants it, and what the jobs came to.

use crate::mount::requests::{asked, Requests};
use crate::mount::systems::{Setup, System};
use crate::mount::turn::{used, Cpu};
use crate::mount::Peer;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What serves the files.
#[derive(Clone, Debug)]
pub struct Served {
    /// In reports.
    pub name: String,
    /// `native`, `ring`, `virtiofsd`, or a peer.
    pub kind: Kind,
    /// What the kernel may keep, empty where it is not ours to say.
    pub cache: String,
}

/// How it is started.
#[derive(Clone, Debug)]
pub enum Kind {
    /// Ours, virtiofsd or none, by [`Setup::system`]'s word.
    Own(&'static str),
    /// Another FUSE program.
    Peer(Peer),
}

/// One job's outcome.
#[derive(Clone, Debug)]
pub struct Done {
    /// The job.
    pub op: &'static str,
    /// Files of its tree.
    pub files: usize,
    /// How long it took.
    pub seconds: f64,
    /// What the kernel asked, where it is counted.
    pub requests: Option<Requests>,
    /// Of the file system's processes.
    pub cpu: Cpu,
}

/// A system while a group of jobs runs on it.
pub struct Session<'a> {
    setup: &'a Setup<'a>,
    served: &'a Served,
    system: Option<System>,
    /// What has been done.
    pub done: Vec<Done>,
}

impl<'a> Session<'a> {
    /// Mounts it over an empty directory of its own.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(setup: &'a Setup<'a>, served: &'a Served) -> io::Result<Session<'a>> {
        let mut session = Session { setup, served, system: None, done: Vec::new() };
        fs::create_dir_all(session.natively())?;
        session.afresh()?;
        Ok(session)
    }

    /// The directory without a mount in between.
    pub fn natively(&self) -> PathBuf {
        self.setup.source.join(&self.served.name)
    }

    /// Mounts it once more: its kernel and its processes know nothing.
    ///
    /// # Errors
    /// When it does not go, or come up.
    pub fn afresh(&mut self) -> io::Result<()> {
        if let Some(system) = self.system.take() {
            system.stop()?;
        }
        self.system = Some(match &self.served.kind {
            Kind::Own(kind) => self.setup.system(kind, &self.served.name)?,
            Kind::Peer(peer) => self.setup.peer(peer)?,
        });
        Ok(())
    }

    /// Does something on the mount that is not measured.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn prepare(&mut self, work: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
        work(&self.mounted()?.dir)
    }

    /// Runs a job on the mount.
    ///
    /// # Errors
    /// The job's; names it.
    pub fn measure(
        &mut self,
        op: &'static str,
        files: usize,
        work: impl FnOnce(&Path) -> io::Result<()>,
    ) -> io::Result<()> {
        crate::interrupt::check()?;
        let system = self.mounted()?;
        let (asked_before, cpu_before, start) = (system.requests()?, system.cpu(), Instant::now());
        work(&system.dir).map_err(|e| io::Error::new(e.kind(), format!("{op}: {e}")))?;
        let (seconds, cpu) = (start.elapsed().as_secs_f64(), used(system.cpu(), cpu_before));
        let requests = system.requests()?.zip(asked_before).map(|(now, since)| asked(&now, &since));
        self.done.push(Done { op, files, seconds, requests, cpu });
        Ok(())
    }

    fn mounted(&self) -> io::Result<&System> {
        self.system.as_ref().ok_or_else(|| io::Error::other("not mounted"))
    }

    /// Unmounts it and removes its files; what has been done.
    ///
    /// # Errors
    /// When it does not go.
    pub fn finish(mut self) -> io::Result<Vec<Done>> {
        let natively = self.natively();
        if let Some(system) = self.system.take() {
            system.stop()?;
        }
        fs::remove_dir_all(natively)?;
        Ok(std::mem::take(&mut self.done))
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        // Of a job that failed: unmount before the files go.
        self.system = None;
        let _ = fs::remove_dir_all(self.natively());
    }
}
