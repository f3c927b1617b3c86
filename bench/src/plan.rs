//! The matrix: which cases are measured.

use serde::Serialize;
use tunnelfs_ring::Policy;

/// What carries the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Via {
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// A process of its own.
    Separate,
    /// The host library in the guest's process.
    InProcess,
}

/// One operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
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

/// One pair of guest and host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Pair {
    /// What carries the messages.
    pub transport: Via,
    /// Where the host runs.
    pub placement: Placement,
    /// How both sides wait.
    pub policy: Policy,
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
    /// Request queues.
    pub queues: u32,
}

/// All pairs that are compared.
pub fn pairs(virtiofsd: bool) -> Vec<Pair> {
    let mut pairs = vec![Pair { transport: Via::Direct, placement: Placement::InProcess, policy: Policy::Spin }];
    for policy in [Policy::Spin, Policy::Park, Policy::Auto] {
        for transport in [Via::Ring, Via::Virtqueue, Via::Socket] {
            for placement in [Placement::Separate, Placement::InProcess] {
                pairs.push(Pair { transport, placement, policy });
            }
        }
        if virtiofsd {
            pairs.push(Pair { transport: Via::Virtiofsd, placement: Placement::Separate, policy });
        }
    }
    pairs
}

const SMALL: [Op; 3] = [Op::Noop, Op::Getattr, Op::Lookup];

/// One request at a time.
pub fn latency(quick: bool) -> Vec<Load> {
    let sizes: &[u32] = if quick { &[4096] } else { &[512, 4096, 16 << 10, 64 << 10, 256 << 10, 1 << 20] };
    let one = |op, size| Load { op, size, depth: 1, queues: 1 };
    let small = SMALL.map(|op| one(op, 0));
    let data = sizes.iter().flat_map(|&size| [one(Op::Read, size), one(Op::Write, size)]);
    small.into_iter().chain(data).collect()
}

/// Many requests in flight.
pub fn throughput(quick: bool) -> Vec<Load> {
    let data = |size, depth, queues| [Op::Read, Op::Write].map(|op| Load { op, size, depth, queues });
    let mut loads = vec![Load { op: Op::Noop, size: 0, depth: 16, queues: 1 }];
    loads.extend(data(1 << 20, 8, 1));
    if !quick {
        loads.extend(data(4096, 16, 1));
        loads.extend(data(64 << 10, 8, 1));
    }
    loads
}
