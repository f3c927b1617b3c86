//! What a run says, in words: what matters first.

use super::figures::{self, times};
use super::recorded::{Recorded, Role, Row};
use std::collections::BTreeMap;
use tunnelfs_settings::Settings;

/// Sentences about a run, the most important first.
pub fn findings(run: &Recorded) -> Vec<String> {
    let mut out = Vec::new();
    out.extend(headline(run));
    let others = others(run);
    out.extend(others.iter().filter(|o| o.role == Role::Peer).map(Other::sentence));
    out.extend(others.iter().filter(|o| o.role == Role::Floor).map(Other::sentence));
    out.extend(behind(run));
    if out.is_empty() {
        out.push("The run has no rows of the ring beside others: there is nothing to compare.".into());
    }
    out
}

/// Our most telling load, beside the peer that people know.
fn headline(run: &Recorded) -> Option<String> {
    let loads = run.loads();
    let telling = ["READ 4 KiB", "randread-4k", "4k random read, depth 1"];
    let load = telling.into_iter().find(|l| loads.contains(l)).or(loads.into_iter().find(|l| run.ours(l).is_some()))?;
    let ours = run.ours(load)?;
    let known = |row: &&Row| row.role == Role::Peer && row.series.contains("virtiofsd");
    let other = run.usual(load).find(known).or(run.usual(load).find(|r| r.role == Role::Peer))?;
    let ratio = ours.shown().times(&other.shown())?;
    let verb = if ours.shown().lower { "takes" } else { "reaches" };
    let (a, b) = (ours.shown().text, other.shown().text);
    Some(format!("{load}: the ring {verb} {a}, {} {b}: {} as fast.", other.series, times(ratio)))
}

/// One other series beside ours, over all loads.
struct Other {
    name: String,
    role: Role,
    ratios: Vec<(String, f64)>,
}

impl Other {
    fn sentence(&self) -> String {
        let Other { name, ratios, role } = self;
        let ahead = ratios.iter().filter(|(_, r)| *r > 1.0).count();
        let middle = (ratios.iter().map(|(_, r)| r.ln()).sum::<f64>() / ratios.len() as f64).exp();
        let by = |a: &&(String, f64), b: &&(String, f64)| a.1.total_cmp(&b.1);
        let (Some(least), Some(most)) = (ratios.iter().min_by(by), ratios.iter().max_by(by)) else {
            return String::new();
        };
        let range = format!("from {} ({}) to {} ({})", times(least.1), least.0, times(most.1), most.0);
        match role {
            Role::Floor => {
                let what =
                    if name.starts_with("floor") { "a FUSE server that does nothing" } else { "without isolation" };
                format!("Beside {name}, {what}, the ring is {} as fast in the middle, {range}.", times(middle))
            }
            _ => format!(
                "Beside {name} the ring is ahead in {ahead} of {} loads, {} as fast in the middle, {range}.",
                ratios.len(),
                times(middle)
            ),
        }
    }
}

fn others(run: &Recorded) -> Vec<Other> {
    let mut found: BTreeMap<String, Other> = BTreeMap::new();
    for load in run.loads() {
        let Some(ours) = run.ours(load) else { continue };
        for row in run.usual(load).filter(|r| r.role != Role::Ours) {
            let Some(ratio) = ours.shown().times(&row.shown()) else { continue };
            let new = || Other { name: row.series.clone(), role: row.role, ratios: Vec::new() };
            found.entry(row.series.clone()).or_insert_with(new).ratios.push((load.into(), ratio));
        }
    }
    let mut found: Vec<Other> = found.into_values().collect();
    // What others have made comes before what is ours in other ways.
    found.sort_by_key(|o| ["ring", "virtqueue", "socket", "the same"].iter().any(|own| o.name.starts_with(own)));
    found
}

/// Where a peer is faster by more than a few per cent.
fn behind(run: &Recorded) -> Option<String> {
    let mut found = Vec::new();
    for load in run.loads() {
        let Some(ours) = run.ours(load) else { continue };
        let ratio = |row: &Row| ours.shown().times(&row.shown()).map(|r| (r, row.series.clone()));
        let peers = run.usual(load).filter(|r| r.role == Role::Peer).filter_map(ratio);
        if let Some((r, series)) = peers.min_by(|a, b| a.0.total_cmp(&b.0)).filter(|(r, _)| *r < 0.97) {
            found.push(format!("{load} ({} of {series})", times(r)));
        }
    }
    (!found.is_empty()).then(|| format!("Slower than a peer in: {}.", found.join(", ")))
}

/// The machine's own costs, and what they mean for the run.
pub fn limits(run: &Recorded) -> Option<String> {
    let l = run.limits?;
    let wake = l.eventfd_rtt_ns as f64;
    let meaning = match l.eventfd_rtt_ns {
        ns if ns > 20_000 => "dear here: who sleeps for each request pays it, and leads over such peers are large",
        ns if ns > 9_000 => "moderate here: leads over peers that sleep for each request are moderate, too",
        _ => "cheap here: leads over peers that sleep for each request are small",
    };
    Some(format!(
        "Waking another CPU and being woken takes {} ({meaning}). A cache line to another CPU and back takes {} ns ({} \
         ns with a line each way); memory is copied at {}.",
        figures::time(wake),
        l.cacheline_rtt_ns,
        l.two_line_rtt_ns,
        figures::bandwidth(l.memcpy_bytes_per_s as f64)
    ))
}

/// The settings that differ from the defaults, as `table.key = value`.
pub fn changed(run: &Recorded) -> Vec<String> {
    let (Some(config), Ok(defaults)) = (&run.config, serde_json::to_value(Settings::default())) else {
        return Vec::new();
    };
    let mut out = Vec::new();
    for (table, keys) in config.as_object().into_iter().flatten() {
        for (key, value) in keys.as_object().into_iter().flatten() {
            if defaults.get(table).and_then(|t| t.get(key)) != Some(value) {
                out.push(format!("{table}.{key} = {value}"));
            }
        }
    }
    out
}

/// How far the rounds of a row lie apart: half of the middle half, in per cent of the median.
pub fn spread(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |part: f64| sorted.get((part * (sorted.len().max(1) - 1) as f64).round() as usize).copied();
    let (low, middle, high) = (at(0.25)?, at(0.5)?, at(0.75)?);
    (sorted.len() > 1 && middle > 0.0).then(|| (high - low) / 2.0 / middle * 100.0)
}
