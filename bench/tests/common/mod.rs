//! What several test programs need beside the rig of `mount/`.

pub mod pair;
pub mod sys;
