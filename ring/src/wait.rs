//! How a side waits for the other: it spins for a bounded time, then sleeps.
//!
//! A wake across cores costs some 25 us each way, a spin nothing but the core.
//! Which is right depends on whether the peer has a core of its own, and that
//! changes with the load: `auto` learns it from whether its spins pay off.

use crossbeam_utils::Backoff;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// The wait policies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Spin up to `spin_us`, then sleep.
    Spin,
    /// Sleep at once.
    Park,
    /// Spin up to `auto_us` while that pays, sleep at once while it does not.
    #[default]
    Auto,
}

impl std::str::FromStr for Policy {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "spin" => Ok(Policy::Spin),
            "park" => Ok(Policy::Park),
            "auto" => Ok(Policy::Auto),
            _ => Err(format!("`{s}` is not a wait policy: spin, park or auto")),
        }
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Policy::Spin => "spin",
            Policy::Park => "park",
            Policy::Auto => "auto",
        })
    }
}

/// A policy and its budgets, microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitConfig {
    /// The policy.
    pub policy: Policy,
    /// How long `spin` spins before it sleeps.
    pub spin_us: u32,
    /// How long `auto` spins at the most before it sleeps.
    pub auto_us: u32,
}

/// What the waits came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct WaitStats {
    /// Waits that ended while spinning.
    pub spun: u64,
    /// Waits that had to sleep.
    pub parked: u64,
}

/// After this many failed spins in a row `auto` sleeps at once.
const GIVE_UP: u32 = 4;
/// While it sleeps at once, `auto` tries a spin again each so many waits.
const PROBE_EVERY: u32 = 256;
/// Between two looks at the clock.
const LOOKS_PER_CLOCK: u32 = 64;

/// One side's waiting on one queue.
#[derive(Debug)]
pub struct Waiter {
    config: WaitConfig,
    failed: u32,
    since_probe: u32,
    /// Counts, for statistics.
    pub stats: WaitStats,
}

impl Waiter {
    /// A waiter that has learnt nothing yet.
    pub fn new(config: WaitConfig) -> Self {
        Waiter { config, failed: 0, since_probe: 0, stats: WaitStats::default() }
    }

    /// Spins for `ready` as long as the policy has it; `false`: go to sleep.
    pub fn spin(&mut self, ready: impl FnMut() -> bool) -> bool {
        let budget = self.budget();
        let found = !budget.is_zero() && spin_for(budget, ready);
        if found {
            self.failed = 0;
            self.stats.spun += 1;
        } else {
            self.failed = self.failed.saturating_add(1);
            self.stats.parked += 1;
        }
        found
    }

    fn budget(&mut self) -> Duration {
        match self.config.policy {
            Policy::Park => Duration::ZERO,
            Policy::Spin => Duration::from_micros(self.config.spin_us.into()),
            Policy::Auto if self.failed < GIVE_UP => Duration::from_micros(self.config.auto_us.into()),
            Policy::Auto => {
                self.since_probe += 1;
                if self.since_probe < PROBE_EVERY {
                    return Duration::ZERO;
                }
                self.since_probe = 0;
                Duration::from_micros(self.config.auto_us.into())
            }
        }
    }
}

fn spin_for(budget: Duration, mut ready: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    let backoff = Backoff::new();
    loop {
        for _ in 0..LOOKS_PER_CLOCK {
            if ready() {
                return true;
            }
            // One pause a look: a longer back-off would add its length to the latency.
            backoff.reset();
            backoff.spin();
        }
        if start.elapsed() >= budget {
            return ready();
        }
    }
}
