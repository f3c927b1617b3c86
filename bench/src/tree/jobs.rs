//! The jobs: ordinary programs on trees of files. "First" is on a fresh mount, whose kernel knows nothing yet; "again"
//! is the same once more on the same mount, and "third" once more after that: a READ has the kernel ask once for the time
//! of access, so only then nothing is left to ask.

use super::made;
use super::session::Session;
use super::source::{self, Source};
use super::TreePlan;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Groups of jobs that work on the same tree, with their jobs' names.
pub const GROUPS: [(&str, &[&str]); 4] = [
    ("files", &["untar", "find", "find-again", "find-third", "grep", "grep-again", "grep-third", "rm"]),
    ("packages", &["install"]),
    ("build", &["build", "build-again"]),
    ("git", &["git-add", "git-status", "git-status-again"]),
];

/// The trees, made once and natively.
pub struct Trees {
    archive: PathBuf,
    files: usize,
    git: PathBuf,
    git_files: usize,
    program: PathBuf,
    c_files: usize,
    packages: usize,
}

impl Trees {
    /// Makes them in `scratch`.
    ///
    /// # Errors
    /// When files are missing, or a program that is needed.
    pub fn make(plan: &TreePlan, scratch: &Path) -> io::Result<Trees> {
        let directories = plan.source.clone().map_or_else(source::dependencies, |dir| Ok(vec![dir]))?;
        let all = source::collect(&directories, plan.files.max(plan.git_files))?;
        let part = |most: usize| -> &[Source] { &all[..most.min(all.len())] };
        let (files, git_files) = (part(plan.files), part(plan.git_files));
        let (plain, archive) = (scratch.join("plain"), scratch.join("files.tar"));
        source::lay(files, &plain.join("t"))?;
        run(command("tar", &scratch.join("plain")).arg("cf").arg(&archive).arg("t"))?;
        fs::remove_dir_all(&plain)?;
        let (git, program) = (scratch.join("git-tree"), scratch.join("c-tree"));
        source::lay(git_files, &git)?;
        let c_files = made::c_program(&program, plan.c_files)?;
        Ok(Trees {
            archive,
            files: files.len(),
            git,
            git_files: git_files.len(),
            program,
            c_files,
            packages: plan.packages,
        })
    }

    /// For the report.
    pub fn describe(&self) -> String {
        format!(
            "{} files; {} for git; {} for the build; {} of packages",
            self.files,
            self.git_files,
            self.c_files,
            made::package_files(self.packages)
        )
    }

    /// Runs a group on one system, from and to an empty directory.
    ///
    /// # Errors
    /// The first job's that fails; names it.
    pub fn run(&self, group: &str, session: &mut Session<'_>) -> io::Result<()> {
        match group {
            "files" => self.on_files(session),
            "packages" => {
                session.measure("install", made::package_files(self.packages), |dir| made::packages(dir, self.packages))
            }
            "build" => self.on_program(session),
            _ => self.on_git(session),
        }
    }

    fn on_files(&self, session: &mut Session<'_>) -> io::Result<()> {
        session.measure("untar", self.files, |dir| run(command("tar", dir).arg("xf").arg(&self.archive)))?;
        session.afresh()?;
        let find = |dir: &Path| run(command("find", dir).args(["t", "-printf", "%s\n"]));
        session.measure("find", self.files, find)?;
        session.measure("find-again", self.files, find)?;
        session.measure("find-third", self.files, find)?;
        session.afresh()?;
        let grep = |dir: &Path| run_for(command("grep", dir).args(["-r", "a word that no file has", "t"]), &[0, 1]);
        session.measure("grep", self.files, grep)?;
        session.measure("grep-again", self.files, grep)?;
        session.measure("grep-third", self.files, grep)?;
        session.measure("rm", self.files, |dir| run(command("rm", dir).args(["-r", "t"])))
    }

    fn on_program(&self, session: &mut Session<'_>) -> io::Result<()> {
        source::link(&self.program, &session.natively())?;
        let build = |dir: &Path| run(command("sh", dir).arg("build.sh"));
        session.measure("build", self.c_files, build)?;
        session.measure("build-again", self.c_files, build)
    }

    fn on_git(&self, session: &mut Session<'_>) -> io::Result<()> {
        source::link(&self.git, &session.natively())?;
        session.prepare(|dir| run(git(dir).args(["init", "-q"])))?;
        session.measure("git-add", self.git_files, |dir| run(git(dir).args(["add", "-A"])))?;
        session.afresh()?;
        let status = |dir: &Path| run(git(dir).args(["status", "--short"]));
        session.measure("git-status", self.git_files, status)?;
        session.measure("git-status-again", self.git_files, status)
    }
}

fn command(program: &str, dir: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(dir).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// git without anybody's own settings.
fn git(dir: &Path) -> Command {
    let mut git = command("git", dir);
    git.env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null");
    git.args([
        "-c",
        "safe.directory=*",
        "-c",
        "gc.auto=0",
        "-c",
        "core.autocrlf=false",
        "-c",
        "advice.addEmbeddedRepo=false",
    ]);
    git
}

fn run(command: &mut Command) -> io::Result<()> {
    run_for(command, &[0])
}

fn run_for(command: &mut Command, fine: &[i32]) -> io::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let out = command.stderr(Stdio::piped()).output();
    let out = out.map_err(|e| io::Error::new(e.kind(), format!("{program}: {e}")))?;
    if out.status.code().is_some_and(|code| fine.contains(&code)) {
        return Ok(());
    }
    let told = String::from_utf8_lossy(&out.stderr);
    Err(io::Error::other(format!("{program}: {}: {}", out.status, told.lines().next().unwrap_or_default())))
}
