//! Drawing: bars, dots and lines as SVG, in colours that a style sheet gives for light and dark.

use std::fmt::Write;

/// Width of every picture, in its own units: it scales to its place.
const WIDTH: f64 = 440.0;

/// The colours: what a series' class number stands for, light and dark.
const COLOURS: [(&str, &str); 9] = [
    ("#2563eb", "#6ea8ff"),
    ("#0f9d8a", "#3ecfb8"),
    ("#c2700c", "#f0a850"),
    ("#d03a3a", "#ff8080"),
    ("#7c3aed", "#b794ff"),
    ("#c0267e", "#f472b6"),
    ("#5b7f1a", "#a3cc52"),
    ("#0e7490", "#52c7e6"),
    ("#6b7280", "#9ca3af"),
];

/// The class of a floor: grey.
pub const GREY: usize = COLOURS.len() - 1;

/// The style sheet of pictures, for a page or for a picture that stands alone.
pub fn style() -> String {
    let list = |dark: bool| -> String {
        let colour = |(i, c): (usize, &(&str, &str))| format!("--c{i}:{};", if dark { c.1 } else { c.0 });
        COLOURS.iter().enumerate().map(colour).collect()
    };
    let mut css = format!(
        ":root{{color-scheme:light dark;--bg:#fff;--card:#fff;--ink:#1c2330;--soft:#5c6675;--rule:#e3e7ee;{}}}\n\
         @media (prefers-color-scheme:dark){{:root{{--bg:#12161d;--card:#1a202a;--ink:#e6eaf2;--soft:#9aa5b5;\
         --rule:#2e3746;{}}}}}\n\
         svg text{{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:var(--ink)}}\n\
         svg .title{{font-size:14px;font-weight:600}}svg .own{{font-weight:600}}svg .soft{{fill:var(--soft);font-size:11px}}\n\
         svg .bg{{fill:var(--card)}}svg .rule{{stroke:var(--rule);stroke-width:1}}\n\
         svg .one{{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:4 3}}svg .track{{fill:var(--rule);opacity:.5}}\n",
        list(false),
        list(true)
    );
    for i in 0..COLOURS.len() {
        let _ = writeln!(css, "svg .f{i}{{fill:var(--c{i})}}svg .l{i}{{stroke:var(--c{i});fill:none;stroke-width:2}}");
    }
    css
}

/// A finished picture.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Its title.
    pub title: String,
    height: f64,
    body: String,
}

impl Picture {
    /// As part of a page that has [`style`].
    pub fn inline(&self) -> String {
        let Picture { title, height, body } = self;
        let title = escape(title);
        format!("<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{title}\" xmlns=\"http://www.w3.org/2000/svg\">{body}</svg>")
    }

    /// As a file of its own, with where it was measured below.
    pub fn alone(&self, machine: &str) -> String {
        let mut signed = self.clone();
        signed.text(12.0, self.height + 8.0, "soft", "start", machine);
        signed.height += 18.0;
        let Picture { title, height, body } = &signed;
        let (wide, high, title) = (WIDTH * 1.5, height * 1.5, escape(title));
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{wide:.0}\" height=\"{high:.0}\" viewBox=\"0 0 {WIDTH} \
             {height:.0}\"><title>{title}</title><style>{}</style><rect class=\"bg\" width=\"100%\" height=\"100%\"/>\
             {body}</svg>\n",
            style()
        )
    }

    fn new(title: &str, note: &str) -> Picture {
        let mut picture = Picture { title: title.into(), height: 48.0, body: String::new() };
        picture.text(12.0, 20.0, "title", "start", title);
        picture.text(12.0, 37.0, "soft", "start", note);
        picture
    }

    fn text(&mut self, x: f64, y: f64, class: &str, anchor: &str, text: &str) {
        let text = escape(text);
        let _ = write!(
            self.body,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\" text-anchor=\"{anchor}\">{text}</text>"
        );
    }

    fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let _ = write!(
            self.body,
            "<line class=\"{class}\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/>",
            from.0, from.1, to.0, to.1
        );
    }

    fn dot(&mut self, class: usize, (x, y): (f64, f64), radius: f64, tip: &str) {
        let tip = escape(tip);
        let _ = write!(
            self.body,
            "<circle class=\"f{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\"><title>{tip}</title></circle>"
        );
    }

    /// Names of series with their colours, below all else.
    fn legend(&mut self, names: &[(String, usize)]) {
        let (mut x, mut y) = (14.0, self.height + 10.0);
        for (name, class) in names {
            let wide = 24.0 + name.chars().count() as f64 * 6.6;
            if x + wide > WIDTH - 8.0 && x > 14.0 {
                (x, y) = (14.0, y + 18.0);
            }
            self.dot(*class, (x + 4.0, y - 4.0), 4.5, name);
            self.text(x + 13.0, y, "", "start", name);
            x += wide;
        }
        self.height = y + 12.0;
    }
}

/// For text and attributes of XML and HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// One bar.
#[derive(Clone, Debug)]
pub struct Bar {
    /// What it stands for.
    pub name: String,
    /// Its colour.
    pub class: usize,
    /// Its length.
    pub value: f64,
    /// The figure, for people.
    pub text: String,
}

/// Bars under their names.
pub fn bars(title: &str, note: &str, bars: &[Bar]) -> Picture {
    let mut picture = Picture::new(title, note);
    let longest = bars.iter().map(|b| b.value).fold(0.0, f64::max);
    let full = WIDTH - 24.0;
    for bar in bars {
        let (y, part) = (picture.height + 6.0, if longest > 0.0 { bar.value / longest } else { 0.0 });
        let class = if bar.class == 0 { "own" } else { "" };
        picture.text(12.0, y + 8.0, class, "start", &bar.name);
        picture.text(WIDTH - 12.0, y + 8.0, class, "end", &bar.text);
        let rect = |class: &str, wide: f64| {
            format!(
                "<rect class=\"{class}\" x=\"12\" y=\"{:.1}\" width=\"{wide:.1}\" height=\"9\" rx=\"3\"/>",
                y + 13.0
            )
        };
        picture.body += &rect("track", full);
        picture.body += &rect(&format!("f{}", bar.class), (full * part).max(2.0));
        picture.height += 32.0;
    }
    picture.height += 12.0;
    picture
}

/// A name, its colour and its points.
#[derive(Clone, Debug)]
pub struct Line {
    /// What it stands for.
    pub name: String,
    /// Its colour.
    pub class: usize,
    /// From left to right.
    pub points: Vec<(f64, f64)>,
}

/// How positions on an axis are found, and what is written beside it.
#[derive(Clone, Debug)]
pub struct Axis {
    /// What it shows, with its unit.
    pub label: String,
    /// Powers are equally far apart; otherwise from zero.
    pub log: bool,
    /// What is written where; none: round numbers.
    pub ticks: Vec<(f64, String)>,
}

impl Axis {
    /// An axis with round numbers.
    pub fn new(label: &str, log: bool) -> Axis {
        Axis { label: label.into(), log, ticks: Vec::new() }
    }

    fn scale(&self, values: impl Iterator<Item = f64>) -> (f64, f64) {
        let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
        match self.log {
            true if self.ticks.is_empty() => (low / 1.15, high * 1.15),
            true => (low, high.max(low * 1.01)),
            false => (0.0, (high * 1.08).max(1e-9)),
        }
    }

    fn place(&self, (low, high): (f64, f64), value: f64) -> f64 {
        match self.log {
            true => (value / low).ln() / (high / low).ln(),
            false => (value - low) / (high - low),
        }
    }

    fn marks(&self, (low, high): (f64, f64)) -> Vec<(f64, String)> {
        if !self.ticks.is_empty() {
            return self.ticks.clone();
        }
        let name = |v: f64| match v {
            v if v >= 1e9 => format!("{}G", v / 1e9),
            v if v >= 1e6 => format!("{}M", v / 1e6),
            v if v >= 1e4 => format!("{}k", v / 1e3),
            v => format!("{}", (v * 1e6).round() / 1e6),
        };
        let mut marks = Vec::new();
        if self.log {
            let wide = (high / low).log10() > 3.0;
            for power in -3..13 {
                for step in if wide { &[1.0][..] } else { &[1.0, 2.0, 5.0] } {
                    marks.push(step * 10f64.powi(power));
                }
            }
        } else {
            let rough = high / 5.0;
            let power = 10f64.powf(rough.log10().floor());
            let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|s| s * power >= rough).unwrap_or(10.0) * power;
            marks.extend((0..8).map(|i| f64::from(i) * step));
        }
        marks.into_iter().filter(|v| (low..=high).contains(v)).map(|v| (v, name(v))).collect()
    }
}

/// Lines with their points, over two axes.
pub fn lines(title: &str, note: &str, x: &Axis, y: &Axis, lines: &[Line]) -> Picture {
    let all_x = lines.iter().flat_map(|l| l.points.iter().map(|p| p.0));
    let all_y = lines.iter().flat_map(|l| l.points.iter().map(|p| p.1));
    let mut frame = Frame::new(title, note, (x, all_x), (y, all_y));
    for line in lines {
        let mut way = String::new();
        for (i, p) in line.points.iter().enumerate() {
            let (x, y) = frame.at(*p);
            let _ = write!(way, "{}{x:.1} {y:.1}", if i == 0 { "M" } else { "L" });
        }
        let _ = write!(frame.picture.body, "<path class=\"l{}\" d=\"{way}\"/>", line.class);
        for p in &line.points {
            let tip = format!("{}: {}", line.name, super::figures::three(p.1));
            let at = frame.at(*p);
            frame.picture.dot(line.class, at, 2.6, &tip);
        }
    }
    frame.finish(lines.iter().map(|l| (l.name.clone(), l.class)).collect())
}

/// Dots of one kind, each with what it says when it is pointed at.
#[derive(Clone, Debug)]
pub struct Dots {
    /// What they stand for.
    pub name: String,
    /// Their colour.
    pub class: usize,
    /// Where, and what they say.
    pub points: Vec<((f64, f64), String)>,
}

/// Dots over two axes.
pub fn scatter(title: &str, note: &str, x: &Axis, y: &Axis, dots: &[Dots]) -> Picture {
    let all_x = dots.iter().flat_map(|d| d.points.iter().map(|p| p.0 .0));
    let all_y = dots.iter().flat_map(|d| d.points.iter().map(|p| p.0 .1));
    let mut frame = Frame::new(title, note, (x, all_x), (y, all_y));
    for kind in dots {
        for (point, tip) in &kind.points {
            let at = frame.at(*point);
            frame.picture.dot(kind.class, at, if kind.class == GREY { 3.5 } else { 6.0 }, tip);
        }
    }
    frame.finish(dots.iter().map(|d| (d.name.clone(), d.class)).collect())
}

/// Two axes with their marks, and where values lie between them.
struct Frame {
    picture: Picture,
    across: (Axis, (f64, f64)),
    up: (Axis, (f64, f64)),
}

const LEFT: f64 = 54.0;
const RIGHT: f64 = WIDTH - 18.0;
const TOP: f64 = 64.0;
const BOTTOM: f64 = 270.0;

impl Frame {
    fn new(
        title: &str,
        note: &str,
        (x, all_x): (&Axis, impl Iterator<Item = f64>),
        (y, all_y): (&Axis, impl Iterator<Item = f64>),
    ) -> Frame {
        let across = x.scale(all_x.chain(x.ticks.iter().map(|t| t.0)));
        let picture = Picture::new(title, note);
        let mut frame = Frame { picture, across: (x.clone(), across), up: (y.clone(), y.scale(all_y)) };
        frame.picture.text(LEFT, TOP - 7.0, "soft", "start", &y.label);
        for (value, name) in y.marks(frame.up.1) {
            let (_, at) = frame.at((across.0, value));
            frame.picture.line("rule", (LEFT, at), (RIGHT, at));
            frame.picture.text(LEFT - 6.0, at + 4.0, "soft", "end", &name);
        }
        let mut free = 0.0;
        for (value, name) in x.marks(across) {
            let (at, half) = (frame.at((value, frame.up.1 .1)).0, name.chars().count() as f64 * 3.1);
            frame.picture.line("rule", (at, BOTTOM), (at, BOTTOM + 4.0));
            if at - half >= free {
                frame.picture.text(at, BOTTOM + 17.0, "soft", "middle", &name);
                free = at + half + 5.0;
            }
        }
        frame.picture.text((LEFT + RIGHT) / 2.0, BOTTOM + 33.0, "soft", "middle", &x.label);
        frame
    }

    fn at(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let across = LEFT + (RIGHT - LEFT) * self.across.0.place(self.across.1, x);
        (across, BOTTOM - (BOTTOM - TOP) * self.up.0.place(self.up.1, y))
    }

    fn finish(mut self, names: Vec<(String, usize)>) -> Picture {
        self.picture.height = BOTTOM + 44.0;
        self.picture.legend(&names);
        self.picture
    }
}

/// Ratios on one axis, a row for each name, with a line at 1.
pub fn ratios(title: &str, note: &str, names: &[String], marks: &[Line]) -> Picture {
    let mut picture = Picture::new(title, note);
    let longest = names.iter().map(|n| n.chars().count()).max().unwrap_or(0) as f64;
    let (left, right, top) = ((longest * 6.7 + 24.0).clamp(90.0, 230.0), WIDTH - 20.0, 70.0);
    let axis = Axis::new("", true);
    let values = || marks.iter().flat_map(|l| l.points.iter().map(|p| p.1));
    let scale = axis.scale(values().chain([0.9, 1.1]));
    let at = |v: f64| left + (right - left) * axis.place(scale, v);
    let bottom = top + names.len() as f64 * 26.0;
    for (value, name) in axis.marks(scale) {
        picture.line(if value == 1.0 { "one" } else { "rule" }, (at(value), top - 6.0), (at(value), bottom - 6.0));
        picture.text(at(value), top - 12.0, "soft", "middle", &format!("{name}×"));
    }
    for (i, name) in names.iter().enumerate() {
        let y = top + i as f64 * 26.0 + 8.0;
        picture.text(left - 12.0, y + 4.0, "", "end", name);
        picture.line("rule", (left, y), (right, y));
        for mark in marks {
            for point in mark.points.iter().filter(|p| p.0 == i as f64) {
                let tip = format!("{}, {name}: {}", mark.name, super::figures::times(point.1));
                picture.dot(mark.class, (at(point.1), y), 5.5, &tip);
            }
        }
    }
    picture.height = bottom + 6.0;
    let legend: Vec<_> = marks.iter().map(|l| (l.name.clone(), l.class)).collect();
    picture.legend(&legend);
    picture
}
