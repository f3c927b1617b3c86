//! A PCI function as user space gets it: config space, BARs and interrupts,
//! the same whether uio or vfio gives them.

use super::vfio::Vectors;
use crate::Error;
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::uio::{pread, pwrite};
use std::fs::File;
use std::sync::Arc;

/// Offsets in config space (PCI 3.0, 6.1).
const COMMAND: i64 = 0x04;
const CAPABILITIES: i64 = 0x34;
/// Bits of the command register.
pub const MEMORY: u16 = 1 << 1;
pub const MASTER: u16 = 1 << 2;
pub const INTX_OFF: u16 = 1 << 10;
/// Capability number of vendor-specific ones.
const VENDOR: u8 = 0x09;

/// A part of a file that can be read, written or mapped.
#[derive(Clone)]
pub struct Window {
    pub file: Arc<File>,
    pub offset: u64,
    pub bytes: u64,
}

/// An opened function.
pub struct Function {
    pub config: Window,
    pub bars: Vec<Option<Window>>,
    /// How it interrupts, before the queues are there.
    pub interrupts: Wiring,
}

/// What there is to be wired up.
pub enum Wiring {
    /// INTx: the uio device, which counts interrupts.
    Uio(Arc<File>),
    /// MSI-X.
    Vfio(Vectors),
}

/// A vendor-specific capability of virtio (`struct virtio_pci_cap`, virtio 1.2, 4.1.4).
#[derive(Clone, Copy, Debug)]
pub struct Capability {
    /// Where it lies in config space.
    pub at: i64,
    /// `VIRTIO_PCI_CAP_*`.
    pub kind: u8,
    pub bar: u8,
    pub offset: u32,
    pub bytes: u32,
    /// What follows; a notification capability's multiplier.
    pub more: u32,
}

/// Walks the capabilities in a config space that `read` reads.
///
/// # Errors
/// `read`'s.
pub fn capabilities(read: &dyn Fn(i64, &mut [u8]) -> std::io::Result<()>) -> std::io::Result<Vec<Capability>> {
    let mut found = Vec::new();
    let mut next = [0];
    read(CAPABILITIES, &mut next)?;
    // A loop in the list must not be one here: there is room for 48.
    for _ in 0..48 {
        let at = i64::from(next[0] & !3);
        if at == 0 {
            break;
        }
        let mut bytes = [0; 20];
        read(at, &mut bytes)?;
        let word = |i: usize| u32::from_le_bytes(bytes[i..i + 4].try_into().expect("four bytes"));
        if bytes[0] == VENDOR && bytes[2] >= 16 {
            let (kind, bar) = (bytes[3], bytes[4]);
            found.push(Capability { at, kind, bar, offset: word(8), bytes: word(12), more: word(16) });
        }
        next = [bytes[1]];
    }
    Ok(found)
}

impl Window {
    /// Reads bytes of it.
    ///
    /// # Errors
    /// The system's.
    pub fn read(&self, at: i64, bytes: &mut [u8]) -> std::io::Result<()> {
        pread(&*self.file, bytes, self.offset as i64 + at).map(drop).map_err(Into::into)
    }

    fn write(&self, at: i64, bytes: &[u8]) -> std::io::Result<()> {
        pwrite(&*self.file, bytes, self.offset as i64 + at).map(drop).map_err(Into::into)
    }

    /// Maps all of it.
    ///
    /// # Errors
    /// [`Error::Setup`].
    pub fn map(&self) -> Result<MmapRaw, Error> {
        let map = MmapOptions::new().offset(self.offset).len(self.bytes as usize).map_raw(&*self.file);
        map.map_err(|e| {
            Error::Setup(format!("cannot map the device's registers: {e}; under kernel lockdown (Secure Boot) only vfio-pci may: --pci-driver vfio"))
        })
    }

    /// Sets and clears bits of the command register.
    ///
    /// # Errors
    /// The system's.
    pub fn command(&self, set: u16, clear: u16) -> std::io::Result<()> {
        let mut word = [0; 2];
        self.read(COMMAND, &mut word)?;
        let command = u16::from_le_bytes(word);
        self.write(COMMAND, &((command | set) & !clear).to_le_bytes())
    }
}
