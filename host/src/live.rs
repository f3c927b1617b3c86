//! The settings that a running host takes over.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use tunnelfs_ring::LiveWait;
use tunnelfs_settings::Settings;

/// The keys of the settings in a [`Live`]; a host's log level is its program's.
pub const LIVE_KEYS: &[&str] =
    &["wait.policy", "wait.goal", "wait.spin_us", "wait.auto_us", "host.thread_pool_size", "log.level"];

/// What may be changed while guests are served. Copies are of the same settings.
#[derive(Clone, Debug)]
pub struct Live {
    pub(crate) wait: LiveWait,
    /// Threads for late requests, of each guest.
    pub(crate) spares: Arc<AtomicUsize>,
}

impl Live {
    /// What `settings` start with.
    pub fn new(settings: &Settings) -> Self {
        let spares = Arc::new(AtomicUsize::new(settings.host.thread_pool_size));
        Live { wait: LiveWait::new(settings.wait), spares }
    }

    /// Takes `settings` over, for all guests.
    pub fn set(&self, settings: &Settings) {
        self.wait.set(settings.wait);
        self.spares.store(settings.host.thread_pool_size, Ordering::Relaxed);
    }
}
