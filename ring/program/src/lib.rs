//! What TunnelFS's programs have in common beside their settings: the log, `doctor`'s checks, completions and manual
//! pages.

pub mod doctor;
pub mod log;
pub mod reload;
pub mod shell;
