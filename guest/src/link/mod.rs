//! Ways to reach a host.

pub mod local;
