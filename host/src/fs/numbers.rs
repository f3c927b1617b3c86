//! Inode numbers that are distinct for a guest that sees one device.
//!
//! A mount in the guest has one device number, and below the shared directory there may be many file systems, whose
//! inode numbers repeat. Two files with one number are hard links of each other for `cp -a`, tar and rsync. Files of
//! the shared directory's own file system keep their numbers; others get a prefix by their device.

use foldhash::HashMap;
use parking_lot::{Mutex, RwLock};
use std::hash::{BuildHasher, RandomState};

/// Bits of an inode number below the prefix.
const BITS: u32 = 48;
/// Prefixes from here on are other devices'.
const OTHERS: u64 = 0x8000;
/// The prefix of numbers that were given out one by one.
const TABLE: u64 = 0xffff;
/// Most numbers in the table, which bounds its memory; beyond it they are hashes.
const MOST: usize = 1 << 20;

/// The numbers of one mount.
#[derive(Debug)]
pub struct Numbers {
    root: u64,
    prefixes: RwLock<HashMap<u64, u64>>,
    table: Mutex<HashMap<(u64, u64), u64>>,
    hasher: RandomState,
}

impl Numbers {
    /// For a shared directory on the device `root`.
    pub fn new(root: u64) -> Numbers {
        Numbers { root, prefixes: RwLock::default(), table: Mutex::default(), hasher: RandomState::new() }
    }

    /// The number for the inode `ino` of a device.
    pub fn of(&self, device: u64, ino: u64) -> u64 {
        if device == self.root {
            return if ino >> BITS < OTHERS { ino } else { self.in_table(device, ino) };
        }
        match self.prefix(device) {
            Some(prefix) if ino >> BITS == 0 => prefix << BITS | ino,
            _ => self.in_table(device, ino),
        }
    }

    fn prefix(&self, device: u64) -> Option<u64> {
        if let Some(&known) = self.prefixes.read().get(&device) {
            return Some(known);
        }
        let mut prefixes = self.prefixes.write();
        let next = OTHERS + prefixes.len() as u64;
        if next == TABLE && !prefixes.contains_key(&device) {
            return None;
        }
        Some(*prefixes.entry(device).or_insert(next))
    }

    fn in_table(&self, device: u64, ino: u64) -> u64 {
        let mut table = self.table.lock();
        let next = table.len() as u64;
        let low = match table.get(&(device, ino)) {
            Some(&known) => known,
            None if table.len() < MOST => *table.entry((device, ino)).or_insert(next),
            None => self.hasher.hash_one((device, ino)) >> (64 - BITS) | 1 << (BITS - 1),
        };
        TABLE << BITS | low
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn numbers_of_several_devices_are_distinct_and_stay() {
        let numbers = Numbers::new(7);
        let mut seen = HashSet::new();
        let inos = [1, 2, 1 << 40, 1 << 48, (0x8000 << 48) | 1, 0x8001 << 48, u64::MAX];
        for device in [7, 8, 9, 7 << 32] {
            for ino in inos {
                assert!(seen.insert(numbers.of(device, ino)), "{device}: {ino}");
                assert_eq!(numbers.of(device, ino), numbers.of(device, ino));
            }
        }
        assert_eq!((numbers.of(7, 1), numbers.of(7, 1 << 48)), (1, 1 << 48));
    }

    #[test]
    fn more_devices_than_prefixes() {
        let numbers = Numbers::new(0);
        let all: HashSet<u64> = (1..40_000).map(|device| numbers.of(device, 1)).collect();
        assert_eq!(all.len(), 39_999);
    }
}
