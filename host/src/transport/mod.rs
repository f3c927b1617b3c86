//! The device side of the three transports.

pub mod ring;
pub mod socket;
pub mod virtqueue;
