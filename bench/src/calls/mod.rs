//! What an operation costs in the host's file server, beside the bare system calls that it needs: both in one process,
//! in turn, without a transport.

mod bare;
mod cases;
mod row;
mod served;

pub use cases::run;
pub use row::{table, Row};
