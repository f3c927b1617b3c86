//! Benchmarks of TunnelFS's transports against each other and against the
//! limits of the machine, all in one interleaved run.

pub mod direct;
pub mod inline;
pub mod limits;
pub mod plan;
pub mod record;
pub mod report;
pub mod session;
pub mod workload;
