//! What a search has come to: the commented `tunnelfs.toml`, the table of what was tried, and the trade-offs as pictures.

use super::bencher::Turns;
use super::goal::{Figures, Goal};
use super::mix::Mix;
use super::search::{Found, Point, Tried};
use super::space::Space;
use crate::page::figures::{rate, three, time};
use crate::page::html;
use crate::page::svg::{scatter, Axis, Dots, Picture, GREY};
use crate::record::Origin;
use std::fmt::Write;

/// All that is told.
pub struct Outcome<'a> {
    /// What was searched.
    pub space: &'a Space,
    /// For what.
    pub goal: Goal,
    /// With which loads.
    pub mix: &'a Mix,
    /// What has come of it.
    pub found: Found,
    /// Each turn's figures.
    pub figures: Turns,
    /// Where.
    pub origin: Origin,
}

/// Where a point lies in a picture, by its settings and figures.
type Pick<'a> = &'a dyn Fn(&Point, &Figures) -> Option<(f64, f64)>;

/// Most rows of the table that people see.
const ROWS: usize = 15;

impl Outcome<'_> {
    fn defaults(&self) -> Point {
        let point: Point = self.space.parameters.iter().map(|p| p.default).collect();
        self.space.canonical(&point).unwrap_or(point)
    }

    /// A point's figures, as geometric means over the loads: the defaults' medians, times the point's ratio to them in the
    /// rounds that it took part in, so that points of quiet and of busy minutes can stand in one table.
    fn figures(&self, point: &Point) -> Option<Figures> {
        let (own, base) = (self.figures.get(point)?, self.figures.get(&self.defaults())?);
        let of = |value: fn(&Figures) -> f64| -> f64 {
            let load = |number: usize| {
                let middle = median(base.get(number)?.iter().map(|(_, f)| value(f)).collect())?;
                let in_round = |round: &usize| base[number].iter().find(|(r, _)| r == round).map(|(_, f)| value(f));
                let ratios = own.get(number)?.iter().filter_map(|(round, f)| Some(value(f) / in_round(round)?));
                Some((middle * median(ratios.collect())?).max(1e-3).ln() * self.mix.parts[number].share)
            };
            (0..self.mix.parts.len()).filter_map(load).sum::<f64>() / self.mix.shares()
        };
        let mean = |value| of(value).exp();
        Some(Figures { p50: mean(|f| f.p50), p99: mean(|f| f.p99), rate: mean(|f| f.rate), cpu: mean(|f| f.cpu) })
    }

    /// The result in one or two sentences.
    pub fn verdict(&self) -> String {
        format!("{} {}", self.choice(), self.ending())
    }

    /// Why the search has ended.
    fn ending(&self) -> &'static str {
        match self.found.settled {
            true => "Further tries cannot matter: no neighbour can be better by a per cent.",
            false => "The time was over before all neighbours were tried: more time may find more.",
        }
    }

    /// What is best.
    fn choice(&self) -> String {
        let found = &self.found;
        match found.interval {
            Some(i) => format!(
                "Better than the defaults: {}. It costs {:.3} of what they cost ({:.3} to {:.3} with 95 % confidence, \
                 in rounds of its own).",
                self.space.words(&found.best),
                i.middle,
                i.low,
                i.high
            ),
            None => "The defaults are best: nothing that was tried is better beyond doubt.".into(),
        }
    }

    /// The commented configuration file.
    pub fn toml(&self) -> String {
        let mut out = format!(
            "# Settings for {} by `{}`\n# on {}, kernel {}, {}.\n# Workload: {}. Goal: {}.\n#\n",
            match self.found.interval {
                Some(_) => "this machine, found",
                None => "this machine: the defaults, confirmed",
            },
            self.origin.command,
            self.origin.machine,
            self.origin.kernel,
            self.origin.date,
            self.mix.name,
            self.goal.words()
        );
        for line in wrapped(&self.verdict()) {
            let _ = writeln!(out, "# {line}");
        }
        let settings = self.space.settings(&self.found.best);
        let t = &settings.transport;
        let mark = |name: &str| {
            let parameter = self.space.parameters.iter().find(|p| p.name == name);
            parameter.map_or(String::new(), |p| format!("default {}", p.values[p.default]))
        };
        let _ = writeln!(out, "\n[transport]");
        let _ = writeln!(out, "# Entries of each ring ({}).\nentries = {}", mark("transport.entries"), t.entries);
        let _ = writeln!(out, "# Payload slots of each queue ({}).\nslots = {}", mark("transport.slots"), t.slots);
        let _ = writeln!(
            out,
            "# Bytes of a slot: the largest READ or WRITE ({}).\nslot_size = {}",
            mark("transport.slot_size"),
            t.slot_size
        );
        if self.space.changes(&self.found.best).iter().any(|(name, _)| *name == "transport.queues") {
            let _ = writeln!(out, "# Request queues ({}).\nqueues = {}", mark("transport.queues"), t.queues);
        } else {
            let _ = writeln!(out, "# One request queue on each CPU.\nqueues = 0");
        }
        let w = &settings.wait;
        let _ = writeln!(
            out,
            "\n[wait]\n# How to wait for the other side ({}).\npolicy = \"{}\"",
            mark("wait.policy"),
            w.policy
        );
        let _ = writeln!(
            out,
            "# Longest spin of \"auto\", microseconds ({}).\nauto_us = {}",
            mark("wait.auto_us"),
            w.auto_us
        );
        let _ = writeln!(
            out,
            "# Longest spin of \"spin\", microseconds ({}).\nspin_us = {}",
            mark("wait.spin_us"),
            w.spin_us
        );
        if !settings.host.cpus.is_empty() {
            let _ = writeln!(
                out,
                "\n[host]\n# CPU of each queue's thread (default: by measurement).\ncpus = {:?}",
                settings.host.cpus
            );
            let _ = writeln!(out, "\n[mount]\n# CPU of each queue's thread.\ncpus = {:?}", settings.mount.cpus);
        }
        out
    }

    /// Best first, the defaults and the best always among them.
    fn ranked(&self) -> Vec<&Tried> {
        let mut all: Vec<&Tried> = self.found.tried.iter().collect();
        all.sort_by(|a, b| a.middle().total_cmp(&b.middle()));
        let (best, defaults) = (&self.found.best, self.defaults());
        let mut kept = 0;
        all.retain(|t| {
            kept += 1;
            kept <= ROWS || t.point == *best || t.point == defaults
        });
        all
    }

    /// What was tried, as Markdown.
    pub fn table(&self) -> String {
        let mut out = String::from(
            "| settings | cost, defaults = 1 | interval | rounds | p50 | p99 | rate | CPU of one |\n\
             |---|--:|--:|--:|--:|--:|--:|--:|\n",
        );
        for tried in self.ranked() {
            let figures = self.figures(&tried.point).unwrap_or_default();
            let chosen = if tried.point == self.found.best { "**" } else { "" };
            let interval = tried.interval().filter(|_| tried.point != self.defaults());
            let _ = writeln!(
                out,
                "| {chosen}{}{chosen} | {:.3} | {} | {} | {} | {} | {} | {} |",
                self.space.words(&tried.point),
                tried.middle(),
                interval.map_or(String::new(), |i| format!("{:.3} to {:.3}", i.low, i.high)),
                tried.ratios.len(),
                time(figures.p50),
                time(figures.p99),
                rate(figures.rate),
                time(figures.cpu)
            );
        }
        let more = self.found.tried.len().saturating_sub(self.ranked().len());
        let _ = writeln!(
            out,
            "\n{} settings were tried{}.",
            self.found.tried.len(),
            if more > 0 { "; the best are shown" } else { "" }
        );
        out
    }

    /// Everything for a terminal.
    pub fn text(&self) -> String {
        format!("{}\n\n{}", self.verdict(), self.table())
    }

    /// The trade-offs.
    fn pictures(&self) -> Vec<Picture> {
        let (best, defaults) = (self.found.best.clone(), self.defaults());
        let kinds = |pick: Pick<'_>| {
            let mut all = vec![
                Dots { name: "tried".into(), class: GREY, points: Vec::new() },
                Dots { name: "the defaults".into(), class: 2, points: Vec::new() },
                Dots { name: "chosen".into(), class: 0, points: Vec::new() },
            ];
            for tried in &self.found.tried {
                let point = &tried.point;
                let Some(at) = self.figures(point).and_then(|f| pick(point, &f)) else { continue };
                let kind = if *point == best { 2 } else { usize::from(*point == defaults) };
                all[kind].points.push((at, self.space.words(point)));
            }
            all.retain(|dots| !dots.points.is_empty());
            all
        };
        let by_rate = kinds(&|_, f| Some((f.rate / 1e3, f.cpu / 1e3)));
        let by_latency = kinds(&|_, f| Some((f.p50 / 1e3, f.cpu / 1e3)));
        let note = "geometric means over the workload's loads; each dot is one setting";
        let cpu = Axis::new("CPU of one, µs", true);
        let mut out = vec![
            scatter("Rate against CPU", note, &Axis::new("thousands a second", true), &cpu, &by_rate),
            scatter("Latency against CPU", note, &Axis::new("p50, µs", true), &cpu, &by_latency),
        ];
        for (name, word) in
            [("transport.slots", "slots"), ("transport.entries", "entries"), ("wait.auto_us", "auto_us")]
        {
            let Some(i) = self.space.parameters.iter().position(|p| p.name == name) else { continue };
            let values = &self.space.parameters[i].values;
            let number = |v: &String| v.parse::<f64>().ok();
            let ticks = values.iter().filter_map(|v| number(v).map(|n| (n, v.clone()))).collect();
            let dots = kinds(&|point, f| number(&values[point[i]]).map(|n| (n, f.p50 / 1e3)));
            let x = Axis { ticks, ..Axis::new(word, true) };
            out.push(scatter(&format!("Latency against {word}"), note, &x, &Axis::new("p50, µs", true), &dots));
        }
        out
    }

    /// All as one page that needs no network.
    pub fn page(&self) -> String {
        let words = [
            format!("{}, kernel {}, {}", self.origin.machine, self.origin.kernel, self.origin.date),
            format!("Workload: {}. Goal: {}. {}", self.mix.name, self.goal.words(), self.ending()),
        ];
        let mut rows =
            vec![["settings", "cost", "interval", "rounds", "p50", "rate", "CPU of one"].map(String::from).to_vec()];
        for tried in self.ranked() {
            let f = self.figures(&tried.point).unwrap_or_default();
            let interval = tried.interval().map_or(String::new(), |i| format!("{:.3} to {:.3}", i.low, i.high));
            rows.push(vec![
                self.space.words(&tried.point),
                three(tried.middle()),
                interval,
                tried.ratios.len().to_string(),
                time(f.p50),
                rate(f.rate),
                time(f.cpu),
            ]);
        }
        html::plain("Settings for this machine", &words, &self.choice(), &self.pictures(), &rows, &self.toml())
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Lines of at most a hundred characters.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut().expect("there is one");
        if line.len() + word.len() > 100 {
            lines.push(word.into());
        } else {
            *line += if line.is_empty() { "" } else { " " };
            *line += word;
        }
    }
    lines
}
