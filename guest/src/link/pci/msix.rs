//! A device's interrupts through vfio: MSI-X vectors that signal eventfds.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use vfio_bindings::bindings::vfio::*;

mod ioctl {
    use super::vfio_irq_set;
    use nix::request_code_none;
    // `_IO(VFIO_TYPE, VFIO_BASE + 10)`
    nix::ioctl_write_ptr_bad!(device_set_irqs, request_code_none!(b';', 110), vfio_irq_set);
}

/// The MSI-X vectors of a device.
pub struct MsixVectors {
    device: Arc<File>,
    /// The container and the group.
    _keep: [File; 2],
}

impl MsixVectors {
    /// Takes an open device. `keep` are its container and its group, which must stay open as long as it.
    pub fn new(device: Arc<File>, keep: [File; 2]) -> MsixVectors {
        MsixVectors { device, _keep: keep }
    }

    /// Routes one MSI-X vector per queue to `bells`. The kernel signals `request` when it wants the device back.
    ///
    /// # Errors
    /// The system's.
    pub fn route(&self, bells: &[OwnedFd], request: &OwnedFd) -> io::Result<()> {
        let bells: Vec<_> = bells.iter().map(AsRawFd::as_raw_fd).collect();
        set_irqs(&self.device, VFIO_PCI_REQ_IRQ_INDEX, &[request.as_raw_fd()])?;
        set_irqs(&self.device, VFIO_PCI_MSIX_IRQ_INDEX, &bells)
    }
}

/// Routes the interrupts of one index to eventfds.
fn set_irqs(device: &File, index: u32, bells: &[i32]) -> io::Result<()> {
    const HEAD: usize = size_of::<vfio_irq_set>();
    // `struct vfio_irq_set`, then the descriptors; u32s keep it aligned.
    let mut words = vec![0u32; HEAD / 4];
    words.extend(bells.iter().map(|&bell| bell as u32));
    let head = [
        (words.len() * 4) as u32,
        VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
        index,
        0,
        bells.len() as u32,
    ];
    words[..head.len()].copy_from_slice(&head);
    // SAFETY: `argsz` and `count` in the structure match its size and the descriptors behind it.
    unsafe { ioctl::device_set_irqs(device.as_raw_fd(), words.as_ptr().cast()) }?;
    Ok(())
}
