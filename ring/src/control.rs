//! The one in-band message that turns a virtqueue into a ring, and the numbers
//! of the project's own messages. A host that does not know a number answers
//! that it is not implemented, and the guest stays on the virtqueue.

use crate::{Error, Geometry};

/// Message number: set up a ring on the queue that carries this message.
pub const OP_SETUP: u32 = 0x5446_0001;
/// Message number: answered by the host's server with nothing done.
pub const OP_NOOP: u32 = 0x5446_0002;
/// Message number: the reply is one `u64`, payload bytes that the host has copied.
pub const OP_COPIED: u32 = 0x5446_0003;
/// First word of a [`RingSetup`].
pub const MAGIC: u32 = u32::from_le_bytes(*b"TFS1");
/// Version of the region's layout.
pub const VERSION: u32 = 1;

/// The body of [`OP_SETUP`]: magic and version, then these as little-endian
/// integers in this order, then four bytes of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSetup {
    /// Optional features wanted; none exist in version 1.
    pub features: u32,
    /// The queue's sizes.
    pub geometry: Geometry,
    /// Address of the queue's first byte, in the guest's address space.
    pub base: u64,
    /// The CPU that the guest's thread stays on, or [`NO_CPU`]: a host on the
    /// same machine may place its own thread by it.
    pub cpu: u32,
}

/// The guest's thread may run anywhere, or on another machine's CPUs.
pub const NO_CPU: u32 = u32::MAX;

impl RingSetup {
    /// Bytes on the wire.
    pub const BYTES: usize = 40;

    /// The message's bytes.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let g = self.geometry;
        let mut out = [0; Self::BYTES];
        for (i, word) in [MAGIC, VERSION, self.features, g.entries, g.slots, g.slot_size].into_iter().enumerate() {
            out[4 * i..4 * i + 4].copy_from_slice(&word.to_le_bytes());
        }
        out[24..32].copy_from_slice(&self.base.to_le_bytes());
        out[32..36].copy_from_slice(&self.cpu.to_le_bytes());
        out
    }

    /// Reads and checks a message.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for another magic, version or feature, and
    /// [`Error::Geometry`] for sizes out of range.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let bytes: &[u8; Self::BYTES] =
            bytes.try_into().map_err(|_| Error::Corrupt("set-up message of another length"))?;
        let word = |i: usize| u32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().expect("four bytes"));
        if word(0) != MAGIC || word(1) != VERSION || word(2) != 0 {
            return Err(Error::Corrupt("set-up message of another magic, version or feature"));
        }
        let geometry = Geometry { entries: word(3), slots: word(4), slot_size: word(5) };
        geometry.check()?;
        let base = u64::from_le_bytes(bytes[24..32].try_into().expect("eight bytes"));
        Ok(RingSetup { features: 0, geometry, base, cpu: word(8) })
    }
}
