//! Where the trees' files come from.

use serde_json::Value;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Files above this are left out, bytes: trees of sources have few of them.
const LARGEST: u64 = 256 << 10;

/// The directories with the sources of this workspace's dependencies, as cargo has unpacked them.
///
/// # Errors
/// When cargo cannot be asked; says what to do.
pub fn dependencies() -> io::Result<Vec<PathBuf>> {
    let told = |why: String| io::Error::other(format!("cargo metadata: {why}; name a tree by --source DIR"));
    let out = Command::new("cargo").args(["metadata", "--format-version", "1", "--offline"]).output();
    let out = out.map_err(|e| told(e.to_string()))?;
    if !out.status.success() {
        return Err(told(String::from_utf8_lossy(&out.stderr).trim().into()));
    }
    let json: Value = serde_json::from_slice(&out.stdout)?;
    let packages = json["packages"].as_array().ok_or_else(|| told("it lists no packages".into()))?;
    let of = |package: &Value| {
        // Those of the workspace have no source.
        package["source"].as_str()?;
        Some(Path::new(package["manifest_path"].as_str()?).parent()?.to_path_buf())
    };
    let mut directories: Vec<PathBuf> = packages.iter().filter_map(of).collect();
    directories.sort();
    Ok(directories)
}

/// A file, and its path in the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Where it lies.
    pub from: PathBuf,
    /// Where it goes.
    pub to: PathBuf,
}

/// At most so many files of the directories, in an order that stays; at least one.
///
/// # Errors
/// When there is none, or a directory cannot be read.
pub fn collect(directories: &[PathBuf], most: usize) -> io::Result<Vec<Source>> {
    let mut all = Vec::new();
    for directory in directories {
        let name = directory.file_name().map_or_else(|| "tree".into(), PathBuf::from);
        walk(directory, &name, most, &mut all)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", directory.display())))?;
    }
    if all.is_empty() {
        return Err(io::Error::other("no files to make trees of; name a tree by --source DIR"));
    }
    Ok(all)
}

fn walk(directory: &Path, to: &Path, most: usize, all: &mut Vec<Source>) -> io::Result<()> {
    let mut entries = fs::read_dir(directory)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        if all.len() >= most {
            return Ok(());
        }
        let (kind, to) = (entry.file_type()?, to.join(entry.file_name()));
        // A repository within the tree would not be git's to add.
        if kind.is_dir() && entry.file_name() != ".git" {
            walk(&entry.path(), &to, most, all)?;
        } else if kind.is_file() && entry.metadata()?.len() <= LARGEST {
            all.push(Source { from: entry.path(), to });
        }
    }
    Ok(())
}

/// Copies the files into `directory`, which is made.
///
/// # Errors
/// The first that cannot be copied.
pub fn lay(files: &[Source], directory: &Path) -> io::Result<()> {
    for file in files {
        let to = directory.join(&file.to);
        fs::create_dir_all(to.parent().unwrap_or(directory))?;
        fs::copy(&file.from, to)?;
    }
    Ok(())
}

/// Copies a tree by further names of its files.
///
/// # Errors
/// The file system's.
pub fn link(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            link(&entry.path(), &to)?;
        } else {
            fs::hard_link(entry.path(), to)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_files_come_in_the_same_order() {
        let dir = tempfile::tempdir().unwrap();
        let made = dir.path().join("tree");
        for name in ["b/two", "a", "b/one", "c/.git/config", "c/three"] {
            let path = made.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name).unwrap();
        }
        let large = fs::File::create(made.join("large")).unwrap();
        large.set_len(LARGEST + 1).unwrap();
        let all = collect(&[made], 9).unwrap();
        let names: Vec<_> = all.iter().map(|f| f.to.display().to_string()).collect();
        assert_eq!(names, ["tree/a", "tree/b/one", "tree/b/two", "tree/c/three"]);
        assert_eq!(collect(&[dir.path().join("tree")], 2).unwrap(), all[..2]);
        lay(&all, &dir.path().join("copy")).unwrap();
        link(&dir.path().join("copy"), &dir.path().join("linked")).unwrap();
        assert_eq!(fs::read(dir.path().join("linked/tree/b/two")).unwrap(), b"b/two");
        assert!(collect(&[dir.path().join("copy/tree/b/none")], 2).is_err());
    }
}
