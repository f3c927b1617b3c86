//! The report as one page that needs no network.

use super::charts::{self, Section};
use super::recorded::Recorded;
use super::svg::{escape, style, Picture};
use super::words;
use std::fmt::Write;

const LAYOUT: &str = "
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,'Segoe UI',sans-serif}
main{max-width:1280px;margin:0 auto;padding:32px 24px 80px}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 4px}h2{font-size:1.25rem;margin:48px 0 4px}
header p,.soft{color:var(--soft);margin:4px 0;font-size:.92rem}
.first{font-size:1.45rem;line-height:1.4;font-weight:600;margin:24px 0 16px;max-width:44em}
.lead{display:grid;grid-template-columns:minmax(0,1.1fr) minmax(0,1fr);gap:28px;align-items:start}
.lead ul{margin:0;padding:0;list-style:none}.lead li{padding:10px 0;border-bottom:1px solid var(--rule)}
.lead li:last-child{border:0}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr));gap:18px;margin-top:16px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:6px}
figure svg{display:block;width:100%;height:auto}
details{margin-top:12px}summary{cursor:pointer;color:var(--soft)}
code,pre{font:13px/1.5 ui-monospace,Consolas,monospace;overflow-wrap:anywhere;white-space:pre-wrap}
.table{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;width:100%}
td,th{padding:5px 10px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}
.left td:nth-child(2),.left th:nth-child(2){text-align:right}.left td:first-child{white-space:normal}
nav{margin-top:12px;font-size:.92rem}nav a{margin-right:16px;color:var(--c0)}
@media (max-width:760px){main{padding:20px 14px 60px}.lead{grid-template-columns:minmax(0,1fr)}h1{font-size:1.35rem}
.first{font-size:1.15rem}}
@media print{body{background:#fff}figure{break-inside:avoid}}
";

/// The beginning of a page, up to its text.
fn head(title: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>TunnelFS: {}</title>\
         <style>{}{LAYOUT}</style></head><body><main>",
        escape(title),
        style()
    )
}

/// A page of words, one sentence that matters, pictures, a table (its first row is the heading), and a file's text.
pub fn plain(
    title: &str,
    words: &[String],
    first: &str,
    pictures: &[Picture],
    rows: &[Vec<String>],
    text: &str,
) -> String {
    let soft: String = words.iter().map(|w| format!("<p>{}</p>", escape(w))).collect();
    let figures: String = pictures.iter().map(figure).collect();
    let row = |(i, cells): (usize, &Vec<String>)| {
        let tag = if i == 0 { "<th>" } else { "<td>" };
        let cells: String = cells.iter().map(|c| format!("{tag}{}", escape(c))).collect();
        format!("<tr>{cells}</tr>")
    };
    let table: String = rows.iter().enumerate().map(row).collect();
    format!(
        "{}<header><h1>{}</h1>{soft}</header><p class=\"first\">{}</p><div class=\"grid\">{figures}</div><h2>What was \
         tried</h2><div class=\"table\"><table class=\"left\">{table}</table></div><h2>The file</h2><pre>{}</pre>\
         </main></body></html>\n",
        head(title),
        escape(title),
        escape(first),
        escape(text)
    )
}

/// All runs; several of one kind also beside each other.
pub fn page(runs: &[Recorded]) -> String {
    let names = runs.iter().map(|r| r.name.as_str()).collect::<Vec<_>>().join(", ");
    let mut out = head(&names);
    if runs.len() > 1 {
        out += "<nav>";
        for (i, run) in runs.iter().enumerate() {
            let _ = write!(out, "<a href=\"#run{i}\">{}</a>", escape(&run.name));
        }
        out += "</nav>";
    }
    let kinds = runs.iter().all(|r| r.kind == runs[0].kind);
    let pictures = if kinds { charts::runs(runs) } else { Vec::new() };
    if !pictures.is_empty() {
        let text = "Our rows of the loads that all runs have. `tunnelfs-bench compare` tells noise from change.";
        out += &section(&Section { title: "The runs beside each other", text, pictures });
    }
    for (i, run) in runs.iter().enumerate() {
        out += &one(i, run);
    }
    out += "</main></body></html>\n";
    out
}

fn one(number: usize, run: &Recorded) -> String {
    let title = match run.kind.as_str() {
        "mount" => "Mounts side by side",
        "vm" => "In a virtual machine",
        "tree" => "Trees of files",
        _ => "Transports side by side",
    };
    let mut out =
        format!("<header id=\"run{number}\"><h1>{title}: {}</h1><p>{}</p>", escape(&run.name), escape(&run.machine));
    if let Some(limits) = words::limits(run) {
        let _ = write!(out, "<p>{}</p>", escape(&limits));
    }
    out += "</header>";
    let findings = words::findings(run);
    if let Some(first) = findings.first() {
        let _ = write!(out, "<p class=\"first\">{}</p>", escape(first));
    }
    out += "<div class=\"lead\">";
    out += &charts::first(run).map_or(String::new(), |p| figure(&p));
    out += "<ul>";
    for finding in findings.iter().skip(1) {
        let _ = write!(out, "<li>{}</li>", escape(finding));
    }
    out += "</ul></div>";
    out += &charts::sections(run).iter().map(section).collect::<String>();
    out + &how(run)
}

fn figure(picture: &Picture) -> String {
    format!("<figure>{}</figure>", picture.inline())
}

fn section(section: &Section) -> String {
    let pictures: String = section.pictures.iter().map(figure).collect();
    let Section { title, text, .. } = section;
    format!("<h2>{title}</h2><p class=\"soft\">{}</p><div class=\"grid\">{pictures}</div>", escape(text))
}

/// All rows, the command, and the settings.
fn how(run: &Recorded) -> String {
    let mut out = String::from("<h2>How it was measured</h2>");
    let _ = write!(out, "<p><code>{}</code></p>", escape(&run.command));
    let changed = words::changed(run);
    let said = match (&run.config, changed.is_empty()) {
        (None, _) => String::new(),
        (_, true) => "All settings have their defaults.".into(),
        _ => format!("Settings other than the defaults: {}.", changed.join(", ")),
    };
    let _ = write!(out, "<p class=\"soft\">{}</p>", escape(&said));
    if let Some(config) = &run.config {
        let text = serde_json::to_string_pretty(config).unwrap_or_default();
        let _ = write!(out, "<details><summary>All settings</summary><pre>{}</pre></details>", escape(&text));
    }
    let _ = write!(
        out,
        "<details><summary>All {} rows</summary><div class=\"table\"><table><tr><th>load<th>series<th>result<th>spread\
         <th>p50<th>p99<th>p99.9<th>CPU of one</tr>",
        run.rows.len()
    );
    for row in &run.rows {
        let time = |ns: Option<f64>| ns.map_or(String::new(), super::figures::time);
        let _ = write!(
            out,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}</tr>",
            escape(&row.load),
            escape(&row.series),
            row.shown().text,
            words::spread(&row.rates).map_or(String::new(), |s| format!("±{s:.1} %")),
            time(row.at(50.0)),
            time(row.at(99.0)),
            time(row.at(99.9)),
            time(row.cpu_ns)
        );
    }
    out + "</table></div></details>"
}
