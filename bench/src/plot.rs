//! The plots of a run.

use crate::plan::{Cpus, HostLocation, Op, TransportKind};
use crate::record::{Row, Run};
use plotters::prelude::*;
use std::io;
use std::path::Path;
use tunnelfs_ring::Policy;

const SERIES: [(TransportKind, RGBColor); 5] = [
    (TransportKind::Ring, RED),
    (TransportKind::Virtqueue, BLUE),
    (TransportKind::Socket, GREEN),
    (TransportKind::Virtiofsd, MAGENTA),
    (TransportKind::Direct, BLACK),
];

/// Draws what the run has beside `page`; the files' names.
///
/// # Errors
/// When a file cannot be written.
pub fn draw(run: &Run, page: &Path) -> io::Result<Vec<String>> {
    let stem = page.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut drawn = Vec::new();
    for op in [Op::Read, Op::Write] {
        for (kind, unit) in [("latency", "p50, µs"), ("bandwidth", "MB/s")] {
            let value = if kind == "latency" { |r: &Row| r.p50_ns as f64 / 1e3 } else { |r: &Row| r.bytes_per_s / 1e6 };
            let lines = lines(run, op, value);
            if lines.iter().any(|(_, points)| points.len() > 1) {
                let name = format!("{stem}-{}-{kind}.svg", format!("{op:?}").to_lowercase());
                let title = format!("{op:?} {kind} by size: one request at a time, spinning, separate host");
                chart(&page.with_file_name(&name), &title, unit, &lines)
                    .map_err(|e| io::Error::other(e.to_string()))?;
                drawn.push(name);
            }
        }
    }
    Ok(drawn)
}

type CacheLine = ((TransportKind, RGBColor), Vec<(f64, f64)>);

fn lines(run: &Run, op: Op, value: fn(&Row) -> f64) -> Vec<CacheLine> {
    let of = |(via, colour)| {
        let ours = |r: &&Row| {
            let placement = if via == TransportKind::Direct { HostLocation::InProcess } else { HostLocation::Separate };
            (r.transport, r.placement, r.policy, r.cpus) == (via, placement, Policy::Spin, Cpus::All)
                && (r.op, r.depth, r.queues) == (op, 1, 1)
        };
        ((via, colour), run.rows.iter().filter(ours).map(|r| (f64::from(r.size) / 1024.0, value(r))).collect())
    };
    SERIES.map(of).into_iter().filter(|line: &CacheLine| !line.1.is_empty()).collect()
}

fn chart(file: &Path, title: &str, unit: &str, lines: &[CacheLine]) -> Result<(), Box<dyn std::error::Error>> {
    let points = || lines.iter().flat_map(|line| &line.1);
    let range = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)))
    };
    let (x, y) = (range(&mut points().map(|p| p.0)), range(&mut points().map(|p| p.1)));
    let area = SVGBackend::new(file, (800, 480)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d((x.0 * 0.9..x.1 * 1.1).log_scale(), (y.0 * 0.8..y.1 * 1.25).log_scale())?;
    chart.configure_mesh().x_desc("KiB").y_desc(unit).light_line_style(TRANSPARENT).draw()?;
    for ((via, colour), points) in lines {
        let colour = *colour;
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(3))?
            .label(format!("{via:?}").to_lowercase())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    area.present()?;
    Ok(())
}
