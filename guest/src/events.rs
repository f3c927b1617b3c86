//! Events of a mount, for the program that embeds it.

use crate::error::Error;
use std::sync::Arc;
use std::time::Duration;

/// An event of a mount.
#[derive(Debug)]
pub enum Event {
    /// The mount can be used.
    Mounted,
    /// The host has died. Programs that use the mount now wait for another host, for at most `mount.reconnect_timeout`.
    HostLost,
    /// Another host has taken over.
    HostBack {
        /// How long there was no host.
        after: Duration,
    },
    /// The service has ended: unmounted (`Ok`), or failed. This is the last event.
    Ended(Result<(), Error>),
}

/// A callback for each event, called by threads of the mount. The calling thread waits for it, so it should return
/// soon. It must not use the mount's files before [`Event::Mounted`], or after [`Event::HostLost`].
#[derive(Clone, Default)]
pub struct Listener(Option<Arc<dyn Fn(Event) + Send + Sync>>);

impl Listener {
    /// Makes a listener that calls `on_event`.
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
