//! What TunnelFS's programs have in common beside their settings: the log, `doctor`'s checks, figures, `top`, threads,
//! completions and manual pages.

pub mod control;
pub mod doctor;
pub mod log;
pub mod metrics;
pub mod reload;
pub mod shell;
pub mod thread;
pub mod top;
