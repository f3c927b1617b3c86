//! How a side waits for the other: it spins for a bounded time, then sleeps.
//!
//! A wake across cores costs some 25 us each way, a spin nothing but the core.
//! Which is right depends on whether the peer has a core of its own, and that
//! changes with the load: `auto` learns it from whether its spins pay off.

use crate::PeerCpu;
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WaitConfig {
    /// The policy.
    pub policy: Policy,
    /// How long `spin` spins before it sleeps.
    pub spin_us: u32,
    /// How long `auto` spins at the most before it sleeps.
    pub auto_us: u32,
}

impl Default for WaitConfig {
    fn default() -> Self {
        WaitConfig { policy: Policy::Auto, spin_us: 10_000, auto_us: 500 }
    }
}

/// What the waits came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct WaitStats {
    /// Waits that ended while spinning.
    pub spun: u64,
    /// Waits that had to sleep.
    pub parked: u64,
    /// Times that the peer had to be rung.
    pub rung: u64,
}

/// After this many spins in a row that found nothing, or too late, `auto` sleeps at once.
const GIVE_UP: u32 = 4;
/// Bounds of how many short sleeps `auto` sees before it tries to spin again.
const RETRY: std::ops::RangeInclusive<u32> = 2..=4096;
/// Between two looks at the clock.
const LOOKS_PER_CLOCK: u32 = 64;
/// How often who shares a core lets the other one have it before going to sleep.
const OFFERS: u32 = 2;
/// Who does not get its core back for so long had better slept, and been woken.
const AWAY: Duration = Duration::from_micros(200);

/// One side's waiting on one queue.
///
/// ```text
/// while !found { if !waiter.spin(ready) { announce; look again; sleep; waiter.awake() } }
/// ```
#[derive(Debug)]
pub struct Waiter {
    config: WaitConfig,
    /// Failed spins in a row.
    failed: u32,
    /// Short sleeps still to be seen before the next try.
    until_retry: u32,
    /// What `until_retry` starts from; doubles with each try in vain.
    retry: u32,
    asleep_since: Option<Instant>,
    hint: PeerCpu,
    /// Counts, for statistics.
    pub stats: WaitStats,
}

impl Waiter {
    /// A waiter that has learnt nothing yet.
    pub fn new(config: WaitConfig) -> Self {
        let (failed, retry) = (0, *RETRY.start());
        Waiter {
            config,
            failed,
            until_retry: retry,
            retry,
            asleep_since: None,
            hint: PeerCpu::Unknown,
            stats: WaitStats::default(),
        }
    }

    /// Its policy and budgets.
    pub fn config(&self) -> WaitConfig {
        self.config
    }

    /// Under `auto`: the peer has told how it is best waited for.
    pub fn advise(&mut self, hint: PeerCpu) {
        if hint != self.hint {
            (self.hint, self.failed, self.retry) = (hint, 0, *RETRY.start());
        }
    }

    /// Spins for `ready` as long as the policy has it; `false`: go to sleep.
    pub fn spin(&mut self, ready: impl FnMut() -> bool) -> bool {
        self.spin_with(false, ready)
    }

    /// The same for a peer that may need this very core, as a virtual machine's processors do: it is offered to others
    /// all the time, and `auto` takes their work on it for a reason to sleep.
    pub fn spin_sharing(&mut self, ready: impl FnMut() -> bool) -> bool {
        self.spin_with(true, ready)
    }

    fn spin_with(&mut self, shares: bool, ready: impl FnMut() -> bool) -> bool {
        let (budget, auto) = (self.budget(), self.config.policy == Policy::Auto);
        let away = if auto { AWAY } else { budget };
        let spin = match self.hint {
            PeerCpu::Same if auto => offer_core(ready).into(),
            _ if budget.is_zero() => Spin::Vain,
            _ => spin_for(budget, shares.then_some(away), ready),
        };
        match spin {
            Spin::Found => (self.failed, self.retry) = (0, *RETRY.start()),
            _ if auto && !budget.is_zero() => self.fail(),
            _ => {}
        }
        if spin == Spin::Vain {
            self.stats.parked += 1;
            self.asleep_since = auto.then(Instant::now);
            return false;
        }
        self.stats.spun += 1;
        true
    }

    /// The sleep that followed a failed [`Self::spin`] is over.
    ///
    /// A short one says that spinning might have paid, if the peer has a core
    /// of its own; a long one says nothing, for nobody wanted anything.
    pub fn awake(&mut self) {
        let Some(since) = self.asleep_since.take() else { return };
        if since.elapsed() < self.auto_budget() {
            self.until_retry = self.until_retry.saturating_sub(1);
        }
    }

    fn fail(&mut self) {
        self.failed += 1;
        if self.failed >= GIVE_UP {
            self.until_retry = self.retry;
            self.retry = (self.retry * 2).min(*RETRY.end());
        }
    }

    fn auto_budget(&self) -> Duration {
        Duration::from_micros(self.config.auto_us.into())
    }

    fn budget(&self) -> Duration {
        match self.config.policy {
            Policy::Park => Duration::ZERO,
            Policy::Spin => Duration::from_micros(self.config.spin_us.into()),
            Policy::Auto if self.hint == PeerCpu::Same => Duration::ZERO,
            Policy::Auto if self.failed < GIVE_UP || self.until_retry == 0 => self.auto_budget(),
            Policy::Auto => Duration::ZERO,
        }
    }
}

/// How a spin ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spin {
    Found,
    /// Found, but by then somebody else had long had the core.
    Late,
    /// Nothing came within the budget.
    Vain,
}

impl From<bool> for Spin {
    fn from(found: bool) -> Self {
        if found {
            Spin::Found
        } else {
            Spin::Vain
        }
    }
}

/// Looks for what comes from this same core: lets others run on it, a few times. Cheaper on both sides than to sleep
/// and be woken, when the other side does the same.
pub fn offer_core(mut ready: impl FnMut() -> bool) -> bool {
    for _ in 0..OFFERS {
        if ready() {
            return true;
        }
        std::thread::yield_now();
    }
    ready()
}

/// Looks without the clock first: what comes at once must not pay for reading it. Who shares lets others have the
/// core, for so long at the most: without a core of its own it would be kept from just those who are waited for.
fn spin_for(budget: Duration, shares: Option<Duration>, mut ready: impl FnMut() -> bool) -> Spin {
    let mut first = None;
    loop {
        for _ in 0..LOOKS_PER_CLOCK {
            if ready() {
                return Spin::Found;
            }
            // One pause a look: a longer back-off would add its length to the latency.
            Backoff::new().spin();
        }
        let before = Instant::now();
        if let Some(most) = shares {
            std::thread::yield_now();
            if before.elapsed() > most {
                return if ready() { Spin::Late } else { Spin::Vain };
            }
        }
        if before - *first.get_or_insert(before) >= budget {
            return ready().into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auto() -> Waiter {
        Waiter::new(WaitConfig { policy: Policy::Auto, spin_us: 0, auto_us: 1000 })
    }

    fn fail(w: &mut Waiter, looks: &mut u64) {
        let found = w.spin(|| {
            *looks += 1;
            false
        });
        assert!(!found);
    }

    #[test]
    fn auto_gives_up_and_tries_again_after_ever_more_short_sleeps() {
        let (mut w, mut looks) = (auto(), 0);
        for _ in 0..GIVE_UP {
            fail(&mut w, &mut looks);
            w.awake();
        }
        let mut gaps = Vec::new();
        for _ in 0..3 {
            let mut gap = 0;
            loop {
                let before = looks;
                fail(&mut w, &mut looks);
                w.awake();
                if looks > before {
                    break gaps.push(gap);
                }
                gap += 1;
            }
        }
        assert!(gaps.windows(2).all(|g| g[0] < g[1]), "{gaps:?}");
    }

    #[test]
    fn a_long_sleep_teaches_nothing() {
        let (mut w, mut looks) = (auto(), 0);
        for _ in 0..GIVE_UP {
            fail(&mut w, &mut looks);
        }
        let before = looks;
        for _ in 0..5 {
            fail(&mut w, &mut looks);
            std::thread::sleep(Duration::from_millis(2));
            w.awake();
        }
        assert_eq!(looks, before);
    }

    #[test]
    fn a_spin_that_pays_is_repeated() {
        let mut w = auto();
        for _ in 0..100 {
            assert!(w.spin(|| true));
        }
        assert_eq!(w.stats.spun, 100);
    }

    #[test]
    fn on_a_shared_core_auto_offers_it_and_sleeps() {
        let mut w = auto();
        w.advise(PeerCpu::Same);
        for _ in 0..2 * GIVE_UP {
            let mut looks = 0;
            fail(&mut w, &mut looks);
            assert_eq!(looks, u64::from(OFFERS) + 1);
            w.awake();
        }
        assert!(w.spin(|| true));
    }

    #[test]
    fn park_never_looks() {
        let (mut w, mut looks) = (Waiter::new(WaitConfig { policy: Policy::Park, spin_us: 9, auto_us: 9 }), 0);
        fail(&mut w, &mut looks);
        assert_eq!(looks, 0);
    }
}
