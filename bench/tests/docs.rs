//! What the pages say is so: links lead somewhere, commands and settings exist, and the first commands of the README work.

#[allow(dead_code)]
#[path = "mount/rig.rs"]
mod rig;
#[path = "common/skip.rs"]
mod skip;

use rig::{soon, Scratch, Unmounted};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tunnelfs_bench::session::sibling;
use tunnelfs_settings::Settings;

/// The workspace.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// All pages, with their text.
fn pages() -> Vec<(PathBuf, String)> {
    let folders = ["", "docs", "ring", "results"].map(|folder| root().join(folder));
    let files = folders.iter().flat_map(|folder| fs::read_dir(folder).unwrap()).map(|entry| entry.unwrap().path());
    let mut pages: Vec<_> = files.filter(|file| file.extension().is_some_and(|end| end == "md")).collect();
    pages.sort();
    assert!(pages.len() > 10, "{pages:?}");
    pages.into_iter().map(|page| (page.clone(), fs::read_to_string(page).unwrap())).collect()
}

/// The parts of `text` between `open` and the next `close`, on one line.
fn between<'a>(text: &'a str, open: &'a str, close: char) -> impl Iterator<Item = &'a str> {
    text.split(open)
        .skip(1)
        .filter_map(move |rest| rest.split_once(close))
        .map(|(part, _)| part)
        .filter(|part| !part.contains('\n'))
}

/// Blocks of code in this language.
fn blocks<'a>(text: &'a str, language: &str) -> Vec<&'a str> {
    let fence = format!("```{language}\n");
    text.split(fence.as_str()).skip(1).filter_map(|rest| rest.split_once("```")).map(|(block, _)| block).collect()
}

/// A heading as the end of a link to it: as GitHub makes it.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn links_lead_somewhere() {
    for (page, text) in pages() {
        for link in between(&text, "](", ')').filter(|link| !link.contains("://")) {
            let (file, part) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            assert!(target.exists(), "{}: {link}", page.display());
            let there = |text: String| {
                text.lines().any(|line| line.starts_with('#') && anchor(line.trim_start_matches('#')) == part)
            };
            assert!(part.is_empty() || there(fs::read_to_string(&target).unwrap()), "{}: {link}", page.display());
        }
    }
}

/// Code within the text, not in blocks.
fn inline_code(text: &str) -> Vec<String> {
    let parts = text.split("```").step_by(2).map(|part| part.replace('\n', " "));
    parts.flat_map(|part| part.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// Commands in a page: in the text, in lines of their own, and in blocks.
fn commands(text: &str) -> Vec<String> {
    let mut found = inline_code(text);
    found.extend(text.lines().filter_map(|line| line.strip_prefix("    ")).map(str::to_owned));
    for block in text.split("```").skip(1).step_by(2) {
        found.extend(block.replace("\\\n", " ").lines().skip(1).map(str::to_owned));
    }
    let parts = found.iter().flat_map(|line| line.split("&&")).map(|part| part.split(" # ").next().unwrap_or_default());
    parts.map(|part| part.trim().trim_start_matches("./target/release/").to_owned()).collect()
}

/// What a program says of itself, and of one of its commands; empty: there is no such command.
#[derive(Default)]
struct Help(BTreeMap<String, String>);

impl Help {
    fn of(&mut self, program: &str, command: &str) -> &str {
        self.0.entry(format!("{program} {command}")).or_insert_with(|| {
            let mut asked = Command::new(sibling(program).unwrap());
            asked.args((!command.is_empty()).then_some(command)).arg("--help");
            String::from_utf8(asked.output().unwrap().stdout).unwrap()
        })
    }
}

#[test]
fn commands_exist() {
    let makefile = fs::read_to_string(root().join("Makefile")).unwrap();
    let targets: Vec<_> = makefile.lines().filter_map(|line| line.split_once(':')).map(|(target, _)| target).collect();
    let (mut help, mut checked) = (Help::default(), 0);
    for (page, text) in pages() {
        // What was recorded was so then.
        let recorded = page.starts_with(root().join("results")) || page.ends_with("CHANGELOG.md");
        for command in commands(&text).into_iter().filter(|_| !recorded) {
            let told = format!("{}: `{command}`", page.display());
            let words: Vec<_> = command.split_whitespace().collect();
            match words[..] {
                [program @ ("tunnelfs-host" | "tunnelfs-guest" | "tunnelfs-bench"), ref rest @ ..] => {
                    let first = rest.first().filter(|word| word.starts_with(|c: char| c.is_ascii_lowercase()));
                    let texts = [help.of(program, "").to_owned(), help.of(program, first.unwrap_or(&"")).to_owned()];
                    assert!(!texts[1].is_empty(), "{told}: no such command");
                    for option in rest.iter().filter(|word| word.starts_with("--")) {
                        let name = option.trim_end_matches(['.', ',', ')', ']']).split('=').next().unwrap();
                        let known = |text: &String| {
                            text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').any(|w| w == name)
                        };
                        assert!(texts.iter().any(known), "{told}: no option {name}");
                    }
                    checked += 1;
                }
                ["make", target, ..] if target.starts_with(|c: char| c.is_ascii_lowercase()) => {
                    assert!(targets.contains(&target.trim_end_matches(',')), "{told}: no such target");
                    checked += 1;
                }
                _ => {}
            }
        }
    }
    assert!(checked > 60, "{checked} commands");
}

#[test]
fn settings_exist() {
    let all = toml::Value::try_from(Settings::default()).unwrap();
    let mut checked = 0;
    for (page, text) in pages() {
        for word in inline_code(&text) {
            let Some((table, key)) = word.split_once('.') else { continue };
            let key: String = key.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
            if let (Some(keys), false) = (all.get(table).and_then(toml::Value::as_table), key.is_empty()) {
                assert!(keys.contains_key(&key), "{}: `{word}`", page.display());
                checked += 1;
            }
        }
        for block in blocks(&text, "toml") {
            let read = toml::from_str::<Settings>(block);
            assert!(read.is_ok(), "{}: {block}: {}", page.display(), read.unwrap_err());
            checked += 1;
        }
    }
    assert!(checked > 15, "{checked} settings");
}

/// The README's first commands, with other directories.
#[test]
fn the_first_commands_work() {
    let Some(scratch) = Scratch::new() else { return };
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let block = blocks(&readme, "sh")[0];
    let (build, rest) = block.split_once('\n').unwrap();
    assert!(build.contains("cargo build"), "{build}");
    let [share, point, socket] = ["share", "mnt", "socket"].map(|name| scratch.path(name));
    fs::write(share.join("hello"), "there").unwrap();
    let programs = sibling("tunnelfs-host").unwrap();
    let told = |path: &Path| path.display().to_string();
    let script = rest
        .replace("./target/release", &told(programs.parent().unwrap()))
        .replace("/srv/data", &told(&share))
        .replace("/run/tfs.sock", &told(&socket))
        .replace("/mnt", &told(&point));
    assert!(!script.contains(" /run") && !script.contains(" /mnt") && !script.contains(" /srv"), "{script}");
    let _unmounted = Unmounted(point.clone());
    // The host goes with its shell, which no line of the script ends.
    let output = Command::new("sh").arg("-ec").arg(format!("trap 'kill $!' EXIT\n{script}")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.lines().any(|line| line == "hello"), "{said}");
    soon("it is unmounted", || (!rig::is_mounted(&point)).then_some(()));
}
