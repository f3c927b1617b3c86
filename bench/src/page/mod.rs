//! `tunnelfs-bench report`: recorded runs as pages, and all pictures of the project.

mod charts;
pub mod figures;
pub mod html;
pub mod markdown;
pub mod recorded;
pub mod svg;
pub mod words;

use crate::record::Run;
use recorded::Recorded;
use std::io;
use std::path::{Path, PathBuf};

/// The command line of `report`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tunnelfs-bench report results/mount.json --output mount.html
  tunnelfs-bench report before.json after.json --output both.html

Writes both.html, one page without a network, and both.md beside it.")]
pub struct ReportArgs {
    /// Runs, as --json has written them
    #[arg(required = true, value_name = "RUN.json")]
    runs: Vec<PathBuf>,
    /// The page; a Markdown file of the same name goes beside it
    #[arg(long, short, value_name = "PAGE.html")]
    output: PathBuf,
    /// Also write the pictures that stand alone, as the README and results/ have them, into this directory
    #[arg(long, value_name = "DIR")]
    pictures: Option<PathBuf>,
}

/// Writes the page and the Markdown file.
///
/// # Errors
/// What cannot be read or written, by name.
pub fn run(args: &ReportArgs) -> io::Result<()> {
    if !args.output.extension().is_some_and(|e| e == "html" || e == "htm") {
        return Err(io::Error::other(format!("--output {}: the page's name must end in .html", args.output.display())));
    }
    let runs = args.runs.iter().map(|path| recorded::read(path)).collect::<io::Result<Vec<Recorded>>>()?;
    let text = args.output.with_extension("md");
    write(&args.output, &html::page(&runs))?;
    write(&text, &markdown::page(&runs))?;
    if let Some(dir) = &args.pictures {
        for run in &runs {
            pictures(run, dir, &run.name)?;
        }
    }
    println!("{} and {}", args.output.display(), text.display());
    Ok(())
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    std::fs::write(path, text).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
}

/// Draws what a fresh run has beside `page`; the files' names.
///
/// # Errors
/// When a file cannot be written.
pub fn draw(run: &Run, page: &Path) -> io::Result<Vec<String>> {
    let stem = page.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let read = recorded::parse(&serde_json::to_vec(run)?, &stem).map_err(io::Error::other)?;
    pictures(&read, page.parent().unwrap_or(Path::new("")), &stem)
}

/// Writes a run's pictures that stand alone; their names.
fn pictures(run: &Recorded, dir: &Path, stem: &str) -> io::Result<Vec<String>> {
    let mut drawn = Vec::new();
    for (end, picture) in charts::files(run) {
        let name = format!("{stem}-{end}.svg");
        write(&dir.join(&name), &picture.alone(&run.machine))?;
        drawn.push(name);
    }
    Ok(drawn)
}
