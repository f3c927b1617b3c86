//! Benchmarks of TunnelFS's transports against each other and against the
//! limits of the machine, all in one interleaved run.

pub mod calls;
pub mod compare;
pub mod direct;
pub mod idle;
pub mod in_process;
pub mod interrupt;
pub mod intervals;
pub mod limits;
pub mod measure;
pub mod mount;
pub mod page;
pub mod plan;
pub mod progress;
pub mod ratios;
pub mod record;
pub mod report;
pub mod resources;
pub mod session;
pub mod target;
pub mod tree;
pub mod tune;
pub mod variants;
pub mod workload;
