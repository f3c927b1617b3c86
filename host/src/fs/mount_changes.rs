//! Mounts that come and go below the shared directory, of which fanotify tells nothing.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd};

/// `/proc/self/mountinfo`: poll(2) says `POLLPRI` when a mount has come or gone anywhere.
#[derive(Debug)]
pub struct MountChanges {
    file: File,
    /// The shared directory's path, as the file has it.
    under: String,
    known: Vec<String>,
}

impl AsFd for MountChanges {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl MountChanges {
    /// `file`: opened for this alone.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn new(file: File, under: &str) -> io::Result<MountChanges> {
        let mut changes = MountChanges { file, under: escaped(under.trim_end_matches('/')), known: Vec::new() };
        changes.known = changes.read()?;
        Ok(changes)
    }

    fn read(&mut self) -> io::Result<Vec<String>> {
        let mut text = String::new();
        self.file.rewind()?;
        self.file.read_to_string(&mut text)?;
        Ok(text.lines().filter_map(|line| below(line, &self.under)).collect())
    }

    /// Whether there are others below the shared directory than at the last look.
    pub fn have_come(&mut self) -> bool {
        let now = self.read().unwrap_or_default();
        let others = now != self.known;
        self.known = now;
        others
    }
}

/// A path, as the file has it.
fn escaped(path: &str) -> String {
    path.replace('\\', r"\134").replace(' ', r"\040").replace('\t', r"\011").replace('\n', r"\012")
}

/// A mount below a directory: its number and its place.
fn below(line: &str, directory: &str) -> Option<String> {
    let mut fields = line.split(' ');
    let (number, place) = (fields.next()?, fields.nth(3)?);
    place.strip_prefix(directory).filter(|rest| rest.starts_with('/')).map(|rest| format!("{number} {rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_below_the_directory_count() {
        let line = |place: &str| format!("36 35 98:0 /mnt1 {place} rw,noatime shared:1 - ext4 /dev/root rw");
        assert_eq!(below(&line("/srv/data/sub"), "/srv/data").as_deref(), Some("36 /sub"));
        assert_eq!(below(&line("/sub"), "").as_deref(), Some("36 /sub"));
        for other in ["/srv/data", "/srv/database", "/srv"] {
            assert_eq!(below(&line(other), "/srv/data"), None);
        }
        assert_eq!(escaped("/a b\\"), r"/a\040b\134");
    }
}
