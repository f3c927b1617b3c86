//! Nothing holds up a queue: a request that takes too long keeps its thread, and another thread takes the queue.
//!
//! A thread of a [`Crew`] owns a [`Duty`] (a queue, a connection) and does everything itself. Before it handles a
//! request it lends the duty to its [`Lane`]; afterwards it takes it back. A watcher looks at all lanes twice per
//! [`BOUND`]. Where the same request is still there, the watcher takes the duty and gives it to a spare thread. The late
//! thread delivers its one answer when it has it, and becomes a spare.
//!
//! ```text
//! owner:   lend(duty) -- handle the request -- reclaim() -> the duty, or nothing: late
//! watcher:            -- same request as at the last look? take() -> a spare thread's inbox
//! ```
//!
//! A request costs its thread four stores and two loads; of the stores two are locked. The watcher sleeps while no
//! request comes. The number of threads is bounded: when all are held up, the next requests wait.

use crate::interrupt;
use crossbeam_utils::CachePadded;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// A request that takes longer is late: its queue goes on without it.
const BOUND: Duration = Duration::from_millis(1);
/// Between two looks of the watcher. Late is who is seen twice with one request: after half of the bound or more.
const TICK: Duration = Duration::from_micros(BOUND.as_micros() as u64 / 2);
/// Looks without any request after which the watcher sleeps: 20 ms. The next request wakes it.
const IDLE_TICKS: u32 = 40;
/// Threads without work that are kept. Others end.
const MAX_IDLE: usize = 2;
/// Most threads of one crew, whatever has been abandoned: stuck threads of requests that nobody waits for count too.
const MAX_THREADS: usize = 1024;
/// Between two signals to a request that is to be interrupted. The first may come before its system call.
const SIGNAL_EVERY: Duration = Duration::from_millis(10);
/// How long an INTERRUPT is kept for a request that has not been seen yet: it may be on its way in another queue.
const KEEP_INTERRUPT: Duration = Duration::from_secs(2);
/// INTERRUPTs that are kept. The oldest makes room.
const MAX_INTERRUPTS: usize = 256;

/// What a thread serves.
pub trait Duty: Sized + Send + 'static {
    /// Serves until the duty has ended, or has been taken over (then `self` has moved into `lane`).
    fn run(self: Box<Self>, lane: &Lane<Self>);

    /// The duty is taken away from a late request's thread. Called before that thread goes on, and before another thread
    /// runs the duty.
    fn taken(&mut self);
}

/// The words that a thread writes for each request.
struct Hot<D> {
    /// The duty, while its thread handles a request.
    lent: AtomicPtr<D>,
    /// Changes with each request.
    sequence: AtomicU32,
    /// The request's FUSE `unique`.
    unique: AtomicU64,
}

/// What others do with a thread that is late.
#[derive(Default)]
struct Late {
    late: bool,
    signalled: Option<Instant>,
}

/// One thread's place.
pub struct Lane<D> {
    hot: CachePadded<Hot<D>>,
    /// Which duty the thread runs: its number.
    number: AtomicUsize,
    /// `sequence` at the watcher's last look. The watcher's own.
    seen: AtomicU32,
    late: Mutex<Late>,
    thread: libc::pid_t,
    watch: Arc<Watch>,
}

/// How the watcher is woken.
struct Watch {
    asleep: CachePadded<AtomicBool>,
    thread: Mutex<Option<Thread>>,
}

impl Watch {
    fn wake(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            if let Some(thread) = &*self.thread.lock() {
                thread.unpark();
            }
        }
    }
}

impl<D: Duty> Lane<D> {
    fn new(watch: Arc<Watch>) -> Self {
        let hot = Hot { lent: AtomicPtr::new(null_mut()), sequence: AtomicU32::new(0), unique: AtomicU64::new(0) };
        let (number, seen, late) = (AtomicUsize::new(usize::MAX), AtomicU32::new(0), Mutex::default());
        Lane { hot: CachePadded::new(hot), number, seen, late, thread: nix::unistd::gettid().as_raw(), watch }
    }

    /// The thread is about to handle a request of the duty with this number.
    pub fn lend(&self, duty: Box<D>, unique: u64) {
        self.hot.unique.store(unique, Ordering::Relaxed);
        let sequence = self.hot.sequence.load(Ordering::Relaxed);
        self.hot.sequence.store(sequence.wrapping_add(1), Ordering::Relaxed);
        // Pairs with `Watcher::sleep`: either the watcher sees the duty, or this thread sees that it sleeps.
        self.hot.lent.store(Box::into_raw(duty), Ordering::SeqCst);
        if self.watch.asleep.load(Ordering::SeqCst) {
            self.watch.wake();
        }
    }

    /// The request has been handled. `None`: late, another thread has the duty; deliver, then [`Lane::leave`].
    pub fn reclaim(&self) -> Option<Box<D>> {
        let duty = self.swap_out();
        if duty.is_none() {
            // Waits for `take` to end: the duty counts the late request before its answer is delivered.
            drop(self.late.lock());
        }
        duty
    }

    fn swap_out(&self) -> Option<Box<D>> {
        let duty = self.hot.lent.swap(null_mut(), Ordering::AcqRel);
        // SAFETY: from `Box::into_raw` in `lend`; the swap gives it to one thread only.
        (!duty.is_null()).then(|| unsafe { Box::from_raw(duty) })
    }

    /// The late request has been answered: the thread may not be signalled any more.
    pub fn leave(&self) {
        let late = std::mem::take(&mut *self.late.lock());
        self.hot.unique.store(0, Ordering::Relaxed);
        if late.signalled.is_some() {
            // A signal that is pending is taken here, and not by the next request.
            // SAFETY: a system call without arguments.
            unsafe { libc::syscall(libc::SYS_sched_yield) };
        }
    }

    /// Sets which duty the thread runs, for [`Crew::force`].
    pub fn set_number(&self, number: usize) {
        self.number.store(number, Ordering::Release);
    }

    fn is_lent(&self) -> bool {
        !self.hot.lent.load(Ordering::SeqCst).is_null()
    }

    /// Takes the duty away from a thread in a request.
    fn take(&self) -> Option<Box<D>> {
        let mut late = self.late.lock();
        let mut duty = self.swap_out()?;
        duty.taken();
        *late = Late { late: true, signalled: None };
        Some(duty)
    }

    /// Interrupts the late request, if it is this one and it is time.
    fn interrupt(&self, unique: impl FnOnce(u64) -> bool) {
        let mut late = self.late.lock();
        let due = late.signalled.is_none_or(|at| at.elapsed() >= SIGNAL_EVERY);
        if late.late && due && unique(self.hot.unique.load(Ordering::Relaxed)) {
            late.signalled = Some(Instant::now());
            interrupt::send(self.thread);
        }
    }
}

impl<D> Drop for Lane<D> {
    fn drop(&mut self) {
        let duty = *self.hot.lent.get_mut();
        if !duty.is_null() {
            // SAFETY: from `Box::into_raw` in `lend`, and nobody else has the lane any more.
            drop(unsafe { Box::from_raw(duty) });
        }
    }
}

/// Duties that wait for a thread, and the threads.
struct Inbox<D> {
    duties: VecDeque<Box<D>>,
    /// Threads that wait for a duty.
    idle: usize,
    /// All of them.
    threads: usize,
    /// How many there may be.
    limit: usize,
    stopping: bool,
    handles: Vec<JoinHandle<()>>,
}

struct Shared<D> {
    inbox: Mutex<Inbox<D>>,
    /// A duty has come, or the end.
    more: Condvar,
    /// A thread has ended.
    ended: Condvar,
    lanes: Mutex<Vec<Arc<Lane<D>>>>,
    watch: Arc<Watch>,
    interrupts: Mutex<VecDeque<(u64, Instant)>>,
}

/// The threads that serve one guest.
pub struct Crew<D: Duty>(Arc<Shared<D>>);

impl<D: Duty> Clone for Crew<D> {
    fn clone(&self) -> Self {
        Crew(self.0.clone())
    }
}

impl<D: Duty> Crew<D> {
    /// A crew that may hold `spares` late requests beside its duties.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn new(spares: usize) -> io::Result<Self> {
        interrupt::install()?;
        let inbox = Inbox {
            duties: VecDeque::new(),
            idle: 0,
            threads: 0,
            limit: spares.max(1),
            stopping: false,
            handles: Vec::new(),
        };
        let watch = Arc::new(Watch { asleep: CachePadded::new(AtomicBool::new(false)), thread: Mutex::new(None) });
        let shared = Arc::new(Shared {
            inbox: Mutex::new(inbox),
            more: Condvar::new(),
            ended: Condvar::new(),
            lanes: Mutex::default(),
            watch,
            interrupts: Mutex::default(),
        });
        let its = shared.clone();
        let watcher = std::thread::Builder::new().name("watcher".into()).spawn(move || Watcher::new(its).run())?;
        shared.watch.thread.lock().replace(watcher.thread().clone());
        shared.inbox.lock().handles.push(watcher);
        Ok(Crew(shared))
    }

    /// Gives a duty to a thread of its own.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start(&self, duty: D) -> io::Result<()> {
        let mut inbox = self.0.inbox.lock();
        inbox.limit += 1;
        self.0.spawn(&mut inbox)?;
        inbox.duties.push_back(Box::new(duty));
        self.0.more.notify_one();
        Ok(())
    }

    /// A duty that [`Crew::start`] was given has ended.
    pub fn finished(&self) {
        let mut inbox = self.0.inbox.lock();
        inbox.limit = inbox.limit.saturating_sub(1);
    }

    /// Takes duty `number` over from a thread that is in a request, also beyond the limit of threads.
    pub fn force(&self, number: usize) {
        let lanes = self.0.lanes.lock().clone();
        let of = |lane: &&Arc<Lane<D>>| lane.number.load(Ordering::Acquire) == number;
        if let Some(duty) = lanes.iter().filter(of).find_map(|lane| lane.take()) {
            self.0.hand_over(duty);
        }
    }

    /// Interrupts the request with this `unique`, if it is late or becomes so.
    pub fn interrupt(&self, unique: u64) {
        let mut interrupts = self.0.interrupts.lock();
        if interrupts.len() == MAX_INTERRUPTS {
            interrupts.pop_front();
        }
        interrupts.push_back((unique, Instant::now()));
        drop(interrupts);
        self.0.watch.wake();
    }

    /// Tells all threads to end. What waits for a thread is dropped.
    pub fn stop(&self) {
        let mut inbox = self.0.inbox.lock();
        inbox.stopping = true;
        let waiting = std::mem::take(&mut inbox.duties);
        drop(inbox);
        drop(waiting);
        self.0.more.notify_all();
        self.0.watch.wake();
    }

    /// Waits until all threads have ended, for `limit` at the most. Late requests are interrupted.
    pub fn join(&self, limit: Duration) -> bool {
        let lanes = self.0.lanes.lock().clone();
        lanes.iter().for_each(|lane| lane.interrupt(|_| true));
        let until = Instant::now() + limit;
        let mut inbox = self.0.inbox.lock();
        while inbox.threads > 0 {
            if self.0.ended.wait_until(&mut inbox, until).timed_out() {
                return false;
            }
        }
        let handles = std::mem::take(&mut inbox.handles);
        drop(inbox);
        self.0.watch.wake();
        for handle in handles {
            handle.thread().unpark();
            let _ = handle.join();
        }
        true
    }
}

impl<D: Duty> Shared<D> {
    fn spawn(self: &Arc<Self>, inbox: &mut Inbox<D>) -> io::Result<()> {
        inbox.handles.retain(|handle| !handle.is_finished());
        let shared = self.clone();
        let thread = std::thread::Builder::new().name("queue".into()).spawn(move || shared.work())?;
        inbox.handles.push(thread);
        inbox.threads += 1;
        Ok(())
    }

    fn work(self: &Arc<Self>) {
        let lane = Arc::new(Lane::new(self.watch.clone()));
        self.lanes.lock().push(lane.clone());
        while let Some(duty) = self.next() {
            duty.run(&lane);
            lane.set_number(usize::MAX);
        }
        self.lanes.lock().retain(|other| !Arc::ptr_eq(other, &lane));
        self.inbox.lock().threads -= 1;
        self.ended.notify_all();
    }

    fn next(&self) -> Option<Box<D>> {
        let mut inbox = self.inbox.lock();
        loop {
            if let Some(duty) = inbox.duties.pop_front() {
                return Some(duty);
            }
            if inbox.stopping || inbox.idle >= MAX_IDLE {
                return None;
            }
            inbox.idle += 1;
            self.more.wait(&mut inbox);
            inbox.idle -= 1;
        }
    }

    /// Whether another thread is there, or may be.
    fn has_spare(self: &Arc<Self>) -> bool {
        let mut inbox = self.inbox.lock();
        inbox.idle > inbox.duties.len() || inbox.threads < inbox.limit && self.spawn(&mut inbox).is_ok()
    }

    /// Gives a late thread's duty to another one.
    fn hand_over(self: &Arc<Self>, duty: Box<D>) {
        let mut inbox = self.inbox.lock();
        inbox.duties.push_back(duty);
        if inbox.idle < inbox.duties.len() && inbox.threads < MAX_THREADS {
            // Without a thread it waits for one that is done.
            let _ = self.spawn(&mut inbox);
        }
        self.more.notify_one();
    }
}

/// The thread that looks for late requests.
struct Watcher<D> {
    shared: Arc<Shared<D>>,
    /// Looks without a request.
    idle: u32,
    /// Whether it has been said that all threads are held up.
    told: bool,
}

impl<D: Duty> Watcher<D> {
    fn new(shared: Arc<Shared<D>>) -> Self {
        Watcher { shared, idle: 0, told: false }
    }

    fn run(mut self) {
        loop {
            {
                let inbox = self.shared.inbox.lock();
                if inbox.stopping && inbox.threads == 0 {
                    return;
                }
            }
            let lanes = self.shared.lanes.lock().clone();
            let mut busy = false;
            for lane in &lanes {
                busy |= self.look(lane);
            }
            let interrupts = self.interrupt(&lanes);
            self.idle = if busy || interrupts { 0 } else { self.idle + 1 };
            if self.idle < IDLE_TICKS {
                std::thread::park_timeout(TICK);
            } else {
                self.sleep();
            }
        }
    }

    /// Whether the lane's thread has begun a request since the last look, or is in one that can be taken over.
    fn look(&mut self, lane: &Arc<Lane<D>>) -> bool {
        let sequence = lane.hot.sequence.load(Ordering::Relaxed);
        if lane.seen.swap(sequence, Ordering::Relaxed) != sequence {
            return true;
        }
        if !lane.is_lent() {
            return false;
        }
        if self.shared.has_spare() {
            if let Some(duty) = lane.take() {
                self.shared.hand_over(duty);
            }
        } else if !std::mem::replace(&mut self.told, true) {
            tracing::warn!("all threads are held up by slow requests: the next ones wait (host.thread_pool_size)");
        }
        true
    }

    /// Signals late requests whose callers have been interrupted. Whether there are any.
    fn interrupt(&self, lanes: &[Arc<Lane<D>>]) -> bool {
        let mut interrupts = self.shared.interrupts.lock();
        if interrupts.is_empty() {
            return false;
        }
        for (unique, since) in interrupts.iter_mut() {
            for lane in lanes {
                lane.interrupt(|late| {
                    late == *unique && {
                        *since = Instant::now();
                        true
                    }
                });
            }
        }
        interrupts.retain(|(_, since)| since.elapsed() < KEEP_INTERRUPT);
        true
    }

    fn sleep(&mut self) {
        let watch = &self.shared.watch;
        watch.asleep.store(true, Ordering::SeqCst);
        // Pairs with `Lane::lend`, `Crew::interrupt` and `Crew::stop`.
        let lanes = self.shared.lanes.lock().clone();
        let work = || {
            lanes.iter().any(|lane| lane.is_lent())
                || !self.shared.interrupts.lock().is_empty()
                || self.shared.inbox.lock().stopping
        };
        if work() {
            watch.asleep.store(false, Ordering::SeqCst);
        }
        while watch.asleep.load(Ordering::SeqCst) {
            std::thread::park();
        }
        self.idle = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicI32;

    /// Requests that take about as long as the bound, so that the watcher and the thread meet.
    struct Borderline {
        left: u32,
        /// Duties taken away whose late answers have not been delivered.
        late: Arc<AtomicI32>,
        takeovers: Arc<AtomicU32>,
    }

    impl Duty for Borderline {
        fn run(mut self: Box<Self>, lane: &Lane<Self>) {
            while self.left > 0 {
                self.left -= 1;
                let (late, began) = (self.late.clone(), Instant::now());
                let length = BOUND * (5 + self.left % 10) / 10;
                lane.lend(self, 1);
                while began.elapsed() < length {
                    std::hint::spin_loop();
                }
                match lane.reclaim() {
                    Some(duty) => self = duty,
                    None => {
                        assert!(late.fetch_sub(1, Ordering::AcqRel) > 0, "an answer before the duty was taken");
                        return lane.leave();
                    }
                }
            }
        }

        fn taken(&mut self) {
            // Long enough for the other thread to come first, if it may.
            std::thread::sleep(BOUND / 5);
            self.late.fetch_add(1, Ordering::AcqRel);
            self.takeovers.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_duty_is_taken_before_the_late_answer_is_delivered() {
        let (late, takeovers) = (Arc::new(AtomicI32::new(0)), Arc::new(AtomicU32::new(0)));
        let crew = Crew::new(8).unwrap();
        crew.start(Borderline { left: 300, late: late.clone(), takeovers: takeovers.clone() }).unwrap();
        let ended = Instant::now() + Duration::from_secs(60);
        while Arc::strong_count(&takeovers) > 1 && Instant::now() < ended {
            std::thread::sleep(Duration::from_millis(5));
        }
        crew.stop();
        assert!(crew.join(Duration::from_secs(60)));
        assert!(takeovers.load(Ordering::Relaxed) > 0);
        assert_eq!(late.load(Ordering::Acquire), 0);
    }
}
