//! Changes that wait for a guest: a bounded queue, which merges repeats.

use super::changes::{Change, ChangeSink};
use super::sys::errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;
use std::collections::{HashSet, VecDeque};
use std::io;
use std::os::fd::AsFd;
use tunnelfs_fuse_abi::changes::kind;

/// Changes that wait, at most.
const MOST: usize = 16_384;

/// What makes two changes the same one.
type Same = (u32, u64, u64, Vec<u8>);

fn same(change: &Change) -> Same {
    (change.kind, change.node, change.parent, change.name.clone())
}

/// Whether the second of two such changes says nothing new.
fn merges(change: &Change) -> bool {
    is_awaited(change) || matches!(change.kind, kind::MODIFIED | kind::ATTRIBUTES | kind::CLOSED | kind::UNWATCHED)
}

/// Whether somebody waits for the guest's answer.
fn is_awaited(change: &Change) -> bool {
    matches!(change.kind, kind::DROP_DATA | kind::EXPIRE | kind::CLEAN)
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Change>,
    /// Those that merge, since a name changed last: after that a name may be another file's.
    mergeable: HashSet<Same>,
    closed: bool,
}

/// The queue.
#[derive(Debug)]
pub struct ChangeQueue {
    state: Mutex<State>,
    /// Signalled while there is something for a reader.
    news: EventFd,
    most: usize,
}

impl ChangeQueue {
    /// An empty queue.
    pub fn new() -> io::Result<ChangeQueue> {
        ChangeQueue::with_limit(MOST)
    }

    fn with_limit(most: usize) -> io::Result<ChangeQueue> {
        let news = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(ChangeQueue { state: Mutex::default(), news, most })
    }

    /// Adds a change. When too many wait, all are dropped but those that the guest must answer.
    pub fn push(&self, change: Change) {
        let mut state = self.state.lock();
        if state.closed {
            return;
        }
        if merges(&change) {
            if !state.mergeable.insert(same(&change)) {
                return;
            }
        } else {
            state.mergeable.clear();
        }
        if state.waiting.len() >= self.most && !is_awaited(&change) {
            overflow(&mut state);
        } else {
            state.waiting.push_back(change);
        }
        let _ = self.news.write(1);
    }

    /// Changes were lost: the guest is to forget all.
    pub fn overflow(&self) {
        let mut state = self.state.lock();
        if !state.closed {
            overflow(&mut state);
            let _ = self.news.write(1);
        }
    }

    /// Gives what waits to `sink`; waits for something first.
    ///
    /// # Errors
    /// `EINTR`: interrupted, or closed.
    pub fn wait(&self, sink: &mut ChangeSink<'_>) -> io::Result<()> {
        loop {
            // Before the look: what comes after it signals again.
            let _ = self.news.read();
            {
                let mut state = self.state.lock();
                if state.closed {
                    let _ = self.news.write(1);
                    return Err(errno(libc::EINTR));
                }
                if !state.waiting.is_empty() {
                    drain(&mut state, sink);
                    if !state.waiting.is_empty() {
                        let _ = self.news.write(1);
                    }
                    return Ok(());
                }
            }
            let mut fds = [PollFd::new(self.news.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::NONE)?;
        }
    }

    /// The guest has gone: nobody waits any more.
    pub fn close(&self) {
        let mut state = self.state.lock();
        *state = State { closed: true, ..State::default() };
        let _ = self.news.write(1);
    }
}

fn drain(state: &mut State, sink: &mut ChangeSink<'_>) {
    while let Some(change) = state.waiting.front() {
        if !sink(change) {
            break;
        }
        if let Some(change) = state.waiting.pop_front().filter(merges) {
            state.mergeable.remove(&same(&change));
        }
    }
}

fn overflow(state: &mut State) {
    state.waiting.retain(is_awaited);
    state.mergeable = state.waiting.iter().map(same).collect();
    state.waiting.push_front(Change { kind: kind::OVERFLOW, ..Change::default() });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(kind: u32, node: u64, name: &[u8]) -> Change {
        Change { kind, node, name: name.into(), ..Change::default() }
    }

    fn kinds(queue: &ChangeQueue, most: usize) -> Vec<(u32, u64)> {
        let mut got = Vec::new();
        queue
            .wait(&mut |change| {
                let fits = got.len() < most;
                if fits {
                    got.push((change.kind, change.node));
                }
                fits
            })
            .unwrap();
        got
    }

    #[test]
    fn repeats_are_merged_until_a_name_changes() {
        let queue = ChangeQueue::new().unwrap();
        for _ in 0..3 {
            queue.push(change(kind::MODIFIED, 5, b"a"));
            queue.push(change(kind::ATTRIBUTES, 5, b"a"));
        }
        queue.push(change(kind::DELETED, 5, b"a"));
        queue.push(change(kind::MODIFIED, 5, b"a"));
        let all = [kind::MODIFIED, kind::ATTRIBUTES, kind::DELETED, kind::MODIFIED].map(|kind| (kind, 5));
        assert_eq!(kinds(&queue, 9), all);
        // What has been given out is none to merge with.
        queue.push(change(kind::MODIFIED, 5, b"a"));
        assert_eq!(kinds(&queue, 9), [(kind::MODIFIED, 5)]);
    }

    #[test]
    fn what_the_sink_refuses_comes_again() {
        let queue = ChangeQueue::new().unwrap();
        (1..=5).for_each(|node| queue.push(change(kind::CREATED, node, b"a")));
        let nodes = |got: Vec<(u32, u64)>| got.into_iter().map(|(_, node)| node).collect::<Vec<_>>();
        assert_eq!(nodes(kinds(&queue, 2)), [1, 2]);
        assert_eq!(nodes(kinds(&queue, 9)), [3, 4, 5]);
    }

    #[test]
    fn an_overflow_keeps_only_what_must_be_answered() {
        let queue = ChangeQueue::with_limit(4).unwrap();
        queue.push(change(kind::DROP_DATA, 7, b""));
        (1..=9).for_each(|node| queue.push(change(kind::CREATED, node, b"a")));
        queue.push(change(kind::DROP_DATA, 7, b""));
        queue.push(change(kind::DROP_DATA, 8, b""));
        let got = kinds(&queue, 99);
        assert_eq!(got[..2], [(kind::OVERFLOW, 0), (kind::DROP_DATA, 7)]);
        assert!(got.len() <= 6 && got.contains(&(kind::DROP_DATA, 8)), "{got:?}");
        assert_eq!(got.iter().filter(|(k, _)| *k == kind::OVERFLOW).count(), 1, "{got:?}");
    }

    #[test]
    fn a_waiting_reader_gets_news_and_the_end() {
        let queue = ChangeQueue::new().unwrap();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| (kinds(&queue, 9), queue.wait(&mut |_| true).unwrap_err().raw_os_error()));
            queue.push(change(kind::CREATED, 3, b"a"));
            while !queue.state.lock().waiting.is_empty() {
                std::thread::yield_now();
            }
            queue.close();
            assert_eq!(reader.join().unwrap(), (vec![(kind::CREATED, 3)], Some(libc::EINTR)));
        });
    }
}
