//! Which CPU a queue's thread runs on, under `auto`: another core than the guest's thread, where it spins; the guest's
//! core, which both yield to each other; or the guest's core, with a [`CopyHelper`] on another one.
//!
//! None is always best (docs/performance.md). One reader of small requests is served fastest from another core, a busy
//! machine from the guest's core. Large payloads lie in the cache of the guest's core, but two cores copy them faster.
//! So the placements are measured against each other, for small and for large payloads separately. The throughput of
//! all queues together decides: an application that moves to another core takes its requests to another queue. The
//! slower placement is tried again after ever longer times.

use crate::copy_helper::CopyHelper;
use crossbeam_utils::CachePadded;
use parking_lot::Mutex;
use std::cell::OnceCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tunnelfs_ring::{allowed_cpus, set_affinity, LiveWait, PeerCpu};

/// Length of one measurement.
const WINDOW: Duration = Duration::from_millis(20);
/// Requests that a queue serves between two looks at the clock.
const LOOK_EVERY: u32 = 8;
/// Windows in a new placement before the measured one: caches and the guest's way of waiting adapt meanwhile.
const WARMUP_WINDOWS: u32 = 1;
/// Windows between two trials: the first time, and at most. Doubled after each failed trial.
const HOLD: (u32, u32) = (8, 512);
/// A placement must be better than the present one by this factor.
const MIN_GAIN: f64 = 1.05;
/// A rate that changes by this factor means another load: the next trial comes soon.
const CHANGED: f64 = 1.5;

/// Payloads are large if requests move this many bytes on average: enough for two threads to copy.
const LARGE: u64 = 256 << 10;

/// What a queue has served.
#[derive(Clone, Copy, Debug, Default)]
pub struct Served {
    /// Requests.
    pub requests: u32,
    /// Their payload bytes, both ways.
    pub bytes: u64,
}

impl std::ops::AddAssign for Served {
    fn add_assign(&mut self, more: Served) {
        self.requests += more.requests;
        self.bytes += more.bytes;
    }
}

/// Where a queue's thread runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuPlacement {
    /// On another core than the guest's thread, spinning.
    OtherCore,
    /// On the guest's core, yielding it.
    GuestCore,
    /// On the guest's core, with a copy helper on another one.
    GuestCoreWithHelper,
}

/// The two placements that are tried for small payloads, and for large ones. The first guess comes first.
const PLACES: [[CpuPlacement; 2]; 2] =
    [[CpuPlacement::OtherCore, CpuPlacement::GuestCore], [CpuPlacement::GuestCoreWithHelper, CpuPlacement::OtherCore]];

impl CpuPlacement {
    /// What the guest is told about the host's CPU.
    pub fn peer_cpu(self) -> PeerCpu {
        match self {
            CpuPlacement::OtherCore => PeerCpu::Other,
            CpuPlacement::GuestCore | CpuPlacement::GuestCoreWithHelper => PeerCpu::Same,
        }
    }
}

/// A comparison of two placements.
#[derive(Debug)]
struct Trial {
    place: CpuPlacement,
    other: CpuPlacement,
    /// Requests a second in the present placement.
    rate: f64,
    /// Whether the present placement is on trial against that rate.
    trying: bool,
    windows: u32,
    hold: u32,
}

impl Trial {
    fn new([place, other]: [CpuPlacement; 2]) -> Self {
        Trial { place, other, rate: 0.0, trying: false, windows: 0, hold: HOLD.0 }
    }

    fn change(&mut self) {
        std::mem::swap(&mut self.place, &mut self.other);
    }

    /// Takes the rate of a finished window, and decides on `place`.
    fn window(&mut self, rate: f64) {
        self.windows += 1;
        if self.trying {
            if self.windows > WARMUP_WINDOWS {
                self.judge(rate);
            }
        } else {
            if self.rate > 0.0 && !(1.0 / CHANGED..CHANGED).contains(&(rate / self.rate)) {
                self.hold = HOLD.0;
            }
            self.rate = rate;
            if self.windows >= self.hold {
                (self.trying, self.windows) = (true, 0);
                self.change();
            }
        }
    }

    fn judge(&mut self, rate: f64) {
        (self.trying, self.windows) = (false, 0);
        if rate > self.rate * MIN_GAIN {
            (self.rate, self.hold) = (rate, HOLD.0);
        } else {
            self.change();
            self.hold = (self.hold * 2).min(HOLD.1);
        }
    }
}

/// Decides for all queues of a device.
#[derive(Debug)]
pub struct PlacementTuner {
    /// Requests of all queues. In a cache line of its own: each queue's thread writes it.
    served: CachePadded<AtomicU64>,
    state: Mutex<Measured>,
}

const SMALL_TRIAL: usize = 0;
const LARGE_TRIAL: usize = 1;

#[derive(Debug)]
struct Measured {
    trials: [Trial; 2],
    /// The trial that the present load belongs to.
    current: usize,
    since: Instant,
    /// `served` at that time.
    from: u64,
}

impl PlacementTuner {
    pub fn new() -> Self {
        let trials = PLACES.map(Trial::new);
        let state = Measured { trials, current: SMALL_TRIAL, since: Instant::now(), from: 0 };
        PlacementTuner { served: CachePadded::new(AtomicU64::new(0)), state: Mutex::new(state) }
    }

    /// Counts requests, decides at the end of a window, and returns the placement.
    fn count(&self, served: Served) -> CpuPlacement {
        let requests = u64::from(served.requests);
        let total = self.served.fetch_add(requests, Ordering::Relaxed) + requests;
        let mut state = self.state.lock();
        let large = served.bytes >= LARGE * requests.max(1);
        let current = if large { LARGE_TRIAL } else { SMALL_TRIAL };
        if current != state.current && requests > 0 {
            // The window has measured another load so far.
            (state.current, state.since, state.from) = (current, Instant::now(), total);
        }
        let elapsed = state.since.elapsed();
        if elapsed >= WINDOW {
            // A window that contains a pause measures nothing.
            if elapsed < 3 * WINDOW {
                // Another queue may have closed the window with a later total than this one's.
                let rate = total.saturating_sub(state.from) as f64 / elapsed.as_secs_f64();
                let current = state.current;
                state.trials[current].window(rate);
            }
            (state.since, state.from) = (Instant::now(), total.max(state.from));
        }
        state.trials[state.current].place
    }
}

/// One queue thread's placement.
pub struct Placement {
    guest_cpu: usize,
    allowed: Vec<usize>,
    tuner: Arc<PlacementTuner>,
    place: CpuPlacement,
    served: Served,
    wait: LiveWait,
    /// Started when it is first needed.
    helper: OnceCell<Option<Arc<CopyHelper>>>,
}

impl Placement {
    /// For a guest whose thread stays on `guest_cpu`; `None` when there is no other CPU. Moves the calling thread, which
    /// must be the queue's.
    pub fn new(guest_cpu: usize, tuner: Arc<PlacementTuner>, wait: LiveWait) -> Option<Placement> {
        let allowed = allowed_cpus();
        if !allowed.contains(&guest_cpu) || allowed.len() < 2 {
            return None;
        }
        let place = tuner.count(Served::default());
        let (served, helper) = (Served::default(), OnceCell::new());
        let placement = Placement { guest_cpu, allowed, tuner, place, served, wait, helper };
        placement.move_to(place);
        Some(placement)
    }

    /// Moves the calling thread, which has taken the queue over, to the queue's CPU.
    pub fn take_over(&self) {
        self.move_to(self.place);
    }

    /// Where the thread is now.
    pub fn place(&self) -> CpuPlacement {
        self.place
    }

    /// Counts served requests. Returns whether the placement has changed.
    pub fn served(&mut self, more: Served) -> bool {
        if more.requests > 0 {
            self.helper().into_iter().for_each(|helper| helper.keep_spinning());
        }
        self.served += more;
        if self.served.requests < LOOK_EVERY {
            return false;
        }
        let before = self.place;
        self.place = self.tuner.count(std::mem::take(&mut self.served));
        if self.place != before {
            self.move_to(self.place);
        }
        self.place != before
    }

    /// The copy helper, in the placement that has one.
    pub fn helper(&self) -> Option<&Arc<CopyHelper>> {
        if self.place != CpuPlacement::GuestCoreWithHelper {
            return None;
        }
        let start = || {
            let helper = CopyHelper::new(self.others(), self.wait.clone());
            helper.inspect_err(|e| tracing::warn!("no helper for large READs: {e}")).ok().map(Arc::new)
        };
        self.helper.get_or_init(start).as_ref()
    }

    fn others(&self) -> Vec<usize> {
        self.allowed.iter().copied().filter(|&cpu| cpu != self.guest_cpu).collect()
    }

    fn move_to(&self, place: CpuPlacement) {
        let moved = match place {
            CpuPlacement::OtherCore => set_affinity(&self.others()),
            CpuPlacement::GuestCore | CpuPlacement::GuestCoreWithHelper => set_affinity(&[self.guest_cpu]),
        };
        // The thread stays where it is: that is slower, not wrong.
        if let Err(e) = moved {
            tracing::debug!("moving a queue's thread: {e}");
        }
    }
}

impl Drop for Placement {
    fn drop(&mut self) {
        let _ = set_affinity(&self.allowed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(trial: &mut Trial, windows: u32, rate: impl Fn(CpuPlacement) -> f64) -> f64 {
        let mut done = 0.0;
        for _ in 0..windows {
            let r = rate(trial.place);
            done += r;
            trial.window(r);
        }
        done
    }

    #[test]
    fn the_better_place_is_found_and_kept() {
        for better in [CpuPlacement::OtherCore, CpuPlacement::GuestCore] {
            let rate = |p| if p == better { 3.0 } else { 1.0 };
            let mut trial = Trial::new(PLACES[SMALL_TRIAL]);
            run(&mut trial, 100, rate);
            let kept = run(&mut trial, 1000, rate) / 3000.0;
            assert!(kept > 0.97, "{better:?}: {kept}");
        }
    }

    #[test]
    fn large_payloads_start_with_a_helper() {
        let tuner = PlacementTuner::new();
        let small = Served { requests: 8, bytes: 8 * 4096 };
        let large = Served { requests: 8, bytes: 8 << 20 };
        let places = [small, large, small].map(|served| tuner.count(served));
        assert_eq!(places, [CpuPlacement::OtherCore, CpuPlacement::GuestCoreWithHelper, CpuPlacement::OtherCore]);
    }

    /// Two queues count at once: the one with the lower total gets the lock last, and closes the next window.
    #[test]
    fn a_late_queue_closes_a_window_with_a_lower_total() {
        let tuner = PlacementTuner::new();
        {
            let mut state = tuner.state.lock();
            state.from = 1000;
            state.since = Instant::now() - WINDOW - WINDOW / 2;
        }
        assert_eq!(tuner.count(Served { requests: 8, bytes: 8 * 4096 }), CpuPlacement::OtherCore);
        assert_eq!(tuner.state.lock().from, 1000);
    }

    #[test]
    fn a_changed_load_is_tried_again_soon() {
        let mut trial = Trial::new(PLACES[SMALL_TRIAL]);
        run(&mut trial, 3000, |p| if p == CpuPlacement::OtherCore { 10.0 } else { 5.0 });
        let rate = |p| if p == CpuPlacement::GuestCore { 3.0 } else { 1.0 };
        run(&mut trial, 40, rate);
        assert_eq!(trial.place, CpuPlacement::GuestCore);
    }
}
