//! What the project is held to: ratios of cases within one run.

use crate::plan::{Cpus, HostLocation, Op, TransportKind};
use crate::record::{Row, Run};
use serde::Serialize;
use tunnelfs_ring::Policy;

/// The bound of a ratio.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Lower is better.
    AtMost(f64),
    /// Higher is better.
    AtLeast(f64),
}

/// One ratio.
#[derive(Clone, Debug, Serialize)]
pub struct Ratio {
    /// Of what, in words.
    pub what: String,
    /// The ratio.
    pub value: f64,
    /// The target.
    pub bound: Bound,
    /// Why it may be missed, in a clause.
    pub why: String,
}

impl Ratio {
    /// Whether the target is reached.
    pub fn reached(&self) -> bool {
        match self.bound {
            Bound::AtMost(limit) => self.value <= limit,
            Bound::AtLeast(limit) => self.value >= limit,
        }
    }
}

/// Cases by their coordinates; separate hosts (the direct call has none) and one queue.
struct Cases<'a>(&'a [Row]);

impl<'a> Cases<'a> {
    fn find(
        &self,
        via: TransportKind,
        policy: Policy,
        cpus: Cpus,
        (op, size, depth): (Op, u32, u32),
    ) -> Option<&'a Row> {
        let placement = if via == TransportKind::Direct { HostLocation::InProcess } else { HostLocation::Separate };
        self.0.iter().find(|r| {
            (r.transport, r.placement, r.policy, r.cpus) == (via, placement, policy, cpus)
                && (r.op, r.size, r.depth, r.queues) == (op, size, depth, 1)
        })
    }
}

const NOOP: (Op, u32, u32) = (Op::Noop, 0, 1);
const READ_4K: (Op, u32, u32) = (Op::Read, 4096, 1);
const READ_1M: (Op, u32, u32) = (Op::Read, 1 << 20, 8);

/// The targets' ratios, as far as the run has their rows.
pub fn ratios(run: &Run) -> Vec<Ratio> {
    use {Bound::*, Cpus::*, Policy::*};
    let cases = Cases(&run.rows);
    let p50 = |via, policy, cpus, case| cases.find(via, policy, cpus, case).map(|r| r.p50_ns as f64);
    let rate = |via, policy, case| cases.find(via, policy, All, case).map(|r| r.ops_per_s);
    let line = Some(run.limits.cacheline_rtt_ns as f64).filter(|ns| *ns > 0.0);
    let ring_noop = p50(TransportKind::Ring, Spin, All, NOOP);
    let mut out = Vec::new();
    let mut add = |what: &str, value: Option<f64>, limit: Option<f64>, bound, why: &str| {
        if let (Some(value), Some(limit)) = (value, limit) {
            out.push(Ratio { what: what.into(), value: value / limit, bound, why: why.into() });
        }
    };
    let wake = run.limits.eventfd_rtt_ns as f64 / 1e3;
    let wake = format!("both sides sleep, and being woken across cores and back takes {wake:.1} µs of either");
    let beyond = |of: Option<f64>, trip: u64| {
        let rest = of.map_or(0.0, |of| of - 2.0 * trip as f64);
        format!("building, checking and copying two entries takes {rest:.0} ns beyond two trips")
    };
    let beyond = [run.limits.cacheline_rtt_ns, run.limits.two_line_rtt_ns].map(|trip| beyond(ring_noop, trip));
    add("no-op p50, spin: ring / cache-line round trip", ring_noop, line, AtMost(2.0), &beyond[0]);
    let lines = Some(run.limits.two_line_rtt_ns as f64).filter(|ns| *ns > 0.0);
    add("the same / round trip on two lines", ring_noop, lines, AtMost(2.0), &beyond[1]);
    for policy in [Spin, Park, Auto] {
        let (ring, virtqueue) =
            (p50(TransportKind::Ring, policy, All, NOOP), p50(TransportKind::Virtqueue, policy, All, NOOP));
        add(
            &format!("no-op p50, {policy}: ring / virtqueue"),
            ring,
            virtqueue,
            AtMost(0.5),
            if policy == Park { &wake } else { "what both wait for is most of it" },
        );
    }
    let bound = p50(TransportKind::Direct, Spin, All, READ_4K).zip(line).map(|(direct, line)| direct + 3.0 * line);
    add(
        "READ 4 KiB p50, spin: ring / (direct call + 3 round trips)",
        p50(TransportKind::Ring, Spin, All, READ_4K),
        bound,
        AtMost(1.0),
        "64 cache lines of payload cross between the cores, too",
    );
    let (ring, direct) = (rate(TransportKind::Ring, Spin, READ_1M), rate(TransportKind::Direct, Spin, READ_1M));
    add(
        "READ 1 MiB depth 8 bandwidth, spin: ring / direct call",
        ring,
        direct,
        AtLeast(0.95),
        "the payload is read by another core than the one that copied it",
    );
    let (socket, ring) = (p50(TransportKind::Socket, Auto, All, NOOP), p50(TransportKind::Ring, Auto, All, NOOP));
    add(
        "no-op p50, auto, a spare core: socket / ring",
        socket,
        ring,
        AtLeast(20.0),
        "the socket's sides had little need to sleep in this run",
    );
    let (socket, ring) = (p50(TransportKind::Socket, Auto, One, NOOP), p50(TransportKind::Ring, Auto, One, NOOP));
    add(
        "no-op p50, auto, both on one core: socket / ring",
        socket,
        ring,
        AtLeast(1.0),
        "both hand one core over, which costs either the same switches",
    );
    out.extend(auto_ratios(&cases));
    out.extend(run.echo.chunks_exact(2).filter(|pair| pair[0].policy == Spin).map(|pair| Ratio {
        what: "echo p50, spin: endpoint / raw queues".into(),
        value: pair[1].p50_ns as f64 / pair[0].p50_ns as f64,
        bound: AtMost(1.1),
        why: "the safe ends copy a slot's header and check it".into(),
    }));
    out.extend(run.idle.iter().map(|idle| Ratio {
        what: format!("idle {:?}, {}: share of a core", idle.pair.transport, idle.pair.policy),
        value: idle.guest_cpu + idle.host_cpu,
        bound: AtMost(0.001),
        why: "a thread was still looking for work when it was watched".into(),
    }));
    out
}

/// `auto` against the better of `spin` and `park`, for each load of the ring.
fn auto_ratios(cases: &Cases<'_>) -> Vec<Ratio> {
    let ring = cases.0.iter().filter(|r| r.transport == TransportKind::Ring && r.placement == HostLocation::Separate);
    let autos = ring.filter(|r| r.policy == Policy::Auto && r.queues == 1);
    let ratio = |auto: &Row| {
        let case = (auto.op, auto.size, auto.depth);
        let other = |policy| cases.find(TransportKind::Ring, policy, auto.cpus, case).map(|r| r.ops_per_s);
        let best = other(Policy::Spin)?.max(other(Policy::Park)?);
        let (low, high) = auto.rates.iter().fold((f64::MAX, 0.0f64), |(low, high), r| (low.min(*r), high.max(*r)));
        let place = if auto.cpus == Cpus::One { "one core" } else { "a spare core" };
        Some(Ratio {
            what: format!("{}, {place}: auto / better of spin and park", auto.load_name()),
            value: auto.ops_per_s / best,
            bound: Bound::AtLeast(0.9),
            why: format!("its rounds span {:.1} to {:.1} k/s", low / 1e3, high / 1e3),
        })
    };
    autos.filter_map(ratio).collect()
}
