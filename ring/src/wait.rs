//! How one side waits for the other: it spins for a bounded time, then sleeps.
//!
//! A wake-up across cores costs up to 25 us each way; a spin costs the core. Which is better depends on whether the peer
//! has a core of its own, and that changes with the load. `auto` learns it from how its spins end. While other threads of
//! the machine wait for CPUs, it does not spin at all: they would pay for it.

use crate::live::LiveWait;
use crate::policy::{Goal, Policy, WaitConfig};
use crate::pressure::CpuPressure;
use crossbeam_utils::Backoff;
use std::time::{Duration, Instant};

/// How the waits of one [`Parker`] ended.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Waits that ended while spinning.
    pub spun: u64,
    /// Waits that had to sleep.
    pub parked: u64,
    /// Times that the peer slept and had to be notified.
    pub kicks: u64,
}

/// Failed spins in a row after which `auto` sleeps at once.
const MAX_FAILED_SPINS: u32 = 4;
/// Short sleeps that `auto` must see before it spins again: the first bound, and the last.
const RETRY_AFTER_SLEEPS: std::ops::RangeInclusive<u32> = 2..=4096;
/// Looks between two reads of the clock.
const LOOKS_PER_CLOCK: u32 = 64;
/// Calls of sched_yield(2) before a sleep, under [`SpinMode::Handoff`].
const HANDOFF_YIELDS: u32 = 2;
/// A yield that takes longer than this counts as a failed spin: sleeping would have been cheaper.
const MAX_YIELD: Duration = Duration::from_micros(200);
/// Longest time between two reads of the clock without a yield: [`LOOKS_PER_CLOCK`] looks take 1 to 5 us. After more,
/// another thread had this core. That may have been the peer, which could reply only because this thread was preempted.
const MAX_LOOKS: Duration = Duration::from_micros(10);

/// What a spin does between two looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SpinMode {
    /// Nothing: the peer has a core of its own. Under `auto` a spin in which this thread was preempted counts as failed.
    #[default]
    Busy,
    /// Calls sched_yield(2), because the peer may need this core (a vCPU thread, say). Under `auto` a yield longer than
    /// 200 us counts as a failed spin.
    Yield,
    /// The peer runs on this core. `auto` yields twice, then sleeps; the other policies spin as under `Busy`.
    Handoff,
}

/// One kind of wait, as [`Parker::wait`] needs it.
pub trait Wait {
    /// What a sleep can fail with.
    type Error;

    /// Whether there is something to do.
    fn ready(&self) -> bool;

    /// Asks the peer for a notification, with a full fence behind it. [`Self::ready`] is looked at once more afterwards.
    fn arm(&mut self);

    /// Sleeps until a notification comes.
    ///
    /// # Errors
    /// Its own.
    fn sleep(&mut self) -> Result<(), Self::Error>;

    /// Tells the peer that no notification is wanted any more.
    fn disarm(&mut self);
}

/// Waits for one peer: it spins as the policy says, then sleeps, and learns from both.
#[derive(Debug)]
pub struct Parker {
    /// Where `config` comes from, and the changes there that it has.
    live: LiveWait,
    changes: u32,
    config: WaitConfig,
    mode: SpinMode,
    /// Failed spins in a row.
    failed: u32,
    /// Short sleeps still to be seen before the next spin.
    until_retry: u32,
    /// What `until_retry` starts from; doubles with each spin that fails.
    retry: u32,
    asleep_since: Option<Instant>,
    /// Whether `auto` would keep others from running.
    pressure: CpuPressure,
    /// Counts, for statistics.
    pub counters: Counters,
}

impl Parker {
    /// A parker that has learnt nothing yet. It waits by a [`WaitConfig`] for good, or by a [`LiveWait`] as it changes.
    pub fn new(config: impl Into<LiveWait>) -> Self {
        let live = config.into();
        let (changes, config) = (live.changes(), live.get());
        let retry = *RETRY_AFTER_SLEEPS.start();
        Parker {
            live,
            changes,
            config,
            mode: SpinMode::default(),
            failed: 0,
            until_retry: retry,
            retry,
            asleep_since: None,
            pressure: pressure(config.goal),
            counters: Counters::default(),
        }
    }

    /// As [`Self::new`], for spins of another mode.
    pub fn with_mode(config: impl Into<LiveWait>, mode: SpinMode) -> Self {
        Parker { mode, ..Parker::new(config) }
    }

    /// Returns the policy and its budgets.
    pub fn config(&self) -> WaitConfig {
        self.config
    }

    /// Returns where the policy and its budgets come from.
    pub fn live(&self) -> &LiveWait {
        &self.live
    }

    /// Takes over what has been changed, and forgets what `auto` has learnt.
    #[cold]
    fn reload(&mut self) {
        let mode = self.mode;
        *self = Parker { counters: self.counters, ..Parker::with_mode(&self.live, mode) };
    }

    /// Sets what a spin does between two looks. A change forgets what `auto` has learnt.
    pub fn set_mode(&mut self, mode: SpinMode) {
        if mode != self.mode {
            (self.mode, self.failed, self.retry) = (mode, 0, *RETRY_AFTER_SLEEPS.start());
        }
    }

    /// Waits until `w` is ready or has been notified: spins, arms, looks again, sleeps, disarms.
    ///
    /// # Errors
    /// Those of [`Wait::sleep`]; `w` is disarmed then too.
    pub fn wait<W: Wait>(&mut self, w: &mut W) -> Result<(), W::Error> {
        if self.spin(|| w.ready()) {
            return Ok(());
        }
        w.arm();
        let slept = if w.ready() { Ok(()) } else { w.sleep() };
        w.disarm();
        self.unparked();
        slept
    }

    /// Spins for `ready` as long as the policy says. Returns `true` once it holds, and `false` when the caller must
    /// sleep, and call [`Self::unparked`] afterwards.
    pub fn spin(&mut self, ready: impl FnMut() -> bool) -> bool {
        if self.live.changes() != self.changes {
            self.reload();
        }
        let (budget, auto) = (self.budget(), self.config.policy == Policy::Auto);
        let pressure = auto.then_some(&mut self.pressure);
        let spun = match self.mode {
            SpinMode::Handoff if auto => hand_off(ready).into(),
            _ if budget.is_zero() => Spun::TimedOut,
            SpinMode::Yield => spin_for(budget, Some(if auto { MAX_YIELD } else { budget }), pressure, ready),
            _ => spin_for(budget, None, pressure, ready),
        };
        match spun {
            Spun::Ready => (self.failed, self.retry) = (0, *RETRY_AFTER_SLEEPS.start()),
            _ if auto && !budget.is_zero() => self.fail(),
            _ => {}
        }
        if spun == Spun::TimedOut {
            self.counters.parked += 1;
            self.asleep_since = auto.then(Instant::now);
            return false;
        }
        self.counters.spun += 1;
        true
    }

    /// Learns from the sleep that followed a failed [`Self::spin`].
    ///
    /// After a short sleep spinning might have paid, if the peer has a core of its own. A long sleep teaches nothing:
    /// there was nothing to do.
    pub fn unparked(&mut self) {
        let Some(since) = self.asleep_since.take() else { return };
        let now = Instant::now();
        self.pressure.is_scarce(now);
        if now - since < self.auto_budget() {
            self.until_retry = self.until_retry.saturating_sub(1);
        }
    }

    fn fail(&mut self) {
        self.failed += 1;
        if self.failed >= MAX_FAILED_SPINS {
            self.until_retry = self.retry;
            self.retry = (self.retry * 2).min(*RETRY_AFTER_SLEEPS.end());
        }
    }

    fn auto_budget(&self) -> Duration {
        Duration::from_micros(self.config.auto_us.into())
    }

    fn budget(&self) -> Duration {
        match self.config.policy {
            Policy::Park => Duration::ZERO,
            Policy::Spin => Duration::from_micros(self.config.spin_us.into()),
            Policy::Auto if self.mode == SpinMode::Handoff || self.config.goal == Goal::Cpu => Duration::ZERO,
            Policy::Auto if self.pressure.was_scarce() => Duration::ZERO,
            Policy::Auto if self.failed < MAX_FAILED_SPINS || self.until_retry == 0 => self.auto_budget(),
            Policy::Auto => Duration::ZERO,
        }
    }
}

/// What `auto` looks at beside its own spins.
fn pressure(goal: Goal) -> CpuPressure {
    match goal {
        Goal::Balanced => CpuPressure::new(),
        Goal::Latency | Goal::Cpu => CpuPressure::default(),
    }
}

/// How a spin ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spun {
    /// Ready within the budget.
    Ready,
    /// Ready, but only after another thread had this core: for longer than [`MAX_YIELD`], or without a yield.
    ReadyLate,
    /// Not ready within the budget.
    TimedOut,
}

impl From<bool> for Spun {
    fn from(ready: bool) -> Self {
        if ready {
            Spun::Ready
        } else {
            Spun::TimedOut
        }
    }
}

/// Lets other threads of this core run, twice. Cheaper for both sides than a sleep and a wake-up, when
/// the peer does the same. Returns whether `ready` holds.
pub fn hand_off(mut ready: impl FnMut() -> bool) -> bool {
    for _ in 0..HANDOFF_YIELDS {
        if ready() {
            return true;
        }
        std::thread::yield_now();
    }
    ready()
}

/// Polls `ready` for up to `budget`. Reads the clock only every [`LOOKS_PER_CLOCK`] looks, so that an immediate reply
/// costs no clock read. With `max_yield` it calls sched_yield(2) as often, and ends after a yield that took longer. With
/// `pressure` it ends when CPUs are scarce.
fn spin_for(
    budget: Duration,
    max_yield: Option<Duration>,
    mut pressure: Option<&mut CpuPressure>,
    mut ready: impl FnMut() -> bool,
) -> Spun {
    let mut clock: Option<(Instant, Instant)> = None;
    loop {
        for _ in 0..LOOKS_PER_CLOCK {
            if ready() {
                let preempted = max_yield.is_none() && clock.is_some_and(|(_, last)| last.elapsed() > MAX_LOOKS);
                return if preempted { Spun::ReadyLate } else { Spun::Ready };
            }
            // One pause per look: a longer back-off would add its length to the latency.
            Backoff::new().spin();
        }
        let before = Instant::now();
        if let Some(most) = max_yield {
            std::thread::yield_now();
            if before.elapsed() > most {
                return if ready() { Spun::ReadyLate } else { Spun::TimedOut };
            }
        }
        let (first, _) = *clock.get_or_insert((before, before));
        let scarce = pressure.as_mut().is_some_and(|pressure| pressure.is_scarce(before));
        if scarce || before - first >= budget {
            return ready().into();
        }
        clock = Some((first, before));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auto() -> Parker {
        Parker::new(WaitConfig { auto_us: 1000, goal: Goal::Latency, ..WaitConfig::default() })
    }

    fn fail(w: &mut Parker, looks: &mut u64) {
        let found = w.spin(|| {
            *looks += 1;
            false
        });
        assert!(!found);
    }

    #[test]
    fn auto_retries_after_more_and_more_short_sleeps() {
        let (mut w, mut looks) = (auto(), 0);
        for _ in 0..MAX_FAILED_SPINS {
            fail(&mut w, &mut looks);
            w.unparked();
        }
        let mut gaps = Vec::new();
        for _ in 0..3 {
            let mut gap = 0;
            loop {
                let before = looks;
                fail(&mut w, &mut looks);
                w.unparked();
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
        for _ in 0..MAX_FAILED_SPINS {
            fail(&mut w, &mut looks);
        }
        let before = looks;
        for _ in 0..5 {
            fail(&mut w, &mut looks);
            std::thread::sleep(Duration::from_millis(2));
            w.unparked();
        }
        assert_eq!(looks, before);
    }

    #[test]
    fn a_spin_that_finds_something_is_repeated() {
        let mut w = auto();
        for _ in 0..100 {
            assert!(w.spin(|| true));
        }
        assert_eq!(w.counters.spun, 100);
    }

    #[test]
    fn auto_yields_and_sleeps_on_a_shared_core() {
        let mut w = auto();
        w.set_mode(SpinMode::Handoff);
        for _ in 0..2 * MAX_FAILED_SPINS {
            let mut looks = 0;
            fail(&mut w, &mut looks);
            assert_eq!(looks, u64::from(HANDOFF_YIELDS) + 1);
            w.unparked();
        }
        assert!(w.spin(|| true));
    }

    #[test]
    fn park_never_looks() {
        let (mut w, mut looks) = (Parker::new(WaitConfig { policy: Policy::Park, ..WaitConfig::default() }), 0);
        fail(&mut w, &mut looks);
        assert_eq!(looks, 0);
    }

    /// Ready on the second look after `arm`, if at all.
    struct Armed {
        armed: bool,
        ready_when_armed: bool,
        slept: bool,
        disarmed: bool,
    }

    impl Wait for Armed {
        type Error = ();

        fn ready(&self) -> bool {
            self.armed && self.ready_when_armed
        }

        fn arm(&mut self) {
            self.armed = true;
        }

        fn sleep(&mut self) -> Result<(), ()> {
            self.slept = true;
            Err(())
        }

        fn disarm(&mut self) {
            self.disarmed = true;
        }
    }

    #[test]
    fn a_wait_looks_again_after_arming_and_disarms_after_an_error() {
        for (ready_when_armed, result) in [(true, Ok(())), (false, Err(()))] {
            let mut parker = Parker::new(WaitConfig { policy: Policy::Park, ..WaitConfig::default() });
            let mut wait = Armed { armed: false, ready_when_armed, slept: false, disarmed: false };
            assert_eq!(parker.wait(&mut wait), result);
            assert!(wait.disarmed && wait.slept != ready_when_armed);
        }
    }
}
