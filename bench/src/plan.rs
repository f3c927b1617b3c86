//! The matrix: which cases are measured.

use serde::{Deserialize, Serialize};
use std::time::Duration;
use tunnelfs_ring::Policy;

/// What carries the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum TransportKind {
    /// The shared-memory ring.
    Ring,
    /// A plain split virtqueue.
    Virtqueue,
    /// Messages streamed over a UNIX socket.
    Socket,
    /// The server called as a function: no transport.
    Direct,
    /// A plain virtqueue to stock virtiofsd.
    Virtiofsd,
}

/// Where the host runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum HostLocation {
    /// A process of its own.
    Separate,
    /// The host library in the guest's process.
    InProcess,
}

/// One operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// Answered by the host's server with nothing done.
    Noop,
    /// GETATTR of an open file.
    Getattr,
    /// LOOKUP of a name in the root.
    Lookup,
    /// READ at a moving offset.
    Read,
    /// WRITE at a moving offset.
    Write,
}

/// Which CPUs guest and host have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Cpus {
    /// All of the machine's.
    All,
    /// Both sides share one.
    One,
}

/// One pair of guest and host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Pair {
    /// What carries the messages.
    pub transport: TransportKind,
    /// Where the host runs.
    pub placement: HostLocation,
    /// How both sides wait.
    pub policy: Policy,
    /// Where both run.
    pub cpus: Cpus,
}

/// One load on a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Load {
    /// The operation.
    pub op: Op,
    /// Payload bytes of one operation.
    pub size: u32,
    /// Requests in flight on each queue.
    pub depth: u32,
    /// Request queues, each with a thread of its own.
    pub queues: u32,
}

/// What is measured: every load on every pair, in rounds.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The pairs that are compared.
    pub pairs: Vec<Pair>,
    /// What each of them has to do.
    pub loads: Vec<Load>,
    /// How often each pair gets its turn with each load.
    pub rounds: usize,
    /// Length of a turn.
    pub turn: Duration,
}

/// What a run is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matrix {
    /// One request at a time.
    Latency,
    /// Many requests in flight.
    Throughput,
    /// Both.
    All,
}

const POLICIES: [Policy; 3] = [Policy::Spin, Policy::Park, Policy::Auto];
const OURS: [TransportKind; 3] = [TransportKind::Ring, TransportKind::Virtqueue, TransportKind::Socket];

impl Plan {
    /// The planned matrix; `quick` is a smaller one, of less than a minute.
    pub fn new(matrix: Matrix, quick: bool) -> Plan {
        let mut loads = Vec::new();
        if matrix != Matrix::Throughput {
            loads.extend(latency(quick));
        }
        if matrix != Matrix::Latency {
            loads.extend(throughput(quick));
        }
        let (rounds, turn_ms) = if quick { (3, 50) } else { (6, 80) };
        Plan { pairs: pairs(quick), loads, rounds, turn: Duration::from_millis(turn_ms) }
    }
}

/// All pairs that are compared.
pub fn pairs(quick: bool) -> Vec<Pair> {
    use {Cpus::*, HostLocation::*};
    let pair = |transport, placement, policy, cpus| Pair { transport, placement, policy, cpus };
    let mut pairs = vec![pair(TransportKind::Direct, InProcess, Policy::Spin, All)];
    for policy in POLICIES {
        let small = quick && policy != Policy::Auto;
        pairs.extend(OURS.map(|via| pair(via, Separate, policy, All)));
        if !small {
            pairs.extend(OURS.map(|via| pair(via, InProcess, policy, All)));
            pairs.push(pair(TransportKind::Virtiofsd, Separate, policy, All));
        }
        let shared: &[TransportKind] = if small { &[TransportKind::Ring] } else { &OURS };
        pairs.extend(shared.iter().map(|&via| pair(via, Separate, policy, One)));
    }
    pairs
}

/// One request at a time.
fn latency(quick: bool) -> Vec<Load> {
    let sizes: &[u32] = if quick { &[4096] } else { &[512, 4096, 16 << 10, 64 << 10, 256 << 10, 1 << 20] };
    let one = |op, size| Load { op, size, depth: 1, queues: 1 };
    let small = [Op::Noop, Op::Getattr, Op::Lookup].map(|op| one(op, 0));
    let data = sizes.iter().flat_map(|&size| [one(Op::Read, size), one(Op::Write, size)]);
    small.into_iter().chain(data).collect()
}

/// Many requests in flight.
fn throughput(quick: bool) -> Vec<Load> {
    let data = |size, depth, queues| [Op::Read, Op::Write].map(|op| Load { op, size, depth, queues });
    let noop = |depth, queues| Load { op: Op::Noop, size: 0, depth, queues };
    let mut loads = vec![noop(16, 1)];
    loads.extend(data(1 << 20, 8, 1));
    if !quick {
        loads.extend([noop(1, 2), noop(16, 2)]);
        for queues in [1, 2] {
            loads.extend(data(4096, 16, queues));
            loads.extend(data(64 << 10, 8, queues));
        }
        loads.extend(data(1 << 20, 4, 2));
    }
    loads
}
