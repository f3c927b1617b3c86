//! A PCI function as uio or vfio gives it to user space: config space, BARs and interrupts.

use super::msix::MsixVectors;
use crate::error::Error;
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
/// Number of a vendor-specific capability.
const VENDOR: u8 = 0x09;

/// A part of a file that can be read, written or mapped.
#[derive(Clone)]
pub struct FileRegion {
    pub file: Arc<File>,
    pub offset: u64,
    pub bytes: u64,
}

/// An open PCI function.
pub struct Function {
    pub config: FileRegion,
    pub bars: Vec<Option<FileRegion>>,
    /// Its interrupts, not yet routed to queues.
    pub interrupts: IrqSource,
}

/// Source of a function's interrupts.
pub enum IrqSource {
    /// INTx, by the uio device: a read returns the number of interrupts.
    Uio(Arc<File>),
    /// MSI-X vectors, by vfio.
    Vfio(MsixVectors),
}

/// A vendor-specific capability of virtio (`struct virtio_pci_cap`, virtio 1.2, 4.1.4).
#[derive(Clone, Copy, Debug)]
pub struct Capability {
    /// Its offset in config space.
    pub at: i64,
    /// `VIRTIO_PCI_CAP_*`.
    pub kind: u8,
    pub bar: u8,
    pub offset: u32,
    pub bytes: u32,
    /// The word behind it; `notify_off_multiplier` of a notification capability.
    pub more: u32,
}

/// Returns the vendor-specific capabilities of a config space, which `read` reads at an offset.
///
/// # Errors
/// Those of `read`.
pub fn capabilities(read: &dyn Fn(i64, &mut [u8]) -> std::io::Result<()>) -> std::io::Result<Vec<Capability>> {
    let mut found = Vec::new();
    let mut next = [0];
    read(CAPABILITIES, &mut next)?;
    // The list may have a cycle, so follow at most 48 entries: config space has room for no more.
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

impl FileRegion {
    /// Reads bytes at an offset in the region.
    ///
    /// # Errors
    /// The system's.
    pub fn read(&self, at: i64, bytes: &mut [u8]) -> std::io::Result<()> {
        pread(&*self.file, bytes, self.offset as i64 + at).map(drop).map_err(Into::into)
    }

    fn write(&self, at: i64, bytes: &[u8]) -> std::io::Result<()> {
        pwrite(&*self.file, bytes, self.offset as i64 + at).map(drop).map_err(Into::into)
    }

    /// Maps the whole region.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(config: &[u8; 256]) -> Vec<Capability> {
        let read = |at: i64, bytes: &mut [u8]| {
            let from = config.get(at as usize..at as usize + bytes.len());
            bytes.copy_from_slice(from.ok_or(std::io::ErrorKind::UnexpectedEof)?);
            Ok(())
        };
        capabilities(&read).unwrap_or_default()
    }

    fn put(config: &mut [u8; 256], at: usize, next: u8, kind: u8) {
        config[at..at + 5].copy_from_slice(&[VENDOR, next, 20, kind, 4]);
        config[at + 8..at + 12].copy_from_slice(&0x3000u32.to_le_bytes());
        config[at + 12..at + 16].copy_from_slice(&0x1000u32.to_le_bytes());
        config[at + 16..at + 20].copy_from_slice(&4u32.to_le_bytes());
    }

    #[test]
    fn the_vendors_capabilities_are_found() {
        let mut config = [0; 256];
        config[0x34] = 0x40;
        put(&mut config, 0x40, 0x60, 1);
        // MSI-X is not the vendor's.
        config[0x60..0x62].copy_from_slice(&[0x11, 0x70]);
        put(&mut config, 0x70, 0, 2);
        let found = walk(&config);
        assert_eq!(
            found.iter().map(|c| (c.kind, c.bar, c.offset, c.bytes, c.more)).collect::<Vec<_>>(),
            [(1, 4, 0x3000, 0x1000, 4), (2, 4, 0x3000, 0x1000, 4)]
        );
    }

    #[test]
    fn a_list_that_goes_round_or_leads_out_ends() {
        let mut config = [0; 256];
        config[0x34] = 0x40;
        put(&mut config, 0x40, 0x40, 1);
        assert_eq!(walk(&config).len(), 48);
        config[0x34] = 0xfc;
        assert!(walk(&config).is_empty());
    }
}
