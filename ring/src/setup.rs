//! The message that turns a virtqueue into a ring. A device that does not know it answers ENOSYS, and the driver stays
//! on the virtqueue.

use crate::error::Error;
use crate::geometry::Geometry;

/// First word of a [`RingSetup`].
pub const MAGIC: u32 = u32::from_le_bytes(*b"TFS1");
/// Version of the region's layout. Version 1 had one address for a queue in one piece.
pub const VERSION: u32 = 2;
/// Most runs that a [`RingSetup`] may have.
pub const MAX_RUNS: usize = 4096;

/// The body of [`RingSetup::OPCODE`]: magic and version, then these as little-endian
/// integers in this order, the number of runs before them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingSetup {
    /// Optional features wanted; none exist in version 2.
    pub features: u32,
    /// The queue's sizes.
    pub geometry: Geometry,
    /// Address of the queue's control part (all but the slots), in the guest's address space.
    pub control: u64,
    /// The CPU that the guest's thread stays on, or [`CPU_UNKNOWN`]: a host on the
    /// same machine may place its own thread by it.
    pub cpu: u32,
    /// Where the slots lie, in order.
    pub runs: Vec<SlotRun>,
}

/// Slots that lie one after the other. A VM's memory is in one piece for the
/// guest's process, but in several for everybody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRun {
    /// Address of the first slot, in the guest's address space.
    pub address: u64,
    /// How many there are.
    pub slots: u32,
}

impl SlotRun {
    /// Bytes on the wire: the address, the number, four bytes of zeros.
    const BYTES: usize = 16;

    /// The runs of slots of `size` bytes that lie at `addresses`.
    pub fn coalesce(addresses: impl IntoIterator<Item = u64>, size: u32) -> Vec<SlotRun> {
        let mut runs = Vec::<SlotRun>::new();
        for address in addresses {
            match runs.last_mut() {
                Some(run) if run.address.checked_add(run.bytes(size)) == Some(address) => run.slots += 1,
                _ => runs.push(SlotRun { address, slots: 1 }),
            }
        }
        runs
    }

    /// Bytes of the whole run.
    pub fn bytes(&self, slot_size: u32) -> u64 {
        u64::from(self.slots) * u64::from(slot_size)
    }
}

/// The guest's thread may run anywhere, or on another machine's CPUs.
pub const CPU_UNKNOWN: u32 = u32::MAX;

impl RingSetup {
    /// The message's FUSE opcode.
    pub const OPCODE: u32 = 0x5446_0001;
    /// Bytes on the wire before the runs.
    pub const FIXED_BYTES: usize = 40;
    /// Bytes of the longest message.
    pub const MAX_BYTES: usize = Self::FIXED_BYTES + MAX_RUNS * SlotRun::BYTES;

    /// The message's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let (g, mut out) = (self.geometry, Vec::new());
        let mut add = |word: u32| out.extend_from_slice(&word.to_le_bytes());
        let halves = |address: u64| [address as u32, (address >> 32) as u32];
        [MAGIC, VERSION, self.features, g.entries, g.slots, g.slot_size].into_iter().for_each(&mut add);
        halves(self.control).into_iter().chain([self.cpu, self.runs.len() as u32]).for_each(&mut add);
        for run in &self.runs {
            halves(run.address).into_iter().chain([run.slots, 0]).for_each(&mut add);
        }
        out
    }

    /// Reads and checks a message: each slot has a place then. Whether it lies
    /// in the guest's memory is for whoever knows that memory to check.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for another magic, version or feature, or runs that
    /// are not as many slots as there are, and [`Error::Geometry`] for sizes out of range.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let word = |i: usize| Some(u32::from_le_bytes(bytes.get(4 * i..4 * i + 4)?.try_into().expect("four bytes")));
        let fixed = (0..10).map(word).collect::<Option<Vec<_>>>();
        let fixed = fixed.ok_or(Error::Corrupt("set-up message cut off"))?;
        if fixed[0] != MAGIC || fixed[1] != VERSION || fixed[2] != 0 {
            return Err(Error::Corrupt("set-up message of another magic, version or feature"));
        }
        let geometry = Geometry { entries: fixed[3], slots: fixed[4], slot_size: fixed[5] };
        geometry.check()?;
        let count = fixed[9] as usize;
        if count > MAX_RUNS || bytes.len() != Self::FIXED_BYTES + count * SlotRun::BYTES {
            return Err(Error::Corrupt("set-up message of another length"));
        }
        let address = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        let run = |i: usize| Some(SlotRun { address: address(word(i)?, word(i + 1)?), slots: word(i + 2)? });
        let runs = (0..count).map(|n| run(10 + 4 * n)).collect::<Option<Vec<_>>>();
        let runs = runs.ok_or(Error::Corrupt("set-up message cut off"))?;
        let slots: u64 = runs.iter().map(|run| u64::from(run.slots)).sum();
        if slots != u64::from(geometry.slots) {
            return Err(Error::Corrupt("runs of another number of slots"));
        }
        Ok(RingSetup { features: 0, geometry, control: address(fixed[6], fixed[7]), cpu: fixed[8], runs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setup() -> RingSetup {
        let geometry = Geometry { entries: 8, slots: 4, slot_size: 8192 };
        let runs = SlotRun::coalesce([0x10_0000, 0x10_2000, 0x30_0000, 0x8_0000_0000], geometry.slot_size);
        RingSetup { features: 0, geometry, control: 0x1_2345_6000, cpu: 3, runs }
    }

    #[test]
    fn a_message_comes_back_as_it_was() {
        let setup = setup();
        assert_eq!(setup.runs.iter().map(|r| r.slots).collect::<Vec<_>>(), [2, 1, 1]);
        let bytes = setup.to_bytes();
        assert_eq!(bytes.len(), RingSetup::FIXED_BYTES + 3 * SlotRun::BYTES);
        assert_eq!(RingSetup::from_bytes(&bytes).unwrap(), setup);
    }

    #[test]
    fn broken_messages_are_refused() {
        let good = setup().to_bytes();
        for cut in 0..good.len() {
            assert!(RingSetup::from_bytes(&good[..cut]).is_err());
        }
        // Magic, version, feature, entries, slots, slot size, number of runs, slots of a run.
        for (word, value) in [(0, 1), (1, 1), (2, 1), (3, 3), (4, 5), (5, 100), (9, u32::MAX), (12, 3), (12, u32::MAX)]
        {
            let mut bytes = good.clone();
            bytes[4 * word..4 * word + 4].copy_from_slice(&u32::to_le_bytes(value));
            assert!(RingSetup::from_bytes(&bytes).is_err(), "word {word} = {value}");
        }
    }
}
