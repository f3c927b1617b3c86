//! Hosts and mounts of every kind, at random.

use crate::rig::{Host, Peer, Scratch};
use crate::{Rng, FEATURES};

/// A host's cache mode, and what its guests are told.
type Mode = (&'static [&'static str], &'static str);

/// Without a cache, mappings must be allowed.
const MODES: [Mode; 6] = [
    (&["--cache=auto"], ""),
    (&["--cache=never", "--allow-mmap"], ""),
    (&["--cache=metadata", "--allow-mmap"], ""),
    (&["--cache=always"], ""),
    (&["--cache=auto", "--writeback"], ",writeback"),
    (&["--cache=always", "--writeback"], ",writeback"),
];

pub struct HostPlan {
    peer: Peer,
    pub options: Vec<String>,
    guest_words: &'static str,
}

fn one<T: Copy>(rng: &mut Rng, list: &[T]) -> T {
    list[rng.below(list.len())]
}

impl HostPlan {
    pub fn draw(rng: &mut Rng) -> HostPlan {
        let peer = one(rng, &[Peer::Ours, Peer::Ours, Peer::Ours, Peer::Stream]);
        let (cache, guest_words) = one(rng, &MODES);
        let mut options: Vec<String> = FEATURES.iter().chain(cache).map(ToString::to_string).collect();
        options.push(format!("--sandbox={}", one(rng, &["namespace", "chroot", "none"])));
        options.push(format!("--thread-pool-size={}", one(rng, &[1, 2, 4])));
        options.push(format!("--inode-file-handles={}", one(rng, &["never", "prefer"])));
        options.push(format!("--wait={}", one(rng, &["auto", "auto", "park", "spin"])));
        HostPlan { peer, options, guest_words }
    }

    /// Whether the guest's kernel keeps lists of names.
    pub fn keeps_lists(&self) -> bool {
        self.options.iter().any(|word| word == "--cache=always" || word == "--cache=metadata")
    }

    pub fn start(&self, scratch: &Scratch) -> Host {
        Host::start_with(scratch, self.peer, &self.options.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// The words of a mount on this host.
    pub fn draw_guest(&self, rng: &mut Rng, channels: &[&str]) -> String {
        let transport = match self.peer {
            Peer::Stream => "socket",
            _ => one(rng, &["ring", "ring", "virtqueue"]),
        };
        format!(
            "channel={},transport={transport},reconnect_timeout=1,wait={},queues={},slots={},slot_size={}{}",
            one(rng, channels),
            one(rng, &["auto", "auto", "park", "spin"]),
            one(rng, &[1, 2]),
            one(rng, &[4, 16, 32]),
            one(rng, &[64 << 10, 256 << 10, 1 << 20]),
            self.guest_words
        )
    }
}
