//! Safe ends of one queue: region, rings, slots, notification and waiting behind a few methods.
//!
//! A [`Slot`] is a token. Whoever holds it owns the payload buffer: [`Driver::submit`] moves it to the device, and
//! [`Driver::reap`] brings it back.

mod device;
mod driver;
mod handoff;
mod payload;
mod sleep;

pub use device::{Device, Request};
pub use driver::{Driver, Reply, Slot, SubmitError};
pub use handoff::Handoff;
pub use payload::Payload;
