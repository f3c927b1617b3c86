//! `doctor`: looks at what the machine gives, and says what to do about what is missing.

use nix::sys::resource::{getrlimit, Resource};
use std::fmt::Display;
use std::fs;
use std::io::{self, Write};
use std::str::FromStr;
use tunnelfs_settings::Transport;

/// How good what was found is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grade {
    /// As it should be.
    Fine,
    /// It works, and could be better.
    Advice,
    /// It does not work so.
    Problem,
}

/// One thing that was looked at.
#[derive(Clone, Debug)]
pub struct Finding {
    /// How good it is.
    pub grade: Grade,
    /// What was found.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

/// All that was looked at.
#[derive(Debug, Default)]
pub struct Report(pub Vec<Finding>);

impl Report {
    /// Adds what is as it should be.
    pub fn fine(&mut self, what: impl Display) {
        self.add(Grade::Fine, what, "");
    }

    /// Adds what could be better.
    pub fn advice(&mut self, what: impl Display, remedy: impl Display) {
        self.add(Grade::Advice, what, remedy);
    }

    /// Adds what does not work.
    pub fn problem(&mut self, what: impl Display, remedy: impl Display) {
        self.add(Grade::Problem, what, remedy);
    }

    fn add(&mut self, grade: Grade, what: impl Display, remedy: impl Display) {
        self.0.push(Finding { grade, what: what.to_string(), remedy: remedy.to_string() });
    }

    /// Prints one line for each finding, and its remedy below. Returns whether there is no problem.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn print(&self, out: &mut dyn Write) -> io::Result<bool> {
        for finding in &self.0 {
            let word = match finding.grade {
                Grade::Fine => "ok     ",
                Grade::Advice => "advice ",
                Grade::Problem => "PROBLEM",
            };
            writeln!(out, "{word}  {}", finding.what)?;
            if !finding.remedy.is_empty() {
                writeln!(out, "         -> {}", finding.remedy)?;
            }
        }
        let count = |grade| self.0.iter().filter(|finding| finding.grade == grade).count();
        let (problems, advice) = (count(Grade::Problem), count(Grade::Advice));
        writeln!(out, "{problems} problems, {advice} pieces of advice")?;
        Ok(problems == 0)
    }

    /// Looks at the kernel's version: below `needed` it is a problem, below `wanted` advice, for `why`.
    pub fn kernel(&mut self, needed: (u32, u32), wanted: (u32, u32), why: &str) {
        let release = read("/proc/sys/kernel/osrelease").unwrap_or_default();
        let what = format!("kernel {release}");
        match version(&release) {
            Some(found) if found < needed => {
                self.problem(what, format!("Linux {}.{} or newer is needed", needed.0, needed.1));
            }
            Some(found) if found < wanted => self.advice(what, format!("Linux {}.{} {why}", wanted.0, wanted.1)),
            _ => self.fine(what),
        }
    }

    /// Looks at the limit of open files; `wanted` 0: no number of them is asked for.
    pub fn open_files(&mut self, wanted: u64) {
        let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
        // SAFETY: a system call without arguments.
        let root = unsafe { libc::geteuid() } == 0;
        let what = format!("open files: at most {hard}");
        if hard >= wanted || (root && parse::<u64>("/proc/sys/fs/nr_open").is_none_or(|most| most >= wanted)) {
            return self.fine(what);
        }
        let remedy =
            format!("for {wanted} (host.rlimit_nofile): LimitNOFILE={wanted} in the unit, or ulimit -Hn as root");
        self.advice(format!("{what}; with few of them files are reopened more often"), remedy);
    }

    /// Looks whether there are huge pages for the shared memory, if it is to have them.
    pub fn huge_pages(&mut self, transport: &Transport) {
        if !transport.huge_pages {
            return;
        }
        let pages = transport.queue_count() * transport.geometry().bytes().div_ceil(2 << 20);
        let free = parse::<usize>("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
        let what = format!("huge pages of 2 MiB: {} free, {pages} needed", free.unwrap_or(0));
        if free.unwrap_or(0) < pages {
            let more = pages - free.unwrap_or(0);
            self.problem(
                what,
                format!("sysctl vm.nr_hugepages=$(($(sysctl -n vm.nr_hugepages) + {more})), or no huge_pages"),
            );
        } else {
            self.fine(what);
        }
    }
}

/// A small file's text without the end of its line.
pub fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// A small file's number.
pub fn parse<T: FromStr>(path: &str) -> Option<T> {
    read(path)?.parse().ok()
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_number() {
        assert_eq!(version("6.18.0-rc1+"), Some((6, 18)));
        assert!(version("6.9").unwrap() < version("6.14.2-amd64").unwrap());
        assert_eq!(version("x"), None);
        let mut report = Report::default();
        report.kernel((0, 1), (0, 2), "");
        report.kernel((0, 1), (9999, 0), "has more");
        report.kernel((9999, 0), (9999, 0), "");
        let grades: Vec<Grade> = report.0.iter().map(|finding| finding.grade).collect();
        assert_eq!(grades, [Grade::Fine, Grade::Advice, Grade::Problem]);
    }

    #[test]
    fn a_problem_is_told_with_its_remedy() {
        let mut report = Report::default();
        report.fine("this");
        let mut out = Vec::new();
        assert!(report.print(&mut out).unwrap());
        report.problem("that", "do so");
        assert!(!report.print(&mut out).unwrap());
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("PROBLEM  that\n         -> do so\n1 problems"), "{text}");
    }

    #[test]
    fn huge_pages_are_counted() {
        let (mut report, mut transport) = (Report::default(), Transport::default());
        report.huge_pages(&transport);
        assert!(report.0.is_empty());
        transport.huge_pages = true;
        transport.queues = 62;
        transport.slots = 16384;
        transport.entries = 16384;
        report.huge_pages(&transport);
        assert!(report.0[0].grade == Grade::Problem && report.0[0].remedy.contains("vm.nr_hugepages"));
    }
}
