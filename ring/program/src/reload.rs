//! Reading the settings file again while the program runs.

use crate::log::{Control, VARIABLE};
use nix::errno::Errno;
use nix::fcntl::{openat2, OFlag, OpenHow, ResolveFlag};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use tunnelfs_settings::{changed_keys, Loader, Settings, SYSTEM_FILE};

/// A settings file, to be read again.
#[derive(Debug)]
pub struct SettingsFile {
    path: PathBuf,
    place: Place,
}

/// Where the file is read again.
#[derive(Debug)]
enum Place {
    /// At its path.
    Path,
    /// By its name in a private view of its directory, from which no path leads out. Another file in its place is seen.
    Directory(OwnedFd, PathBuf),
    /// The file itself: another file in its place is not seen.
    File(File),
}

impl SettingsFile {
    /// The file that [`Loader::new`] reads for `named`; `None`: there is none. It is read at its path.
    pub fn new(named: Option<&Path>) -> Option<Self> {
        let path = named.unwrap_or(Path::new(SYSTEM_FILE));
        let path = std::path::absolute(path).ok().filter(|path| named.is_some() || path.exists())?;
        Some(SettingsFile { path, place: Place::Path })
    }

    /// As [`Self::new`], for a process that goes into a sandbox: what it takes to read the file is opened now. It leads
    /// to no other directory.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn before_sandbox(named: Option<&Path>) -> io::Result<Option<Self>> {
        let Some(SettingsFile { path, .. }) = Self::new(named) else { return Ok(None) };
        let path = path.canonicalize()?;
        let directory = path.parent().zip(path.file_name()).map(|(dir, name)| (view_of(dir), PathBuf::from(name)));
        let place = match directory {
            Some((Ok(dir), name)) => Place::Directory(dir, name),
            _ => Place::File(File::open(&path)?),
        };
        Ok(Some(SettingsFile { path, place }))
    }

    /// Reads the file.
    ///
    /// # Errors
    /// The system's.
    fn read(&self) -> io::Result<String> {
        let mut text = String::new();
        match &self.place {
            Place::Path => File::open(&self.path)?.read_to_string(&mut text)?,
            Place::Directory(dir, name) => {
                let how =
                    OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_BENEATH);
                let fd = openat2(dir, name, how)?;
                File::from(fd).read_to_string(&mut text)?
            }
            Place::File(file) => {
                let mut file = file;
                file.rewind()?;
                file.read_to_string(&mut text)?
            }
        };
        Ok(text)
    }
}

/// A read-only mount of a directory alone, that is nowhere to be seen: its `..` is itself.
fn view_of(dir: &Path) -> io::Result<OwnedFd> {
    let path = std::ffi::CString::new(dir.as_os_str().as_encoded_bytes())?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: a path that ends with a NUL.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let fd = Errno::result(fd)? as i32;
    // SAFETY: a new descriptor that nobody else has.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero bytes are a valid `mount_attr`.
    let mut read_only = unsafe { std::mem::zeroed::<libc::mount_attr>() };
    read_only.attr_set = libc::MOUNT_ATTR_RDONLY;
    let (size, at) = (size_of_val(&read_only), &raw const read_only);
    // SAFETY: an open descriptor, an empty path and attributes of this size.
    let set =
        unsafe { libc::syscall(libc::SYS_mount_setattr, fd.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, at, size) };
    Errno::result(set)?;
    Ok(fd)
}

/// Takes over what a program's settings file says now.
#[derive(Debug)]
pub struct Reloader {
    /// Where the file is; `None`: the program was started without one.
    pub file: Option<SettingsFile>,
    /// What the program runs with.
    pub settings: Settings,
    /// The tables and keys that the program has.
    pub sections: &'static [&'static str],
    /// The keys that it takes over.
    pub live: &'static [&'static str],
    /// What needs a start, in the log's words: `a remount`.
    pub restart: &'static str,
    /// The program's log.
    pub log: Control,
}

impl Reloader {
    /// Reads the file, and has `finish` add what the command line says, and check it. The settings, if a live one has
    /// changed. What has changed, and what else must be done for it, is in the log.
    pub fn reload<E>(&mut self, finish: impl FnOnce(Loader) -> Result<Settings, E>) -> Option<&Settings>
    where
        E: std::fmt::Display + From<tunnelfs_settings::Error>,
    {
        let Some(file) = &self.file else {
            tracing::warn!("SIGHUP: there is no settings file to read again: start with --config FILE");
            return None;
        };
        let path = &file.path;
        let text = file.read().inspect_err(|e| tracing::warn!("SIGHUP: {}: {e}: nothing is changed", path.display()));
        let settings = Loader::of_text(path, text.ok()?).map_err(E::from).and_then(finish);
        let settings = settings.inspect_err(|e| tracing::warn!("SIGHUP: {e}: nothing is changed")).ok()?;
        let changed = changed_keys(&self.settings, &settings, self.sections);
        let (live, later): (Vec<_>, Vec<_>) = changed.into_iter().partition(|key| self.live.contains(&&**key));
        self.settings = settings;
        if live.iter().any(|key| key == "log.level") && !self.log.set(self.settings.log.level) {
            tracing::warn!("SIGHUP: log.level: the environment's {VARIABLE} goes before it");
        }
        if live.is_empty() && later.is_empty() {
            tracing::info!("SIGHUP: {} has not changed", path.display());
        }
        if !live.is_empty() {
            tracing::info!("SIGHUP: {}: taken over: {}", path.display(), live.join(", "));
        }
        if !later.is_empty() {
            tracing::warn!("SIGHUP: {}: needs {}: {}", path.display(), self.restart, later.join(", "));
        }
        (!live.is_empty()).then_some(&self.settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_file_that_is_replaced_is_read_by_each_way_that_can_see_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, new) = (dir.path().join("t.toml"), dir.path().join("new"));
        fs::write(&path, "one").unwrap();
        let by_path = SettingsFile::new(Some(&path)).unwrap();
        let opened = SettingsFile::before_sandbox(Some(&path)).unwrap().unwrap();
        let by_file = SettingsFile { path: path.clone(), place: Place::File(File::open(&path).unwrap()) };
        fs::write(&path, "two").unwrap();
        for file in [&by_path, &opened, &by_file] {
            assert_eq!(file.read().unwrap(), "two");
        }
        fs::write(&new, "three").unwrap();
        fs::rename(&new, &path).unwrap();
        assert_eq!(by_path.read().unwrap(), "three");
        if let Place::Directory(view, _) = &opened.place {
            assert_eq!(opened.read().unwrap(), "three");
            // No way leads out of the view, also not for one who does as he likes with its descriptor.
            let up = nix::fcntl::openat(view, "../../t.toml", OFlag::O_RDONLY, nix::sys::stat::Mode::empty());
            assert!(up.is_ok(), "`..` of the view is the view: {up:?}");
            let write = nix::fcntl::openat(view, "t.toml", OFlag::O_WRONLY, nix::sys::stat::Mode::empty());
            assert_eq!(write.unwrap_err(), Errno::EROFS);
        }
    }
}
