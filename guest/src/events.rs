//! What becomes of a mount, told to the program that has it.

use crate::error::Error;
use std::sync::Arc;
use std::time::Duration;

/// Something has happened to a mount.
#[derive(Debug)]
pub enum Event {
    /// It can be used.
    Mounted,
    /// The host has gone. Programs that use the mount wait, for as long as `mount.reconnect_timeout` says.
    HostLost,
    /// Another host has taken over.
    HostBack {
        /// How long there was none.
        after: Duration,
    },
    /// It is served no more: it was unmounted, or the error says why. The last event.
    Ended(Result<(), Error>),
}

/// Called for each event, from threads of the mount: one that takes long holds up what comes after it. It must not use
/// the mount's files before [`Event::Mounted`], or after [`Event::HostLost`].
#[derive(Clone, Default)]
pub struct Listener(Option<Arc<dyn Fn(Event) + Send + Sync>>);

impl Listener {
    /// Calls `on_event`.
    pub fn new(on_event: impl Fn(Event) + Send + Sync + 'static) -> Listener {
        Listener(Some(Arc::new(on_event)))
    }

    pub(crate) fn tell(&self, event: Event) {
        if let Some(on_event) = &self.0 {
            on_event(event);
        }
    }
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "a callback" } else { "none" })
    }
}
