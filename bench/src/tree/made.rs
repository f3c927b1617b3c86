//! Trees that are generated: C files for a build, and packages of tiny files.

use std::fs::{self, File, FileTimes, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

/// Headers in the C tree, of which each C file includes [`INCLUDED`].
const HEADERS: usize = 40;
const INCLUDED: usize = 12;
/// Tiny files of a package.
const TINY: usize = 6;

/// Writes a program of `files` C files, their headers and a build script; the number of files in all.
///
/// # Errors
/// The file system's.
pub fn c_program(directory: &Path, files: usize) -> io::Result<usize> {
    fs::create_dir_all(directory.join("include"))?;
    for header in 0..HEADERS {
        let text = format!(
            "#ifndef H{header}\n#define H{header}\nstruct s{header} {{ long a, b; }};\n\
             static inline long f{header}(struct s{header} *s) {{ return s->a * {header} + s->b; }}\n#endif\n"
        );
        fs::write(directory.join(format!("include/h{header}.h")), text)?;
    }
    let mut main = String::from("#include <stdio.h>\n");
    let mut calls = String::new();
    for file in 0..files {
        let used: Vec<usize> = (0..INCLUDED).map(|i| (file * 7 + i * 3) % HEADERS).collect();
        let mut text: String = used.iter().map(|h| format!("#include \"h{h}.h\"\n")).collect();
        text += &format!("long part{file}(long n) {{\n  long sum = 0;\n");
        for h in &used {
            text += &format!("  {{ struct s{h} s = {{ n, {file} }}; sum += f{h}(&s); }}\n");
        }
        text += "  return sum;\n}\n";
        fs::write(directory.join(format!("part{file}.c")), text)?;
        main += &format!("long part{file}(long);\n");
        calls += &format!(" + part{file}({file})");
    }
    fs::write(directory.join("main.c"), format!("{main}int main(void) {{ printf(\"%ld\\n\", 0L{calls}); }}\n"))?;
    let script = "set -e\nmkdir -p out\nfor c in *.c; do cc -O0 -Iinclude -c \"$c\" -o \"out/${c%.c}.o\"; done\n\
                  cc out/*.o -o out/program\nout/program >/dev/null\n";
    fs::write(directory.join("build.sh"), script)?;
    Ok(HEADERS + files + 2)
}

/// Files, links included, that [`packages`] makes of so many packages.
pub fn package_files(packages: usize) -> usize {
    packages * (TINY + 2)
}

/// Installs packages as npm does: each file is written under its name, gets its mode and time, and each package has a
/// link among the programs.
///
/// # Errors
/// The file system's.
pub fn packages(directory: &Path, packages: usize) -> io::Result<()> {
    let modules = directory.join("node_modules");
    let programs = modules.join(".bin");
    fs::create_dir_all(&programs)?;
    let time = UNIX_EPOCH + Duration::from_secs(499_162_500);
    let write = |path: &Path, text: &str, mode: u32| {
        let mut file = File::create_new(path)?;
        file.write_all(text.as_bytes())?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.set_times(FileTimes::new().set_accessed(time).set_modified(time))
    };
    for number in 0..packages {
        // Some have others below them.
        let home = match number % 5 {
            0 => modules.join(format!("package-{number}")),
            _ => {
                modules.join(format!("package-{}", number - number % 5)).join("node_modules").join(format!("{number}"))
            }
        };
        fs::create_dir_all(home.join("lib"))?;
        let json = format!("{{\"name\":\"package-{number}\",\"version\":\"1.0.{number}\",\"main\":\"lib/0.js\"}}\n");
        write(&home.join("package.json"), &json, 0o644)?;
        for file in 0..TINY {
            let text = format!("'use strict';\nmodule.exports = (n) => n + {file} * {number};\n");
            write(&home.join(format!("lib/{file}.js")), &text, if file == 0 { 0o755 } else { 0o644 })?;
        }
        symlink(
            home.join("lib/0.js").strip_prefix(&modules).map_err(io::Error::other)?,
            programs.join(format!("p{number}")),
        )?;
    }
    // Each looks for its own, and for one that is not there.
    for entry in fs::read_dir(&programs)? {
        let link = entry?.path();
        let target = fs::read_link(&link)?;
        fs::read(modules.join(&target))?;
        let _ = fs::metadata(modules.join(target).with_extension("json"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(directory: &Path) -> usize {
        let entries = fs::read_dir(directory).unwrap().map(Result::unwrap);
        entries.map(|e| if e.file_type().unwrap().is_dir() { count(&e.path()) } else { 1 }).sum()
    }

    #[test]
    fn as_many_files_as_said() {
        let dir = tempfile::tempdir().unwrap();
        packages(dir.path(), 7).unwrap();
        assert_eq!(count(dir.path()), package_files(7));
        let c = dir.path().join("c");
        let files = c_program(&c, 3).unwrap();
        assert_eq!(count(&c), files);
    }
}
