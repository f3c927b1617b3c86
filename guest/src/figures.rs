//! A mount's figures for Prometheus and for `top`.

use crate::reconnect::Reconnect;
use crate::stats::QueueStats;
use std::fmt::Display;
use std::sync::Arc;
use tunnelfs_fuse_abi::opcode;
use tunnelfs_program::metrics::Exposition;

/// Quantiles of the latencies.
const QUANTILES: [f64; 4] = [0.5, 0.9, 0.99, 0.999];

/// The source of a mount's figures.
#[derive(Clone)]
pub struct Figures {
    /// By queue: its transport, number of slots, and statistics.
    pub(crate) queues: Vec<(&'static str, u32, Arc<QueueStats>)>,
    pub(crate) reconnect: Option<Arc<Reconnect>>,
}

impl Figures {
    /// Returns the figures in Prometheus's text format.
    pub fn metrics(&self) -> String {
        let mut out = Exposition::default();
        let up = !self.reconnect.as_ref().is_some_and(|reconnect| reconnect.handover.is_away());
        out.metric("tunnelfs_guest_host_up", "gauge", "Whether there is a host.");
        out.value("tunnelfs_guest_host_up", &[], u8::from(up));
        self.each(&mut out, "slots", "gauge", "Slots: the most requests under way.", &|_, slots| slots.into());
        let help = "Slots of requests that the host has.";
        self.each(&mut out, "slots_in_use", "gauge", help, &|stats, _| stats.in_use());
        self.waits(&mut out);
        let help = "Notifications of a host that slept (kicks).";
        self.each(&mut out, "notifications_total", "counter", help, &|stats, _| stats.waits().kicks);
        let help = "Payload bytes copied in user space.";
        self.each(&mut out, "copied_bytes_total", "counter", help, &|stats, _| stats.copied());
        self.operations(&mut out);
        out.text()
    }

    /// Writes one metric with a value per queue. `value` gets the queue's statistics and its number of slots.
    fn each(&self, out: &mut Exposition, name: &str, kind: &str, help: &str, value: &dyn Fn(&QueueStats, u32) -> u64) {
        let name = format!("tunnelfs_guest_{name}");
        out.metric(&name, kind, help);
        for (i, (transport, slots, stats)) in self.queues.iter().enumerate() {
            out.value(&name, &[("queue", &i), ("transport", transport)], value(stats, *slots));
        }
    }

    fn waits(&self, out: &mut Exposition) {
        let name = "tunnelfs_guest_waits_total";
        out.metric(name, "counter", "Waits for the host, by how they ended.");
        for (i, (.., stats)) in self.queues.iter().enumerate() {
            let waits = stats.waits();
            for (ended, count) in [("spinning", waits.spun), ("sleeping", waits.parked)] {
                out.value(name, &[("queue", &i), ("ended", &ended)], count);
            }
        }
    }

    fn operations(&self, out: &mut Exposition) {
        let (requests, errors) = ("tunnelfs_guest_requests_total", "tunnelfs_guest_request_errors_total");
        let mut counts = [Exposition::default(), Exposition::default(), Exposition::default()];
        let [done, failed, seconds] = &mut counts;
        done.metric(requests, "counter", "Requests that were answered.");
        failed.metric(errors, "counter", "Of these, those answered by an error.");
        let name = "tunnelfs_guest_request_seconds";
        seconds.metric(name, "summary", "How long the host took, since the mount began.");
        for (i, (.., stats)) in self.queues.iter().enumerate() {
            stats.each_operation(|number, failures, latency| {
                let operation = opcode::name(number);
                let labels: [(&str, &dyn Display); 2] = [("queue", &i), ("operation", &operation)];
                done.value(requests, &labels, latency.len());
                failed.value(errors, &labels, failures);
                for quantile in QUANTILES {
                    let value = latency.value_at_quantile(quantile) as f64 / 1e9;
                    seconds.value(name, &[labels[0], labels[1], ("quantile", &quantile)], value);
                }
                seconds.value(&format!("{name}_sum"), &labels, latency.mean() * latency.len() as f64 / 1e9);
                seconds.value(&format!("{name}_count"), &labels, latency.len());
            });
        }
        counts.into_iter().for_each(|one| out.append(one));
    }
}
