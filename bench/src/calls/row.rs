//! One operation's costs, and their table.

/// The largest ratio that is wanted.
const WANTED: f64 = 1.5;

/// One operation's row.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was done.
    pub name: &'static str,
    /// The bare calls, nanoseconds.
    pub bare: f64,
    /// The file server, nanoseconds.
    pub served: f64,
}

/// The rows as a Markdown table.
pub fn table(title: &str, rows: &[Row]) -> String {
    let mut text =
        format!("| {title} | bare calls, us | direct call, us | ratio | at most {WANTED} |\n|---|--:|--:|--:|---|\n");
    for Row { name, bare, served } in rows {
        let reached = if served / bare <= WANTED { "yes" } else { "**no**" };
        text += &format!("| {name} | {:.2} | {:.2} | {:.2} | {reached} |\n", bare / 1e3, served / 1e3, served / bare);
    }
    text
}
