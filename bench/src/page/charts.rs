//! Which pictures a run gives.

use super::figures;
use super::recorded::{Recorded, Role, Row};
use super::svg::{bars, lines, ratios, Axis, Bar, Line, Picture, GREY};

/// Pictures of one kind, with what they show.
pub struct Section {
    /// Its heading.
    pub title: &'static str,
    /// How to read them.
    pub text: &'static str,
    /// At least one.
    pub pictures: Vec<Picture>,
}

/// Most loads in one picture, and most pictures of a kind where each load could have one.
const MOST: usize = 12;
const FEW: usize = 6;

/// Every series' colour: ours first, floors grey.
pub struct Palette(Vec<(String, usize)>);

impl Palette {
    /// The colours of a run.
    pub fn of(run: &Recorded) -> Palette {
        let mut known: Vec<(String, usize)> = Vec::new();
        let mut next = 0;
        for row in run.rows.iter().filter(|r| r.usual).chain(&run.rows) {
            if known.iter().any(|(name, _)| *name == row.series) {
                continue;
            }
            let class = match row.role {
                Role::Ours if !known.iter().any(|(_, class)| *class == 0) => 0,
                Role::Floor if matches!(row.series.as_str(), "native" | "direct call") => GREY,
                _ => {
                    next += 1;
                    1 + (next - 1) % (GREY - 1)
                }
            };
            known.push((row.series.clone(), class));
        }
        Palette(known)
    }

    /// The colour of a series.
    pub fn class(&self, series: &str) -> usize {
        self.0.iter().find(|(name, _)| name == series).map_or(GREY, |(_, class)| *class)
    }
}

/// The one picture: how many times as fast the ring is as each other series, load by load.
pub fn first(run: &Recorded) -> Option<Picture> {
    let palette = Palette::of(run);
    let loads: Vec<&str> = run
        .loads()
        .into_iter()
        .filter(|l| run.ours(l).is_some_and(telling) && run.usual(l).count() > 1)
        .take(MOST)
        .collect();
    let mut marks: Vec<Line> = Vec::new();
    for (i, load) in loads.iter().enumerate() {
        let ours = run.ours(load)?.shown();
        for other in run.usual(load).filter(|r| r.role != Role::Ours) {
            let Some(times) = ours.times(&other.shown()) else { continue };
            let point = (i as f64, times);
            match marks.iter_mut().find(|m| m.name == other.series) {
                Some(mark) => mark.points.push(point),
                None => {
                    let class = palette.class(&other.series);
                    marks.push(Line { name: other.series.clone(), class, points: vec![point] });
                }
            }
        }
    }
    let names: Vec<String> = loads.iter().map(|l| l.to_string()).collect();
    let note = "right of 1×: the ring is faster; grey: the floor, without any isolation";
    (!marks.is_empty()).then(|| ratios("How many times as fast the ring is as…", note, &names, &marks))
}

/// Several queues tell more of the machine than of a transport: they have pictures further down.
fn telling(row: &Row) -> bool {
    row.queues == 1 || !row.load.contains(" queues")
}

/// All other pictures that the run has the data for.
pub fn sections(run: &Recorded) -> Vec<Section> {
    let section = |title, text, pictures| Section { title, text, pictures };
    let all = [
        section(
            "Side by side",
            "One picture a load, policy auto on all CPUs. Times: shorter is better; rates and bandwidths: longer is \
             better. In brackets, how many times as fast the ring is.",
            comparisons(run),
        ),
        section(
            "Latency by percentile",
            "How long all but the slowest requests take: 99.9 % is the slowest one in a thousand. A flat line keeps \
             its promise.",
            percentiles(run),
        ),
        section("By size", "One request at a time, at the sizes that were measured.", sizes(run)),
        section(
            "Latency against load",
            "More requests in flight from point to point: the rate grows to the right until only the waiting does.",
            under_load(run),
        ),
        section("Rate against ring size", "The same load over rings of several sizes.", ring_sizes(run)),
        section(
            "CPU per operation",
            "Both sides' processes, without the program that asks. A spinning side uses its core whether or not \
             there is work.",
            processor(run),
        ),
        section("Requests per file", "What the kernel asked the guest for each file of a tree.", requests(run)),
    ];
    all.into_iter().filter(|s| !s.pictures.is_empty()).collect()
}

fn comparisons(run: &Recorded) -> Vec<Picture> {
    let palette = Palette::of(run);
    let picture = |load: &str| {
        let mut rows: Vec<&Row> = run.usual(load).collect();
        rows.sort_by_key(|row| match row.role {
            Role::Ours => 0,
            Role::Peer => 1,
            Role::Floor => 2,
        });
        let ours = run.ours(load).map(Row::shown);
        let bar = |row: &&Row| {
            let shown = row.shown();
            let times = ours.as_ref().filter(|_| row.role != Role::Ours).and_then(|o| o.times(&shown));
            let text = times.map_or(shown.text.clone(), |t| format!("{}  ({})", shown.text, figures::times(t)));
            Bar { name: row.series.clone(), class: palette.class(&row.series), value: shown.value, text }
        };
        let lower = rows.first()?.shown().lower;
        let note = if lower { "time of one; shorter is better" } else { "longer is better" };
        (rows.len() > 1).then(|| bars(load, note, &rows.iter().map(bar).collect::<Vec<_>>()))
    };
    run.loads().into_iter().filter_map(picture).collect()
}

/// One percentile's place on an axis on which each further nine is as far as the one before.
fn nines(percentile: f64) -> f64 {
    1.0 / (1.0 - percentile / 100.0).max(1e-6)
}

fn percentiles(run: &Recorded) -> Vec<Picture> {
    let palette = Palette::of(run);
    let ticks = [0.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999];
    let picture = |load: &str| {
        let line = |row: &Row| {
            let points = row.curve.iter().filter(|(p, _)| *p < 100.0).map(|(p, ns)| (nines(*p), ns / 1e3)).collect();
            Line { name: row.series.clone(), class: palette.class(&row.series), points }
        };
        let all: Vec<Line> = run.usual(load).map(line).filter(|l| l.points.len() > 2).collect();
        let most = all.iter().flat_map(|l| l.points.iter().map(|p| p.0)).fold(0.0, f64::max);
        let named = ticks.into_iter().filter(|p| nines(*p) <= most * 1.001);
        let x = Axis { ticks: named.map(|p| (nines(p), format!("{p} %"))).collect(), ..Axis::new("percentile", true) };
        (!all.is_empty()).then(|| lines(load, "latency by percentile, µs", &x, &Axis::new("µs", true), &all))
    };
    let mut loads = run.loads();
    // What is asked singly shows a transport's own time.
    loads.sort_by_key(|load| run.ours(load).map_or(u32::MAX, |row| row.in_flight));
    loads.into_iter().filter_map(picture).take(FEW).collect()
}

/// A picture of lines by size, of those usual rows that ask one at a time.
fn by_size(run: &Recorded, op: &str, unit: &str, value: fn(&Row) -> Option<f64>) -> Option<Picture> {
    let palette = Palette::of(run);
    let rows = || run.rows.iter().filter(|r| r.usual && r.op == op && r.in_flight == 1 && r.size > 0);
    let mut sizes: Vec<u64> = rows().map(|r| r.size).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let mut all: Vec<Line> = Vec::new();
    for row in rows() {
        let Some(y) = value(row) else { continue };
        let point = (row.size as f64, y);
        match all.iter_mut().find(|l| l.name == row.series) {
            Some(line) => line.points.push(point),
            None => {
                let class = palette.class(&row.series);
                all.push(Line { name: row.series.clone(), class, points: vec![point] });
            }
        }
    }
    let ticks = sizes.iter().map(|s| (*s as f64, figures::bytes(*s))).collect();
    let x = Axis { ticks, ..Axis::new("bytes of a request", true) };
    let what = if unit == "µs" { "p50" } else { "bandwidth" };
    let title = format!("{} by size: {what}", op.to_uppercase());
    (sizes.len() > 1).then(|| lines(&title, "one request at a time, policy auto", &x, &Axis::new(unit, true), &all))
}

fn p50_us(row: &Row) -> Option<f64> {
    row.at(50.0).map(|ns| ns / 1e3)
}

fn megabytes(row: &Row) -> Option<f64> {
    Some(row.rate * row.size as f64 / 1e6)
}

fn sizes(run: &Recorded) -> Vec<Picture> {
    let both = |op| [by_size(run, op, "µs", p50_us), by_size(run, op, "MB/s", megabytes)];
    ["read", "write"].into_iter().flat_map(both).flatten().collect()
}

/// A load without what it says about requests in flight: `READ 4 KiB`, `randread-4k`.
fn without_depth(row: &Row) -> &str {
    let load = row.load.as_str();
    let ends = [" depth ", " x ", "-qd", "-2jobs"];
    ends.iter().filter_map(|end| load.find(end)).min().map_or(load, |at| &load[..at])
}

/// Rows that are alike but for one thing, as lines over it.
fn grouped<'a>(
    rows: impl Iterator<Item = &'a Row>,
    name: fn(&Row) -> String,
    palette: &Palette,
    point: impl Fn(&Row) -> Option<(f64, f64)>,
) -> Vec<Line> {
    let mut all: Vec<Line> = Vec::new();
    for row in rows {
        let Some(point) = point(row) else { continue };
        match all.iter_mut().find(|l| l.name == name(row)) {
            Some(line) => line.points.push(point),
            None => all.push(Line { name: name(row), class: palette.class(&row.series), points: vec![point] }),
        }
    }
    all.retain(|line| line.points.len() > 1);
    all
}

fn under_load(run: &Recorded) -> Vec<Picture> {
    let palette = Palette::of(run);
    let mut names: Vec<&str> = run.rows.iter().filter(|r| r.seconds.is_none()).map(without_depth).collect();
    names.dedup();
    names.sort_unstable();
    names.dedup();
    let picture = |name: &str| {
        let point = |percentile: f64| move |row: &Row| Some((row.rate / 1e3, row.at(percentile)? / 1e3));
        let rows = || {
            let mut rows: Vec<&Row> =
                run.rows.iter().filter(|r| r.usual && r.queues == 1 && without_depth(r) == name).collect();
            rows.sort_by_key(|r| r.in_flight);
            rows.into_iter()
        };
        let series = |row: &Row| row.series.clone();
        let two = [(50.0, "p50"), (99.0, "p99")].map(|(percentile, word)| {
            let all = grouped(rows(), series, &palette, point(percentile));
            let title = format!("{name}: {word} against rate");
            let axes = (Axis::new("thousands a second", false), Axis::new(&format!("{word}, µs"), true));
            (!all.is_empty()).then(|| lines(&title, "from one request in flight to many", &axes.0, &axes.1, &all))
        });
        two.into_iter().flatten()
    };
    names.into_iter().flat_map(picture).take(FEW).collect()
}

fn ring_sizes(run: &Recorded) -> Vec<Picture> {
    let palette = Palette::of(run);
    let measured = |pick: fn((u32, u32)) -> u32| {
        let mut values: Vec<u32> = run.rows.iter().filter_map(|r| r.ring.map(pick)).collect();
        values.sort_unstable();
        values.dedup();
        values
    };
    let mut pictures = Vec::new();
    for (word, pick) in [("slots", (|r| r.1) as fn((u32, u32)) -> u32), ("entries", |r| r.0)] {
        let values = measured(pick);
        if values.len() < 2 {
            continue;
        }
        let ticks: Vec<_> = values.iter().map(|v| (f64::from(*v), v.to_string())).collect();
        for load in run.loads() {
            let family = |row: &Row| row.family.clone();
            let point = |row: &Row| Some((f64::from(pick(row.ring?)), row.rate / 1e3));
            let mut rows: Vec<&Row> =
                run.rows.iter().filter(|r| r.usual && r.load == load && r.ring.is_some()).collect();
            rows.retain(|r| r.role != Role::Floor);
            rows.sort_by_key(|r| r.ring.map(pick));
            let all = grouped(rows.into_iter(), family, &palette, point);
            if all.is_empty() {
                continue;
            }
            let x = Axis { ticks: ticks.clone(), ..Axis::new(&format!("{word} of a queue"), true) };
            let y = Axis::new("thousands a second", false);
            pictures.push(lines(&format!("{load}, by {word}"), "rate against ring size", &x, &y, &all));
        }
    }
    pictures
}

fn processor(run: &Recorded) -> Vec<Picture> {
    let palette = Palette::of(run);
    let picture = |load: &str| {
        let ours = run.ours(load).and_then(|r| r.cpu_ns);
        let bar = |row: &Row| {
            let value = row.cpu_ns?;
            let times = ours.filter(|_| row.role != Role::Ours).map(|o| figures::times(value / o));
            let text = times.map_or(figures::time(value), |t| format!("{}  ({t})", figures::time(value)));
            Some(Bar { name: row.series.clone(), class: palette.class(&row.series), value, text })
        };
        let all: Vec<Bar> = run.usual(load).filter_map(bar).collect();
        let note = "CPU time of one operation; shorter is better; in brackets: times the ring's";
        (all.len() > 1).then(|| bars(load, note, &all))
    };
    run.loads().into_iter().filter_map(picture).take(MOST).collect()
}

fn requests(run: &Recorded) -> Vec<Picture> {
    let palette = Palette::of(run);
    let picture = |load: &str| {
        let bar = |row: &Row| {
            let value = row.requests_per_file?;
            let (name, class) = (row.series.clone(), palette.class(&row.series));
            Some(Bar { name, class, value, text: figures::three(value) })
        };
        let all: Vec<Bar> = run.usual(load).filter_map(bar).collect();
        (!all.is_empty()).then(|| bars(load, "requests for each file; shorter is better", &all))
    };
    run.loads().into_iter().filter_map(picture).collect()
}

/// Several runs of one kind: our rows of each load beside each other.
pub fn runs(all: &[Recorded]) -> Vec<Picture> {
    let Some(first) = all.first().filter(|_| all.len() > 1) else { return Vec::new() };
    let picture = |load: &str| {
        let bar = |(i, run): (usize, &Recorded)| {
            let shown = run.ours(load)?.shown();
            let before = first.ours(load)?.shown();
            let times = shown.times(&before).filter(|_| i > 0).map(figures::times);
            let text = times.map_or(shown.text.clone(), |t| format!("{}  ({t})", shown.text));
            Some(Bar { name: run.name.clone(), class: i % GREY, value: shown.value, text })
        };
        let bars_of: Vec<Bar> = all.iter().enumerate().filter_map(bar).collect();
        let note = format!("the ring in each run; in brackets: times as fast as in {}", first.name);
        (bars_of.len() > 1).then(|| bars(load, &note, &bars_of))
    };
    first.loads().into_iter().filter_map(picture).collect()
}

/// The pictures that lie beside a recorded run, each with the end of its file's name.
pub fn files(run: &Recorded) -> Vec<(String, Picture)> {
    let mut all: Vec<(String, Option<Picture>)> = vec![("first".into(), first(run))];
    for op in ["read", "write"] {
        all.push((format!("{op}-latency"), by_size(run, op, "µs", p50_us)));
        all.push((format!("{op}-bandwidth"), by_size(run, op, "MB/s", megabytes)));
    }
    all.into_iter().filter_map(|(end, picture)| picture.map(|p| (end, p))).collect()
}
