//! The threads that write notifications. Notifications of one directory, or of one inode, keep their order. A
//! notification that blocks on a lock delays no others.

use super::actions::Action;
use super::counters::{ChangeCounters, InFlightReplies};
use super::notify::{Kernel, NotifyResult, Part};
use crate::reconnect::Reconnect;
use parking_lot::{Condvar, Mutex};
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tunnelfs_ring::Eventfd;

/// Most threads, and so the most notifications that may block on locks at the same time.
const MAX_THREADS: usize = 16;
/// Most threads without work; more than these end.
const MAX_IDLE: usize = 2;
/// Most actions in the queue, to bound memory. No more changes are fetched from the host then.
const MAX_WAITING: usize = 16 << 10;
/// Pause before the first retry of a notification of an inode that the kernel may be about to learn of. The pause
/// doubles with each retry.
const FIRST_RETRY: Duration = Duration::from_millis(1);
/// Most retries of one notification; their pauses add up to 511 ms.
const MAX_RETRIES: u32 = 9;

/// Key of an action. Actions with the same key keep their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Order {
    Directory(u64),
    Inode(u64),
    /// Attributes that a host waits for, before it answers a READ. The data's drop waits for that READ.
    Expiry(u64),
    None,
}

struct Job {
    action: Action,
    /// Replies on their way to the kernel, after which the notification is sent once more.
    replies: Option<Arc<InFlightReplies>>,
    retries: u32,
}

#[derive(Default)]
struct State {
    /// Jobs by key. The job that a thread runs now is not in its list, but its key is here.
    waiting: HashMap<Order, VecDeque<Job>>,
    /// Keys that a thread may take.
    ready: VecDeque<Order>,
    /// Jobs to retry, and when.
    later: Vec<(Instant, Job)>,
    /// Number of unfinished actions.
    count: usize,
    idle: usize,
    threads: usize,
    ended: bool,
}

/// The queue of actions, and its threads.
pub struct Dispatcher {
    state: Mutex<State>,
    more: Condvar,
    kernel: Kernel,
    counters: Arc<ChangeCounters>,
    reconnect: Arc<Reconnect>,
    /// The host's nodeids of files whose data has been dropped, not yet reported.
    dropped: Mutex<Vec<u64>>,
    /// An eventfd, signalled when `dropped` grows, or when there is room for more actions.
    pub news: OwnedFd,
}

impl Dispatcher {
    /// Makes a dispatcher without threads; they start with the first actions.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn new(
        device: Arc<OwnedFd>,
        counters: Arc<ChangeCounters>,
        reconnect: Arc<Reconnect>,
    ) -> Result<Arc<Self>, tunnelfs_ring::Error> {
        Ok(Arc::new(Dispatcher {
            state: Mutex::default(),
            more: Condvar::new(),
            kernel: Kernel(device),
            counters,
            reconnect,
            dropped: Mutex::default(),
            news: Eventfd::new()?,
        }))
    }

    /// Queues actions for the threads.
    pub fn push(self: &Arc<Self>, actions: Vec<Action>) {
        let replies = self.counters.under_way().map(Arc::new);
        for action in actions {
            match action {
                Action::Everything => self.invalidate_everything(),
                Action::Dropped { host } => self.report_dropped(host),
                action => self.add(Job { action, replies: replies.clone(), retries: 0 }),
            }
        }
    }

    /// Returns `true` if more changes may be fetched from the host.
    pub fn has_room(&self) -> bool {
        self.state.lock().count < MAX_WAITING
    }

    /// Takes at most `most` of the host's nodeids of the files of which something has been dropped, not yet reported.
    pub fn take_dropped(&self, most: usize) -> Vec<u64> {
        let mut dropped = self.dropped.lock();
        let end = most.min(dropped.len());
        dropped.drain(..end).collect()
    }

    /// Ends the threads: the mount has ended.
    pub fn end(&self) {
        self.state.lock().ended = true;
        self.more.notify_all();
    }

    /// Has the kernel drop its whole cache. Names expire at once, or one by one on kernels without INC_EPOCH.
    pub fn invalidate_everything(self: &Arc<Self>) {
        self.counters.note_everything();
        let replies = self.counters.under_way().map(Arc::new);
        let by_name = self.kernel.invalidate_names() == NotifyResult::Unsupported;
        let tables = self.reconnect.tables.read();
        let (mut nodes, mut names) = (Vec::new(), Vec::new());
        for (node, is_dir) in tables.nodes.all() {
            nodes.push(Action::Inode { node, part: if is_dir { Part::Attributes } else { Part::Data } });
            if by_name && is_dir {
                let below = tables.nodes.children(node);
                names.extend(below.map(|(name, _)| Action::Name { parent: node, name: name.to_vec() }));
            }
        }
        drop(tables);
        for action in names.into_iter().chain(nodes) {
            self.add(Job { action, replies: replies.clone(), retries: 0 });
        }
        if let Some(replies) = replies {
            // Expire the names of those replies too: they reached the kernel after the first INC_EPOCH.
            self.counters.wait_for(&replies);
            self.kernel.invalidate_names();
        }
    }

    fn add(self: &Arc<Self>, job: Job) {
        let mut state = self.state.lock();
        state.count += 1;
        self.enqueue(&mut state, job);
    }

    /// Queues a job under its key, and starts a thread if too few are idle.
    fn enqueue(self: &Arc<Self>, state: &mut State, job: Job) {
        let order = order_of(&job.action);
        state.waiting.entry(order).or_insert_with(|| {
            state.ready.push_back(order);
            VecDeque::new()
        });
        if let Some(jobs) = state.waiting.get_mut(&order) {
            jobs.push_back(job);
        }
        if state.idle < state.ready.len() && state.threads < MAX_THREADS {
            let its = self.clone();
            let thread = tunnelfs_program::thread::spawn("notify", move || its.work());
            match thread {
                Ok(_) => state.threads += 1,
                Err(e) => tracing::debug!("{e}"),
            }
        }
        self.more.notify_one();
    }

    fn work(self: Arc<Self>) {
        let mut state = self.state.lock();
        loop {
            self.take_due(&mut state);
            if state.ended {
                break;
            }
            let Some(order) = state.ready.pop_front() else {
                if state.idle >= MAX_IDLE && state.later.is_empty() {
                    break;
                }
                state.idle += 1;
                let next = state.later.iter().map(|(at, _)| *at).min();
                match next {
                    Some(at) => drop(self.more.wait_until(&mut state, at)),
                    None => self.more.wait(&mut state),
                }
                state.idle -= 1;
                continue;
            };
            let Some(mut job) = state.waiting.get_mut(&order).and_then(VecDeque::pop_front) else {
                state.waiting.remove(&order);
                continue;
            };
            let told = parking_lot::MutexGuard::unlocked(&mut state, || self.run(&job));
            if told == NotifyResult::Ended {
                state.ended = true;
                self.more.notify_all();
            }
            if told == NotifyResult::Unknown && job.retries < MAX_RETRIES && self.should_retry(&job.action) {
                let pause = FIRST_RETRY * 2u32.pow(job.retries);
                job.retries += 1;
                state.later.push((Instant::now() + pause, job));
            } else {
                self.finished(&mut state, &job.action);
            }
            match state.waiting.get(&order) {
                Some(more) if more.is_empty() => drop(state.waiting.remove(&order)),
                Some(_) => state.ready.push_back(order),
                None => {}
            }
        }
        state.threads -= 1;
    }

    /// Queues the jobs whose retry is due.
    fn take_due(self: &Arc<Self>, state: &mut State) {
        let now = Instant::now();
        while let Some(due) = state.later.iter().position(|(at, _)| *at <= now) {
            let (_, job) = state.later.swap_remove(due);
            self.enqueue(state, job);
        }
    }

    /// Counts a finished action, and signals `news` if there is room again.
    fn finished(&self, state: &mut State, action: &Action) {
        state.count -= 1;
        if let Action::Drop { host, .. } = action {
            self.report_dropped(*host);
        }
        if state.count + 1 == MAX_WAITING {
            Eventfd::signal(&self.news);
        }
    }

    /// Reports a file to the host as dropped, through the change thread.
    fn report_dropped(&self, host: u64) {
        self.dropped.lock().push(host);
        Eventfd::signal(&self.news);
    }

    /// Returns `true` if the kernel may be about to learn of the inode that it did not have, so that a retry makes
    /// sense.
    fn should_retry(&self, action: &Action) -> bool {
        match action {
            Action::Inode { node, .. } => self.reconnect.tables.read().nodes.is_looked_up(*node),
            // No retry for Drop, as the host waits for it, and none for a name that is not cached.
            _ => false,
        }
    }

    /// Sends a notification, and once more after the replies that were on their way.
    fn run(&self, job: &Job) -> NotifyResult {
        let told = self.tell(&job.action);
        match &job.replies {
            Some(replies) if told != NotifyResult::Ended => {
                self.counters.wait_for(replies);
                self.tell(&job.action)
            }
            _ => told,
        }
    }

    fn tell(&self, action: &Action) -> NotifyResult {
        match action {
            Action::Name { parent, name } => self.kernel.invalidate_name(*parent, name),
            Action::Inode { node, part } | Action::Drop { node, part, .. } => {
                self.kernel.invalidate_inode(*node, *part)
            }
            Action::Dropped { .. } | Action::Everything => NotifyResult::Done,
        }
    }
}

fn order_of(action: &Action) -> Order {
    match action {
        Action::Name { parent, .. } => Order::Directory(*parent),
        Action::Drop { node, part: Part::Attributes, .. } => Order::Expiry(*node),
        Action::Inode { node, .. } | Action::Drop { node, .. } => Order::Inode(*node),
        Action::Dropped { .. } | Action::Everything => Order::None,
    }
}
