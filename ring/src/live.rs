//! Wait settings that may change while threads wait by them.

use crate::policy::WaitConfig;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Wait settings that several [`crate::Parker`]s share, and that may be changed at any time: each of them takes a change
/// over at its next wait. Copies are of the same settings.
#[derive(Clone, Debug)]
pub struct LiveWait(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Counts the changes: what a parker looks at.
    changes: AtomicU32,
    config: Mutex<WaitConfig>,
}

impl LiveWait {
    /// Settings to start with.
    pub fn new(config: WaitConfig) -> Self {
        LiveWait(Arc::new(Shared { changes: AtomicU32::new(0), config: Mutex::new(config) }))
    }

    /// Returns the settings as they are now.
    pub fn get(&self) -> WaitConfig {
        *self.0.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the settings. A thread that sleeps or spins takes them over when it waits next.
    pub fn set(&self, config: WaitConfig) {
        *self.0.config.lock().unwrap_or_else(PoisonError::into_inner) = config;
        self.0.changes.fetch_add(1, Ordering::Release);
    }

    /// How many changes there have been.
    pub(crate) fn changes(&self) -> u32 {
        self.0.changes.load(Ordering::Acquire)
    }
}

impl From<WaitConfig> for LiveWait {
    fn from(config: WaitConfig) -> Self {
        LiveWait::new(config)
    }
}

impl From<&LiveWait> for LiveWait {
    fn from(live: &LiveWait) -> Self {
        live.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Parker, Policy};

    #[test]
    fn a_parker_takes_a_change_over_at_its_next_wait() {
        let park = WaitConfig { policy: Policy::Park, ..WaitConfig::default() };
        let live = LiveWait::new(park);
        let mut parker = Parker::new(&live);
        let mut looks = 0;
        let mut spin = |parker: &mut Parker| {
            looks = 0;
            parker.spin(|| {
                looks += 1;
                false
            });
            looks
        };
        assert_eq!(spin(&mut parker), 0);
        live.set(WaitConfig { policy: Policy::Spin, spin_us: 100, ..park });
        assert!(spin(&mut parker) > 0);
        live.set(park);
        assert_eq!(spin(&mut parker), 0);
        assert_eq!(parker.config().policy, Policy::Park);
    }
}
