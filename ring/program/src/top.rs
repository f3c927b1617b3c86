//! `top`: a program's figures, as rates between two looks.

use crate::metrics::{parse, Sample};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::widgets::{Block, Paragraph, Row, Table};
use ratatui::Frame;
use std::io::{self, Write};
use std::time::{Duration, Instant};

/// How to show it.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Options {
    /// Print the figures of one interval as text, and exit
    #[arg(long)]
    pub once: bool,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub interval: u64,
}

/// What was seen at one time.
struct Look {
    at: Instant,
    samples: Vec<Sample>,
}

/// A table: its title, heads and rows.
struct Shown {
    title: String,
    heads: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

/// Shows the figures that `ask` gets, until the user ends it; with `once`, of one interval.
///
/// # Errors
/// Nobody answers, what answers is no TunnelFS, or there is no terminal.
pub fn run(title: &str, options: Options, mut ask: impl FnMut() -> io::Result<String>) -> io::Result<()> {
    let mut before = look(&mut ask)?;
    let interval = Duration::from_secs(options.interval);
    if options.once {
        std::thread::sleep(interval);
        return print(title, &tables(&before, &look(&mut ask)?));
    }
    let mut terminal = ratatui::try_init()?;
    let mut shown = tables(&before, &before);
    let ended = loop {
        if let Err(e) = terminal.draw(|frame| draw(frame, title, &shown)) {
            break Err(e);
        }
        match is_over(interval) {
            Ok(false) => {}
            Ok(true) => break Ok(()),
            Err(e) => break Err(e),
        }
        match look(&mut ask) {
            Ok(now) => {
                shown = tables(&before, &now);
                before = now;
            }
            Err(e) => break Err(e),
        }
    };
    ratatui::restore();
    ended
}

fn look(ask: &mut impl FnMut() -> io::Result<String>) -> io::Result<Look> {
    let text = ask()?;
    let samples = parse(&text).ok_or_else(|| io::Error::other("the answer is of another version of TunnelFS"))?;
    Ok(Look { at: Instant::now(), samples })
}

/// Waits for an interval; `true`: the user has pressed q, Escape or Ctrl-C.
fn is_over(interval: Duration) -> io::Result<bool> {
    let until = Instant::now() + interval;
    while event::poll(until.saturating_duration_since(Instant::now()))? {
        if let Event::Key(key) = event::read()? {
            let interrupt = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
            let ends = matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) || interrupt;
            if ends && key.kind == KeyEventKind::Press {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

impl Look {
    /// The sum of a metric where the labels have these values; `None`: there is none.
    fn sum(&self, suffix: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let is = |s: &&Sample| s.name.ends_with(suffix) && labels.iter().all(|(name, value)| s.label(name) == *value);
        let values: Vec<f64> = self.samples.iter().filter(is).map(|s| s.value).collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    /// The values of a label, in order.
    fn values(&self, suffix: &str, label: &str) -> Vec<String> {
        let mut values: Vec<String> = Vec::new();
        for sample in self.samples.iter().filter(|s| s.name.ends_with(suffix)) {
            let value = sample.label(label).to_owned();
            if !value.is_empty() && !values.contains(&value) {
                values.push(value);
            }
        }
        values
    }
}

/// What grew between two looks, per second.
fn rate(before: &Look, now: &Look, suffix: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let seconds = (now.at - before.at).as_secs_f64().max(1e-9);
    let grown = now.sum(suffix, labels)? - before.sum(suffix, labels).unwrap_or(0.0);
    Some(grown.max(0.0) / seconds)
}

fn plain(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) => format!("{value:.1}"),
    }
}

fn tables(before: &Look, now: &Look) -> Vec<Shown> {
    let mut shown = vec![queues(before, now)];
    if now.sum("_request_seconds_count", &[]).is_some() {
        shown.push(operations(before, now));
    }
    shown
}

fn queues(before: &Look, now: &Look) -> Shown {
    let guests = now.values("_requests_total", "guest");
    let mut rows = Vec::new();
    for guest in guests.iter().map(String::as_str).chain(guests.is_empty().then_some("")) {
        for queue in now.values("_waits_total", "queue") {
            let queue = [("guest", guest), ("queue", queue.as_str())];
            if now.sum("_waits_total", &queue).is_none() {
                continue;
            }
            let rate = |suffix| rate(before, now, suffix, &queue);
            let ended = |how| self::rate(before, now, "_waits_total", &[queue[0], queue[1], ("ended", how)]);
            let requests = rate("_requests_total").or(Some(0.0));
            let per_request = |count: Option<f64>| Some(count? / requests?.max(1e-9)).filter(|_| requests > Some(0.0));
            let name = if guest.is_empty() { queue[1].1.to_owned() } else { format!("{guest}/{}", queue[1].1) };
            rows.push(vec![
                name,
                plain(requests),
                plain(now.sum("_slots_in_use", &queue)),
                plain(per_request(rate("_notifications_total"))),
                plain(ended("spinning")),
                plain(ended("sleeping")),
            ]);
        }
    }
    let heads = vec!["queue", "requests/s", "slots in use", "kicks/request", "spun/s", "slept/s"];
    Shown { title: "Queues".into(), heads, rows }
}

fn operations(before: &Look, now: &Look) -> Shown {
    let mut rows = Vec::new();
    for operation in now.values("_requests_total", "operation") {
        let labels = [("operation", operation.as_str())];
        let quantile = |quantile| {
            let labels = [labels[0], ("quantile", quantile)];
            // The slowest queue's: percentiles of several queues do not add up.
            let is = |s: &&Sample| labels.iter().all(|(name, value)| s.label(name) == *value);
            let slowest = now
                .samples
                .iter()
                .filter(is)
                .map(|s| s.value * 1e6)
                .fold(None, |a: Option<f64>, b| Some(a.map_or(b, |a| a.max(b))));
            plain(slowest)
        };
        rows.push(vec![
            operation.clone(),
            plain(rate(before, now, "_requests_total", &labels)),
            plain(now.sum("_request_errors_total", &labels)),
            quantile("0.5"),
            quantile("0.99"),
            quantile("0.999"),
        ]);
    }
    let heads = vec!["operation", "requests/s", "failed", "p50 us", "p99 us", "p99.9 us"];
    Shown { title: "Operations (percentiles since the mount, of the slowest queue)".into(), heads, rows }
}

fn print(title: &str, tables: &[Shown]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{title}")?;
    for table in tables {
        writeln!(out, "\n{}", table.title)?;
        let heads = table.heads.iter().map(ToString::to_string).collect();
        for row in std::iter::once(&heads).chain(&table.rows) {
            let cells: Vec<_> = row.iter().skip(1).map(|cell| format!("{cell:>14}")).collect();
            writeln!(out, "{:<16}{}", row[0], cells.join(""))?;
        }
    }
    Ok(())
}

fn draw(frame: &mut Frame<'_>, title: &str, tables: &[Shown]) {
    let mut heights = vec![Constraint::Length(1)];
    heights.extend(tables.iter().map(|table| Constraint::Length(table.rows.len() as u16 + 3)));
    heights.push(Constraint::Min(0));
    let areas = Layout::vertical(heights).split(frame.area());
    frame.render_widget(Paragraph::new(format!("{title}   (q ends)")), areas[0]);
    for (table, area) in tables.iter().zip(areas.iter().skip(1)) {
        let rows = table.rows.iter().map(|row| Row::new(row.clone()));
        let widths = table.heads.iter().map(|_| Constraint::Length(15));
        let head = Row::new(table.heads.clone()).style(Style::new().add_modifier(Modifier::BOLD));
        frame.render_widget(
            Table::new(rows, widths).header(head).block(Block::bordered().title(table.title.as_str())),
            *area,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(text: &str, at: Instant) -> Look {
        Look { at, samples: parse(text).unwrap() }
    }

    #[test]
    fn rates_are_of_what_grew() {
        let (start, queue) = (Instant::now(), "{queue=\"0\",operation=\"READ\"}");
        let text = |n: u32, kicks: u32| {
            format!(
                "t_requests_total{queue} {n}\nt_notifications_total{{queue=\"0\"}} {kicks}\n\
                 t_waits_total{{queue=\"0\",ended=\"spinning\"}} {n}\n\
                 t_request_seconds_count{queue} {n}\n\
                 t_request_seconds{{queue=\"0\",operation=\"READ\",quantile=\"0.5\"}} 0.000012\n"
            )
        };
        let (before, now) = (look(&text(100, 10), start), look(&text(500, 110), start + Duration::from_secs(2)));
        let shown = tables(&before, &now);
        assert_eq!(shown[0].rows, [["0", "200", "-", "0.2", "200", "-"]]);
        assert_eq!(shown[1].rows, [["READ", "200", "-", "12.0", "-", "-"]]);
    }

    #[test]
    fn it_is_drawn() {
        let at = Instant::now();
        let look = look("t_requests_total{queue=\"0\"} 1\nt_waits_total{queue=\"0\",ended=\"sleeping\"} 1\n", at);
        let mut terminal = ratatui::Terminal::new(ratatui::backend::TestBackend::new(100, 20)).unwrap();
        terminal.draw(|frame| draw(frame, "a mount", &tables(&look, &look))).unwrap();
        let text = terminal.backend().to_string();
        assert!(text.contains("a mount") && text.contains("slots in use"), "{text}");
    }
}
