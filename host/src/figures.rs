//! What a host's queues have done so far: counted by the threads that serve them, read by `status`, `top` and scrapers.

use parking_lot::Mutex;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use tunnelfs_program::metrics::Exposition;
use tunnelfs_ring::Counters;

/// One queue of one guest.
#[derive(Debug, Default)]
pub struct QueueFigures {
    queue: usize,
    /// The guest's number; 0 until it has come.
    guest: Arc<AtomicU64>,
    requests: AtomicU64,
    spun: AtomicU64,
    parked: AtomicU64,
    /// Calls: notifications of the guest.
    pub calls: AtomicU64,
}

impl QueueFigures {
    /// Counts requests that were served, and takes over how waits have ended.
    pub fn served(&self, requests: u64, waits: Counters) {
        self.requests.fetch_add(requests, Relaxed);
        self.spun.store(waits.spun, Relaxed);
        self.parked.store(waits.parked, Relaxed);
    }
}

/// All queues of all guests.
#[derive(Clone, Debug, Default)]
pub struct Figures(Arc<Mutex<Vec<Weak<QueueFigures>>>>);

impl Figures {
    /// Another queue, until it is dropped.
    pub fn add(&self, guest: &Arc<AtomicU64>, queue: usize) -> Arc<QueueFigures> {
        let figures = Arc::new(QueueFigures { queue, guest: guest.clone(), ..QueueFigures::default() });
        let mut all = self.0.lock();
        all.retain(|one| one.strong_count() > 0);
        all.push(Arc::downgrade(&figures));
        figures
    }

    /// Those of guests that are there, with the guest's number.
    fn present(&self) -> Vec<(u64, Arc<QueueFigures>)> {
        let all: Vec<_> = self.0.lock().iter().filter_map(Weak::upgrade).collect();
        all.into_iter().map(|one| (one.guest.load(Relaxed), one)).filter(|(guest, _)| *guest != 0).collect()
    }

    fn guests(queues: &[(u64, Arc<QueueFigures>)]) -> usize {
        queues.iter().filter(|(_, one)| one.queue == 0).count()
    }

    /// For Prometheus, and for `top`.
    pub fn metrics(&self) -> String {
        let (queues, mut out) = (self.present(), Exposition::default());
        out.metric("tunnelfs_host_guests", "gauge", "Guests that are connected.");
        out.value("tunnelfs_host_guests", &[], Self::guests(&queues));
        let name = "tunnelfs_host_requests_total";
        out.metric(name, "counter", "Requests that were served.");
        for (guest, one) in &queues {
            out.value(name, &[("guest", guest), ("queue", &one.queue)], one.requests.load(Relaxed));
        }
        let name = "tunnelfs_host_waits_total";
        out.metric(name, "counter", "Waits for requests, by how they ended.");
        for (guest, one) in &queues {
            for (ended, count) in [("spinning", &one.spun), ("sleeping", &one.parked)] {
                out.value(name, &[("guest", guest), ("queue", &one.queue), ("ended", &ended)], count.load(Relaxed));
            }
        }
        let name = "tunnelfs_host_notifications_total";
        out.metric(name, "counter", "Notifications of a guest that slept (calls).");
        for (guest, one) in &queues {
            out.value(name, &[("guest", guest), ("queue", &one.queue)], one.calls.load(Relaxed));
        }
        out.text()
    }

    /// For people.
    pub fn status(&self) -> String {
        let queues = self.present();
        let mut text = format!("guests: {}\n", Self::guests(&queues));
        for (guest, one) in &queues {
            let (requests, spun, parked) = (&one.requests, &one.spun, &one.parked);
            let _ = writeln!(
                text,
                "guest {guest}, queue {}: {} requests, {} calls; waits: {} spun, {} parked",
                one.queue,
                requests.load(Relaxed),
                one.calls.load(Relaxed),
                spun.load(Relaxed),
                parked.load(Relaxed)
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tunnelfs_program::metrics::parse;

    #[test]
    fn a_guest_is_counted_from_its_number_on_until_it_goes() {
        let (figures, guest) = (Figures::default(), Arc::new(AtomicU64::new(0)));
        let queue = figures.add(&guest, 0);
        queue.served(3, Counters { spun: 1, parked: 2, kicks: 0 });
        assert!(figures.status().starts_with("guests: 0"));
        guest.store(7, Relaxed);
        let samples = parse(&figures.metrics()).unwrap();
        assert!(samples
            .iter()
            .any(|s| s.name == "tunnelfs_host_requests_total" && s.label("guest") == "7" && s.value == 3.0));
        assert!(figures.status().contains("guest 7, queue 0: 3 requests"));
        drop(queue);
        assert!(figures.status().starts_with("guests: 0"));
    }
}
